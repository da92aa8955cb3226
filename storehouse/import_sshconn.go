package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/floxctl/flox"
	daemon "github.com/floxctl/flox/nix/worker"
)

// maxSSHSaid bounds in bytes what is kept of what ssh says.
const maxSSHSaid = 2 << 10

// sshSession is a conversation with a Nix daemon through a process of ssh.
type sshSession struct {
	client *daemon.Client
	conn   *sshConn
	where  string
	expiry *time.Timer // while it is idle
}

// openSSH runs ssh and greets the daemon behind it.
func openSSH(ctx context.Context, where string, argv []string, dir flox.StoreDir) (*sshSession, error) {
	s := &sshSession{where: where}
	var err error
	if s.conn, err = startSSH(argv); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", where, err, flox.ErrUnreachable)
	}
	s.client, err = daemon.NewClient(ctx, s.conn, daemon.ClientConfig{Dir: dir})
	if err != nil { // and it is closed
		return nil, s.lost(err)
	}
	return s, nil
}

// lost says what ssh said when there was no answer.
func (s *sshSession) lost(err error) error {
	said := s.conn.said.String()
	if said != "" {
		said = " (ssh says: " + said + ")"
	}
	if errors.Is(err, flox.ErrBadInput) { // it is there, and something else
		return fmt.Errorf("%s: %w%s", s.where, err, said)
	}
	return fmt.Errorf("%s: %w%s: %w", s.where, err, said, flox.ErrUnreachable)
}

// sshConn is the standard input and output of a process.
type sshConn struct {
	io.Reader
	io.Writer
	cmd  *exec.Cmd
	said *lastWords
	once sync.Once
}

func startSSH(argv []string) (*sshConn, error) {
	cmd := exec.Command(argv[0], argv[1:]...) //nolint:gosec,noctx // checked; lives until it is closed
	c := &sshConn{cmd: cmd, said: &lastWords{}}
	cmd.Stderr = c.said
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // with all that it starts
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.Reader, c.Writer = out, in
	return c, cmd.Start()
}

// Close ends the process and waits for it.
func (c *sshConn) Close() error {
	c.once.Do(func() {
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		_ = c.cmd.Wait()
	})
	return nil
}

// lastWords keeps the end of what is written to it.
type lastWords struct {
	mu   sync.Mutex
	text []byte
}

// Write is io.Writer.
func (l *lastWords) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if over := len(l.text) - maxSSHSaid; over > 0 {
		l.text = append([]byte(nil), l.text[over:]...)
	}
	return len(p), nil
}

// String is what was written last, on one line.
func (l *lastWords) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(strings.Fields(strings.ToValidUTF8(string(l.text), "?")), " ")
}
