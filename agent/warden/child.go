package warden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/fuse"
)

// lookEvery is how often to look whether a child that seems to live is dying.
const lookEvery = 500 * time.Millisecond

// child is one process started by the warden.
type child struct {
	pid    int
	line   *net.UnixConn
	life   *os.File
	closed chan struct{} // its end of the life pipe is closed
	reaped chan struct{}
	state  string        // how it ended, valid after reaped
	ready  chan struct{} // closed when it says that everything of it runs

	messages atomic.Uint64 // on its line
	beats    atomic.Bool   // it says that it lives, as older ones do not

	mu      sync.Mutex
	serving time.Time // when it said that it reads requests
	version string    // as it says
	format  int       // of its state, too
	readyAt time.Time // when it said that everything runs
}

// heard takes what a child says; most of it is for others.
func (c *child) heard(q question) {
	c.messages.Add(1)
	switch q.Ask {
	case tellBeat:
		c.beats.Store(true)
		return
	case tellServing, tellReady:
	default:
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version, c.format = printable(q.Version), max(q.StateFormat, 1)
	if c.serving.IsZero() {
		c.serving = time.Now()
	}
	if q.Ask == tellReady && c.readyAt.IsZero() {
		c.readyAt = time.Now()
		close(c.ready)
	}
}

func (c *child) readySince() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.readyAt
}

func (c *child) saidVersion() string {
	version, _ := c.said()
	return version
}

// said is what it said of itself; format 0 is nothing yet.
func (c *child) said() (version string, format int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.version, c.format
}

func (c *child) servingSince() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.serving
}

// startChild gives a process the mount's device, a line and a life pipe, and makes
// it the child: the spare, or a new one.
func (w *warden) startChild() (*child, error) {
	given := inheritance{
		Init: w.dev.Init, MountDir: w.cfg.MountDir, RunDir: w.cfg.RunDir, Beat: w.cfg.Silence / looksPerSilence / 2, Before: w.before,
	}
	if w.links != nil {
		given.LinksDir, given.LinksInit = w.links.Dir, w.links.Init
	}
	if c := w.takeSpare(&given); c != nil {
		return c, nil
	}
	value, err := json.Marshal(given)
	if err != nil {
		return nil, err
	}
	return w.startProcess(envName+"="+string(value), nil)
}

// startProcess starts a process with one more variable, and where it is told that it is
// the child, nil if it is.
func (w *warden) startProcess(variable string, order *os.File) (*child, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	life, lifeEnd, err := os.Pipe()
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	defer lifeEnd.Close()
	cmd := w.program.command(w.cfg.Child[1:]...)
	cmd.Env = append(withoutEnv(w.cfg.Env), variable)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if w.cfg.Output != nil {
		cmd.Stdout, cmd.Stderr = w.cfg.Output, w.cfg.Output
	}
	cmd.ExtraFiles = []*os.File{w.dev.File, theirs, lifeEnd, order} // deviceFD, lineFD, lifeFD, spareFD
	if w.links != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, w.links.File) // linksFD
	}
	cmd.SysProcAttr = w.ordinary()
	c := &child{line: ours, life: life, closed: make(chan struct{}), reaped: make(chan struct{}), ready: make(chan struct{})}
	if err := c.launch(cmd); err != nil {
		_ = ours.Close()
		life.Close()
		return nil, fmt.Errorf("start %s: %w", w.program.name, err)
	}
	return c, nil
}

// ordinary is how an ordinary user's process is started.
func (w *warden) ordinary() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		// No groups, and no capabilities: leaving uid 0 drops them.
		Credential: &syscall.Credential{Uid: w.cfg.UID, Gid: w.cfg.GID},
		Pdeathsig:  syscall.SIGKILL,
		// Ctrl-C is the warden's to hear; it unmounts before it ends the child. And
		// the child may have root's terminal to write to, which it could type at
		// (TIOCSTI) if it were that of its own session.
		Setsid: true,
	}
	if w.cfg.Unprivileged {
		below(attr, w.cfg.UID, w.cfg.GID)
	}
	return attr
}

