package pack

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// remotePack is a pack that the bucket has.
type remotePack struct {
	Name      string    `json:"name"`
	Size      int64     `json:"size"`
	Condemned time.Time `json:"condemned,omitzero"` // to be removed after the grace
}

// The index object of a pack: indexMagic, an entry per frame, and as 64-bit little
// endian numbers the pack's size and the CRC-32C of all before.
const (
	indexMagic = "flxpidx1"
	entrySize  = flox.CIDSize + 13
)

// packEntry is a frame of a pack.
type packEntry struct {
	id flox.CID
	loc
}

func encodeEntries(entries []packEntry, size int64) []byte {
	b := make([]byte, 0, len(indexMagic)+len(entries)*entrySize+16)
	b = append(b, indexMagic...)
	for _, e := range entries {
		b = append(b, e.id[:]...)
		for _, v := range []uint32{e.off, e.plain, e.stored} {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		b = append(b, byte(e.enc))
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(size))
	return binary.LittleEndian.AppendUint64(b, uint64(crc32.Checksum(b, castagnoli)))
}

// decodeEntries checks an index object. Which number the pack has here is not in it.
func decodeEntries(b []byte) (entries []packEntry, size int64, err error) {
	body := len(b) - len(indexMagic) - 16
	if body < 0 || body%entrySize != 0 || string(b[:len(indexMagic)]) != indexMagic ||
		uint64(crc32.Checksum(b[:len(b)-8], castagnoli)) != binary.LittleEndian.Uint64(b[len(b)-8:]) {
		return nil, 0, fmt.Errorf("a pack's index of %d bytes is damaged: %w", len(b), flox.ErrCorrupt)
	}
	size = int64(binary.LittleEndian.Uint64(b[len(b)-16:]))
	for at := len(indexMagic); at < len(b)-16; at += entrySize {
		e := packEntry{id: flox.CID(b[at : at+flox.CIDSize])}
		u := func(i int) uint32 { return binary.LittleEndian.Uint32(b[at+flox.CIDSize+i:]) }
		e.loc = loc{off: u(0), plain: u(4), stored: u(8), enc: encoding(b[at+flox.CIDSize+12])}
		if int64(e.off)+e.frameSize() > size || e.plain > content.MaxBlock || e.stored > e.plain || size > math.MaxUint32 {
			return nil, 0, fmt.Errorf("a pack's index has a frame at %d of %d: %w", e.off, size, flox.ErrCorrupt)
		}
		entries = append(entries, e)
	}
	return entries, size, nil
}

// maxIndexObject bounds an index object; a pack is closed long before.
const maxIndexObject = 4 * maxPending * entrySize

// packFrames is what a pack in the bucket has.
type packFrames struct {
	entries []packEntry
	size    int64 // of the pack
}

// of gives the entries of the pack that has this number here.
func (f packFrames) of(id uint32) []packEntry {
	for i := range f.entries {
		f.entries[i].pack = id
	}
	return f.entries
}

// frames fetches the index object of a pack.
func (r *remote) frames(ctx context.Context, name string) (f packFrames, err error) {
	ctx, cancel := context.WithTimeout(ctx, bucketTime)
	defer cancel()
	in, err := r.Bucket.Get(ctx, indexPrefix+name, 0, -1)
	if err != nil {
		return f, err
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, maxIndexObject))
	if err != nil {
		return f, err
	}
	if f.entries, f.size, err = decodeEntries(b); err != nil {
		err = fmt.Errorf("bucket %s: %s: %w", r.Bucket, indexPrefix+name, err)
	}
	return f, err
}

// place uploads every pack that the bucket does not have; writing is held, and what
// was put is flushed.
func (s *Store) place(ctx context.Context) error {
	r := s.remote
	if err := r.ready(); err != nil {
		return err
	}
	// What was counted on may have been condemned by another server: see DESIGN.md.
	r.mu.Lock()
	stale := time.Since(r.refreshed) > r.Grace/4
	r.mu.Unlock()
	if stale && s.index.sound() == nil {
		if err := s.refresh(ctx); err != nil {
			return r.note(ctx, err)
		}
	}
	for _, id := range s.unplaced() {
		if err := s.upload(ctx, id); err != nil {
			return r.note(ctx, err)
		}
	}
	return r.note(ctx, nil)
}

// unplaced lists the durable packs that only the local disk has, the oldest first.
func (s *Store) unplaced() []uint32 {
	s.mu.RLock()
	sizes := maps.Clone(s.sizes)
	for _, p := range s.unsynced {
		delete(sizes, p.id)
	}
	s.mu.RUnlock()
	for id := range s.index.remotes() {
		delete(sizes, id)
	}
	return slices.Sorted(maps.Keys(sizes))
}

