package backup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// lookers is how many indexes of objects are read at once.
const lookers = 16

// Object is a content object.
type Object struct {
	Digest string `json:"blake3"` // hexadecimal, which its name is made of
	Size   int64  `json:"size"`   // bytes
}

// Name is where the object lies in the place.
func (o Object) Name() string { return objectName(o.Digest) }

// Contents says which block lies in which content object of a place. What it knows
// is on disk: about 80 bytes a block, in a directory of its own that Close removes.
type Contents struct {
	place *Place
	dir   string
	db    *pebble.DB // CID: number of the object, offset, plain size, stored size and encoding
	dec   *zstd.Decoder

	mu      sync.Mutex
	objects []Object // by number; without a digest: being written
	used    []bool   // by number: the backup under way needs it
	blocks  uint64   // in objects that were read, repeats included
}

// location is where a block lies.
type location struct {
	number, off uint32
	entry
}

const locationSize = 16

// OpenContents reads the indexes of the place's content objects, all or those
// named, into dir, which it makes anew. bad is told of those that are missing or
// damaged, whose blocks then are not there; an error of it ends the reading.
func (p *Place) OpenContents(ctx context.Context, dir string, only []Object, bad func(Object, error) error) (*Contents, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("index of the backup's content: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("index of the backup's content: %w", err)
	}
	c := &Contents{place: p, dir: dir}
	var err error
	if c.dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(content.MaxBlock)); err != nil {
		return nil, err
	}
	c.db, err = pebble.Open(dir, &pebble.Options{DisableWAL: true, MemTableSize: 16 << 20, Logger: quietLog{}})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("index of the backup's content: %w", err), c.Close())
	}
	if only == nil {
		only, err = p.objects(ctx)
	}
	if err == nil {
		err = c.learn(ctx, only, bad)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// objects lists the content objects of the place.
func (p *Place) objects(ctx context.Context) (all []Object, err error) {
	err = p.list(ctx, contentPrefix, func(o object) error {
		if digest, ok := objectDigest(o.name); ok {
			all = append(all, Object{digest, o.size})
		}
		return nil
	})
	return all, err
}

// learn reads the indexes of objects.
func (c *Contents) learn(ctx context.Context, objects []Object, bad func(Object, error) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(lookers)
	var telling sync.Mutex
	for _, o := range objects {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			entries, err := c.place.readIndex(ctx, o.Name(), o.Size)
			if errors.Is(err, flox.ErrCorrupt) || errors.Is(err, flox.ErrNotFound) {
				telling.Lock()
				defer telling.Unlock()
				return bad(o, err)
			}
			if err != nil {
				return err
			}
			return c.know(c.number(o), entries)
		})
	}
	return group.Wait()
}

// number takes an object in.
func (c *Contents) number(o Object) uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects, c.used = append(c.objects, o), append(c.used, false)
	return uint32(len(c.objects) - 1) //nolint:gosec // an object has megabytes
}

// know notes where the blocks of an object lie.
func (c *Contents) know(number uint32, entries []entry) error {
	c.mu.Lock()
	c.blocks += uint64(len(entries))
	c.mu.Unlock()
	batch := c.db.NewBatch()
	defer func() { _ = batch.Close() }() // applied, or given up
	off := uint32(len(objectMagic))
	for _, e := range entries {
		if err := batch.Set(e.id[:], location{number, off, e}.bytes(), nil); err != nil {
			return err
		}
		off += e.stored
	}
	return batch.Commit(pebble.NoSync)
}

