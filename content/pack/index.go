package pack

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
)

// The index says where each block lies. It holds only what is durable in a pack,
// is written without a log of its own, and what it lost in a crash is read from
// the packs again: Pebble never has to sync for a Put. Keys:
//
//	b CID            pack, offset, plain size, stored size, encoding
//	o pack offset    CID: the same the other way round, for scrub and sweep
//	p pack           indexed up to offset, bytes of frames in the index
//	n pack           what the bucket has of it (JSON)
//	s                counts: blocks, plain bytes, stored bytes
const (
	keyBlock  = 'b'
	keyFrame  = 'o'
	keyPack   = 'p'
	keyRemote = 'n'
	keyCounts = 's'
)

// loc is where a block lies.
type loc struct {
	pack          uint32
	off           uint32 // of the frame in the pack
	plain, stored uint32
	enc           encoding
}

// frameSize is the bytes the block takes in its pack.
func (l loc) frameSize() int64 { return headerSize + int64(l.stored) }

func (l loc) matches(h header, id flox.CID) bool {
	return h.id == id && h.plain == l.plain && h.stored == l.stored && h.enc == l.enc
}

const locSize = 17

func (l loc) bytes() []byte {
	b := make([]byte, 0, locSize)
	for _, v := range []uint32{l.pack, l.off, l.plain, l.stored} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return append(b, byte(l.enc))
}

func parseLoc(b []byte) (loc, error) {
	if len(b) != locSize {
		return loc{}, fmt.Errorf("an index entry of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	u := func(i int) uint32 { return binary.BigEndian.Uint32(b[i:]) }
	return loc{pack: u(0), off: u(4), plain: u(8), stored: u(12), enc: encoding(b[16])}, nil
}

func blockKey(id flox.CID) []byte { return append([]byte{keyBlock}, id[:]...) }

func frameKey(pack, off uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{keyFrame}, pack)
	return binary.BigEndian.AppendUint32(b, off)
}

func packKey(pack uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyPack}, pack) }

// packState is what the index knows of a pack.
type packState struct {
	indexed int64 // every frame before this offset is in the index, or was deleted
	live    int64 // bytes of frames in the index
}

// counts are totals over the index.
type counts struct{ blocks, plain, stored uint64 }

func appendUints(vs ...uint64) []byte {
	var b []byte
	for _, v := range vs {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// load reads the small state.
func (x *index) load() error {
	if b, err := x.get([]byte{keyCounts}); err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	} else if len(b) == 24 {
		u := func(i int) uint64 { return binary.BigEndian.Uint64(b[i:]) }
		x.counts = counts{u(0), u(8), u(16)}
	}
	err := x.each(keyRemote, nil, func(k, v []byte) error {
		var p remotePack
		if err := json.Unmarshal(v, &p); err != nil || len(k) != 5 {
			return fmt.Errorf("a bucket's entry of %d and %d bytes: %w", len(k), len(v), flox.ErrCorrupt)
		}
		x.remote[binary.BigEndian.Uint32(k[1:])] = p
		return nil
	})
	if err != nil {
		return err
	}
	return x.each(keyPack, nil, func(k, v []byte) error {
		if len(k) != 5 || len(v) != 16 {
			return fmt.Errorf("a pack's entry of %d and %d bytes: %w", len(k), len(v), flox.ErrCorrupt)
		}
		x.packs[binary.BigEndian.Uint32(k[1:])] = packState{
			int64(binary.BigEndian.Uint64(v)), int64(binary.BigEndian.Uint64(v[8:])),
		}
		return nil
	})
}

// get gives a copy of a value, or ErrNotFound.
func (x *index) get(key []byte) ([]byte, error) {
	db := x.acquire()
	defer x.release(db)
	v, closer, err := db.Get(key)
	if err != nil {
		return nil, db.readError(err)
	}
	defer closer.Close()
	return append([]byte(nil), v...), nil
}

// find gives a block's place, or ErrNotFound.
func (x *index) find(id flox.CID) (loc, error) {
	key := [1 + flox.CIDSize]byte{keyBlock}
	copy(key[1:], id[:])
	db := x.acquire()
	defer x.release(db)
	v, closer, err := db.Get(key[:])
	if err != nil {
		return loc{}, db.readError(err)
	}
	defer closer.Close()
	return parseLoc(v)
}

// each calls f with every key of a kind that begins with prefix, in order.
func (x *index) each(kind byte, prefix []byte, f func(k, v []byte) error) error {
	lower := append([]byte{kind}, prefix...)
	upper := append([]byte(nil), lower...)
	for i := len(upper) - 1; i >= 0; i-- {
		if upper[i]++; upper[i] != 0 {
			break
		}
	}
	db := x.acquire()
	defer x.release(db)
	it, err := db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return db.readError(err)
	}
	for ok := it.First(); ok && err == nil; ok = it.Next() {
		err = f(it.Key(), it.Value())
	}
	if iterErr := it.Close(); iterErr != nil && err == nil {
		err = db.readError(iterErr)
	}
	return err
}