// upload puts a pack and its index into the bucket.
func (s *Store) upload(ctx context.Context, id uint32) error {
	r, path := s.remote, s.packPath(id)
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return s.lostLocal(id)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	var entries []packEntry
	_, skipped, err := scan(f, int64(len(fileMagic)), st.Size(), func(off int64, h header) error {
		entries = append(entries, packEntry{h.id, loc{pack: id, off: uint32(off), plain: h.plain, stored: h.stored, enc: h.enc}})
		return nil
	}, func(int64, header) {})
	if err != nil {
		return err
	}
	if skipped > 0 {
		s.log.Error("damaged frames passed over", "pack", path, "bytes", skipped)
	}
	name := r.nameOf(id)
	if err := r.put(ctx, packPrefix+name, bufio.NewReaderSize(io.NewSectionReader(f, 0, st.Size()), 1<<20)); err != nil {
		return err
	}
	// Now the pack is there for everybody.
	b := encodeEntries(entries, st.Size())
	if err := r.put(ctx, indexPrefix+name, bytes.NewReader(b)); err != nil {
		return err
	}
	if err := s.index.setRemote(id, &remotePack{Name: name, Size: st.Size()}); err != nil {
		return err
	}
	r.cache.addPack(id, st.Size())
	return nil
}

// lostLocal forgets a pack that somebody removed before the bucket had it.
func (s *Store) lostLocal(id uint32) error {
	var l lost
	if err := s.index.sound(); err != nil {
		return err
	}
	if err := s.dropLost(id, 0, &l); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.sizes, id)
	s.mu.Unlock()
	s.report(&l)
	return nil
}

// dropLocal removes the local copy of a pack that the bucket has.
func (s *Store) dropLocal(id uint32) {
	if _, ok := s.index.remotePack(id); !ok {
		return
	}
	s.mu.Lock()
	delete(s.sizes, id)
	s.mu.Unlock()
	s.files.forget(id)
	if err := os.Remove(s.packPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("local copy of a pack not removed", "pack", s.packPath(id), "error", err)
	}
}

// hasLocal says whether a pack is here whole.
func (s *Store) hasLocal(id uint32) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.sizes[id]
	return ok || s.active != nil && s.activeID == id
}

// readRemote reads a frame through the cache; what the cache has damaged is fetched
// again.
func (s *Store) readRemote(ctx context.Context, buf *[]byte, id flox.CID, l loc, p remotePack) (h header, stored []byte, err error) {
	b := slices.Grow((*buf)[:0], int(l.frameSize()))[:l.frameSize()]
	*buf = b
	for range 2 {
		if err = s.remote.cache.read(ctx, p, int64(l.off), b); err != nil {
			return h, nil, err
		}
		if h, err = checkFrame(b, id, l); err == nil {
			return h, b[headerSize:], nil
		}
		s.remote.cache.drop(p.Name, int64(l.off), l.frameSize())
	}
	return h, nil, err
}

// checkFrame checks a whole frame.
func checkFrame(b []byte, id flox.CID, l loc) (header, error) {
	h, err := parseHeader(b)
	if err == nil && !l.matches(h, id) {
		err = fmt.Errorf("the frame there is of block %s, %d bytes in %d: %w", h.id, h.plain, h.stored, flox.ErrCorrupt)
	}
	if err == nil {
		err = h.check(b[headerSize:])
	}
	return h, err
}

// remotes gives a copy of what is known of the bucket's packs.
func (x *index) remotes() map[uint32]remotePack {
	x.mu.Lock()
	defer x.mu.Unlock()
	return maps.Clone(x.remote)
}

func (x *index) remotePack(id uint32) (remotePack, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	p, ok := x.remote[id]
	return p, ok
}

// setRemote notes what the bucket has; nil = no longer. A damaged index is not
// written: it is made anew with what is noted here.
func (x *index) setRemote(id uint32, p *remotePack) error {
	if x.sound() == nil {
		batch := x.db.NewBatch()
		defer batch.Close()
		var err error
		if p == nil {
			err = batch.Delete(remoteKey(id), nil)
		} else {
			var b []byte
			if b, err = json.Marshal(p); err == nil {
				err = batch.Set(remoteKey(id), b, nil)
			}
		}
		if err == nil {
			err = batch.Commit(pebble.NoSync)
		}
		if err != nil {
			return fmt.Errorf("index: %w", err)
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if p == nil {
		delete(x.remote, id)
	} else {
		x.remote[id] = *p
	}
	return nil
}

func remoteKey(id uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyRemote}, id) }
