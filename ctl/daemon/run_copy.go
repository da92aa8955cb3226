package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/ctl/cli"
)

// copyDir, in the private state directory, holds paths as files. It is all
// runs': what one has fetched the others need not.
const copyDir = "store"

// runCopy fetches the closure as files and gives the directory they lie in.
func runCopy(ctx context.Context, file string, opts *runOptions, s *slot) (string, error) {
	dir, trust := filepath.Join(opts.stateDir, copyDir), true
	if opts.to != "" {
		dir, trust = opts.to, false
	}
	cfg, err := s.config(ctx, file, opts)
	if err != nil {
		return "", err
	}
	invite, err := api.LoadInvite(filepath.Join(s.dir, agentDir, inviteName))
	if err != nil {
		return "", err
	}
	log, err := os.OpenFile(s.log(), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return "", fmt.Errorf("log of the agent: %w", err)
	}
	defer log.Close()
	a, err := agent.New(agentConfig(cfg, invite, newLogger(log, cfg, defaultRunLevel)))
	if err != nil {
		return "", err
	}
	began := time.Now()
	bar := &copyProgress{w: os.Stderr, quiet: opts.quiet, began: began, terminal: term.IsTerminal(int(os.Stderr.Fd()))}
	got, err := materialize(ctx, a, agent.Materialize{Path: opts.path, Dir: dir, Trust: trust, Progress: bar.show})
	bar.end()
	if ctx.Err() != nil && !opts.quiet {
		bar.printf("floxctl: stopped. What has arrived stays; the same command goes on from there.\n")
	}
	if errors.Is(err, flox.ErrUnreachable) && ctx.Err() == nil {
		return "", notKnown(err)
	}
	if err != nil {
		return "", err
	}
	if opts.to != "" && !opts.quiet {
		bar.printf("floxctl: %s, %s, complete in %s (%s fetched, %s)\n", pathCount(got.Paths), cli.FormatBytes(got.TotalBytes), dir,
			cli.FormatBytes(got.Fetched), cli.FormatDuration(time.Since(began)))
	}
	return dir, nil
}

// materialize runs the agent for as long as that takes.
func materialize(ctx context.Context, a *agent.Agent, m agent.Materialize) (got agent.Materialized, err error) {
	group, ctx := errgroup.WithContext(ctx)
	running, stop := context.WithCancel(ctx)
	defer stop()
	group.Go(func() error {
		err := a.Run(running)
		if running.Err() != nil {
			return nil // how a part ends that had hardly begun is nobody's concern
		}
		return err
	})
	group.Go(func() (err error) {
		defer stop()
		got, err = a.Materialize(ctx, m)
		return err
	})
	return got, group.Wait()
}

// copyProgress shows how far a copy is: on a terminal in one line, in a log now
// and then.
type copyProgress struct {
	w        io.Writer
	quiet    bool
	terminal bool
	began    time.Time
	said     time.Time
	drawn    bool
}

const copyLogEvery = 5 * time.Second

func (p *copyProgress) show(m agent.Materialized) {
	now := time.Now()
	switch {
	case p.quiet || m.TotalBytes == 0:
	case p.terminal:
		p.drawn = true
		p.printf("\r%s\x1b[K", p.words(m, now))
	case now.Sub(p.began) > copyLogEvery && now.Sub(p.said) > copyLogEvery:
		p.said = now
		p.printf("floxctl: %s\n", p.words(m, now))
	}
}

func (p *copyProgress) words(m agent.Materialized, now time.Time) string {
	rate := float64(m.Fetched) / max(now.Sub(p.began).Seconds(), 0.001)
	return fmt.Sprintf("%d %% (%s of %s), %s, %d of %d paths", m.Bytes*100/m.TotalBytes,
		cli.FormatBytes(m.Bytes), cli.FormatBytes(m.TotalBytes), cli.FormatRate(uint64(rate)), m.Paths, m.TotalPaths)
}

// end takes the line away.
func (p *copyProgress) end() {
	if p.drawn {
		p.printf("\r\x1b[K")
	}
}

func (p *copyProgress) printf(format string, args ...any) { fmt.Fprintf(p.w, format, args...) }

// pathCount is a number of paths for people.
func pathCount(n uint32) string {
	if n == 1 {
		return "1 path"
	}
	return cli.FormatCount(uint64(n)) + " paths"
}
