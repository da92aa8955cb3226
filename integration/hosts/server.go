package hosts

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/integration/netns"
)

// NewServer makes a storehouse of several servers, or one of its other servers
// when that Joins; it does not run yet. state is its --state-dir as the host sees
// it; "" = the default.
func NewServer(p Programs, host *netns.Host, logs, state string, flags ...string) *Storehouse {
	if state == "" {
		state = stateDir
	}
	return newStorehouse(p, host, logs, state, append([]string{
		"--state-dir", state, "--server-name", host.Name, "--log-level", "debug", // who leads is in the log
		"--consensus", fmt.Sprintf("%s:%d", host.Addr(), ConsensusPort),
	}, flags...)...)
}

// Admin calls through the server's own socket, as root. The caller closes its
// idle connections.
func (s *Storehouse) Admin() floxv1connect.AdminClient {
	return floxv1connect.NewAdminClient(&http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(s.Host.Root(), "run/floxd/storehouse.sock"))
		},
	}}, "http://storehouse")
}

// Change has the server run another program with more flags from its next start on,
// until undo is called.
func (s *Storehouse) Change(program string, flags ...string) (undo func()) {
	was := s.argv
	s.argv = slices.Concat([]string{program}, was[1:], flags)
	return func() { s.argv = was }
}

// Join makes a server that has never run one of the storehouse that an invite is of.
func (s *Storehouse) Join(ctx context.Context, invite string) error {
	return Join(ctx, Programs{Floxd: s.argv[0]}, s.Host, invite, "--name", s.Host.Name, "--state-dir", s.dir,
		"--consensus", fmt.Sprintf("%s:%d", s.Host.Addr(), ConsensusPort))
}

// Join has a host join a storehouse with an invite. Nothing is started.
func Join(ctx context.Context, p Programs, host *netns.Host, invite string, flags ...string) error {
	cmd := host.Command(ctx, p.Floxd, append([]string{"join", "-", "--no-start"}, flags...)...)
	cmd.Stdin = strings.NewReader(invite)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("join %s: %w: %s", host.Name, err, out)
	}
	return nil
}

// Led is when a server became the leader last, as its log says; zero = never
// since it was started last.
func (s *Storehouse) Led() (at time.Time, err error) {
	line, err := s.Said(`msg="entering leader state"`)
	if err != nil || line == "" {
		return at, err
	}
	stamp, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
	if at, err = time.Parse("2006-01-02T15:04:05.000Z07:00", stamp); err != nil {
		return at, fmt.Errorf("%s: %w", s.Log, err)
	}
	return at, nil
}

// Votes reports whether so many servers vote, as the leader s knows.
func (s *Storehouse) Votes(servers int) (bool, error) {
	line, err := s.Said(`msg="updating configuration"`)
	return strings.Count(line, "Suffrage:Voter") == servers, err
}

// Said is the last line with some words that the server logged since it was
// started last; "" = none.
func (s *Storehouse) Said(words string) (last string, err error) {
	log, err := os.Open(s.Log)
	if err != nil {
		return "", err
	}
	defer log.Close()
	if _, err := log.Seek(s.began, io.SeekStart); err != nil {
		return "", err
	}
	b, err := io.ReadAll(log)
	if err != nil {
		return "", err
	}
	for line := range bytes.Lines(b) {
		if bytes.Contains(line, []byte(words)) {
			last = string(line)
		}
	}
	return last, nil
}

// Leader is the running server that became the leader last. ErrNotFound if none
// of them did.
func Leader(servers []*Storehouse) (leader *Storehouse, err error) {
	var since time.Time
	for _, s := range servers {
		if !s.Running() {
			continue
		}
		at, err := s.Led()
		if err != nil {
			return nil, err
		}
		if at.After(since) {
			leader, since = s, at
		}
	}
	if leader == nil {
		return nil, fmt.Errorf("no server leads: %w", flox.ErrNotFound)
	}
	return leader, nil
}
