package pack

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/floxctl/flox"
)

// lost collects blocks that may be gone: the index knew them, or a frame's header
// names them.
type lost struct {
	ids map[flox.CID]struct{}
	// fresh says that the index was made anew from nothing: what it had known and the
	// packs no longer have cannot be named.
	fresh bool
	// unnamed says that packs hold bytes that are no frame, and may have been one
	// that no index knew yet.
	unnamed bool
}

// maxLost bounds how many blocks are named; of more, and of an index that cannot be
// read, only the zero CID tells.
const maxLost = 1 << 20

func (l *lost) add(id flox.CID) {
	if l.ids == nil {
		l.ids = make(map[flox.CID]struct{})
	}
	if len(l.ids) == maxLost {
		l.fresh = true
		return
	}
	l.ids[id] = struct{}{}
}

// addGone adds what old knows and the store does not.
func (l *lost) addGone(s *Store, old *index) {
	// Where a table is damaged an iterator ends: many short ones see more.
	for first := range 256 {
		err := old.each(keyBlock, []byte{byte(first)}, func(k, _ []byte) error {
			if len(k) != 1+flox.CIDSize {
				return nil
			}
			if _, err := s.lookup(flox.CID(k[1:])); errors.Is(err, flox.ErrNotFound) {
				l.add(flox.CID(k[1:]))
			}
			return nil
		})
		if err != nil {
			l.fresh = true
		}
	}
}

// report tells Config.Lost what is not there after all.
func (s *Store) report(l *lost) {
	n := 0
	for id := range l.ids {
		if _, err := s.lookup(id); !errors.Is(err, flox.ErrNotFound) {
			continue
		}
		n++
		if s.cfg.Lost != nil {
			s.cfg.Lost(id)
		}
	}
	if n > 0 {
		s.log.Error("blocks are lost here", "dir", s.cfg.Dir, "blocks", n)
	}
	if (l.fresh || l.unnamed) && s.cfg.Lost != nil {
		s.cfg.Lost(flox.CID{})
	}
}

// loadIndex opens the index and brings it up to the packs. One that is damaged is
// made anew.
func (s *Store) loadIndex() error {
	name := currentIndex(s.cfg.Dir)
	if err := removeOldIndexes(s.cfg.Dir, name); err != nil {
		return err
	}
	path := filepath.Join(s.cfg.Dir, name)
	x, err := openIndex(s.indexFS, path, s.log, s.foundRot)
	_, noteErr := os.Stat(filepath.Join(s.cfg.Dir, damagedName))
	var l lost
	if err == nil && noteErr != nil && !x.rotten() {
		s.index = x
		if err = s.recover(&l); err == nil {
			s.report(&l)
			return nil
		}
		s.index = nil
		if s.active != nil {
			s.active.Close()
			s.active = nil
		}
	}
	if errors.Is(err, os.ErrPermission) || isFull(err) || err != nil && x != nil && !errors.Is(err, flox.ErrCorrupt) {
		if x != nil {
			err = errors.Join(err, x.db.Close())
		}
		return err
	}
	s.log.Warn("index is damaged, making it anew from the packs", "dir", path, "error", err)
	fresh, err := newIndexDir(s.cfg.Dir, name)
	if err == nil {
		clear(s.sizes)
		s.lastID = 0
		s.index, err = openIndex(s.indexFS, fresh, s.log, s.foundRot)
	}
	if err == nil {
		err = s.recover(&l)
	}
	if err == nil {
		err = errors.Join(s.index.db.Flush(), useIndex(s.cfg.Dir, fresh))
	}
	if x != nil {
		x.db.rotten.Store(true) // known by now
		if err == nil {
			l.fresh = false // x says it, if it can be read
			l.addGone(s, x)
		}
		s.closeOld(x.db)
	}
	if err != nil {
		return err
	}
	s.report(&l)
	return os.RemoveAll(path)
}

// closeOld closes an index that is no longer used, and may be damaged.
func (s *Store) closeOld(db *indexDB) {
	if err := db.Close(); err != nil {
		s.log.Warn("damaged index not closed well", "dir", db.dir, "error", err)
	}
}

// foundRot notes damage of the index, for Run and for the next Open.
func (s *Store) foundRot(err error) {
	s.log.Error("index is damaged", "dir", s.cfg.Dir, "error", err)
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, damagedName), nil, 0o644); err != nil {
		s.log.Error("damaged index not noted", "dir", s.cfg.Dir, "error", err)
	}
	select {
	case s.rot <- struct{}{}:
	default:
	}
}

