package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
)

const (
	// maxNixLog bounds one build log that a client sends, maxNixLogs how many logs
	// are known by derivation: beyond that the oldest are forgotten.
	maxNixLog  = 256 << 20
	maxNixLogs = 20_000
	// logsAtOnce is how many logs are fetched at once for one client.
	logsAtOnce = 8
)

// nixLogs finds build logs, which are store paths: in the storehouse, or staged if
// a client of this machine sent them. Stock Nix opens the file of a log itself and
// asks no daemon (Nix 2.8 src/libstore/local-fs-store.cc getBuildLog); what it
// finds in its log-dir is a link to flox.LogsName in the mount.
type nixLogs struct {
	a   *Agent
	dir string // a file for each derivation, which names the log

	mu sync.Mutex // held while one is written
}

// Log implements flox.Store.
func (s *store) Log(ctx context.Context, name string) (flox.CID, error) {
	drv, err := flox.ParseStorePath(name)
	if err != nil || !strings.HasSuffix(name, nix.DrvExtension) {
		return flox.CID{}, fmt.Errorf("%s is no derivation: %w", name, flox.ErrNotFound)
	}
	info, err := s.a.nix.logs.find(ctx, drv)
	if err != nil {
		return flox.CID{}, err
	}
	return info.Manifest, nil
}

// find gives the log that a client of this machine sent, else the storehouse's
// newest, or, while nobody answers, the one known here.
func (l *nixLogs) find(ctx context.Context, drv flox.StorePath) (*flox.PathInfo, error) {
	known, err := l.known(drv)
	if err == nil {
		if info, ok := l.a.stagedInfo(known); ok {
			return info, nil
		}
	}
	log, failed := l.ask(ctx, drv)
	switch {
	case failed == nil && log != known:
		if err := l.note(drv, log); err != nil {
			l.a.log.Debug("where a build log is gets forgotten", "derivation", string(drv), "error", err)
		}
	case failed != nil && err == nil && away(failed):
		if info, ok := l.a.facts.get(known.HashPart()); ok {
			return info, nil
		}
		return nil, failed
	case failed != nil:
		return nil, failed
	}
	return l.a.resolver.lookup(ctx, log)
}

// ask asks the storehouse which store path is the log of a derivation's last build.
func (l *nixLogs) ask(ctx context.Context, drv flox.StorePath) (log flox.StorePath, err error) {
	err = l.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error {
		log, err = askLog(ctx, l.a.calls.builds(house), drv)
		return err
	})
	return log, err
}

// askLog reads no more than which path it is.
func askLog(ctx context.Context, builds buildsClient, drv flox.StorePath) (flox.StorePath, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := builds.BuildLog(ctx, connect.NewRequest(&floxv1.BuildLogRequest{Drv: string(drv)}))
	if err != nil {
		return "", err
	}
	defer stream.Close()
	if !stream.Receive() {
		return "", cmp.Or(stream.Err(), fmt.Errorf("log of %s: %w", drv, flox.ErrNotFound))
	}
	return flox.ParseStorePath(stream.Msg().GetRecord().GetLog())
}

func (l *nixLogs) file(drv flox.StorePath) string {
	return filepath.Join(l.dir, string(drv[:2]), string(drv[2:]))
}

// known is what was the log of a derivation when it was noted last; ErrNotFound.
func (l *nixLogs) known(drv flox.StorePath) (flox.StorePath, error) {
	b, err := os.ReadFile(l.file(drv))
	if err != nil {
		return "", fmt.Errorf("log of %s is not known here: %w", drv, flox.ErrNotFound)
	}
	return flox.ParseStorePath(string(b))
}

func (l *nixLogs) note(drv, log flox.StorePath) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := l.file(drv)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return fmt.Errorf("build log: %w", err)
	}
	return replaceFile(name, []byte(log), 0o600, false)
}

// add takes in a log that a client sent: it is for who looks on this machine.
func (l *nixLogs) add(ctx context.Context, drv flox.StorePath, log io.Reader) error {
	counted := &io.LimitedReader{R: log, N: maxNixLog + 1}
	p, err := l.a.staged.AddAddressed(ctx, drv.Name()+".log", nix.CAFlat, nix.SHA256, nil, counted)
	if err != nil {
		return fmt.Errorf("build log: %w", err)
	}
	if counted.N == 0 {
		return fmt.Errorf("build log of %s is larger than %d bytes: %w", drv, maxNixLog, flox.ErrFull)
	}
	return l.note(drv, p.Info.Path)
}

// each calls f with all logs that are known here.
func (l *nixLogs) each(f func(file string, log flox.StorePath, at time.Time)) error {
	return filepath.WalkDir(l.dir, func(name string, e iofs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil //nolint:nilerr // gone meanwhile
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		info, err := e.Info()
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		if log, err := flox.ParseStorePath(string(b)); err == nil {
			f(name, log, info.ModTime())
		}
		return nil
	})
}

// tidy forgets the oldest of those that are too many.
func (l *nixLogs) tidy() error {
	type known struct {
		file string
		at   time.Time
	}
	var all []known
	if err := l.each(func(file string, _ flox.StorePath, at time.Time) { all = append(all, known{file, at}) }); err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b known) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.file, b.file)) })
	var failed []error
	for _, k := range all[:max(len(all)-maxNixLogs, 0)] {
		failed = append(failed, os.Remove(k.file))
	}
	return errors.Join(failed...)
}

// logFetches are the logs of the builds one client sees, on their way here.
type logFetches struct {
	l      *nixLogs
	builds buildsClient
	ctx    context.Context //nolint:containedctx // of the one build it belongs to
	group  errgroup.Group
}

func (l *nixLogs) fetches(ctx context.Context, builds buildsClient) *logFetches {
	f := &logFetches{l: l, builds: builds, ctx: ctx}
	f.group.SetLimit(logsAtOnce)
	return f
}

// stopped fetches the log of a build that ended, so that it can be read without a
// network too. It waits if too many are on their way.
func (f *logFetches) stopped(m *floxv1.BuildStop) {
	drv, err := flox.ParseStorePath(m.GetDrv())
	if err != nil || m.GetOutcome().GetStartUnix() == 0 { // nothing was started
		return
	}
	f.group.Go(func() error {
		// A log that cannot be had is no reason for a build to fail.
		if err := f.fetch(drv); err != nil && f.ctx.Err() == nil {
			f.l.a.log.Debug("the log of a build is not here", "derivation", string(drv), "error", err)
		}
		return nil
	})
}

func (f *logFetches) fetch(drv flox.StorePath) error {
	log, err := askLog(f.ctx, f.builds, drv)
	if err != nil {
		return err
	}
	if err := f.l.note(drv, log); err != nil {
		return err
	}
	info, err := f.l.a.lookup(f.ctx, log)
	if err != nil {
		return err
	}
	t, err := f.l.a.open(f.ctx, info)
	if err != nil {
		return err
	}
	e, err := t.Entry(f.ctx, 0)
	if err != nil {
		return err
	}
	return t.readFile(f.ctx, 0, int64(e.Size), io.Discard)
}

func (f *logFetches) wait() { _ = f.group.Wait() }
