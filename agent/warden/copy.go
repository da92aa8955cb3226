package warden

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// maxProgram is the largest program that is copied, in bytes.
	maxProgram = 512 << 20
	// copyPart is how much of it is read at once, so that giving up is noticed.
	copyPart = 1 << 20
)

// servedByProcess reports whether a file lies in a file system that a process
// serves, such as our own mount, from which Nix installs this very program. Its
// pages come from that process when they are first touched, and again when
// memory was short: a program that is to serve the mount cannot wait for them.
func servedByProcess(f *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, os.NewSyscallError("fstatfs", err)
	}
	return int64(st.Type) == unix.FUSE_SUPER_MAGIC, nil //nolint:unconvert // another type on other machines
}

// copyInMemory gives a copy of a program that nobody has to serve and nobody can
// write to.
func copyInMemory(ctx context.Context, from io.Reader, size int64) (*os.File, error) {
	if size > maxProgram {
		return nil, fmt.Errorf("it lies in a file system that is served by a process and is too large to be copied, %d bytes of at most %d: %w", size, maxProgram, flox.ErrBadInput)
	}
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("floxd", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3, where each can be executed
		fd, err = unix.MemfdCreate("floxd", flags)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	to := os.NewFile(uintptr(fd), "floxd")
	if err := fill(ctx, to, from, size); err != nil {
		to.Close()
		return nil, fmt.Errorf("copy it out of a file system that is served by a process: %w", err)
	}
	return to, nil
}

// fill writes size bytes to a file in memory and seals it.
func fill(ctx context.Context, to *os.File, from io.Reader, size int64) error {
	for left := size; left > 0; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := io.CopyN(to, from, min(left, copyPart))
		if err != nil {
			return err
		}
		left -= n
	}
	_, err := unix.FcntlInt(to.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	return os.NewSyscallError("fcntl", err)
}
