package staging

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

const (
	// sweepDelay is how long removed content waits for more of it: a sweep reads
	// all manifests.
	sweepDelay = 10 * time.Second
	// removeBatch is how many paths are removed by one write.
	removeBatch = 1024
)

// Uploaded notes that the storehouse has paths meanwhile. Those that are not
// staged are skipped.
func (s *Store) Uploaded(paths ...flox.StorePath) error {
	s.valid.Lock() // nobody else changes records
	defer s.valid.Unlock()
	if err := s.ready(false); errors.Is(err, flox.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	batch := new(pebble.Batch)
	n := uint64(0)
	for _, path := range paths {
		p, err := s.Path(path)
		if errors.Is(err, flox.ErrNotFound) || err == nil && p.Uploaded {
			continue
		}
		if err != nil {
			return err
		}
		p.Uploaded = true
		b, err := appendPath(p)
		if err != nil {
			return err
		}
		_ = batch.Set(pathKey(path.HashPart()), b, nil)
		n++
	}
	if batch.Empty() {
		return nil
	}
	// A mark that is lost costs a question, no more.
	if err := s.db.Apply(batch, false); err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Uploaded += n
	return nil
}

// Remove removes a path. ErrBusy: another staged path refers to it; ErrNotFound.
func (s *Store) Remove(ctx context.Context, path flox.StorePath) error {
	s.valid.Lock()
	defer s.valid.Unlock()
	p, err := s.Path(path)
	if err != nil {
		return err
	}
	var by flox.StorePath
	err = s.List(ctx, "", func(other *Path) bool {
		for _, ref := range other.Info.References {
			if ref == path && other.Info.Path != path {
				by = other.Info.Path
			}
		}
		return by == ""
	})
	if err == nil && by != "" {
		err = fmt.Errorf("%s cannot be removed: %s, which is staged, refers to it: %w", path, by, flox.ErrBusy)
	}
	if err != nil {
		return err
	}
	return s.remove(ctx, []*Path{p})
}

// Collect removes every path that keep does not want, unless one that stays
// refers to it, at any depth. Paths that the storehouse has may go though others
// refer to them: their readers find them there. It says how many went. While it
// runs, no path becomes valid.
func (s *Store) Collect(ctx context.Context, keep func(*Path) bool) (removed int, err error) {
	s.valid.Lock()
	defer s.valid.Unlock()
	kept := make(map[flox.StorePath]bool)
	var queue []*Path
	if err := s.List(ctx, "", func(p *Path) bool {
		if keep(p) {
			kept[p.Info.Path] = true
			queue = append(queue, p)
		}
		return true
	}); err != nil {
		return 0, err
	}
	for len(queue) > 0 {
		p := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, ref := range p.Info.References {
			if kept[ref] {
				continue
			}
			in, err := s.Path(ref)
			if errors.Is(err, flox.ErrNotFound) || err == nil && in.Uploaded {
				continue
			}
			if err != nil {
				return 0, err
			}
			kept[ref] = true
			queue = append(queue, in)
		}
	}
	var going []*Path
	flush := func() error {
		err := s.remove(ctx, going)
		if err == nil {
			removed += len(going)
		}
		going = going[:0]
		return err
	}
	var failed error
	err = s.List(ctx, "", func(p *Path) bool { // of a snapshot
		if kept[p.Info.Path] {
			return true
		}
		if going = append(going, p); len(going) == removeBatch {
			failed = flush()
		}
		return failed == nil
	})
	if err = errors.Join(failed, err); err == nil {
		err = flush()
	}
	return removed, err
}

// remove needs s.valid alone. The paths go in one write.
func (s *Store) remove(ctx context.Context, paths []*Path) error {
	if len(paths) == 0 {
		return nil
	}
	batch := new(pebble.Batch)
	packed := false
	for _, p := range paths {
		hash := p.Info.Path.HashPart()
		_ = batch.Delete(pathKey(hash), nil)
		_ = batch.Delete(cidKey(manifestPrefix, p.Info.Manifest, hash), nil)
		if p.inline == 0 {
			packed = true
			continue
		}
		m, err := s.Open(ctx, p)
		if err == nil {
			err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
				_ = batch.Delete(cidKey(blockPrefix, id, hash), nil)
				return true
			})
		}
		if err != nil {
			return fmt.Errorf("remove %s: %w", p.Info.Path, err)
		}
	}
	if batch.Empty() {
		return nil
	}
	if err := s.put(batch, false); err != nil {
		return fmt.Errorf("staging: remove: %w", err)
	}
	s.mu.Lock()
	for _, p := range paths {
		s.stats.add(p, -1)
	}
	s.mu.Unlock()
	s.tell()
	if packed {
		s.sweepSoon()
	}
	return nil
}

// Run gives the room of removed content back to the disk and makes texts durable,
// until ctx ends. ErrFull: the index could not be written, and can be again now; the process has to
// start anew.
func (s *Store) Run(ctx context.Context) error {
	select {
	case <-s.opened:
	case <-ctx.Done():
		return nil
	}
	all, ctx := errgroup.WithContext(ctx)
	all.Go(func() error {
		select {
		case <-s.packed:
			return s.packs.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	all.Go(func() error { return s.tend(ctx) })
	all.Go(func() error {
		return after(ctx, s.swept, sweepDelay, func() {
			if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn("room of removed paths not given back", "error", err)
			}
		})
	})
	all.Go(func() error {
		return after(ctx, s.loose, SyncAfter, func() {
			if err := s.settle(); err != nil {
				s.cfg.Log.Warn("added texts are not on disk yet", "error", err)
			}
		})
	})
	return all.Wait()
}

// tend watches the room of the disk.
func (s *Store) tend(ctx context.Context) error {
	look := time.NewTicker(time.Second)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		}
		if err := s.db.Tend(); err != nil {
			return err
		}
	}
}

// after does something a while after it was asked for, until ctx ends.
func after(ctx context.Context, asked <-chan struct{}, delay time.Duration, do func()) error {
	for {
		select {
		case <-asked:
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil
		}
		do()
	}
}

// Sweep gives the room of removed content back to the disk.
func (s *Store) Sweep(ctx context.Context) error {
	if err := s.ready(false); errors.Is(err, flox.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	packs, err := s.blocks()
	if err != nil {
		return err
	}
	// A sweep does not see what an add that failed left behind unsynced.
	if err := packs.Sync(ctx); err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	_, err = packs.SweepMarked(ctx, func(ctx context.Context) (func(flox.CID) bool, error) {
		live := make(map[flox.CID]struct{}) // 32 bytes for each chunk of some 32 KiB
		var failed error
		err := s.List(ctx, "", func(p *Path) bool {
			if p.inline > 0 {
				return true
			}
			var m *content.Manifest
			if m, failed = s.Open(ctx, p); failed == nil {
				failed = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
					live[id] = struct{}{}
					return true
				})
			}
			return failed == nil
		})
		return func(id flox.CID) bool {
			_, ok := live[id]
			return ok
		}, errors.Join(failed, err)
	})
	s.tell()
	if err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	return nil
}
