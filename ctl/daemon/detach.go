package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// A log that is larger when its service is started is put aside, as NAME.old.
const maxServiceLog = 16 << 20

func (s *service) logPath() string { return filepath.Join(s.cfg.StateDir, "floxd-"+s.part+".log") }
func (s *service) pidPath() string { return filepath.Join(s.cfg.StateDir, "floxd-"+s.part+".pid") }

// hold opens the file that says which process the service is. Its lock belongs
// to that process, which inherits it: however it ends, the lock ends with it.
// With it held, pid is the process; else it is 0 and the lock is the caller's.
func (s *service) hold() (lock *os.File, pid int, err error) {
	// No link: the directory may be an ordinary user's.
	lock, err = os.OpenFile(s.pidPath(), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("state directory: %w", err)
	}
	err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		mine, err := lock.Stat()
		if there, gone := os.Lstat(s.pidPath()); err != nil || gone != nil || !os.SameFile(mine, there) {
			return s.again(lock, err) // another command removed it meanwhile
		}
		return lock, 0, nil
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, 0, errors.Join(fmt.Errorf("state directory: %w", err), lock.Close())
	}
	text := make([]byte, 32)
	n, _ := lock.ReadAt(text, 0)
	pid, err = strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil || pid <= 1 {
		err = cli.Explain(flox.ErrBusy, "floxd %s is being started or stopped by another command; try again", s.part)
	}
	return nil, pid, errors.Join(err, lock.Close())
}

// again is hold, after what was opened turned out to be nobody's file.
func (s *service) again(lock *os.File, err error) (*os.File, int, error) {
	if err = errors.Join(err, lock.Close()); err != nil {
		return nil, 0, fmt.Errorf("state directory: %w", err)
	}
	return s.hold()
}

func (s *service) startDetached(ctx context.Context, changed bool) (*runs, error) {
	lock, pid, err := s.hold()
	if err == nil && pid > 0 && changed {
		if err = s.stopDetached(ctx); err == nil {
			lock, pid, err = s.hold()
		}
	}
	if err != nil {
		return nil, err
	}
	log := func() string { return lastLines(s.logPath(), 15) }
	if pid > 0 {
		return &runs{Manager: "none", PID: pid, Log: s.logPath()}, s.await(ctx, nil, log)
	}
	defer lock.Close()
	process, err := s.detach(lock)
	if err != nil {
		return nil, fmt.Errorf("start floxd %s: %w", s.part, err)
	}
	gone := make(chan struct{})
	go func() { // ends with the process, or with this one
		_, _ = process.Wait()
		close(gone)
	}()
	return &runs{Manager: "none", PID: process.Pid, Log: s.logPath()}, s.await(ctx, gone, log)
}

// detach starts the service in a session of its own, with the lock as its
// descriptor 3, which it passes on to nobody.
func (s *service) detach(lock *os.File) (*os.Process, error) {
	if info, err := os.Lstat(s.logPath()); err == nil && info.Size() > maxServiceLog {
		if err := os.Rename(s.logPath(), s.logPath()+".old"); err != nil {
			return nil, err
		}
	}
	log, err := os.OpenFile(s.logPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(s.program, "--config", s.config, s.part) //nolint:noctx // outlives this process
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "FLOXD_") })
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	err = lock.Truncate(0)
	if err == nil {
		_, err = lock.WriteAt([]byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0)
	}
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill())
	}
	return cmd.Process, nil
}

// stopDetached ends a process that startDetached started, and waits for its end.
func (s *service) stopDetached(ctx context.Context) error {
	if _, err := os.Lstat(s.pidPath()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, leavePatience)
	defer cancel()
	asked := 0
	for {
		lock, pid, err := s.hold()
		if err != nil {
			return err
		}
		if pid == 0 {
			return errors.Join(os.Remove(s.pidPath()), lock.Close())
		}
		if pid != asked {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("stop floxd %s (process %d): %w", s.part, pid, err)
			}
			asked = pid
		}
		select {
		case <-time.After(askEvery):
		case <-ctx.Done():
			return cli.Explain(flox.ErrBusy, "floxd %s (process %d) was asked to end and has not within %s: who uses the mount? (fuser -vm %s)", s.part, pid, leavePatience, s.cfg.StoreDir)
		}
	}
}

// lastLines is the end of a file of text.
func lastLines(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const most = 16 << 10
	tail := make([]byte, most)
	from := int64(0)
	if info, err := f.Stat(); err == nil {
		from = max(0, info.Size()-most)
	}
	got, _ := f.ReadAt(tail, from)
	lines := strings.Split(strings.TrimSpace(string(tail[:got])), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
