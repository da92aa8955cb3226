package pack

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/floxctl/flox"
)

// refresh looks through the bucket: packs of other servers, or of this one before
// its disk was lost, come into the index, and those that are gone leave it; writing
// is held.
func (s *Store) refresh(ctx context.Context) error {
	if err := s.index.sound(); err != nil {
		return err
	}
	r := s.remote
	condemned := make(map[string]time.Time)
	err := r.list(ctx, condemnedPrefix, func(name string, at time.Time) error {
		condemned[name] = at
		return nil
	})
	if err != nil {
		return err
	}
	known := make(map[string]uint32)
	for id, p := range s.index.remotes() {
		known[p.Name] = id
	}
	seen := make(map[string]bool)
	var fresh []string
	began := time.Now()
	err = r.list(ctx, indexPrefix, func(name string, _ time.Time) error {
		seen[name] = true
		if _, ok := known[name]; !ok {
			fresh = append(fresh, name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := s.discoverAll(ctx, fresh, condemned); err != nil {
		return err
	}
	var l lost
	for name, id := range known {
		p, _ := s.index.remotePack(id)
		switch at, isCondemned := condemned[name]; {
		case !seen[name]:
			if err := s.vanished(id, &l); err != nil {
				return err
			}
		case isCondemned && p.Condemned.IsZero():
			p.Condemned = at
			if err := s.index.setRemote(id, &p); err != nil {
				return err
			}
		}
	}
	if len(l.ids) > 0 {
		if err := s.findAgain(ctx); err != nil {
			return err
		}
		s.report(&l)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refreshed = began
	return nil
}

// discoverBatch is how many index objects are fetched at once.
const discoverBatch = 16

// discoverAll takes up packs that the bucket has.
func (s *Store) discoverAll(ctx context.Context, names []string, condemned map[string]time.Time) error {
	for batch := range slices.Chunk(names, discoverBatch) {
		frames, errs := make([]packFrames, len(batch)), make([]error, len(batch))
		var wg sync.WaitGroup
		for i, name := range batch {
			wg.Go(func() { frames[i], errs[i] = s.remote.frames(ctx, name) })
		}
		wg.Wait()
		for i, name := range batch {
			switch err := errs[i]; {
			case errors.Is(err, flox.ErrNotFound): // removed meanwhile
			case errors.Is(err, flox.ErrCorrupt):
				s.log.Error("pack in the bucket passed over", "pack", name, "error", err)
			case err != nil:
				return err
			default:
				if err := s.discover(name, condemned[name], frames[i]); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// discover takes up a pack that the bucket has.
func (s *Store) discover(name string, condemned time.Time, frames packFrames) error {
	id, ours := s.remote.numberOf(name)
	if !ours {
		s.mu.Lock()
		s.lastID++
		id = s.lastID
		s.mu.Unlock()
	} else {
		s.mu.Lock()
		s.lastID = max(s.lastID, id)
		s.mu.Unlock()
	}
	return s.indexEntries(s.index, id, remotePack{Name: name, Size: frames.size, Condemned: condemned}, frames.of(id))
}

// indexRemote brings the frames of a pack in the bucket into x, unless they are in a
// better place: here, or in a pack of this server.
func (s *Store) indexRemote(ctx context.Context, x *index, id uint32, p remotePack) error {
	frames, err := s.remote.frames(ctx, p.Name)
	if err != nil {
		return err
	}
	return s.indexEntries(x, id, p, frames.of(id))
}

// indexEntries is indexRemote with the frames at hand.
func (s *Store) indexEntries(x *index, id uint32, p remotePack, entries []packEntry) error {
	if s.hasLocal(id) || !p.Condemned.IsZero() {
		// The frames are known, or were moved before it was condemned.
		return x.setRemote(id, &p)
	}
	c := x.change()
	for _, e := range entries {
		at, err := c.find(e.id)
		if err == nil {
			better, isRemote := x.remotePack(at.pack)
			if at.pack == id || !isRemote || better.Condemned.IsZero() && s.remote.owns(better.Name) {
				continue
			}
		} else if !errors.Is(err, flox.ErrNotFound) {
			return errors.Join(err, c.batch.Close())
		}
		if err := c.set(e.id, e.loc); err != nil {
			return errors.Join(err, c.batch.Close())
		}
	}
	c.indexed(id, p.Size)
	if err := c.commit(); err != nil {
		return err
	}
	return x.setRemote(id, &p)
}

// vanished lets a pack go that the bucket no longer has; one that is here whole is
// uploaded again.
func (s *Store) vanished(id uint32, l *lost) error {
	p, _ := s.index.remotePack(id)
	if s.hasLocal(id) && p.Condemned.IsZero() {
		s.log.Error("pack is gone from the bucket, uploading it again", "pack", p.Name)
		s.remote.cache.forgetPack(id)
		return s.index.setRemote(id, nil)
	}
	if err := s.dropLost(id, 0, l); err != nil {
		return err
	}
	s.dropLocal(id)
	s.remote.cache.forgetPack(id)
	return s.index.setRemote(id, nil)
}

// findAgain looks for blocks whose pack is gone in the others.
func (s *Store) findAgain(ctx context.Context) error {
	for id, p := range s.index.remotes() {
		if err := s.indexRemote(ctx, s.index, id, p); err != nil && !errors.Is(err, flox.ErrNotFound) && !errors.Is(err, flox.ErrCorrupt) {
			return err
		}
	}
	return nil
}

// Find looks for blocks that are not in the index in every pack of the bucket, and
// says which are there now: one that this server's sweep forgot while another made
// it live again may still lie in a pack. It reads every pack's index.
func (s *Store) Find(ctx context.Context, ids []flox.CID) ([]bool, error) {
	if s.remote == nil {
		return s.Has(ctx, ids)
	}
	wanted := make(map[flox.CID]bool, len(ids))
	for _, id := range ids {
		wanted[id] = true
	}
	if err := s.findWanted(ctx, wanted); err != nil {
		return nil, fmt.Errorf("block store %s: find %d blocks: %w", s.cfg.Dir, len(ids), err)
	}
	return s.Has(ctx, ids)
}

func (s *Store) findWanted(ctx context.Context, wanted map[flox.CID]bool) error {
	if err := s.writing.lock(ctx); err != nil {
		return err
	}
	defer s.writing.unlock()
	if err := s.refresh(ctx); err != nil {
		return err
	}
	for id, p := range s.index.remotes() {
		if !p.Condemned.IsZero() {
			continue
		}
		frames, err := s.remote.frames(ctx, p.Name)
		if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrCorrupt) {
			continue
		}
		if err != nil {
			return err
		}
		c := s.index.change()
		for _, e := range frames.of(id) {
			if _, err := c.find(e.id); wanted[e.id] && errors.Is(err, flox.ErrNotFound) {
				if err := c.set(e.id, e.loc); err != nil {
					return errors.Join(err, c.batch.Close())
				}
			}
		}
		if err := c.commit(); err != nil {
			return err
		}
	}
	return nil
}

// Refresh looks at once what is in the bucket, as Run does now and then. Errors:
// ErrUnreachable, ErrDenied; ErrBadInput without a bucket.
func (s *Store) Refresh(ctx context.Context) error {
	if s.remote == nil {
		return fmt.Errorf("block store %s has no bucket: %w", s.cfg.Dir, flox.ErrBadInput)
	}
	if err := s.writing.lock(ctx); err != nil {
		return err
	}
	defer s.writing.unlock()
	if err := s.refresh(ctx); err != nil {
		return fmt.Errorf("block store %s: %w", s.cfg.Dir, err)
	}
	return nil
}

// missPause is how long it is at least between two looks at the bucket because of
// blocks that are not in the index.
const missPause = time.Second

// lookAgain is Refresh for a block that is not in the index: what another server
// has put into the bucket is valid at once, and Run comes by later. However many
// wait for it, one looks for all; nobody waits when the last look was for nothing.
func (s *Store) lookAgain(ctx context.Context, id flox.CID) error {
	r, missed := s.remote, time.Now()
	r.mu.Lock()
	wait, inVain := missPause-time.Since(r.refreshed), time.Since(r.inVain) < missPause
	r.mu.Unlock()
	if wait > 0 && inVain {
		return nil
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := s.writing.lock(ctx); err != nil {
		return err
	}
	defer s.writing.unlock()
	r.mu.Lock()
	looked := r.refreshed.After(missed)
	r.mu.Unlock()
	if !looked {
		if err := s.refresh(ctx); err != nil {
			return err
		}
	}
	if _, err := s.lookup(id); errors.Is(err, flox.ErrNotFound) {
		r.mu.Lock()
		r.inVain = time.Now()
		r.mu.Unlock()
	}
	return nil
}

// openRemote brings the index up to the bucket at Open. With a bucket that is away
// a store that knew it before goes on with what it knew.
func (s *Store) openRemote() error {
	// Every call of the bucket is bounded; all of them may take long.
	if err := s.refresh(context.Background()); err != nil {
		if len(s.index.remotes()) == 0 {
			return fmt.Errorf("block store %s: what is in the bucket is not known yet: %w", s.cfg.Dir, err)
		}
		s.log.Error("bucket is away, going on with what is known of it", "bucket", s.remote.Bucket.String(), "error", err)
	}
	for id := range s.index.remotes() {
		if size, ok := s.sizes[id]; ok {
			s.remote.cache.addPack(id, size)
		}
	}
	return nil
}

// tend is what Run does for the bucket now and then.
func (s *Store) tend(ctx context.Context) {
	err := s.Refresh(ctx)
	if err == nil && len(s.unplaced()) > 0 {
		err = s.Sync(ctx)
	}
	if err != nil && ctx.Err() == nil {
		s.log.Warn("bucket", "error", err)
	}
}
