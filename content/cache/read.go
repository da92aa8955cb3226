package cache

import (
	"errors"
	"io"
	iofs "io/fs"
	"os"
	"syscall"

	"github.com/floxctl/flox"
)

// ReadAt reads min(len(p), f.Size-off) bytes of f at off into p. Only with Hit
// is p filled, and n is that many; else n is 0 and p's content is undefined.
// Node is the mount's inode that is being read, 0 if none: it marks f as used
// and is remembered for the second chance.
//
// A warm read is one pread, without a lock.
func (c *Cache) ReadAt(f File, p []byte, off int64, node uint64) (n int, st State) {
	if off < 0 || f.Size < 0 {
		return 0, Miss
	}
	return c.readFile(f, p[:max(min(int64(len(p)), f.Size-off), 0)], off, reader{node: node})
}

// reader says for whom bytes are read.
type reader struct {
	node uint64
	raw  bool // bytes are hashed by the caller: unverified ones will do, and it is no use of the file
}

func (c *Cache) readFile(f File, p []byte, off int64, who reader) (n int, st State) {
	for n < len(p) {
		k, within := c.segmentOf(f, off+int64(n))
		part := p[n:min(int64(len(p)), int64(n)+c.cfg.segment-within)]
		if st := c.read(k, f.Size, part, within, who); st != Hit {
			return 0, st
		}
		n += len(part)
	}
	return n, Hit
}

// read reads from one segment.
func (c *Cache) read(k key, size int64, p []byte, off int64, who reader) State {
	for range 4 { // it may be moved to another pack, or its file closed, under us
		r := c.record(k)
		if r == nil {
			return Miss
		}
		ct := r.cur.Load()
		if ct.object == 0 || ct.size != size {
			return Miss
		}
		if st := state(ct.ext, uint32(off), uint32(off)+uint32(len(p)), c.session.lost); st == Miss || st == Unverified && !who.raw {
			return st
		}
		err := c.pread(ct, p, off)
		if err == nil {
			if !who.raw || ct.block {
				r.use(who.node, ct.block)
			}
			return Hit
		}
		if !c.gone(k, ct, err) {
			return Miss
		}
	}
	return Miss
}

// record gives the record of k, from memory if it is warm; nil if it cannot be read.
func (c *Cache) record(k key) *record {
	if r := c.memory.peek(k); r != nil {
		return r
	}
	r, err := c.memory.acquire(k)
	if err != nil {
		if !errors.Is(err, flox.ErrClosed) {
			c.cfg.Log.Warn("cache record cannot be read", "file", k.id, "err", err)
		}
		return nil
	}
	c.memory.release(r)
	return r
}

// pread fills p with a segment's bytes at off.
func (c *Cache) pread(ct *content, p []byte, off int64) error {
	f, err := c.objects.open(ct.object)
	if err != nil {
		return err
	}
	_, err = f.ReadAt(p, ct.base+off)
	return err
}

// preadAgain is pread for who has the record locked: the bytes are there.
func (c *Cache) preadAgain(ct *content, p []byte, off int64) (err error) {
	for range 4 {
		if err = c.pread(ct, p, off); !errors.Is(err, os.ErrClosed) {
			return err
		}
	}
	return err
}

// gone deals with a read that failed, and says whether to try again. Bytes that
// the disk does not give are dropped, so that they are fetched anew.
func (c *Cache) gone(k key, ct *content, err error) (again bool) {
	if errors.Is(err, os.ErrClosed) {
		return true
	}
	if r := c.record(k); r == nil || !r.cur.Load().same(ct) {
		return true // moved or evicted
	}
	if errors.Is(err, iofs.ErrNotExist) || errors.Is(err, io.EOF) || errors.Is(err, syscall.EIO) {
		c.cfg.Log.Warn("cached bytes are missing: dropped", "file", k.id, "err", err)
		if err := c.drop(k, ct, 0, uint32(ct.length)); err != nil {
			c.cfg.Log.Warn("drop cached bytes", "file", k.id, "err", err)
		}
	}
	return false
}

// Used says that node was given [off, off+n) of f from elsewhere than ReadAt (a
// fetch answers its readers from memory). Without it the cache does not know
// whom to ask before it evicts those bytes.
func (c *Cache) Used(f File, off, n int64, node uint64) {
	off = max(off, 0)
	for end := min(off+n, f.Size); off < end; {
		k, within := c.segmentOf(f, off)
		if r := c.record(k); r != nil {
			if ct := r.cur.Load(); ct.object != 0 {
				r.use(node, ct.block)
			}
		}
		off += c.cfg.segment - within
	}
}

// State says what ReadAt of n bytes of f at off would find, without marking f used.
func (c *Cache) State(f File, off, n int64) State {
	if off < 0 || n < 0 {
		return Miss
	}
	st := Hit
	for end := min(off+n, f.Size); off < end; {
		k, within := c.segmentOf(f, off)
		part := min(end-off, c.cfg.segment-within)
		r := c.record(k)
		if r == nil {
			return Miss
		}
		ct := r.cur.Load()
		if ct.object == 0 || ct.size != f.Size {
			return Miss
		}
		switch state(ct.ext, uint32(within), uint32(within+part), c.session.lost) {
		case Miss:
			return Miss
		case Unverified:
			st = Unverified
		}
		off += part
	}
	return st
}

// Missing gives the parts of [off, off+n) of f of which no byte is here, in
// order. Unverified bytes count as here.
func (c *Cache) Missing(f File, off, n int64) (out []Range) {
	add := func(off, n int64) {
		if k := len(out) - 1; k >= 0 && out[k].Off+out[k].Len == off {
			out[k].Len += n
			return
		}
		out = append(out, Range{off, n})
	}
	off = max(off, 0)
	for end := min(off+n, f.Size); off < end; {
		k, within := c.segmentOf(f, off)
		part := min(end-off, c.cfg.segment-within)
		var ext []extent
		if r := c.record(k); r != nil {
			if ct := r.cur.Load(); ct.object != 0 && ct.size == f.Size {
				ext = ct.ext
			}
		}
		at := off - within
		gaps(ext, uint32(within), uint32(within+part), func(lo, hi uint32) { add(at+int64(lo), int64(hi-lo)) })
		off += part
	}
	return out
}
