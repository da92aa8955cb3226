package pack

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"

	"github.com/floxctl/flox"
)

// maxPending is how many frames may wait for a Sync before a Put does one.
const maxPending = 1 << 16

// checkSpace is how many bytes are appended between two looks at the free space.
const checkSpace = 4 << 20

// frameBuffers holds memory in which frames are made.
var frameBuffers = sync.Pool{New: func() any { return new([]byte) }}

// Put appends a block, compressed where that helps, unless it is there already.
// It is durable after Sync. Errors: ErrCorrupt if data does not hash to id,
// ErrFull with nothing changed, ErrClosed.
func (s *Store) Put(ctx context.Context, id flox.CID, data []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkPlain("put", id, data); err != nil {
		return err
	}
	return s.putFrame(ctx, id, func(buf *[]byte) header { return s.encode(buf, id, data) })
}

// putFrame appends the frame that encode makes, unless the block is there already.
func (s *Store) putFrame(ctx context.Context, id flox.CID, encode func(buf *[]byte) header) error {
	s.mu.RLock()
	there, err := s.has(id)
	synced := s.synced
	s.mu.RUnlock()
	if err != nil || there {
		return err
	}
	if s.remote != nil {
		// Nothing piles up here while the bucket is away.
		if err := s.remote.ready(); err != nil {
			return fmt.Errorf("block store %s: put block %s: %w", s.cfg.Dir, id, err)
		}
	}
	buf := frameBuffers.Get().(*[]byte)
	defer frameBuffers.Put(buf)
	h := encode(buf)
	full, early, err := s.append(h, *buf, synced)
	early.begin()
	if err == nil && full {
		// A pack is full, or much waits: it is somebody's turn to sync.
		err = s.Sync(ctx)
	}
	return err
}

// has says whether a block is there; mu is held at least for reading.
func (s *Store) has(id flox.CID) (bool, error) {
	if err := s.usable(); err != nil {
		return false, err
	}
	if _, ok := s.pending[id]; ok {
		return true, nil
	}
	l, err := s.index.find(id)
	if errors.Is(err, flox.ErrNotFound) {
		return false, nil
	}
	if err == nil && s.remote != nil {
		// What is about to be removed is not counted on.
		if p, ok := s.index.remotePack(l.pack); ok && !p.Condemned.IsZero() {
			return false, nil
		}
	}
	if errors.Is(err, flox.ErrCorrupt) && len(s.pending) < 4*maxPending {
		return false, nil // it comes twice at worst
	}
	return err == nil, err
}

// encode makes the frame of a block in buf.
func (s *Store) encode(buf *[]byte, id flox.CID, data []byte) header {
	h := header{id: id, plain: uint32(len(data)), stored: uint32(len(data))}
	b := append((*buf)[:0], make([]byte, headerSize)...)
	if s.enc != nil && len(data) > 64 {
		b = s.enc.EncodeAll(data, b)
		// Reading plain bytes is cheaper: zstd has to save a sixteenth.
		if n := len(b) - headerSize; n < len(data)-len(data)/16 {
			h.enc, h.stored = encodingZstd, uint32(n)
		}
	}
	if h.enc == encodingRaw {
		b = append(b[:headerSize], data...)
	}
	h.crc = crc32.Checksum(b[headerSize:], castagnoli)
	h.put(b)
	*buf = b
	return h
}

// append writes a frame to the active pack, unless its block came in since the
// store was at synced. It reports whether a Sync is due, and what the disk may begin
// to write.
func (s *Store) append(h header, frame []byte, synced uint64) (due bool, early span, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return false, span{}, err
	}
	if _, ok := s.pending[h.id]; ok {
		return false, span{}, nil
	}
	if s.synced != synced {
		if there, err := s.has(h.id); err != nil || there {
			return false, span{}, err
		}
	}
	if err := s.room(int64(len(frame))); err != nil {
		return false, span{}, err
	}
	if due, err = s.write(h, frame); err != nil {
		return false, span{}, err
	}
	if n := s.size - s.begun; n >= beginEvery {
		early = span{s.active, s.begun, n}
		s.begun = s.size
	}
	return due, early, nil
}