// frames calls f with the blocks of a pack in order of their offset.
func (x *index) frames(pack uint32, f func(id flox.CID, off uint32) error) error {
	return x.each(keyFrame, binary.BigEndian.AppendUint32(nil, pack), func(k, v []byte) error {
		if len(k) != 9 || len(v) != flox.CIDSize {
			return fmt.Errorf("a frame's entry of %d and %d bytes: %w", len(k), len(v), flox.ErrCorrupt)
		}
		return f(flox.CID(v), binary.BigEndian.Uint32(k[5:]))
	})
}

// change collects what is to be written in one go.
type change struct {
	x     *index
	batch *pebble.Batch
	packs map[uint32]packState
	counts
}

// change begins one. Only one of those who hold Store.writing has one at a time.
func (x *index) change() *change {
	return &change{x: x, batch: x.db.NewIndexedBatch(), packs: make(map[uint32]packState), counts: x.counts}
}

func (c *change) pack(id uint32) packState {
	if p, ok := c.packs[id]; ok {
		return p
	}
	return c.x.packs[id]
}

// find gives a block's place with the change applied.
func (c *change) find(id flox.CID) (loc, error) {
	v, closer, err := c.batch.Get(blockKey(id))
	if err != nil {
		return loc{}, c.x.db.readError(err)
	}
	defer closer.Close()
	return parseLoc(v)
}

// set puts a block at a place, instead of where it was.
func (c *change) set(id flox.CID, l loc) error {
	if err := c.remove(id); err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	p := c.pack(l.pack)
	p.live += l.frameSize()
	c.packs[l.pack] = p
	c.blocks++
	c.plain += uint64(l.plain)
	c.stored += uint64(l.frameSize())
	if err := c.batch.Set(blockKey(id), l.bytes(), nil); err != nil {
		return err
	}
	return c.batch.Set(frameKey(l.pack, l.off), id[:], nil)
}

// remove forgets a block; ErrNotFound if there is none.
func (c *change) remove(id flox.CID) error {
	l, err := c.find(id)
	if err != nil {
		return err
	}
	p := c.pack(l.pack)
	p.live -= l.frameSize()
	c.packs[l.pack] = p
	c.blocks--
	c.plain -= uint64(l.plain)
	c.stored -= uint64(l.frameSize())
	if err := c.batch.Delete(blockKey(id), nil); err != nil {
		return err
	}
	return c.batch.Delete(frameKey(l.pack, l.off), nil)
}

// indexed says that every frame of a pack before offset is in the index.
func (c *change) indexed(pack uint32, off int64) {
	p := c.pack(pack)
	p.indexed = off
	c.packs[pack] = p
}

// dropPack forgets a pack without blocks.
func (c *change) dropPack(pack uint32) error {
	c.packs[pack] = packState{indexed: -1}
	return c.batch.Delete(packKey(pack), nil)
}

// commit writes the change.
func (c *change) commit() error {
	defer c.batch.Close()
	for id, p := range c.packs {
		if p.indexed < 0 {
			continue
		}
		if err := c.batch.Set(packKey(id), appendUints(uint64(p.indexed), uint64(p.live)), nil); err != nil {
			return err
		}
	}
	if err := c.batch.Set([]byte{keyCounts}, appendUints(c.blocks, c.plain, c.stored), nil); err != nil {
		return err
	}
	if err := c.batch.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	c.x.mu.Lock()
	defer c.x.mu.Unlock()
	for id, p := range c.packs {
		if c.x.packs[id] = p; p.indexed < 0 {
			delete(c.x.packs, id)
		}
	}
	c.x.counts = c.counts
	return nil
}
