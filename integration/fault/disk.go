// Package fault breaks what tests lean on, the way reality does: a disk that
// loses power or fills up, a file whose bits flip. Links break in
// integration/netns.
//
// It must not know what is stored. Whatever it mounts is gone when its owner
// closes it or the process ends.
package fault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/internal/reap"
)

// MinDiskSize is the smallest disk that ext4 with a journal fits on.
const MinDiskSize = 16 << 20

// release gives up the mount $1 and removes the image $2.
const release = `umount "$1" 2>/dev/null || umount -l "$1" 2>/dev/null
rm -f "$2"
rmdir "$1" 2>/dev/null
:`

// Disk is an ext4 file system of its own on a loop device.
type Disk struct {
	// Dir is where it is mounted.
	Dir string

	image  string
	reaper *reap.Reaper
}

// NewDisk makes a disk of size bytes and mounts it in a new directory below
// dir, as root. Close must be called.
func NewDisk(ctx context.Context, dir string, size int64) (*Disk, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("mounting a disk needs root: run with sudo: %w", flox.ErrDenied)
	}
	if size < MinDiskSize {
		return nil, fmt.Errorf("disk of %d bytes: want at least %d: %w", size, MinDiskSize, flox.ErrBadInput)
	}
	image, err := os.CreateTemp(dir, "disk-*.img")
	if err != nil {
		return nil, err
	}
	defer image.Close()
	d := &Disk{Dir: strings.TrimSuffix(image.Name(), ".img"), image: image.Name()}
	if d.reaper, err = reap.Start(release, d.Dir, d.image); err != nil {
		return nil, errors.Join(err, os.Remove(d.image))
	}
	err = errors.Join(image.Truncate(size), os.Mkdir(d.Dir, 0o755))
	if err == nil {
		err = run(ctx, "mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", d.image)
	}
	if err == nil {
		err = d.mount(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk %s: %w", d.Dir, err), d.Close())
	}
	return d, nil
}

// mount also replays the journal after a power cut. The loop device is freed
// by the kernel when the mount ends.
func (d *Disk) mount(ctx context.Context) error {
	return run(ctx, "mount", "-o", "loop", d.image, d.Dir)
}

// Close unmounts the disk and removes it with all that is on it.
func (d *Disk) Close() error { return d.reaper.Close() }

// Freeze stops processes before the power is cut, so that on several disks it goes
// at the same moment: none of them tells anybody anything any more.
func Freeze(ctx context.Context, pids ...int) error {
	for _, pid := range pids {
		if err := stop(ctx, pid); err != nil {
			return err
		}
	}
	return nil
}

// PowerCut does to the disk what pulling the plug does: whatever was not
// synced may be lost. The writers are stopped before, so that none of their
// calls can succeed on a dead disk, and killed after. Then the disk is mounted
// again, as after a reboot. The caller waits for the killed processes; others
// that have files open there make it fail with ErrBusy.
func (d *Disk) PowerCut(ctx context.Context, writers ...int) error {
	if err := Freeze(ctx, writers...); err != nil {
		return err
	}
	if err := shutdown(d.Dir); err != nil {
		return fmt.Errorf("cut the power of %s: %w", d.Dir, err)
	}
	for _, pid := range writers {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	if err := d.unmount(ctx); err != nil {
		return err
	}
	return d.mount(ctx)
}

// unmount waits, for at most ten seconds, for the killed to let go.
func (d *Disk) unmount(ctx context.Context) error {
	for tries := 0; ; tries++ {
		err := unix.Unmount(d.Dir, 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || tries == 500 {
			return fmt.Errorf("unmount %s: %w: somebody still has files open there: %w", d.Dir, err, flox.ErrBusy)
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// shutdown makes an ext4 refuse everything and forget what it had not written
// (EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH, Linux fs/ext4/ext4.h).
func shutdown(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	const request, noLogFlush = 0x8004587d, 2
	return unix.IoctlSetPointerInt(int(f.Fd()), request, noLogFlush)
}

// stop sends SIGSTOP and waits until no thread of the process runs.
func stop(ctx context.Context, pid int) error {
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return fmt.Errorf("stop process %d: %w", pid, err)
	}
	for {
		states, err := threadStates(pid)
		if err != nil {
			return err
		}
		if strings.Trim(states, "TtZX") == "" {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("stop process %d: %w", pid, err)
		}
	}
}

// threadStates gives the state letter of each thread (proc_pid_stat(5)).
func threadStates(pid int) (string, error) {
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
	if err != nil {
		return "", err
	}
	var states []byte
	for _, task := range tasks {
		stat, err := os.ReadFile(task)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			return "", err
		}
		// The name before the state may hold anything, also ")".
		if end := bytes.LastIndexByte(stat, ')'); end >= 0 && end+2 < len(stat) {
			states = append(states, stat[end+2])
		}
	}
	return string(states), nil
}

// Fill takes all space of the file system that holds dir, except for leave
// bytes, in the form of one file. The result gives it back.
func Fill(dir string, leave int64) (release func() error, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, fmt.Errorf("fill %s: %w", dir, err)
	}
	f, err := os.CreateTemp(dir, "fill-*")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	release = func() error { return os.Remove(f.Name()) }
	free := int64(st.Bavail) * st.Bsize
	// What a file's own metadata takes is not known before: go on in smaller
	// steps until even a block is refused.
	for size, step := int64(0), max(free-leave, 0); step >= st.Bsize; {
		err := unix.Fallocate(int(f.Fd()), 0, size, step)
		switch {
		case err == nil:
			size += step
			if err := unix.Statfs(dir, &st); err != nil {
				return nil, errors.Join(err, release())
			}
			step = min(step, int64(st.Bavail)*st.Bsize-leave)
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		default:
			return nil, errors.Join(fmt.Errorf("fill %s: %w", dir, err), release())
		}
	}
	return release, nil
}

// FlipBit inverts one bit of a file, counted from its beginning, as a failing
// disk does. The file's times and mode stay.
func FlipBit(file string, bit int64) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if bit < 0 || bit/8 >= st.Size() {
		return fmt.Errorf("bit %d of %s, which has %d bytes: %w", bit, file, st.Size(), flox.ErrBadInput)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], bit/8); err != nil {
		return err
	}
	b[0] ^= 1 << (bit % 8)
	if _, err := f.WriteAt(b[:], bit/8); err != nil {
		return err
	}
	return os.Chtimes(file, time.Time{}, st.ModTime())
}

func pause(ctx context.Context) error {
	wait := time.NewTimer(20 * time.Millisecond)
	defer wait.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-wait.C:
		return nil
	}
}

func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}