// write is append behind its checks; mu is held.
func (s *Store) write(h header, frame []byte) (due bool, err error) {
	full := s.active != nil && s.size+int64(len(frame)) > s.cfg.PackSize && s.size > int64(len(fileMagic))
	// The index of a pack in the bucket is read at once.
	if full || s.remote != nil && s.active != nil && len(s.pending) >= maxPending {
		s.seal()
		due = true
	}
	if s.active == nil {
		if err := s.newPack(); err != nil {
			return false, diskError(err, "new pack in "+s.cfg.Dir)
		}
	}
	if _, err := s.active.WriteAt(frame, s.size); err != nil {
		// What came of it is behind the end of the pack: take it away, so that
		// the disk gets its room back.
		if truncErr := s.active.Truncate(s.size); truncErr != nil {
			s.log.Error("torn frame stays until the next start", "pack", s.packPath(s.activeID), "err", truncErr)
		}
		return false, diskError(err, "put block "+h.id.String())
	}
	s.pending[h.id] = loc{pack: s.activeID, off: uint32(s.size), plain: h.plain, stored: h.stored, enc: h.enc}
	s.size += int64(len(frame))
	s.appended++
	return due || len(s.pending) >= maxPending, nil
}

// room refuses n bytes that would eat into the reserve.
func (s *Store) room(n int64) error {
	if s.checked += n; s.checked < checkSpace {
		return nil
	}
	free, err := s.free()
	if err != nil {
		return err
	}
	if free < s.cfg.Reserve+n {
		s.checked = checkSpace // look again next time
		return fmt.Errorf("block store %s: %d bytes are free on its disk, of which %d stay so; free space or delete paths: %w", s.cfg.Dir, free, s.cfg.Reserve, flox.ErrFull)
	}
	s.checked = 0
	s.ballast.Tend()
	return nil
}

// seal ends the active pack; mu is held.
func (s *Store) seal() {
	s.ended(sealed{s.activeID, s.active, s.size, s.syncedSize})
	s.active = nil
}

// ended says that nothing more comes into a pack; mu is held.
func (s *Store) ended(p sealed) {
	s.unsynced = append(s.unsynced, p)
	s.sizes[p.id] = p.size
}

// newPack begins a pack; mu is held.
func (s *Store) newPack() error {
	path := s.packPath(s.lastID + 1)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(fileMagic), 0)
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return errors.Join(err, f.Close(), os.Remove(path))
	}
	s.active, s.size, s.syncedSize, s.begun = f, int64(len(fileMagic)), 0, 0
	s.lastID++
	s.activeID = s.lastID
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Sync makes everything durable that was put before the call. Concurrent calls
// share one fsync. With a bucket that is when the bucket has it; while that takes
// nothing the error says since when and why, and what was put waits for a later Sync.
func (s *Store) Sync(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.RLock()
	want, err := s.appended, s.usable()
	s.mu.RUnlock()
	if err != nil {
		return err
	}
	if err := s.writing.lock(ctx); err != nil {
		return err
	}
	defer s.writing.unlock()
	s.mu.RLock()
	done := s.synced >= want
	err = s.usable()
	s.mu.RUnlock()
	// What was put by others, or before this start, may be counted on as well.
	if done && s.remote != nil {
		done = len(s.unplaced()) == 0
	}
	if done || err != nil {
		// Somebody who came later than our Puts synced meanwhile.
		return err
	}
	if err := s.flush(); err != nil || s.remote == nil {
		return err
	}
	if err := s.place(ctx); err != nil {
		return fmt.Errorf("block store %s: %w", s.cfg.Dir, err)
	}
	return nil
}

