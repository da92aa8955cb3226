package cache

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

// place names where a chunk lies.
type place struct {
	file File
	off  int64
	size int64
}

// Get gives a block, a chunk, or a whole small file by its CID. The bytes are
// hashed on every call, so peers can be served with them. ErrNotFound: not here
// (any more).
func (c *Cache) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	places, err := c.places(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", id, err)
	}
	for _, p := range places {
		data := make([]byte, p.size)
		if _, st := c.readFile(p.file, data, p.off, reader{raw: true}); st != Hit {
			continue
		}
		if blake3.Sum256(data) == [32]byte(id) {
			return data, nil
		}
		// A chunk may be overwritten with itself while it is read; Verify looks
		// again, locked, and drops what is wrong.
		ok, err := c.verify(p.file, p.off, flox.Chunk{ID: id, Size: uint32(p.size)})
		if err != nil {
			return nil, fmt.Errorf("get %s: %w", id, err)
		}
		if !ok {
			continue
		}
		if _, st := c.readFile(p.file, data, p.off, reader{raw: true}); st == Hit && blake3.Sum256(data) == [32]byte(id) {
			return data, nil
		}
	}
	return nil, fmt.Errorf("get %s: not in the cache: %w", id, flox.ErrNotFound)
}

// places gives where id may be read from: at most a few places, all of whose
// bytes are here, trusted or not.
func (c *Cache) places(ctx context.Context, id flox.CID) (list []place, err error) {
	if r := c.record(key{id: id}); r != nil {
		f := File{id, r.cur.Load().size}
		if f.Size > 0 && f.Size <= maxBlock && c.State(f, 0, f.Size) != Miss {
			list = append(list, place{f, 0, f.Size})
		}
	}
	const enough = 4
	var found []place
	prefix := append([]byte{'c'}, id[:]...)
	err = c.index.scan(ctx, prefix, prefix, func(k, v []byte) error {
		if p, ok := readPlace(k, v); ok {
			found = append(found, p)
		}
		if len(found) == enough {
			return errStop
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, p := range found {
		if c.locate(&p) {
			list = append(list, p)
		}
	}
	return list, nil
}

// readPlace reads a chunk's entry.
func readPlace(k, v []byte) (p place, ok bool) {
	size, n := binary.Uvarint(v)
	if len(k) != 1+2*flox.CIDSize+8 || n <= 0 || size == 0 || size > maxBlock {
		return p, false
	}
	k = k[1+flox.CIDSize:]
	p.file.ID = flox.CID(k[:flox.CIDSize])
	p.off = int64(binary.BigEndian.Uint64(k[flox.CIDSize:]))
	p.size = int64(size)
	return p, p.off >= 0
}

// locate fills in the size of the file, and says whether all bytes are here.
func (c *Cache) locate(p *place) bool {
	k, _ := c.segmentOf(p.file, p.off)
	r := c.record(k)
	if r == nil {
		return false
	}
	p.file.Size = r.cur.Load().size
	return p.off+p.size <= p.file.Size && c.State(p.file, p.off, p.size) != Miss
}

// Has says for each id whether Get would find it. Bytes are not hashed.
func (c *Cache) Has(ids []flox.CID) []bool {
	out := make([]bool, len(ids))
	for i, id := range ids {
		places, err := c.places(context.Background(), id)
		out[i] = err == nil && len(places) > 0
	}
	return out
}

// Chunks calls yield with the id of everything Get would find, in no order,
// some more than once, until yield returns false.
func (c *Cache) Chunks(yield func(flox.CID) bool) {
	more := true
	emit := func(id flox.CID) bool {
		more = more && yield(id)
		return more
	}
	err := c.index.pages(context.Background(), []byte{'f'}, func(list []entry) error {
		for _, e := range list {
			k, ok := readKey(e.key[1:])
			ct, _, _, err := decode(e.value)
			if !ok || err != nil || k.seg != 0 || ct.size > maxBlock {
				continue
			}
			here := length(ct.ext) == ct.size // spares the look into memory
			if ct.size > ct.length {
				here = c.State(File{k.id, ct.size}, 0, ct.size) != Miss
			}
			if here && !emit(k.id) {
				return errStop
			}
		}
		return nil
	})
	if err == nil && more {
		err = c.index.pages(context.Background(), []byte{'p'}, func(list []entry) error { return c.parts(list, emit) })
	}
	if err != nil {
		c.cfg.Log.Warn("list the cache's chunks", "err", err)
	}
}

// parts yields the chunks of a page of 'p' entries that are here.
func (c *Cache) parts(list []entry, yield func(flox.CID) bool) error {
	const head = 1 + flox.CIDSize + 4
	for _, e := range list {
		if len(e.key) != head+8 || len(e.value) <= flox.CIDSize {
			continue
		}
		size, n := binary.Uvarint(e.value[flox.CIDSize:])
		p := place{
			file: File{ID: flox.CID(e.key[1 : 1+flox.CIDSize])},
			off:  int64(binary.BigEndian.Uint64(e.key[head:])),
			size: int64(size),
		}
		if n > 0 && size <= maxBlock && c.locate(&p) && !yield(flox.CID(e.value[:flox.CIDSize])) {
			return errStop
		}
	}
	return nil
}
