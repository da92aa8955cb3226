package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/indexdb"
)

const (
	maxBlock   = 16 << 20 // bytes of a chunk or block at most
	maxSegment = 1 << 30  // bytes of a segment at most
)

// PutChunk keeps a chunk of f that lies at off. The caller has checked data
// against chunk.ID, and took both from a signed manifest. ErrFull: there is no
// room now; use data and let it go. ErrBadInput: the sizes contradict each other.
func (c *Cache) PutChunk(ctx context.Context, f File, off int64, chunk flox.Chunk, data []byte) error {
	switch {
	case len(data) == 0 || len(data) > maxBlock || int64(len(data)) != int64(chunk.Size):
		return fmt.Errorf("put chunk %s: %d bytes given, want %d, 1 to %d: %w", chunk.ID, len(data), chunk.Size, maxBlock, flox.ErrBadInput)
	case off < 0 || off > f.Size-int64(len(data)):
		return fmt.Errorf("put chunk %s: %d bytes at %d are outside of file %s of %d bytes: %w", chunk.ID, len(data), off, f.ID, f.Size, flox.ErrBadInput)
	case f.Size == int64(len(data)) && f.ID != chunk.ID:
		return fmt.Errorf("put chunk %s: it is all of file %s, so their names must be equal: %w", chunk.ID, f.ID, flox.ErrBadInput)
	}
	return c.put(ctx, f, off, chunk, data, false)
}

// PutBlock keeps a block (a manifest's root, a page) whose bytes hash to id. It
// is evicted later than content. Errors as PutChunk.
func (c *Cache) PutBlock(ctx context.Context, id flox.CID, data []byte) error {
	if len(data) == 0 || len(data) > maxBlock {
		return fmt.Errorf("put block %s: %d bytes given, want 1 to %d: %w", id, len(data), maxBlock, flox.ErrBadInput)
	}
	f := File{id, int64(len(data))}
	return c.put(ctx, f, 0, flox.Chunk{ID: id, Size: uint32(len(data))}, data, true)
}

func (c *Cache) put(ctx context.Context, f File, off int64, chunk flox.Chunk, data []byte, block bool) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put %s: %w", chunk.ID, err)
	}
	if err := c.index.usable(); err != nil {
		return fmt.Errorf("put %s: %w", chunk.ID, err)
	}
	if c.State(f, off, int64(len(data))) == Hit && (!block || c.isBlock(f.ID)) {
		return nil
	}
	// What the file takes: whole blocks, and the index about 300 bytes.
	need := int64(len(data)) + 4096
	c.pending.Add(need)
	defer c.pending.Add(-need)
	if err := c.room(); err != nil {
		c.refused.Add(1)
		c.wake()
		return fmt.Errorf("put %s: %w", chunk.ID, err)
	}
	c.keeping.RLock()
	defer c.keeping.RUnlock()
	for at := off; len(data) > 0; {
		k, within := c.segmentOf(f, at)
		n := min(int64(len(data)), c.cfg.segment-within)
		w := write{file: f, key: k, off: within, data: data[:n], block: block}
		if at == off {
			w.chunk, w.chunkOff = chunk, off
		}
		if err := c.write(w); err != nil {
			if errors.Is(err, flox.ErrFull) {
				c.refused.Add(1)
				c.wake()
			}
			return fmt.Errorf("put %s: %w", chunk.ID, err)
		}
		data = data[n:]
		at += n
	}
	return nil
}

// room fails with ErrFull if what is being put does not fit.
func (c *Cache) room() error {
	pending := c.pending.Load()
	if c.index.Low() {
		return fmt.Errorf("the disk of %s is full: %w", c.cfg.Dir, flox.ErrFull)
	}
	if used, budget := c.used(), c.budget(); used+pending > budget {
		return fmt.Errorf("the cache holds %d of %d bytes: %w", used, budget, flox.ErrFull)
	}
	_, free, err := c.disk()
	if err != nil {
		return err
	}
	if free-pending < c.cfg.Reserve {
		return fmt.Errorf("%d bytes are free on the disk of %s, %d stay so: %w", free, c.cfg.Dir, c.cfg.Reserve, flox.ErrFull)
	}
	return nil
}

// used is what the cache takes on disk, in bytes.
func (c *Cache) used() int64 {
	c.sum.Lock()
	own := c.sum.own
	c.sum.Unlock()
	return own + c.objects.total.Load() + c.indexSize.Load()
}

// write is one part of a put: bytes of one segment.
type write struct {
	file     File
	key      key
	off      int64 // in the segment
	data     []byte
	block    bool
	chunk    flox.Chunk // zero: nothing to note
	chunkOff int64      // in the file
}