// flush makes durable and indexes what is pending; writing is held.
func (s *Store) flush() error {
	s.mu.Lock()
	if s.remote != nil && s.active != nil && s.broken == nil && s.size > int64(len(fileMagic)) {
		s.seal() // what is in the bucket does not grow
	}
	if s.broken != nil || len(s.pending) == 0 && len(s.unsynced) == 0 {
		defer s.mu.Unlock()
		return s.broken
	}
	done, full := s.appended, s.unsynced
	active, activeID, size := s.active, s.activeID, s.size
	moved := make(map[flox.CID]loc, len(s.pending))
	for id, l := range s.pending {
		moved[id] = l
	}
	s.unsynced = nil
	s.mu.Unlock()

	err := s.flushFiles(full, active)
	indexed := err == nil
	if err == nil {
		err = s.flushIndex(moved, full, activeID, size, active != nil)
		if indexed = err == nil; !indexed && s.index.rotten() {
			// What is in the packs is durable: the index made anew will know it.
			err = nil
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		// After a failed fsync nobody knows what the disk has: no more writes, and
		// the next Open looks.
		s.broken = diskError(fmt.Errorf("%w; nothing put since the last sync counts, restart", err), "sync "+s.cfg.Dir)
		return s.broken
	}
	for id, l := range moved {
		if indexed && s.pending[id] == l {
			delete(s.pending, id)
		}
	}
	s.synced = done
	s.noteSynced(activeID, size)
	return nil
}

// noteSynced says how much of what was the active pack is durable; mu is held.
func (s *Store) noteSynced(id uint32, size int64) {
	if s.active != nil && s.activeID == id {
		s.syncedSize = size
	}
	for i := range s.unsynced {
		if s.unsynced[i].id == id {
			s.unsynced[i].synced = size
		}
	}
}

func (s *Store) flushFiles(full []sealed, active *os.File) error {
	var errs []error
	for _, p := range full {
		errs = append(errs, p.file.Sync(), p.file.Close())
	}
	if active != nil {
		errs = append(errs, active.Sync())
	}
	return errors.Join(errs...)
}

func (s *Store) flushIndex(moved map[flox.CID]loc, full []sealed, activeID uint32, size int64, hasActive bool) error {
	if err := s.index.sound(); err != nil {
		return err
	}
	c := s.index.change()
	for id, l := range moved {
		if err := c.set(id, l); err != nil {
			return errors.Join(err, c.batch.Close())
		}
	}
	for _, p := range full {
		c.indexed(p.id, p.size)
	}
	if hasActive {
		c.indexed(activeID, size)
	}
	if err := c.commit(); err != nil {
		return err
	}
	if len(full) > 0 {
		// Bounds what the next Open has to read after a crash. Nobody waits for it.
		if _, err := s.index.db.AsyncFlush(); err != nil {
			return fmt.Errorf("index: %w", err)
		}
	}
	return nil
}

// Delete forgets blocks, for example damaged ones, so that Put stores them anew.
// Blocks that are not there are no error.
func (s *Store) Delete(ctx context.Context, ids ...flox.CID) error {
	_, err := s.forget(ctx, ids, nil)
	return err
}

// forget takes blocks out of the index and counts them, but none that keep says.
func (s *Store) forget(ctx context.Context, ids []flox.CID, keep func(flox.CID) bool) (n uint64, err error) {
	if err := s.Sync(ctx); err != nil {
		return 0, err
	}
	if err := s.writing.lock(ctx); err != nil {
		return 0, err
	}
	defer s.writing.unlock()
	// Who decides by has that a block need not be put holds mu too.
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return 0, err
	}
	if err := s.index.sound(); err != nil {
		return 0, fmt.Errorf("block store %s: %w", s.cfg.Dir, err)
	}
	c := s.index.change()
	for _, id := range ids {
		if _, ok := s.pending[id]; ok || keep != nil && keep(id) {
			continue
		}
		switch err := c.remove(id); {
		case err == nil:
			n++
		case !errors.Is(err, flox.ErrNotFound):
			return 0, errors.Join(err, c.batch.Close())
		}
	}
	return n, c.commit()
}
