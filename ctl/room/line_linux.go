package room

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// The line between the two processes is a stream socket: the plan goes in, its
// length first, then signals, one byte each, and how the command ended comes out.
// Its descriptor is above those a caller is likely to hand to the command.
const (
	lineEnv = "FLOXD_ROOM"
	lineFD  = 200      // or the next one that is free
	maxPlan = 64 << 20 // more than the kernel lets a command line have

	endedByExit   = 'E' // its code follows
	endedBySignal = 'S' // its number follows
)

// passed are the signals a command gets that were sent to its caller. Those that
// stop and continue are left to the terminal, which sends them to all of us.
var passed = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
	syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM,
}

// heard are those of passed that whoever called has not asked to be ignored, as
// nohup does: then the command ignores them, too.
func heard() []os.Signal {
	return slices.DeleteFunc(slices.Clone(passed), signal.Ignored)
}

// hear has signals sent to c. Nobody may be asked for none: that would be all.
func hear(c chan<- os.Signal) {
	if sigs := heard(); len(sigs) > 0 {
		signal.Notify(c, sigs...)
	}
}

// Enter starts this program with args as the inner process, which finds plan
// with Inside, and stays until it has ended. It returns how the command ended,
// as an error for Die; what else the inner process had to say it has said.
func Enter(plan any, args ...string) error {
	value, err := json.Marshal(plan)
	if err != nil {
		return err
	}
	value = append(binary.BigEndian.AppendUint32(nil, uint32(len(value))), value...) //nolint:gosec // see maxPlan
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "room")
	defer ours.Close()
	theirs, err := unix.FcntlInt(uintptr(fds[1]), unix.F_DUPFD, lineFD) // is inherited
	_ = unix.Close(fds[1])
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	sigs := make(chan os.Signal, 16)
	hear(sigs)
	defer signal.Stop(sigs)
	cmd := exec.Command("/proc/self/exe", args...) //nolint:noctx // it is told to end over the line
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = Set(os.Environ(), lineEnv, strconv.Itoa(theirs))
	cmd.SysProcAttr = namespaces()
	err = cmd.Start()
	_ = unix.Close(theirs)
	if err != nil {
		return cli.Explain(flox.ErrDenied, "make namespaces: %s", why(err))
	}
	_, _ = ours.Write(value) // fails when it has ended, which is seen below
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

// ended makes of the end of the command an error.
func ended(how, number byte) error {
	if how == endedByExit {
		if number == 0 {
			return nil
		}
		return cli.Said(cli.Exited(int(number), "the command failed"))
	}
	return &killedError{syscall.Signal(number), cli.Said(cli.Exited(128+int(number), "the command was killed"))}
}

// killedError says that a signal ended the command.
type killedError struct {
	signal syscall.Signal
	error
}

func (e *killedError) Unwrap() error { return e.error }

// Die ends this process by the signal that ended the command, if err of Enter
// says so, so that whoever waits for it learns the same. Else, and after signals
// that would leave a core dump, it returns err.
func Die(err error) error {
	var killed *killedError
	if !errors.As(err, &killed) {
		return err
	}
	switch n := killed.signal; n {
	case syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGPIPE:
		signal.Reset(n)
		_ = syscall.Kill(os.Getpid(), n)
		time.Sleep(time.Second) // it is on its way
	}
	return err
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
	files   []*os.File          // the caller's, at their descriptors less 3
}

// Inside takes the plan and the line out of the environment of an inner
// process. From then on no signal of a terminal ends this process. ErrNotFound:
// nobody called Enter.
func Inside(plan any) (*Line, error) {
	value, ok := os.LookupEnv(lineEnv)
	if !ok {
		return nil, fmt.Errorf("this is started by floxctl run only: %w", flox.ErrNotFound)
	}
	_ = os.Unsetenv(lineEnv)
	fd, err := strconv.ParseUint(value, 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", lineEnv, err, flox.ErrBadInput)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("line to the outer process: %w", err)
	}
	l := &Line{socket: os.NewFile(uintptr(fd), "room"), signals: make(chan syscall.Signal, 16), gone: make(chan struct{})}
	if err := readPlan(l.socket, plan); err != nil {
		return nil, fmt.Errorf("plan of the outer process: %w", err)
	}
	if l.files, err = callers(); err != nil {
		return nil, err
	}
	// Caught, not ignored: a command would inherit that.
	hear(make(chan os.Signal, 1))
	go l.listen() // ends with the outer process
	return l, nil
}

func readPlan(r io.Reader, plan any) error {
	head := make([]byte, 4)
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head)
	if n > maxPlan {
		return fmt.Errorf("it has %d bytes: %w", n, flox.ErrBadInput)
	}
	value := make([]byte, n)
	if _, err := io.ReadFull(r, value); err != nil {
		return err
	}
	return json.Unmarshal(value, plan)
}

// callers takes the descriptors which the caller meant for the command, so that
// nothing else that this process starts has them.
func callers() ([]*os.File, error) {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("descriptors of the caller: %w", err)
	}
	var files []*os.File
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil || fd < 3 {
			continue
		}
		// All that are this program's own are closed by what it starts.
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("descriptor %d of the caller: %w", fd, err)
		}
		if grow := fd - 2 - len(files); grow > 0 {
			files = append(files, make([]*os.File, grow)...)
		}
		files[fd-3] = os.NewFile(uintptr(fd), "caller")
	}
	return files, nil
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
	cmd := &exec.Cmd{Path: c.File, Args: c.Args, Env: c.Env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: l.files}
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