// below makes a process one of a user namespace below this one: executing a
// program there as uid takes its capabilities away, those over this one, which
// has the mount, it never had. Nobody's ids change, only how they are called.
func below(attr *syscall.SysProcAttr, uid, gid uint32) {
	attr.Credential = nil
	attr.Cloneflags |= syscall.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: int(uid), HostID: 0, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: int(gid), HostID: 0, Size: 1}}
}

// launch starts cmd, and knows when its end of the life pipe closes.
func (c *child) launch(cmd *exec.Cmd) error {
	if err := c.start(cmd); err != nil {
		return err
	}
	go func() {
		defer close(c.closed)
		_, _ = c.life.Read(make([]byte, 1)) // nobody writes: it ends with the child
	}()
	return nil
}

// start starts cmd on a thread of its own, on which it can gain nothing:
// PR_SET_NO_NEW_PRIVS and the bounding set are a thread's and are inherited by
// what it starts. The death signal is sent when the thread that started the
// child ends, so it must stay until the child is gone, and then goes with the
// goroutine.
func (c *child) start(cmd *exec.Cmd) error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := gainNothing()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
		if err != nil {
			return
		}
		defer close(c.reaped)
		_ = cmd.Wait() // how it ended is in ProcessState
		c.state = cmd.ProcessState.String()
	}()
	if err := <-started; err != nil {
		return err
	}
	c.pid = cmd.Process.Pid
	return nil
}

// gainNothing takes from the calling thread, and from what it starts, every way
// to more privileges. The thread keeps what it has.
func gainNothing() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	for capability := range uintptr(64) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		// EINVAL: the kernel has no more of them. EPERM: a container's root that may
		// not; the child has none of them all the same.
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
			break
		}
		if err != nil {
			return os.NewSyscallError("prctl", err)
		}
	}
	return nil
}

// wait returns when the child is gone or as good as gone, or ctx is done. Being
// reaped is not waited for: a thread of it may be inside the kernel, waiting for
// an answer only the next child can give.
func (c *child) wait(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-c.closed:
			return nil
		case <-c.reaped:
			return nil
		case <-tick.C:
			// Descriptors are closed by the last thread of a process. If that
			// one is held up, the pipe stays open although nobody serves.
			if c.dying() {
				return nil
			}
		}
	}
}

// dying reports whether the child's main thread is dead or was killed.
func (c *child) dying() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.pid))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	// "pid (name) S …"; the name may hold anything.
	_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	return ok && strings.ContainsAny(rest[:1], "ZX") || fuse.Killed(uint32(c.pid))
}

// stop ends the child, kindly for as long as limit.
func (c *child) stop(limit time.Duration) {
	c.signal(syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if c.wait(ctx) != nil {
		c.kill()
	}
	c.gone(time.Second)
}

// gone waits until the child's state is known, which is a moment after its
// descriptors are closed. One that only closed its end of the life pipe would
// live on beside the next, and is made to end.
func (c *child) gone(limit time.Duration) bool {
	for range 2 {
		select {
		case <-c.reaped:
			return true
		case <-time.After(limit):
			c.signal(syscall.SIGKILL)
		}
	}
	return false
}

// ending says how a child ended that is gone or as good as gone.
func (c *child) ending() error {
	if c.gone(50 * time.Millisecond) {
		return errors.New(c.state)
	}
	return errors.New("killed, but a thread of it is still inside the kernel")
}

// kill ends the child as it may end at any time, and waits until the next one
// can be started.
func (c *child) kill() {
	c.signal(syscall.SIGKILL)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.wait(ctx)
}

func (c *child) signal(sig syscall.Signal) {
	select {
	case <-c.reaped: // the number may be somebody else's
	default:
		_ = syscall.Kill(c.pid, sig)
	}
}

// release lets go of what the warden has of a child that is gone.
func (c *child) release() {
	_ = c.line.Close()
	c.life.Close()
}

func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "line")
	file := os.NewFile(uintptr(fds[0]), "line")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}

// withoutEnv is env without what an earlier warden may have left in it.
func withoutEnv(env []string) []string {
	var kept []string
	for _, v := range env {
		if !strings.HasPrefix(v, envName+"=") && !strings.HasPrefix(v, spareName+"=") {
			kept = append(kept, v)
		}
	}
	return kept
}
