package pack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/ballast"
)

// Swept is what a Sweep did.
type Swept struct {
	Blocks uint64 // forgotten
	Bytes  int64  // given back to the disk
}

// sweepBatch is how many blocks are forgotten under the lock at once.
const sweepBatch = 1024

// Sweep is SweepMarked with a live that needs no making: what it says of a block
// must be as of its call.
func (s *Store) Sweep(ctx context.Context, live func(flox.CID) bool) (Swept, error) {
	return s.SweepMarked(ctx, func(context.Context) (func(flox.CID) bool, error) { return live, nil })
}

// SweepMarked forgets every block that is not live and that no Session counts on,
// and rewrites packs that hold mostly such blocks. live may be as of any moment in
// mark: a Session open at some time since then counts, also when it was closed.
func (s *Store) SweepMarked(ctx context.Context, mark func(context.Context) (live func(flox.CID) bool, err error)) (Swept, error) {
	defer s.linger()()
	var done Swept
	if s.remote != nil {
		if err := s.Refresh(ctx); err != nil {
			return done, err
		}
	}
	live, err := mark(ctx)
	if err != nil {
		return done, fmt.Errorf("sweep %s: %w", s.cfg.Dir, err)
	}
	var dead []flox.CID
	forget := func() error {
		n, err := s.forget(ctx, dead, s.pinned)
		done.Blocks += n
		dead = dead[:0]
		return err
	}
	// What comes in from here on is not seen: the iterator is a snapshot.
	err = s.index.each(keyBlock, nil, func(k, v []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(k) != 1+flox.CIDSize {
			return fmt.Errorf("an index key of %d bytes: %w", len(k), flox.ErrCorrupt)
		}
		if id := flox.CID(k[1:]); s.sweeps(v) && !live(id) {
			dead = append(dead, id)
		}
		if len(dead) < sweepBatch {
			return nil
		}
		return forget()
	})
	if err == nil {
		err = forget()
	}
	if err == nil {
		done.Bytes, err = s.compact(ctx)
	}
	if err == nil && s.remote != nil {
		var freed int64
		freed, err = s.removeCondemned(ctx, live)
		done.Bytes += freed
	}
	if err != nil {
		return done, fmt.Errorf("sweep %s: %w", s.cfg.Dir, err)
	}
	return done, nil
}

// compact gives back the room of packs of which less than half is used, also of the
// one that is written to.
func (s *Store) compact(ctx context.Context) (freed int64, err error) {
	full, err := s.leaveSparse(ctx)
	if err != nil {
		return 0, err
	}
	if freed, err = s.rewrite(ctx); err != nil || !full || freed <= 0 {
		return freed, err
	}
	// Now there is room for the pack that the disk was too full for.
	if _, err = s.leaveSparse(ctx); err != nil {
		return freed, err
	}
	more, err := s.rewrite(ctx)
	return freed + more, err
}

// minLeave is the size in bytes from which on a sweep leaves the pack that is written
// to, so that it can be rewritten. Below that it is not worth it.
const minLeave = 1 << 20

// leaveSparse begins a new pack if less than half of the last one is used: the last one
// itself is never rewritten. full says that the disk has no room for a new one.
func (s *Store) leaveSparse(ctx context.Context) (full bool, err error) {
	if s.remote != nil {
		return false, nil // what is in the bucket does not grow
	}
	if err := s.writing.lock(ctx); err != nil {
		return false, err
	}
	defer s.writing.unlock()
	switch left, err := s.leave(); {
	case isFull(err):
		s.log.Warn("no room for a new pack, the last one keeps its dead blocks for now", "dir", s.cfg.Dir, "error", err)
		return true, nil
	case err != nil:
		return false, diskError(err, "new pack in "+s.cfg.Dir)
	case !left:
		return false, nil
	}
	return false, s.flush() // a Sync does nothing where nothing was put
}

// leave is leaveSparse without what is needed around it; writing is held. The new pack
// is there before anything changes: its file keeps the number of the last one from being
// given again when that is gone.
func (s *Store) leave() (left bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return false, err
	}
	last := sealed{id: s.lastID, size: s.sizes[s.lastID]}
	if s.active != nil {
		last = sealed{s.activeID, s.active, s.size, s.syncedSize}
	}
	s.index.mu.Lock()
	p := s.index.packs[last.id]
	s.index.mu.Unlock()
	// What the index does not have yet is live.
	if last.size < minLeave || 2*(p.live+last.size-p.indexed) >= last.size {
		return false, nil
	}
	if err := s.newPack(); err != nil {
		return false, err
	}
	if last.file != nil {
		s.ended(last)
	}
	return true, nil
}