// write puts bytes into a segment. Order: bytes, index, memory; so nobody sees
// an extent before its bytes can be read.
func (c *Cache) write(w write) error {
	r, err := c.memory.acquire(w.key)
	if err != nil {
		return err
	}
	defer c.memory.release(r)
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.cur.Load()
	if old.object != 0 && old.size != w.file.Size {
		return fmt.Errorf("file %s has %d bytes here, %d were said: %w", w.file.ID, old.size, w.file.Size, flox.ErrBadInput)
	}
	end := w.off + int64(len(w.data))
	here := old.object != 0 && state(old.ext, uint32(w.off), uint32(end), c.session.lost) == Hit
	if here && (old.block || !w.block) {
		return nil
	}
	gen := c.session.enter()
	defer c.session.leave()
	next := *old
	next.block = old.block || w.block
	if old.object == 0 {
		if err := c.place(w, &next); err != nil {
			return err
		}
	}
	if w.block {
		r.ref.Store(chances(true))
	}
	if err := c.fill(w, r, old, &next, gen, here); err != nil {
		if old.object == 0 && !next.packed {
			err = errors.Join(err, c.objects.remove(next.object))
		}
		return err
	}
	return nil
}

// fill writes the bytes, unless they are here, and then their entry.
func (c *Cache) fill(w write, r *record, old, next *content, gen uint64, here bool) error {
	if !here {
		if err := c.pwrite(next, w.data, w.off); err != nil {
			return err
		}
		next.ext = insert(old.ext, extent{uint32(w.off), uint32(w.off) + uint32(len(w.data)), gen}, c.session.alike)
	}
	b := c.index.batch()
	c.noteChunk(b, w.key, w.file, w.chunk, w.chunkOff)
	return c.change(b, r, old, next, lazy)
}

// noteChunk puts into b where a chunk lies, so that Get finds it. A chunk that
// is all of its file is found by the file's record.
func (c *Cache) noteChunk(b *batch, k key, f File, chunk flox.Chunk, off int64) {
	if chunk.Size == 0 || chunk.ID == f.ID {
		return
	}
	size := binary.AppendUvarint(nil, uint64(chunk.Size))
	b.set(chunkKey(chunk.ID, f.ID, off), size)
	b.set(partKey(k, off), append(chunk.ID[:], size...))
}

func (c *Cache) isBlock(id flox.CID) bool {
	r := c.record(key{id: id})
	return r != nil && r.cur.Load().block
}

// place finds a place for a segment that is not here.
func (c *Cache) place(w write, ct *content) (err error) {
	*ct = content{size: w.file.Size, length: c.segmentSize(w.file.Size, w.key.seg), block: w.block, packed: w.file.Size <= c.cfg.small}
	if ct.kept, err = c.index.has(keepKey(w.file.ID, "")); err != nil {
		return err
	}
	if ct.packed {
		ct.object, ct.base, err = c.objects.alloc(ct.length)
		return err
	}
	ct.object, err = c.objects.create()
	return err
}

func (c *Cache) pwrite(ct *content, data []byte, off int64) error {
	for range 4 {
		f, err := c.objects.open(ct.object)
		if err != nil {
			return indexdb.Full(err)
		}
		_, err = f.WriteAt(data, ct.base+off)
		if err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrClosed) {
			return indexdb.Full(err)
		}
	}
	return fmt.Errorf("object %d is closed again and again: %w", ct.object, flox.ErrBusy)
}

// change commits b with the record's change from old to next, and publishes
// next, r.mu being held. A next without extents is not here any more.
func (c *Cache) change(b *batch, r *record, old, next *content, sync bool) error {
	c.note(b, r, old, next)
	if err := b.commit(sync); err != nil {
		return err
	}
	c.account(b.sum)
	r.cur.Store(next)
	return nil
}

// note puts a record's change into b.
func (c *Cache) note(b *batch, r *record, old, next *content) {
	b.sum.replace(old, next)
	if old.object != 0 && !old.same(next) {
		if old.packed {
			b.del(memberKey(old.object, old.base, r.key))
		} else {
			b.del(objectKey(old.object))
		}
	}
	if next.object == 0 {
		b.del(segmentKey(r.key))
		return
	}
	b.set(segmentKey(r.key), encode(next, r.ref.Load(), r.readers()))
	if next.packed {
		b.set(objectKey(next.object), nil)
		if !old.same(next) {
			b.set(memberKey(next.object, next.base, r.key), nil)
		}
		return
	}
	if !old.same(next) {
		b.set(objectKey(next.object), segmentKey(r.key)[1:])
	}
}

// account adds what a batch changed to the sums.
func (c *Cache) account(diff totals) {
	c.sum.Lock()
	c.sum.add(diff)
	c.sum.Unlock()
}
