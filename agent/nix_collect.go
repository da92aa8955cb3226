package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix/worker"
)

// nixCollector is what Nix clients may collect: of this machine. A collection of
// the storehouse is an operator's, unless that is this machine's own.
type nixCollector struct {
	n     *nixSession
	roots *nixRoots
}

// Collect implements worker.Collector.
func (c nixCollector) Collect(ctx context.Context, o worker.GCOptions) (*worker.GCResult, error) {
	done, err := c.roots.collect(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	c.n.s.Log().Message(worker.LevelInfo, "finding garbage collector roots...")
	live, err := c.live(ctx)
	if err != nil {
		return nil, err
	}
	if missed := c.roots.notRead(); missed != "" {
		c.n.s.Log().Message(worker.LevelWarn, missed)
	}
	switch o.Action {
	case worker.GCDeleteDead:
		c.n.s.Log().Message(worker.LevelInfo, "deleting garbage...")
	case worker.GCReturnLive, worker.GCReturnDead:
		c.n.s.Log().Message(worker.LevelInfo, "determining live/dead paths...")
	case worker.GCDeleteSpecific:
	}
	if o.Action == worker.GCDeleteDead || o.Action == worker.GCDeleteSpecific {
		return c.remove(ctx, o, live)
	}
	all, err := c.n.All(ctx)
	if err != nil {
		return nil, err
	}
	result := &worker.GCResult{}
	if err := c.judge(ctx, all, live); err != nil {
		return nil, err
	}
	for _, p := range all {
		if live[p] == (o.Action == worker.GCReturnLive) {
			result.Paths = append(result.Paths, c.n.a.cfg.StoreDir.Join(p))
		}
	}
	return result, nil
}

// remove deletes paths that were added on this machine and that nothing keeps.
func (c nixCollector) remove(ctx context.Context, o worker.GCOptions, live map[flox.StorePath]bool) (*worker.GCResult, error) {
	dir, result := c.n.a.cfg.StoreDir, &worker.GCResult{}
	for _, p := range o.Paths {
		if live[p] {
			return nil, &worker.Error{Message: fmt.Sprintf("Cannot delete path '%s' since it is still alive. To find out why, use: nix-store --query --roots", dir.Join(p)), Cause: flox.ErrDenied}
		}
		if _, err := c.n.a.staged.Path(p); err != nil {
			if _, known := c.n.a.lookup(ctx, p); errors.Is(known, flox.ErrNotFound) { // gone already: deleted, as Nix has it
				result.Paths = append(result.Paths, dir.Join(p))
				continue
			}
			if c.n.a.cfg.Embedded {
				continue
			}
			return nil, fmt.Errorf("path '%s' was not added on this machine; what is in the storehouse is collected there by an operator: %w", dir.Join(p), err)
		}
	}
	if o.MaxFreed == 0 {
		return result, nil
	}
	before, err := c.dead(ctx, o, live)
	if err == nil {
		_, err = c.n.a.CollectStaged(ctx, func(p *staging.Path) bool { _, goes := before[p.Info.Path]; return !goes })
	}
	if err != nil {
		return nil, err
	}
	_, err = c.n.a.staged.Unrealise(func(r *staging.Realised) bool {
		_, staged := c.n.a.stagedInfo(r.Path)
		return staged || live[r.Path] || o.Action == worker.GCDeleteSpecific && !slices.Contains(o.Paths, r.Path)
	})
	if err != nil {
		return nil, err
	}
	for p, size := range before {
		if _, err := c.n.a.staged.Path(p); errors.Is(err, flox.ErrNotFound) {
			c.n.s.Log().Message(worker.LevelInfo, "deleting '"+dir.Join(p)+"'")
			result.Paths = append(result.Paths, dir.Join(p))
			result.Freed += size
		} else if o.Action == worker.GCDeleteSpecific {
			return nil, &worker.Error{Message: fmt.Sprintf("cannot delete path '%s' because it is in use by another path", dir.Join(p)), Cause: flox.ErrDenied}
		}
	}
	if err := c.collectHouse(ctx, o, result); err != nil {
		return nil, err
	}
	if o.Action == worker.GCDeleteDead {
		if err := c.free(ctx, o, live, result); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// dead gives the staged paths that are to go, with their sizes: those asked for, or
// all that nothing keeps, until more than MaxFreed goes. Who refers to others goes first.
func (c nixCollector) dead(ctx context.Context, o worker.GCOptions, live map[flox.StorePath]bool) (map[flox.StorePath]uint64, error) {
	var candidates []flox.StorePath
	err := c.n.a.staged.List(ctx, "", func(p *staging.Path) bool {
		if o.Action == worker.GCDeleteSpecific && slices.Contains(o.Paths, p.Info.Path) || o.Action == worker.GCDeleteDead && !live[p.Info.Path] {
			candidates = append(candidates, p.Info.Path)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	goes := make(map[flox.StorePath]uint64, len(candidates))
	if o.Action == worker.GCDeleteSpecific || o.MaxFreed == math.MaxUint64 {
		for _, p := range candidates {
			if s, err := c.n.a.staged.Path(p); err == nil {
				goes[p] = s.Info.NarSize
			}
		}
		return goes, nil
	}
	order, err := c.n.a.stagedClosure(ctx, candidates)
	if err != nil {
		return nil, err
	}
	freed := uint64(0)
	for _, p := range slices.Backward(order) {
		if freed > o.MaxFreed {
			break
		}
		if !live[p.Info.Path] {
			goes[p.Info.Path] = p.Info.NarSize
			freed += p.Info.NarSize
		}
	}
	return goes, nil
}

// free gives back the room of what is cached of paths that nothing here keeps; it comes
// again when somebody reads it. As with the cache itself, only who may take it from
// everybody on this machine does.
func (c nixCollector) free(ctx context.Context, o worker.GCOptions, live map[flox.StorePath]bool, result *worker.GCResult) error {
	if result.Freed > o.MaxFreed {
		c.n.s.Log().Message(worker.LevelInfo, fmt.Sprintf("deleted more than %d bytes; stopping", o.MaxFreed))
		return nil
	}
	if !c.n.s.Trusted() {
		return nil
	}
	keep := make(map[flox.CID]struct{}) // 32 bytes for each file of what is live
	for p := range live {
		info, ok := c.n.a.facts.get(p.HashPart())
		if !ok {
			continue
		}
		err := c.n.a.contentOf(ctx, info, c.n.a.cache, func(id flox.CID) bool {
			keep[id] = struct{}{}
			return ctx.Err() == nil
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil { // what is not here whole comes again as it did
			c.n.a.log.Debug("content of a live path is not all here", "path", string(p), "error", err)
		}
	}
	freed, err := c.n.a.cache.Collect(ctx, int64(min(o.MaxFreed-result.Freed, math.MaxInt64)), func(id flox.CID) bool { //nolint:gosec // bounded
		_, ok := keep[id]
		return ok
	})
	result.Freed += uint64(freed) //nolint:gosec // not negative
	return err
}

// held are the paths that roots of this machine keep.
func (c nixCollector) held(ctx context.Context) ([]flox.StorePath, error) {
	roots, err := c.roots.find(ctx)
	if err != nil {
		return nil, err
	}
	kept, err := c.n.a.keptOwners(ctx)
	if err != nil {
		return nil, err
	}
	var from []flox.StorePath
	for _, r := range roots {
		from = append(from, r.Target)
	}
	for owner := range kept {
		if p, err := flox.ParseStorePath(owner); err == nil {
			from = append(from, p)
		}
	}
	for _, p := range c.n.a.profiles.list() {
		from = append(from, p.Path)
	}
	// Nix keeps logs, whatever is collected.
	err = c.n.logs.each(func(_ string, log flox.StorePath, _ time.Time) {
		if _, staged := c.n.a.stagedInfo(log); staged {
			from = append(from, log)
		}
	})
	return from, err
}

// live are the paths that roots of this machine keep, with all they refer to.
func (c nixCollector) live(ctx context.Context) (map[flox.StorePath]bool, error) {
	from, err := c.held(ctx)
	if err != nil {
		return nil, err
	}
	live := make(map[flox.StorePath]bool)
	for len(from) > 0 {
		p := from[len(from)-1]
		from = from[:len(from)-1]
		if live[p] {
			continue
		}
		live[p] = true
		info, ok := c.n.a.facts.get(p.HashPart())
		if !ok {
			info, ok = c.n.a.stagedInfo(p)
		}
		if !ok {
			continue
		}
		from = append(from, info.References...)
		if _, staged := c.n.a.stagedInfo(info.Deriver); staged { // as with Nix's keep-derivations
			from = append(from, info.Deriver)
		}
	}
	return live, nil
}

// Optimise implements worker.Collector: equal files are one file in the cache
// from the start.
func (c nixCollector) Optimise(context.Context) error { return nil }
