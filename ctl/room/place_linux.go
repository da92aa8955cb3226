package room

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Prepare makes the mounts of this process, the inner one of a room, its own,
// and makes sure that dir is there to mount something on. Where it is not, the
// root directory is made anew from all that is in it, and dir. scratch is an
// empty directory for that.
func Prepare(dir, scratch string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to ourselves: %w", err)
	}
	info, err := os.Stat(dir)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("%s is not a directory", dir)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	cwd, err := os.Getwd()
	if err != nil {
		cwd = "/"
	}
	if err := newRoot(dir, scratch); err != nil {
		return fmt.Errorf("make a root directory with %s in it: %w", dir, err)
	}
	if os.Chdir(cwd) != nil {
		return os.Chdir("/")
	}
	return nil
}

// newRoot makes scratch the root directory, with everything in it that is in
// the one there is, and with dir.
func newRoot(dir, scratch string) error {
	if err := unix.Mount("floxd", scratch, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=1m"); err != nil {
		return os.NewSyscallError("mount", err)
	}
	// So that it does not turn up in itself.
	if err := unix.Mount("", scratch, "", unix.MS_UNBINDABLE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	if err := fill("/", scratch, strings.Split(strings.Trim(dir, "/"), "/")); err != nil {
		return err
	}
	if err := os.Chdir(scratch); err != nil {
		return err
	}
	// The old root lands on the new one and is taken away from there.
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	return os.NewSyscallError("mount", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""))
}

// fill gives the directory to, on a file system of ours, all that from has, and
// the directories of missing below each other, the first of which may be in from.
func fill(from, to string, missing []string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	own := ""
	if len(missing) > 0 {
		own = missing[0]
	}
	for _, e := range entries {
		if e.Name() == own && e.IsDir() {
			continue
		}
		if e.Name() == own {
			return fmt.Errorf("%s is in the way", filepath.Join(from, own))
		}
		if err := mirror(filepath.Join(from, e.Name()), filepath.Join(to, e.Name()), e.Type()); err != nil {
			return err
		}
	}
	if own == "" {
		return nil
	}
	to = filepath.Join(to, own)
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	from = filepath.Join(from, own)
	if _, err := os.Lstat(from); errors.Is(err, fs.ErrNotExist) {
		return os.MkdirAll(filepath.Join(append([]string{to}, missing[1:]...)...), 0o755)
	}
	return fill(from, to, missing[1:])
}

// mirror makes one entry of a directory appear in another.
func mirror(from, to string, kind fs.FileMode) error {
	switch {
	case kind&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case kind.IsDir():
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
	default:
		f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return &os.PathError{Op: "bind", Path: from, Err: err}
	}
	return nil
}

// Place makes the directory source appear at dir, which Prepare has seen to,
// over whatever is there, readable only.
func Place(source, dir string) error {
	if err := unix.Mount(source, dir, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind " + source + " to", Path: dir, Err: err}
	}
	// What the file system is mounted with must stay.
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	const kept = unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME
	flags := unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | uintptr(st.Flags)&kept
	if err := unix.Mount("", dir, "", flags, ""); err != nil {
		return &os.PathError{Op: "make read-only", Path: dir, Err: err}
	}
	return nil
}
