package pack

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/floxctl/flox"
)

// recover brings the index up to the packs, and cuts off torn tails.
func (s *Store) recover(l *lost) error {
	ids, err := s.packIDs()
	if err != nil {
		return err
	}
	l.fresh = len(ids) > 0 && len(s.index.packs) == 0
	cut := false // the last pack
	for _, id := range ids {
		var size int64
		size, cut, err = s.recoverPack(id, l)
		if err != nil {
			return fmt.Errorf("pack %d: %w", id, err)
		}
		s.sizes[id] = size
	}
	// A pack's number is not given again, or a Cursor into it would hide what comes.
	known := maps.Clone(s.index.packs)
	for id, p := range known {
		s.lastID = max(s.lastID, id)
		if _, ok := s.index.remote[id]; ok {
			continue // it need not be here
		}
		if size := s.sizes[id]; size < p.indexed {
			if err := s.dropLost(id, size, l); err != nil {
				return fmt.Errorf("pack %d: %w", id, err)
			}
		}
	}
	for id := range s.index.remote {
		s.lastID = max(s.lastID, id)
	}
	if len(ids) == 0 {
		return nil
	}
	// Go on in the last pack, unless it is full or damaged, or was cut: a Cursor may
	// be behind its end.
	last := ids[len(ids)-1]
	s.lastID = max(s.lastID, last)
	if size := s.sizes[last]; last == s.lastID && s.remote == nil && size < s.cfg.PackSize && size >= int64(len(fileMagic)) && size == s.index.packs[last].indexed && !cut {
		if s.active, err = os.OpenFile(s.packPath(last), os.O_RDWR, 0); err != nil {
			return err
		}
		s.activeID, s.size, s.syncedSize, s.begun = last, size, size, size
		delete(s.sizes, last)
	}
	return nil
}

// packIDs lists the packs, the oldest first.
func (s *Store) packIDs() ([]uint32, error) {
	names, err := os.ReadDir(filepath.Join(s.cfg.Dir, "packs"))
	if err != nil {
		return nil, err
	}
	var ids []uint32
	for _, n := range names {
		base, ok := strings.CutSuffix(n.Name(), ".pack")
		id, err := strconv.ParseUint(base, 10, 32)
		if !ok || err != nil {
			s.log.Warn("unknown file among the packs", "name", n.Name())
			continue
		}
		ids = append(ids, uint32(id))
	}
	slices.Sort(ids)
	return ids, nil
}

// recoverBatch is how many frames go to the index at once.
const recoverBatch = 10_000

// recoverPack indexes the frames of a pack that the index does not know, and
// gives the pack's size, and whether its torn end was cut off.
func (s *Store) recoverPack(id uint32, l *lost) (size int64, cut bool, err error) {
	f, err := os.OpenFile(s.packPath(id), os.O_RDWR, 0)
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, false, err
	}
	size, err = s.mendStart(id, f, st.Size())
	if err != nil {
		return 0, false, err
	}
	from := s.index.packs[id].indexed
	if size <= from {
		return size, false, nil // if it is shorter than it was: dropLost
	}
	// What was not synced may still be in the page cache only: the index must
	// not be ahead of the pack.
	if err := f.Sync(); err != nil {
		return 0, false, err
	}
	end, err := s.indexFrames(s.index, id, f, size, false, l)
	if err != nil {
		return 0, false, err
	}
	if end < size {
		// Most likely never acknowledged; but damage to what was looks the same.
		cut, l.unnamed = true, true
		s.log.Warn("torn end of a pack cut off", "pack", s.packPath(id), "bytes", size-end)
		if err := errors.Join(f.Truncate(end), f.Sync()); err != nil {
			return 0, false, err
		}
	}
	return end, cut, nil
}

// mendStart puts the bytes before a pack's first frame right, and gives the pack's size
// then: a scrub does so for packs that have frames, and one may be cut there.
func (s *Store) mendStart(id uint32, f *os.File, size int64) (int64, error) {
	got := make([]byte, len(fileMagic))
	if _, err := f.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	if string(got) == fileMagic {
		return size, nil
	}
	s.log.Warn("damaged start of a pack repaired", "pack", s.packPath(id), "bytes", size)
	if _, err := f.WriteAt([]byte(fileMagic), 0); err != nil {
		return 0, err
	}
	return max(size, int64(len(fileMagic))), f.Sync()
}

// indexFrames indexes the frames of a pack of some size that x does not know, and
// gives their end. ended says that nothing is to come behind that.
func (s *Store) indexFrames(x *index, id uint32, f io.ReaderAt, size int64, ended bool, l *lost) (end int64, err error) {
	from := max(x.packs[id].indexed, int64(len(fileMagic)))
	c, n := x.change(), 0
	end, skipped, err := scan(f, from, size, func(off int64, h header) error {
		if n++; n%recoverBatch == 0 {
			c.indexed(id, off)
			if err := c.commit(); err != nil {
				return err
			}
			c = x.change()
		}
		return c.set(h.id, loc{pack: id, off: uint32(off), plain: h.plain, stored: h.stored, enc: h.enc})
	}, func(_ int64, h header) { l.add(h.id) })
	if err != nil {
		return 0, errors.Join(err, c.batch.Close())
	}
	if skipped > 0 {
		l.unnamed = true // a frame whose header is damaged does not say whose it is
		s.log.Error("damaged frames passed over", "pack", s.packPath(id), "bytes", skipped)
	}
	if end = min(max(end, int64(len(fileMagic))), size); ended {
		end = size
	}
	c.indexed(id, end)
	return end, c.commit()
}

// dropLost forgets the blocks that lay in a pack behind its present size, so that
// Put takes them again. A pack of size 0 is gone: after a crash also one that a
// sweep removed, whose live blocks were found elsewhere by now.
func (s *Store) dropLost(pack uint32, size int64, l *lost) error {
	c, n := s.index.change(), 0
	err := s.index.frames(pack, func(id flox.CID, off uint32) error {
		at, err := c.find(id)
		if err != nil || at.pack != pack || at.off != off || int64(off)+at.frameSize() <= size {
			return err
		}
		n++
		l.add(id)
		return c.remove(id)
	})
	if err != nil {
		return errors.Join(err, c.batch.Close())
	}
	if n > 0 {
		s.log.Error("a pack is shorter than it was, blocks are lost here", "pack", s.packPath(pack), "bytes", size, "blocks", n)
	}
	if c.indexed(pack, size); size == 0 {
		if err := c.dropPack(pack); err != nil {
			return err
		}
	}
	return c.commit()
}

// damaged is what a reader says of a frame that is not as the index has it.
func (s *Store) damaged(id flox.CID, l loc, err error) error {
	return fmt.Errorf("block %s in %s at %d: %w", id, s.packPath(l.pack), l.off, err)
}