// mendAgain is how long Run waits after it could not make the index anew.
const mendAgain = 30 * time.Second

// Run looks now and then what other servers put into the bucket and uploads what it
// does not have yet. It makes a damaged index anew as soon as damage is found, until ctx ends, while
// the store is used: what the index has lost cannot be read meanwhile, and nothing
// is forgotten. Without Run the next Open does it.
func (s *Store) Run(ctx context.Context) error {
	var refresh <-chan time.Time
	if s.remote != nil {
		tick := time.NewTicker(s.remote.Refresh)
		defer tick.Stop()
		refresh = tick.C
	}
	for {
		select {
		case <-s.rot:
		case <-refresh:
			s.tend(ctx)
		case <-ctx.Done():
			return nil
		}
		for s.index.rotten() {
			err := s.mend(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				break
			}
			s.log.Error("index not made anew, trying again", "dir", s.cfg.Dir, "error", err, "wait", mendAgain)
			select {
			case <-time.After(mendAgain):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// mend makes the index anew beside the damaged one and goes over to it.
func (s *Store) mend(ctx context.Context) (err error) {
	fresh, err := newIndexDir(s.cfg.Dir, filepath.Base(s.index.db.dir))
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	next, err := openIndex(s.indexFS, fresh, s.log, s.foundRot)
	if err != nil {
		return err
	}
	var l lost
	// Most of it while others write. Packs only grow, and none is removed meanwhile.
	var old *indexDB
	if err = s.indexPacks(ctx, next, s.durable(), &l); err == nil && s.remote != nil {
		err = s.indexRemotes(ctx, next)
	}
	if err == nil {
		old, err = s.goOver(ctx, next, &l)
	}
	if err != nil {
		return errors.Join(err, next.db.Close(), os.RemoveAll(fresh))
	}
	s.log.Info("index made anew", "dir", fresh, "blocks", s.Stat().Blocks)
	l.addGone(s, &index{db: old})
	s.report(&l)
	select {
	case <-old.retire():
		s.closeOld(old)
		return os.RemoveAll(old.dir)
	case <-ctx.Done():
		// Somebody still reads it: Close closes it, the next Open removes it.
		s.mu.Lock()
		s.retired = append(s.retired, old)
		s.mu.Unlock()
		return ctx.Err()
	}
}

// goOver brings next up to the packs and makes it the index in use.
func (s *Store) goOver(ctx context.Context, next *index, l *lost) (old *indexDB, err error) {
	if err := s.writing.lock(ctx); err != nil {
		return nil, err
	}
	defer s.writing.unlock()
	if err := s.flush(); err != nil {
		return nil, err
	}
	if err := s.indexPacks(ctx, next, s.durable(), l); err != nil {
		return nil, err
	}
	for id, p := range s.index.remotes() {
		if _, ok := next.remotePack(id); ok {
			continue // all but what was uploaded meanwhile
		}
		if err := next.setRemote(id, &p); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(next.db.Flush(), useIndex(s.cfg.Dir, next.db.dir)); err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old = s.index.replace(next)
	for id, at := range s.pending {
		if int64(at.off) < s.index.packs[at.pack].indexed {
			delete(s.pending, id)
		}
	}
	return old, nil
}

// indexRemotes brings into next what is known of the bucket.
func (s *Store) indexRemotes(ctx context.Context, next *index) error {
	for id, p := range s.index.remotes() {
		if err := s.indexRemote(ctx, next, id, p); err != nil && !errors.Is(err, flox.ErrNotFound) {
			return err
		}
	}
	return nil
}

// durable gives how much of each pack is durable.
func (s *Store) durable() map[uint32]int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sizes := maps.Clone(s.sizes)
	for _, p := range s.unsynced {
		sizes[p.id] = p.synced
	}
	if s.active != nil {
		sizes[s.activeID] = s.syncedSize
	}
	return sizes
}

// indexPacks indexes in x the packs of these sizes, the oldest first.
func (s *Store) indexPacks(ctx context.Context, x *index, sizes map[uint32]int64, l *lost) error {
	for _, id := range slices.Sorted(maps.Keys(sizes)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if sizes[id] <= x.packs[id].indexed {
			continue
		}
		f, err := os.Open(s.packPath(id))
		if errors.Is(err, iofs.ErrNotExist) {
			l.fresh = true // somebody else took it
			continue
		}
		if err != nil {
			return err
		}
		st, err := f.Stat()
		if err == nil {
			_, err = s.indexFrames(x, id, f, min(st.Size(), sizes[id]), true, l)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("pack %d: %w", id, err)
		}
	}
	return nil
}
