package warden

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"math"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// checkTimeout is how long a program may take to say its version.
	checkTimeout = 10 * time.Second
	// openTimeout is how long a program may take to be opened and, where it must
	// be, copied.
	openTimeout = 30 * time.Second
	// maxVersion is the longest version that is passed on, in bytes.
	maxVersion = 100
	// programFD is the least number of a program's descriptor: those below are
	// given to children under numbers of their own.
	programFD = 64
)

// program is a file children are started from. It is held open, so that what
// runs can be started again whatever becomes of its name.
type program struct {
	name string
	file *os.File
	info iofs.FileInfo // of what name was, also where file is a copy of that
}

// sameFile reports whether two programs were opened from one file.
func (p *program) sameFile(q *program) bool {
	return os.SameFile(p.info, q.info) && p.info.Size() == q.info.Size() && p.info.ModTime().Equal(q.info.ModTime())
}

// open opens a program. Its name may lie in a mount that answers when it likes,
// our own included: who waits for that is left behind, at the latest until that
// mount is gone.
func (w *warden) open(ctx context.Context, name string) (*program, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	type opened struct {
		p   *program
		err error
	}
	done := make(chan opened)
	go func() {
		p, err := openProgram(ctx, name)
		select {
		case done <- opened{p, err}:
		case <-ctx.Done():
			if p != nil {
				p.close()
			}
		}
	}()
	select {
	case o := <-done:
		return o.p, o.err
	case <-ctx.Done():
		return nil, fmt.Errorf("program %s cannot be read (%w): %w", name, context.Cause(ctx), flox.ErrUnreachable)
	}
}

// openProgram opens an absolute name. ErrNotFound: it is not there.
// ErrBadInput: it is no program.
func openProgram(ctx context.Context, name string) (*program, error) {
	// Not to wait for the writer of a pipe somebody put in its place.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil, fmt.Errorf("program %s is not there: %w", name, flox.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("program: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("program: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("program %s is not a file: %w", name, flox.ErrBadInput)
	case info.Mode().Perm()&0o111 == 0:
		return nil, fmt.Errorf("program %s is not executable (chmod +x %s): %w", name, name, flox.ErrBadInput)
	}
	held := f
	if served, err := servedByProcess(f); err != nil {
		return nil, fmt.Errorf("program %s: %w", name, err)
	} else if served {
		if held, err = copyInMemory(ctx, f, info.Size()); err != nil {
			return nil, fmt.Errorf("program %s: %w", name, err)
		}
		defer held.Close()
	}
	fd, err := unix.FcntlInt(held.Fd(), unix.F_DUPFD_CLOEXEC, programFD)
	if err != nil {
		return nil, fmt.Errorf("program %s: %w", name, err)
	}
	return &program{name: name, file: os.NewFile(uintptr(fd), name), info: info}, nil
}

// command is a command line of the program. It is started through the open
// file: the child's user need not reach its directory.
func (p *program) command(args ...string) *exec.Cmd {
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", p.file.Fd()), args...) //nolint:noctx // who starts it ends it
	cmd.Args[0] = p.name
	cmd.Dir = "/"
	return cmd
}

func (p *program) close() { p.file.Close() }

// build is what a program says of itself.
type build struct {
	Version     string
	StateFormat int // see Conn
}

// version asks a program, as an ordinary user, for its version: whether it can
// be executed here at all is best found out while nobody needs it yet.
func (w *warden) version(ctx context.Context, p *program) (v build, err error) {
	if len(w.cfg.VersionArgs) == 0 {
		return build{StateFormat: math.MaxInt}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	cmd := p.command(w.cfg.VersionArgs...)
	var out, said limited
	cmd.Env, cmd.Stdout, cmd.Stderr = withoutEnv(w.cfg.Env), &out, &said
	cmd.SysProcAttr = w.ordinary()
	cmd.WaitDelay = time.Second
	run := &child{reaped: make(chan struct{})}
	if err := run.start(cmd); err != nil {
		return v, fmt.Errorf("%s cannot be executed: %w", p.name, err)
	}
	select {
	case <-run.reaped:
	case <-ctx.Done():
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its session is its own
		<-run.reaped
		return v, fmt.Errorf("%s did not say its version within %v: %w", p.name, checkTimeout, flox.ErrBadInput)
	}
	if !cmd.ProcessState.Success() {
		return v, fmt.Errorf("%s did not say its version (%s): %s: %w", p.name, run.state, printable(said.String()), flox.ErrBadInput)
	}
	if err := json.Unmarshal(out.Bytes(), &v); err != nil || v.Version == "" {
		return v, fmt.Errorf("%s did not say its version but %q: %w", p.name, printable(out.String()), flox.ErrBadInput)
	}
	return build{printable(v.Version), max(v.StateFormat, 1)}, nil
}

// limited keeps the first bytes of what a program writes.
type limited struct{ bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	const most = 4096
	if room := most - l.Len(); room > 0 {
		l.Buffer.Write(b[:min(len(b), room)])
	}
	return len(b), nil
}

// printable is what a process that is not trusted says of itself, made fit for
// root's terminal.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, strings.TrimSpace(s))
	return s[:min(len(s), maxVersion)]
}
