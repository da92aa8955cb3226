package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix"
)

// stagedTidy is how often staged paths that the storehouse has go.
const stagedTidy = 10 * time.Minute

// stagedSharing is how often what the storehouse did not take is offered again.
const stagedSharing = 15 * time.Second

// stagedAge is how long what was added stays though nothing needs it; looked at
// every stagedAging.
const (
	stagedAge   = 30 * 24 * time.Hour
	stagedAging = 24 * time.Hour
)

// Staged is the store of what was added on this machine. What it acknowledges
// can be read in the mount at once; nobody else is told of it.
func (a *Agent) Staged() *staging.Store { return a.staged }

// stagedInfo finds a path that is staged here.
func (a *Agent) stagedInfo(p flox.StorePath) (*flox.PathInfo, bool) {
	got, err := a.staged.ByHashPart(p.HashPart())
	if err != nil {
		return nil, false
	}
	return got.Info, true
}

// validElsewhere is staging's Config.Known: signed facts, of here or of the storehouse.
func (a *Agent) validElsewhere(ctx context.Context, p flox.StorePath) (*flox.PathInfo, error) {
	if info, ok := a.facts.get(p.HashPart()); ok {
		return info, nil
	}
	return a.lookup(ctx, p)
}

// derivation is staging's Config.Derivation.
func (a *Agent) derivation(ctx context.Context, p flox.StorePath) ([]byte, error) {
	info, err := a.validElsewhere(ctx, p)
	if err == nil && info.Path != p {
		err = fmt.Errorf("%s: %w", p, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	t, err := a.open(ctx, info)
	if err != nil {
		return nil, err
	}
	e, err := t.Entry(ctx, 0)
	if err == nil && (e.Kind != flox.Regular || e.Size > nix.MaxDerivation) {
		err = fmt.Errorf("%s is a %s of %d bytes, want a derivation: %w", p, e.Kind, e.Size, flox.ErrBadInput)
	}
	if err != nil {
		return nil, err
	}
	b := make([]byte, e.Size)
	n, err := t.readPart(ctx, 0, b, 0)
	if err == nil && n < len(b) {
		err = fmt.Errorf("%s ends at %d of %d bytes: %w", p, n, len(b), flox.ErrCorrupt)
	}
	return b, err
}

// readStaged is ReadAt of a file whose path is staged: its bytes lie there, and
// get into no cache that others are served from.
func (t *tree) readStaged(ctx context.Context, index uint32, p []byte, off int64) (int, error) {
	if data, inline, err := t.Inline(ctx, index); err != nil || inline {
		if err != nil {
			return 0, err
		}
		return copy(p, data[off:]), nil
	}
	var failed error
	err := t.Chunks(ctx, index, off, int64(len(p)), func(at int64, c flox.Chunk) bool {
		var data []byte
		if data, failed = t.a.staged.Get(ctx, c.ID); failed == nil {
			overlay(p, off, data, at)
		}
		return failed == nil
	})
	if err = errors.Join(failed, err); err != nil {
		return 0, fmt.Errorf("%s, which is staged: %w", t.path, err)
	}
	return len(p), nil
}

// isStaged reports whether a tree's content lies in the staging store.
func (a *Agent) isStaged(manifest flox.CID) bool {
	_, ok := a.stagedByManifest(manifest)
	return ok
}

// stagedByManifest finds a staged path by its manifest.
func (a *Agent) stagedByManifest(manifest flox.CID) (*flox.PathInfo, bool) {
	p, err := a.staged.ByManifest(manifest)
	if err != nil {
		return nil, false
	}
	return p.Info, true
}

// stagedNames adds the names of staged paths to those known, as Names does.
func (a *Agent) stagedNames(ctx context.Context, known []flox.Named, after string, limit int) ([]flox.Named, error) {
	// Known names that did not fit may lie before staged ones.
	last := ""
	if len(known) >= limit && limit > 0 {
		last = known[len(known)-1].Name
	}
	var staged []flox.Named
	err := a.staged.List(ctx, after, func(p *staging.Path) bool {
		name := string(p.Info.Path)
		if last != "" && name > last || len(staged) >= limit {
			return false
		}
		staged = append(staged, flox.Named{Name: name, Manifest: p.Info.Manifest})
		return true
	})
	if errors.Is(err, flox.ErrFull) {
		return known, nil // they are back once the disk has room
	}
	if err != nil || len(staged) == 0 {
		return known, err
	}
	out := make([]flox.Named, 0, len(known)+len(staged))
	for len(known) > 0 || len(staged) > 0 {
		switch {
		case len(staged) == 0 || len(known) > 0 && known[0].Name < staged[0].Name:
			out, known = append(out, known[0]), known[1:]
		case len(known) > 0 && known[0].Name == staged[0].Name:
			out, known, staged = append(out, known[0]), known[1:], staged[1:]
		default:
			out, staged = append(out, staged[0]), staged[1:]
		}
	}
	return out[:min(len(out), limit)], nil
}

// runStaged gives back the room of what is not staged any more, and of what the
// storehouse has, until ctx ends.
func (a *Agent) runStaged(ctx context.Context) error {
	a.unshared.Store(true) // the process before may have left something
	swept := make(chan error, 1)
	go func() { swept <- a.staged.Run(ctx) }()
	tick := time.NewTicker(stagedTidy)
	defer tick.Stop()
	sharing := time.NewTicker(stagedSharing)
	defer sharing.Stop()
	aging := time.NewTicker(stagedAging)
	defer aging.Stop()
	for {
		select {
		case <-sharing.C:
			if !a.unshared.Swap(false) {
				continue
			}
			if err := a.shareLeft(ctx); err != nil {
				a.unshared.Store(true)
				a.log.Debug("staged paths that are for others stay", "error", err)
			}
		case <-aging.C:
			if err := a.ageStaged(ctx, time.Now()); err != nil && ctx.Err() == nil {
				a.log.Warn("old staged paths that nothing needs stay", "error", err)
			}
		case <-tick.C:
			if err := a.nix.logs.tidy(); err != nil {
				a.log.Debug("old build logs stay", "error", err)
			}
			if err := a.tidyStaged(ctx); err != nil && ctx.Err() == nil {
				a.log.Debug("staged paths that the storehouse has stay", "error", err)
			}
		case err := <-swept:
			return err
		}
	}
}

// tidyStaged removes the staged paths that were uploaded and whose signed facts
// are here: from then on they are read as any other path. The others stay until
// somebody collects garbage.
func (a *Agent) tidyStaged(ctx context.Context) error {
	var uploaded []flox.StorePath
	err := a.staged.List(ctx, "", func(p *staging.Path) bool {
		if p.Uploaded {
			uploaded = append(uploaded, p.Info.Path)
		}
		return true
	})
	if err != nil || len(uploaded) == 0 {
		return err
	}
	signed := make(map[flox.StorePath]bool, len(uploaded))
	for _, p := range uploaded {
		if a.facts.has(p.HashPart()) {
			signed[p] = true
			continue
		}
		// The resolver would say that it is staged.
		info, err := a.resolver.askStorehouse(ctx, p)
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return err
		}
		signed[p] = err == nil && info.Path == p
	}
	_, err = a.CollectStaged(ctx, func(p *staging.Path) bool { return !signed[p.Info.Path] })
	return err
}

// ageStaged removes what was added long before now and no root of this machine
// keeps.
func (a *Agent) ageStaged(ctx context.Context, now time.Time) error {
	c := nixCollector{&nixSession{a: a, logs: a.nix.logs}, a.nix.roots}
	live, err := c.live(ctx)
	if err != nil {
		return err
	}
	n, err := a.CollectStaged(ctx, func(p *staging.Path) bool {
		return live[p.Info.Path] || now.Sub(p.Added) < stagedAge
	})
	if err == nil {
		_, err = a.staged.Unrealise(func(r *staging.Realised) bool {
			_, staged := a.stagedInfo(r.Path)
			return staged || live[r.Path] || now.Sub(r.Added) < stagedAge
		})
	}
	if n > 0 {
		a.log.Info("staged paths removed that nothing needed for long", "paths", n, "days", int(stagedAge.Hours()/24))
	}
	return err
}

// CollectStaged removes staged paths that keep does not want and that no kept one
// refers to, and says how many. It is what collecting garbage means here.
func (a *Agent) CollectStaged(ctx context.Context, keep func(*staging.Path) bool) (int, error) {
	n, err := a.staged.Collect(ctx, keep)
	if n > 0 {
		a.store.forgetTrees()
		a.log.Debug("staged paths removed", "paths", n)
	}
	return n, err
}

// forgetTrees closes trees of paths that may be gone; they are opened again from
// the page cache.
func (s *store) forgetTrees() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.trees)
}

// stagedMessage says how much is staged.
func (a *Agent) stagedMessage() *floxv1.StagedUse {
	st := a.staged.Stat()
	return &floxv1.StagedUse{Paths: st.Paths, Uploaded: st.Uploaded, NarBytes: st.NarBytes, Bytes: st.Bytes, BudgetBytes: st.Budget}
}
