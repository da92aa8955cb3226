package storehouse

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
	daemon "github.com/floxctl/flox/nix/worker"
)

// Bounds of one store behind ssh.
const (
	sshQuestions = 2           // sessions that ask at once
	sshNars      = 4           // and that send a NAR
	sshIdle      = time.Minute // how long one is kept that nobody uses
)

// sshNarDir begins the names under which a store behind ssh offers its NARs.
const sshNarDir = "nar/"

// realisationDir is where a binary cache has realisations.
const realisationDir = "realisations/"

// sshSource is a store behind ssh, which answers as a binary cache would. It speaks
// the worker protocol with the Nix daemon there.
type sshSource struct {
	where     string // for people
	argv      []string
	dir       flox.StoreDir
	stall     time.Duration
	questions chan struct{} // one token a session that asks
	nars      chan struct{}

	mu     sync.Mutex
	idle   []*sshSession
	closed bool
}

var _ cacheSource = (*sshSource)(nil)

// What may stand in a command line that a shell at the other end reads.
var (
	sshName    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]*$`)
	sshAddress = regexp.MustCompile(`^[0-9A-Fa-f:.]+$`) // IPv6
	sshCommand = regexp.MustCompile(`^[A-Za-z0-9/._][A-Za-z0-9/._+=-]*( [A-Za-z0-9/._+=-]+)*$`)
)

// sshCommandLine is how the daemon of an ssh-ng:// URL is reached. ErrBadInput.
func sshCommandLine(u *url.URL) ([]string, error) {
	bad := func(format string, args ...any) ([]string, error) {
		return nil, fmt.Errorf("%s: want ssh-ng://[USER@]HOST[:PORT], with parameters behind ?: %w", fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	// Nobody is there to type a password; who went away without a word is found out.
	argv := []string{"ssh", "-x", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=10"}
	argv = append(argv, strings.Fields(os.Getenv("NIX_SSHOPTS"))...)
	program := "nix-daemon"
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return bad("%v", err)
	}
	for name, values := range query {
		value := values[len(values)-1]
		switch {
		case name == "ssh-key" && path.IsAbs(value):
			argv = append(argv, "-i", value)
		case name == "ssh-key":
			return bad("ssh-key %q is not the absolute path of a file on every server", value)
		case name == "remote-program" && sshCommand.MatchString(value):
			program = value
		case name == "remote-program":
			return bad("remote-program %q is not a plain command", value)
		case name == "compress" && value == "true":
			argv = append(argv, "-C")
		case name == "compress" && value == "false":
		default:
			return bad("parameter %s=%s: there are ssh-key, remote-program and compress (true or false)", name, value)
		}
	}
	host := u.Hostname()
	switch {
	case !sshName.MatchString(host) && !sshAddress.MatchString(host):
		return bad("host %q", host)
	case strings.Trim(u.Path, "/") != "" || u.Fragment != "":
		return bad("%q behind the host", u.Path+u.Fragment)
	}
	if p := u.Port(); p != "" {
		argv = append(argv, "-p", p)
	}
	if u.User != nil {
		if _, secret := u.User.Password(); secret || !sshName.MatchString(u.User.Username()) {
			return bad("a user is a name, without a password: ssh has its keys")
		}
		host = u.User.Username() + "@" + host
	}
	return append(argv, "--", host, program+" --stdio"), nil
}

func newSSHSource(u *url.URL, opts sourceOptions) (*sshSource, error) {
	argv, err := sshCommandLine(u)
	if err != nil {
		return nil, err
	}
	argv[0] = cmp.Or(opts.ssh, argv[0])
	return &sshSource{
		where: "ssh-ng://" + u.Host, argv: argv, dir: opts.dir, stall: opts.stall,
		questions: make(chan struct{}, sshQuestions), nars: make(chan struct{}, sshNars),
	}, nil
}

// open is cacheSource.
func (s *sshSource) open(ctx context.Context, name string) (io.ReadCloser, error) {
	if file, ok := strings.CutPrefix(name, sshNarDir); ok {
		p, err := flox.ParseStorePath(file)
		if err != nil {
			return nil, err
		}
		select {
		case s.nars <- struct{}{}: // not while the clock of stalling runs
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return stalling(ctx, s.stall, name+" from "+s.where, func(ctx context.Context) (io.ReadCloser, error) { return s.nar(ctx, p) })
	}
	var text []byte
	err := s.question(ctx, func(c *daemon.Client) (err error) {
		text, err = s.file(ctx, c, name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s from %s: %w", name, s.where, err)
	}
	return io.NopCloser(bytes.NewReader(text)), nil
}

// file makes up a file of a binary cache.
func (s *sshSource) file(ctx context.Context, c *daemon.Client, name string) ([]byte, error) {
	if name == "nix-cache-info" {
		// It does not say what its store directory is, but refuses paths of another.
		_, err := c.IsValid(ctx, flox.StorePath(strings.Repeat("0", flox.HashPartLen)+"-x"))
		if _, said := errors.AsType[*daemon.RemoteError](err); said {
			return nil, fmt.Errorf("%w: %w", err, flox.ErrBadInput)
		}
		return []byte("StoreDir: " + string(s.dir) + "\n"), err
	}
	if text, ok := strings.CutPrefix(name, realisationDir); ok {
		id, err := nix.ParseRealisationID(strings.TrimSuffix(text, realisationExt))
		if err != nil {
			return nil, err
		}
		r, err := c.Realisation(ctx, id)
		if err != nil {
			return nil, err
		}
		return r.Marshal(), nil
	}
	hashPart, ok := strings.CutSuffix(name, ".narinfo")
	if !ok || !flox.ValidHashPart(hashPart) {
		return nil, flox.ErrNotFound
	}
	p, err := c.ByHashPart(ctx, hashPart)
	if err == nil && p == "" {
		err = flox.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx, p)
	if err != nil {
		return nil, err
	}
	n := nix.NarInfo{Info: info.PathInfo, URL: sshNarDir + string(p), Compression: "none"}
	return n.Marshal(s.dir), nil
}

// question has f ask; once more where the session had ended while nobody used it.
func (s *sshSource) question(ctx context.Context, f func(*daemon.Client) error) error {
	select {
	case s.questions <- struct{}{}:
		defer func() { <-s.questions }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		session, used, err := s.session(ctx)
		if err != nil {
			return err
		}
		err = f(session.client)
		if s.leave(session, err); !answered(err) && used && ctx.Err() == nil {
			continue // those that wait may all be over; a new one tells
		}
		if !answered(err) {
			err = session.lost(err)
		}
		return err
	}
}

// nar reads the NAR of a path; the token taken of nars is given back.
func (s *sshSource) nar(ctx context.Context, p flox.StorePath) (io.ReadCloser, error) {
	session, _, err := s.session(ctx)
	if err != nil {
		<-s.nars
		return nil, err
	}
	r, w := io.Pipe()
	go func() { // ends with ctx, or with r
		defer func() { <-s.nars }()
		err := session.client.Nar(ctx, p, w)
		if s.leave(session, err); !answered(err) {
			err = session.lost(err)
		}
		_ = w.CloseWithError(err) // nil = the end
	}()
	return r, nil
}

// answered reports whether a daemon said something, so that it can be asked again.
func answered(err error) bool {
	_, said := errors.AsType[*daemon.RemoteError](err)
	return err == nil || said || errors.Is(err, flox.ErrNotFound)
}

// list is cacheSource.
func (s *sshSource) list(context.Context, func(string) error) error {
	return fmt.Errorf("import from %s: a store behind ssh is not listed: name the paths to import: %w", s.where, flox.ErrBadInput)
}

// session gives one that nobody uses; used says that it is not new.
func (s *sshSource) session(ctx context.Context) (session *sshSession, used bool, err error) {
	s.mu.Lock()
	if n := len(s.idle); n > 0 {
		session, s.idle = s.idle[n-1], s.idle[:n-1]
	}
	s.mu.Unlock()
	if session != nil {
		session.expiry.Stop()
		return session, true, nil
	}
	session, err = openSSH(ctx, s.where, s.argv, s.dir)
	return session, false, err
}

// leave keeps a session for the next who needs one, unless err ended it.
func (s *sshSource) leave(session *sshSession, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !answered(err) || s.closed {
		_ = session.client.Close()
		return
	}
	s.idle = append(s.idle, session) // as many as there are tokens
	session.expiry = time.AfterFunc(sshIdle, func() { s.expire(session) })
}

func (s *sshSource) expire(session *sshSession) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, other := range s.idle {
		if other == session {
			s.idle = append(s.idle[:i], s.idle[i+1:]...)
			_ = session.client.Close()
			return
		}
	}
}

// close is cacheSource.
func (s *sshSource) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, session := range s.idle {
		session.expiry.Stop()
		_ = session.client.Close()
	}
	s.idle = nil
	return nil
}
