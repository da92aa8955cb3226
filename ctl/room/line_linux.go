package room

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// The line between the two processes is a stream socket: signals go in, one
// byte each, and how the command ended comes out.
const (
	planEnv = "FLOXD_ROOM"
	lineFD  = 3

	endedByExit   = 'E' // its code follows
	endedBySignal = 'S' // its number follows
)

// passed are the signals a command gets that were sent to its caller. Those that
// stop and continue are left to the terminal, which sends them to all of us.
var passed = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
	syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM,
}

// Enter starts this program with args as the inner process, which finds plan
// with Inside, and stays until it has ended. It returns how the command ended,
// as an error for cli.Run; what else the inner process had to say it has said.
func Enter(plan any, args ...string) error {
	value, err := json.Marshal(plan)
	if err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "room"), os.NewFile(uintptr(fds[1]), "room")
	defer ours.Close()
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, passed...)
	defer signal.Stop(sigs)
	cmd := exec.Command("/proc/self/exe", args...) //nolint:noctx // it is told to end over the line
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = Set(os.Environ(), planEnv, string(value))
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = namespaces()
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return cli.Explain(flox.ErrDenied, "make namespaces: %s", why(err))
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-sigs:
				if n, ok := s.(syscall.Signal); ok && !byTerminal(n) {
					_, _ = ours.Write([]byte{byte(n)}) // fails when there is nobody left to tell
				}
			case <-done:
				return
			}
		}
	}()
	told := make([]byte, 2)
	_, readErr := io.ReadFull(ours, told)
	err = cmd.Wait()
	close(done)
	if readErr != nil { // it never came to the command
		return failed(err)
	}
	return ended(told[0], told[1])
}

// failed keeps the exit code of an inner process that has said why it failed.
func failed(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return cli.Said(cli.Exited(exit.ExitCode(), "the inner process failed"))
	}
	if err == nil {
		err = errors.New("it ended without running the command")
	}
	return fmt.Errorf("inner process: %w", err)
}

// ended makes of the end of the command that of this process. A signal kills
// this one, too, so that whoever waits for it learns the same.
func ended(how, number byte) error {
	if how == endedByExit {
		if number == 0 {
			return nil
		}
		return cli.Said(cli.Exited(int(number), "the command failed"))
	}
	switch n := syscall.Signal(number); n {
	case syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGPIPE:
		signal.Reset(n)
		_ = syscall.Kill(os.Getpid(), n)
		time.Sleep(time.Second) // it is on its way
	}
	return cli.Said(cli.Exited(128+int(number), "the command was killed"))
}

// byTerminal reports whether a signal was most likely typed: then the command
// has it already, being in the same process group as all of us.
func byTerminal(n syscall.Signal) bool {
	if n != syscall.SIGINT && n != syscall.SIGQUIT {
		return false
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	front, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && front == syscall.Getpgrp()
}

// Line is the inner process's end of the line.
type Line struct {
	socket  *os.File
	signals chan syscall.Signal // what the outer process was sent
	gone    chan struct{}       // closed when the outer process is
}

// Inside takes the plan and the line out of the environment of an inner
// process. From then on no signal of a terminal ends this process. ErrNotFound:
// nobody called Enter.
func Inside(plan any) (*Line, error) {
	value, ok := os.LookupEnv(planEnv)
	if !ok {
		return nil, fmt.Errorf("this is started by floxctl run only: %w", flox.ErrNotFound)
	}
	_ = os.Unsetenv(planEnv)
	if err := json.Unmarshal([]byte(value), plan); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", planEnv, err, flox.ErrBadInput)
	}
	if _, err := unix.FcntlInt(lineFD, unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("line to the outer process: %w", err)
	}
	l := &Line{socket: os.NewFile(lineFD, "room"), signals: make(chan syscall.Signal, 16), gone: make(chan struct{})}
	// Caught, not ignored: a command would inherit that.
	signal.Notify(make(chan os.Signal, 1), passed...)
	go l.listen() // ends with the outer process
	return l, nil
}

func (l *Line) listen() {
	defer close(l.gone)
	b := make([]byte, 1)
	for {
		if _, err := io.ReadFull(l.socket, b); err != nil {
			return
		}
		select {
		case l.signals <- syscall.Signal(b[0]):
		default: // nobody takes them that fast
		}
	}
}

// Stopped waits until the outer process was told to end, or ended, or done is
// closed: for what comes before the command.
func (l *Line) Stopped(done <-chan struct{}) bool {
	for {
		select {
		case n := <-l.signals:
			if n != syscall.SIGUSR1 && n != syscall.SIGUSR2 {
				return true
			}
		case <-l.gone:
			return true
		case <-done:
			return false
		}
	}
}

// Run runs the command as uid and gid, which are the caller's, until it ends or
// the outer process does, then what it left behind is ended, too. It tells the
// outer process.
func (l *Line) Run(c Command, uid, gid int) error {
	cmd := &exec.Cmd{Path: c.File, Args: c.Args, Env: c.Env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: gid, HostID: 0, Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	started, waited := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the death signal comes when the thread ends
		defer runtime.UnlockOSThread()
		defer close(waited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in ProcessState
		}
	}()
	if err := <-started; err != nil {
		return c.Failed(err)
	}
	for gone := l.gone; ; {
		select {
		case n := <-l.signals:
			_ = cmd.Process.Signal(n)
		case <-gone:
			_ = cmd.Process.Kill()
			gone = nil
		case <-waited:
			endOthers()
			return l.tell(cmd.ProcessState)
		}
	}
}

func (l *Line) tell(state *os.ProcessState) error {
	message := []byte{endedByExit, byte(max(state.ExitCode(), 0))}
	if w, ok := state.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		message = []byte{endedBySignal, byte(w.Signal())}
	}
	if _, err := l.socket.Write(message); err != nil && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("tell how the command ended: %w", err)
	}
	return nil
}
