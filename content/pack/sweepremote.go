package pack

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/floxctl/flox"
)

// A pack of less than PackSize/smallPack is small; smallPacks of them are joined.
const (
	smallPack  = 4
	smallPacks = 8
)

// sweeps says whether a block with this index entry is this server's to forget.
func (s *Store) sweeps(entry []byte) bool {
	if s.remote == nil {
		return true
	}
	l, err := parseLoc(entry)
	p, placed := s.index.remotePack(l.pack)
	return err == nil && (!placed || s.remote.owns(p.Name))
}

// sparseRemote lists this server's packs in the bucket that are to be rewritten; mu
// and index.mu are held.
func (s *Store) sparseRemote() []uint32 {
	var ids, small []uint32
	for id, p := range s.index.remote {
		switch live := s.index.packs[id].live; {
		case !p.Condemned.IsZero() || !s.remote.owns(p.Name):
		case 2*live < p.Size:
			ids = append(ids, id)
		case p.Size < s.cfg.PackSize/smallPack:
			small = append(small, id)
		}
	}
	if len(small) >= smallPacks {
		ids = append(ids, small...)
	}
	s.emptiestFirst(ids)
	return ids
}

// condemn says in the bucket that a pack goes after the grace. Until then other
// servers may read it, but count on nothing in it. writing is held.
func (s *Store) condemn(ctx context.Context, id uint32) (size int64, err error) {
	p, ok := s.index.remotePack(id)
	if !ok {
		return 0, nil
	}
	p.Condemned = time.Now()
	text := p.Condemned.UTC().Format(time.RFC3339) + "\n"
	if err := s.remote.put(ctx, condemnedPrefix+p.Name, strings.NewReader(text)); err != nil {
		return 0, err
	}
	c := s.index.change()
	if err := errors.Join(c.dropPack(id), c.commit(), s.index.setRemote(id, &p)); err != nil {
		return 0, err
	}
	s.remote.cache.forgetPack(id)
	s.dropLocal(id)
	return p.Size, nil
}

// removeCondemned removes this server's packs whose grace is over. A block in one
// that is live after all, since another server counted on it before it saw that the
// pack was condemned, is moved first.
func (s *Store) removeCondemned(ctx context.Context, live func(flox.CID) bool) (freed int64, err error) {
	for id, p := range s.index.remotes() {
		if p.Condemned.IsZero() || !s.remote.owns(p.Name) || time.Since(p.Condemned) < s.remote.Grace {
			continue
		}
		frames, err := s.remote.frames(ctx, p.Name)
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return freed, err
		}
		if err := s.rescue(ctx, p, frames.of(id), live); err != nil {
			return freed, err
		}
		// The index first: a pack without one is not there.
		for _, prefix := range []string{indexPrefix, packPrefix, condemnedPrefix} {
			if err := s.remote.Bucket.Delete(ctx, prefix+p.Name); err != nil {
				return freed, err
			}
		}
		if err := s.writing.lock(ctx); err != nil {
			return freed, err
		}
		err = s.index.setRemote(id, nil)
		s.writing.unlock()
		if err != nil {
			return freed, err
		}
		freed += p.Size
	}
	return freed, s.removeOrphans(ctx)
}

// rescue moves what is live and nowhere else out of a condemned pack.
func (s *Store) rescue(ctx context.Context, p remotePack, entries []packEntry, live func(flox.CID) bool) error {
	var buf []byte
	rescued := 0
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.mu.RLock()
		there, err := s.has(e.id)
		pinned := s.pinned(e.id)
		s.mu.RUnlock()
		if err != nil {
			return err
		}
		if there || !pinned && !live(e.id) {
			continue
		}
		h, _, err := s.readRemote(ctx, &buf, e.id, e.loc, p)
		if err != nil {
			return fmt.Errorf("block %s of %s: %w", e.id, p.Name, err)
		}
		s.mu.Lock()
		if err = s.usable(); err == nil {
			_, err = s.write(h, buf[:e.frameSize()])
		}
		s.mu.Unlock()
		if err != nil {
			return err
		}
		rescued++
	}
	if rescued == 0 {
		return nil
	}
	s.log.Warn("blocks of a condemned pack are in use again", "pack", p.Name, "blocks", rescued)
	return s.Sync(ctx)
}

// removeOrphans removes this server's packs whose upload never ended.
func (s *Store) removeOrphans(ctx context.Context) error {
	known := make(map[string]bool)
	for _, p := range s.index.remotes() {
		known[p.Name] = true
	}
	for _, id := range s.unplaced() {
		known[s.remote.nameOf(id)] = true
	}
	var orphans []string
	own := s.remote.Server + "/"
	err := s.remote.list(ctx, packPrefix+own, func(name string, at time.Time) error {
		if !known[own+name] && time.Since(at) > s.remote.Grace {
			orphans = append(orphans, packPrefix+own+name)
		}
		return nil
	})
	for _, name := range orphans {
		if err == nil {
			err = s.remote.Bucket.Delete(ctx, name)
		}
	}
	return err
}