// rewrite moves what is live in packs of which less than half is used, and removes them.
// With a bucket it also joins small ones, and they are only condemned.
func (s *Store) rewrite(ctx context.Context) (freed int64, err error) {
	var moved []uint32
	bytes := int64(0)
	finish := func() error {
		// The moved blocks must be durable before the packs go. That the index still
		// names a pack after a crash does no harm: Open finds the blocks where they
		// are, and forgets the rest.
		if err := s.Sync(ctx); err != nil {
			return err
		}
		for _, id := range moved {
			n, err := s.removePack(ctx, id)
			if err != nil {
				return err
			}
			freed += n
		}
		freed -= bytes
		moved, bytes = moved[:0], 0
		return nil
	}
	for _, id := range s.sparse() {
		if fits, err := s.fits(id); err != nil {
			return freed, err
		} else if !fits {
			s.log.Warn("no room for what is live in a pack, it keeps its dead blocks for now", "pack", s.packPath(id))
			continue
		}
		n, err := s.movePack(ctx, id)
		if errors.Is(err, flox.ErrCorrupt) {
			// Moving what is left of it would not repair it: scrub says what is lost.
			s.log.Error("damaged pack not rewritten", "pack", s.packPath(id), "err", err)
			continue
		}
		if err != nil {
			return freed, err
		}
		moved, bytes = append(moved, id), bytes+n
		// A full disk needs its room back at once, a bucket large packs.
		if s.remote == nil || bytes >= s.cfg.PackSize {
			if err := finish(); err != nil {
				return freed, err
			}
		}
	}
	if len(moved) == 0 {
		return freed, nil
	}
	return freed, finish()
}

// fits reports whether the disk has room for what is live in a pack, beside the pack. A
// move that ends halfway would leave the disk full, with the same blocks twice.
func (s *Store) fits(id uint32) (bool, error) {
	s.index.mu.Lock()
	live := s.index.packs[id].live
	s.index.mu.Unlock()
	if s.remote != nil || live == 0 {
		return true, nil
	}
	free, err := s.free()
	return free >= live, err
}

// free gives the bytes that are free on the store's disk.
func (s *Store) free() (int64, error) {
	_, free, err := ballast.Disk(s.cfg.Dir)
	if err != nil {
		return 0, fmt.Errorf("block store %s: free space: %w", s.cfg.Dir, err)
	}
	return free, nil
}

// sparse lists the full, durable packs of which less than half is used, the
// emptiest first, so that even a full disk gains room.
func (s *Store) sparse() []uint32 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.index.mu.Lock()
	defer s.index.mu.Unlock()
	if s.remote != nil {
		return s.sparseRemote()
	}
	var ids []uint32
	for id, size := range s.sizes {
		// A pack whose frames are not all in the index holds blocks that live does
		// not count. The last pack stays, also when it is full (leaveSparse): its number
		// must not be given again, or a Cursor into it would hide what comes.
		if p := s.index.packs[id]; p.indexed >= size && 2*p.live < size && id != s.lastID {
			ids = append(ids, id)
		}
	}
	s.emptiestFirst(ids)
	return ids
}

// emptiestFirst sorts packs; index.mu is held.
func (s *Store) emptiestFirst(ids []uint32) {
	slices.SortFunc(ids, func(a, b uint32) int { return cmp.Compare(s.index.packs[a].live, s.index.packs[b].live) })
}

// movePack moves a pack's blocks to the active one and says how many bytes that
// were.
func (s *Store) movePack(ctx context.Context, id uint32) (moved int64, err error) {
	var buf []byte
	err = s.index.frames(id, func(block flox.CID, off uint32) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		l, err := s.lookup(block)
		if err != nil || l.pack != id || l.off != off {
			if errors.Is(err, flox.ErrNotFound) {
				err = nil // forgotten meanwhile
			}
			return err
		}
		h, stored, err := s.readFrame(ctx, &buf, block, l)
		if err == nil {
			err = h.check(stored)
		}
		if err != nil {
			return s.damaged(block, l, err)
		}
		moved += l.frameSize()
		return s.move(h, buf[:l.frameSize()], l)
	})
	return moved, err
}

// removePack removes a pack whose blocks are elsewhere, and gives its size.
func (s *Store) removePack(ctx context.Context, id uint32) (size int64, err error) {
	if err := s.writing.lock(ctx); err != nil {
		return 0, err
	}
	defer s.writing.unlock()
	if p := s.index.packs[id]; p.live != 0 {
		return 0, fmt.Errorf("pack %d still has %d bytes of blocks: %w", id, p.live, flox.ErrCorrupt)
	}
	if err := s.index.sound(); err != nil {
		return 0, err
	}
	if s.remote != nil {
		return s.condemn(ctx, id)
	}
	c := s.index.change()
	if err := errors.Join(c.dropPack(id), c.commit()); err != nil {
		return 0, err
	}
	s.mu.Lock()
	size = s.sizes[id]
	delete(s.sizes, id)
	s.mu.Unlock()
	s.files.forget(id)
	if err := os.Remove(s.packPath(id)); err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return 0, err
	}
	return size, nil
}

// move appends a frame that lies at old, if it still does.
func (s *Store) move(h header, frame []byte, old loc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	if now, err := s.index.find(h.id); err != nil || now != old {
		if errors.Is(err, flox.ErrNotFound) {
			err = nil
		}
		return err
	}
	_, err := s.write(h, frame)
	return err
}
