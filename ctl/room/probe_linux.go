package room

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/ctl/cli"
)

// probeTimeout bounds a probe, which takes milliseconds.
const probeTimeout = 10 * time.Second

// Probe finds out what this machine lets this user do, by doing it: it starts
// this program with args in namespaces, where it must call ProbeInside. Nothing
// of it is left when Probe returns.
func Probe(ctx context.Context, args ...string) Found {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	var stdout, stderr bytes.Buffer
	cmd.Stdin = os.Stdin // nothing is read of it; a /dev may be empty, and have no null either
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = namespaces()
	err := cmd.Run()
	var found Found
	if err == nil {
		err = json.Unmarshal(stdout.Bytes(), &found)
	}
	if err != nil {
		found.Namespaces = why(err)
		if text := strings.TrimSpace(stderr.String()); text != "" {
			found.Namespaces += " (" + text + ")"
		}
		found.FUSE = "no namespace to mount it in"
	}
	return found
}

// why puts the reasons there are for refusing a namespace into words.
func why(err error) string {
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	switch {
	case errors.Is(err, unix.ENOSPC):
		return "user namespaces are used up or switched off (user.max_user_namespaces)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "user namespaces are not permitted (by the system, or by the container one is in)"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return "the kernel has no user namespaces"
	}
	return err.Error()
}

// namespaces are those of a room: the caller is root in them.
func namespaces() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
}

// ProbeInside is the part of Probe in the namespaces. It mounts over the root
// directory, which always is there and which nobody looks at through it.
func ProbeInside() Found {
	var found Found
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return Found{Namespaces: why(err), FUSE: "no namespace to mount it in"}
	}
	if err := unix.Mount("floxd", "/", "tmpfs", unix.MS_RDONLY, "size=4k"); err != nil {
		return Found{Namespaces: "in a user namespace nothing may be mounted: " + err.Error(), FUSE: "nothing may be mounted"}
	}
	if err := tryFUSE(); err != nil {
		found.FUSE = err.Error()
	}
	return found
}

// tryFUSE mounts a file system that nobody serves; it goes with this process.
func tryFUSE() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/fuse cannot be opened: %w", err)
	}
	defer unix.Close(fd)
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0", fd, unix.S_IFDIR)
	if err := unix.Mount("floxd", "/", cli.FilesystemType, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("FUSE cannot be mounted in a user namespace: %w", err)
	}
	return nil
}