func (l location) bytes() []byte {
	stored := l.stored
	if l.zstd {
		stored |= zstdBit
	}
	b := make([]byte, 0, locationSize)
	for _, v := range []uint32{l.number, l.off, l.plain, stored} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

// find says where a block lies. ErrNotFound.
func (c *Contents) find(id flox.CID) (location, error) {
	b, closer, err := c.db.Get(id[:])
	if errors.Is(err, pebble.ErrNotFound) {
		return location{}, fmt.Errorf("block %s is in no object of the backup: %w", id, flox.ErrNotFound)
	}
	if err != nil {
		return location{}, fmt.Errorf("index of the backup's content: %w", err)
	}
	defer func() { _ = closer.Close() }()
	if len(b) != locationSize {
		return location{}, fmt.Errorf("index of the backup's content: %w", flox.ErrCorrupt)
	}
	u := func(i int) uint32 { return binary.BigEndian.Uint32(b[4*i:]) }
	return location{u(0), u(1), entry{id, u(2), u(3) &^ zstdBit, u(3)&zstdBit != 0}}, nil
}

// object gives an object by its number; false for one that was dropped.
func (c *Contents) object(number uint32) (Object, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.objects[number]
	return o, o.Digest != ""
}

// Use says that the backup under way needs a block; false if it is in no object.
func (c *Contents) Use(id flox.CID) (bool, error) {
	l, err := c.find(id)
	if errors.Is(err, flox.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	c.mu.Lock()
	c.used[l.number] = true
	c.mu.Unlock()
	return true, nil
}

// Used are the objects that the backup under way needs.
func (c *Contents) Used() (list []Object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, used := range c.used {
		if used {
			list = append(list, c.objects[i])
		}
	}
	return list
}

// Blocks is about how many blocks the objects hold that were there at first.
func (c *Contents) Blocks() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.blocks
}

// Has reports whether a block is in an object.
func (c *Contents) Has(id flox.CID) (bool, error) {
	l, err := c.find(id)
	if errors.Is(err, flox.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_, there := c.object(l.number)
	return there, nil
}

// Get is flox.Blocks: it reads one block of the place and checks it.
func (c *Contents) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	l, err := c.find(id)
	if err != nil {
		return nil, err
	}
	o, there := c.object(l.number)
	if !there {
		return nil, fmt.Errorf("block %s is in a damaged object: %w", id, flox.ErrCorrupt)
	}
	stored, err := c.place.part(ctx, o.Name(), int64(l.off), int64(l.stored), int64(l.stored))
	if err != nil {
		return nil, err
	}
	plain, err := c.open(l.entry, stored)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", c.place, o.Name(), err)
	}
	return plain, nil
}

// open gives the plain bytes of a block, checked.
func (c *Contents) open(e entry, stored []byte) (plain []byte, err error) {
	if plain = stored; e.zstd {
		if plain, err = c.dec.DecodeAll(stored, make([]byte, 0, e.plain)); err != nil {
			return nil, fmt.Errorf("block %s: %w: %w", e.id, err, flox.ErrCorrupt)
		}
	}
	if len(plain) != int(e.plain) || content.Hash(plain) != e.id {
		return nil, fmt.Errorf("block %s: its %d bytes are others: %w", e.id, len(plain), flox.ErrCorrupt)
	}
	return plain, nil
}

// Read reads every byte of an object, checks all of it, and calls f with each block
// as it is stored: zstd, or its plain bytes. stored is f's only until it returns.
func (c *Contents) Read(ctx context.Context, o Object, f func(id flox.CID, stored []byte, zstd bool) error) error {
	return c.place.readObject(ctx, o, func(e entry, stored []byte) error {
		if _, err := c.open(e, stored); err != nil {
			return fmt.Errorf("%s: %s: %w", c.place, o.Name(), err)
		}
		return f(e.id, stored, e.zstd)
	})
}

// Close removes what is known.
func (c *Contents) Close() (err error) {
	if c.db != nil {
		err = c.db.Close()
		c.db = nil
	}
	c.dec.Close()
	return errors.Join(err, os.RemoveAll(c.dir))
}

// quietLog keeps Pebble's own chatter out of our log; its errors come back as errors.
type quietLog struct{}

func (quietLog) Infof(string, ...any)  {}
func (quietLog) Errorf(string, ...any) {}
func (quietLog) Fatalf(format string, args ...any) {
	panic(fmt.Sprintf("index of the backup's content: "+format, args...)) // its invariants are broken
}

// Drop forgets the blocks of a damaged object: they are not there. It reports
// whether they were.
func (c *Contents) Drop(o Object) (was bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.objects {
		if c.objects[i] == o {
			c.objects[i].Digest, was = "", true
		}
	}
	return was
}
