package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

func always(uint64) bool { return true }

// Verify hashes the chunk of f that lies at off. If it is right its bytes are
// trusted from now on; if it is wrong or not all here, what is here of it is
// dropped, and ok is false.
func (c *Cache) Verify(ctx context.Context, f File, off int64, chunk flox.Chunk) (ok bool, err error) {
	if chunk.Size == 0 || chunk.Size > maxBlock || off < 0 || off > f.Size-int64(chunk.Size) {
		return false, fmt.Errorf("verify chunk %s: %d bytes at %d of file %s of %d bytes: %w", chunk.ID, chunk.Size, off, f.ID, f.Size, flox.ErrBadInput)
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if ok, err = c.verify(f, off, chunk); err != nil {
		return false, fmt.Errorf("verify chunk %s: %w", chunk.ID, err)
	}
	return ok, nil
}

// piece is what of a chunk lies in one segment, its record locked.
type piece struct {
	r        *record
	ct       *content
	off, end uint32 // in the segment
}

func (c *Cache) verify(f File, off int64, chunk flox.Chunk) (ok bool, err error) {
	// Locked in the order of segments; who else locks several records only tries.
	pieces, err := c.lockPieces(f, off, int64(chunk.Size))
	defer func() {
		for _, p := range pieces {
			p.r.mu.Unlock()
			c.memory.release(p.r)
		}
	}()
	if err != nil {
		return false, err
	}
	all := true
	for _, p := range pieces {
		all = all && p.ct.object != 0 && p.ct.size == f.Size && state(p.ct.ext, p.off, p.end, c.session.lost) != Miss
	}
	if !all { // nothing says which of the unverified bytes are right
		return false, c.forget(pieces, c.session.lost)
	}
	right, err := c.hashes(pieces, chunk)
	if err != nil {
		return false, err
	}
	if !right {
		c.cfg.Log.Warn("cached chunk is wrong: dropped", "chunk", chunk.ID, "file", f.ID, "off", off)
		return false, c.forget(pieces, always)
	}
	return true, c.vouch(pieces, f, off, chunk)
}

func (c *Cache) lockPieces(f File, off, size int64) (pieces []piece, err error) {
	for size > 0 {
		k, within := c.segmentOf(f, off)
		n := min(size, c.cfg.segment-within)
		r, err := c.memory.acquire(k)
		if err != nil {
			return pieces, err
		}
		r.mu.Lock()
		pieces = append(pieces, piece{r, r.cur.Load(), uint32(within), uint32(within + n)})
		off += n
		size -= n
	}
	return pieces, nil
}

// hashes says whether the bytes of pieces are the chunk's. Bytes that cannot be
// read are wrong ones.
func (c *Cache) hashes(pieces []piece, chunk flox.Chunk) (bool, error) {
	data := make([]byte, 0, chunk.Size)
	for _, p := range pieces {
		at := len(data)
		data = data[:at+int(p.end-p.off)]
		err := c.preadAgain(p.ct, data[at:], int64(p.off))
		if errors.Is(err, flox.ErrClosed) {
			return false, err
		}
		if err != nil {
			return false, nil
		}
	}
	return blake3.Sum256(data) == [32]byte(chunk.ID), nil
}

// vouch makes the unverified bytes of pieces trusted.
func (c *Cache) vouch(pieces []piece, f File, off int64, chunk flox.Chunk) error {
	gen := c.session.enter()
	defer c.session.leave()
	for i, p := range pieces {
		if state(p.ct.ext, p.off, p.end, c.session.lost) == Hit {
			continue
		}
		next := *p.ct
		next.ext = insert(p.ct.ext, extent{p.off, p.end, gen}, c.session.alike)
		b := c.index.batch()
		if i == 0 {
			c.noteChunk(b, p.r.key, f, chunk, off)
		}
		if err := c.change(b, p.r, p.ct, &next, lazy); err != nil {
			return err
		}
	}
	return nil
}

// forget drops the bytes of pieces whose generation drop says so for.
func (c *Cache) forget(pieces []piece, drop func(gen uint64) bool) error {
	for _, p := range pieces {
		if p.ct.object == 0 {
			continue
		}
		if err := c.forgetPiece(p, drop); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cache) forgetPiece(p piece, drop func(gen uint64) bool) error {
	next := *p.ct
	next.ext = cut(p.ct.ext, p.off, p.end, drop)
	left, before := length(next.ext), length(p.ct.ext)
	if left == before {
		return nil
	}
	c.dropped.Add(before - left)
	b := c.index.batch()
	if left == 0 {
		next = content{}
		if err := c.noteParts(b, p.r.key); err != nil {
			return err
		}
	}
	// Trusted bytes would be trusted again after a crash: that must not happen.
	trusted := length(cut(p.ct.ext, p.off, p.end, func(gen uint64) bool { return drop(gen) && !c.session.lost(gen) })) < before
	if err := c.change(b, p.r, p.ct, &next, trusted); err != nil {
		return err
	}
	if left == 0 && !p.ct.packed {
		return c.objects.remove(p.ct.object)
	}
	return nil
}

func length(list []extent) (n int64) {
	for _, e := range list {
		n += int64(e.end - e.off)
	}
	return n
}

// noteParts puts into b that the chunks that begin in a segment are not here.
func (c *Cache) noteParts(b *batch, k key) error {
	prefix := partPrefix(k)
	return c.index.scan(context.Background(), prefix, prefix, func(pk, v []byte) error {
		b.del(pk)
		if len(v) > flox.CIDSize {
			b.del(chunkKey(flox.CID(v[:flox.CIDSize]), k.id, int64(binary.BigEndian.Uint64(pk[len(pk)-8:]))))
		}
		return nil
	})
}

// drop forgets [off, end) of a segment that still lies where ct says.
func (c *Cache) drop(k key, ct *content, off, end uint32) error {
	r, err := c.memory.acquire(k)
	if err != nil {
		return err
	}
	defer c.memory.release(r)
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := r.cur.Load(); now.object != 0 && now.same(ct) {
		return c.forgetPiece(piece{r, now, off, end}, always)
	}
	return nil
}
