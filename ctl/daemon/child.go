package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/ctl/cli"
)

// How a child is treated.
const (
	stopPatience = 10 * time.Second // from SIGTERM to SIGKILL
	restartFirst = 500 * time.Millisecond
	restartMost  = 30 * time.Second
	stableAfter  = time.Minute // a child that ran so long failed for a new reason
)

// noFile keeps a child from the configuration file: its environment says it all,
// and a mistake that somebody makes in the file meanwhile must not be found when
// a child died and is missed.
var noFile = []string{"--config", os.DevNull}

// keepDescriptors keeps what this process was given open beside standard input,
// output and error from whom it starts: they are ordinary users' processes that
// talk to the network, and who started this one may have left open what is root's.
func keepDescriptors() error {
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil || !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return os.NewSyscallError("close_range", err)
	}
	open, err := os.ReadDir("/proc/self/fd") // before Linux 5.11
	if err != nil {
		return fmt.Errorf("open descriptors: %w", err)
	}
	for _, entry := range open {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// calledAs is the name this program was called by, if that is still its file: an
// update puts another behind the name, such as a link in /usr/bin or a profile,
// and leaves the file alone.
func calledAs() (string, error) {
	file, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	name, err := exec.LookPath(os.Args[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return file, nil //nolint:nilerr // whoever started it called it something else
	}
	if name, err = filepath.Abs(name); err != nil {
		return file, nil //nolint:nilerr // the directory it was started in is gone
	}
	named, err := os.Stat(name)
	if err != nil {
		return file, nil //nolint:nilerr // as above
	}
	if self, err := os.Stat("/proc/self/exe"); err != nil || !os.SameFile(named, self) {
		return file, nil //nolint:nilerr // as above
	}
	return name, nil
}

// child is this program, started again with other arguments as an ordinary user.
type child struct {
	name string
	who  account
	args []string // with descriptor 3 as its ready pipe
	env  []string
	out  io.Writer
	log  *slog.Logger
}

// run starts the child, closes ready when it has said so for the first time,
// and starts it again whenever it dies, until ctx ends. A child that fails
// before it was ever ready is not started again: its reason will not go away.
func (c *child) run(ctx context.Context, ready chan<- struct{}) error {
	wait := restartFirst
	wasReady := false
	for {
		begun := time.Now()
		err := c.once(ctx, func() {
			if !wasReady {
				wasReady = true
				close(ready)
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		if !wasReady {
			return explainChild(c.name, err)
		}
		if time.Since(begun) > stableAfter {
			wait = restartFirst
		}
		c.log.Error("process died and is started again", "process", c.name, "cause", err, "after", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = min(2*wait, restartMost)
	}
}

// explainChild keeps the exit code of a child that could not start: it has
// printed its reason.
func explainChild(name string, err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return cli.Exited(exit.ExitCode(), fmt.Sprintf("the %s did not start; it says why above", name))
	}
	return fmt.Errorf("start the %s: %w", name, err)
}

// once runs the child from start to end. When ctx ends it is asked to leave,
// and made to after a while.
func (c *child) once(ctx context.Context, isReady func()) error {
	program, err := ownProgram(c.who)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, program, c.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = c.env, c.out, c.out
	cmd.ExtraFiles = []*os.File{w}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopPatience
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// Ctrl-C is for us: we end it in order. And it gets our terminal to write
		// to only: as that of its own session it could type there, as root.
		Setsid:     true,
		Credential: &syscall.Credential{Uid: c.who.uid, Gid: c.who.gid},
		Pdeathsig:  syscall.SIGTERM,
	}
	// The death signal belongs to the thread that starts the child, so that
	// thread must live as long as we do. It can gain no privileges any more, nor
	// can the child, so it is not given back: it goes with this goroutine.
	runtime.LockOSThread()
	if err = os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)); err == nil {
		err = cmd.Start()
	}
	w.Close()
	if err != nil {
		return err
	}
	said := make(chan struct{})
	go func() { // ends with the child, which holds the other end
		defer close(said)
		if line, err := bufio.NewReader(io.LimitReader(r, 64)).ReadString('\n'); err == nil && line == "ready\n" {
			isReady()
		}
	}()
	err = cmd.Wait()
	<-said
	if err == nil {
		err = errors.New("it ended by itself")
	}
	return err
}
