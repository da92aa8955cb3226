package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/indexdb"
)

// Keys of the index. Numbers are big-endian, so that they sort.
//
//	c id file off      -> size        a chunk lies in file at off
//	f id seg           -> record      a segment of a file
//	g owner 0 id       ->             owner keeps id
//	k id owner         ->             the same, by id
//	l object base id seg ->           the segment lies in the pack object
//	m                  -> marks       generations and sync marks
//	o object           -> [id seg]    an own file's segment; empty for a pack
//	p id seg off       -> cid size    a chunk begins in the segment, at off of the file
//	t                  -> totals      sums over all records, kept by merging
var (
	keyMarks  = []byte("m")
	keyTotals = []byte("t")
)

func segmentKey(k key) []byte {
	return binary.BigEndian.AppendUint32(append([]byte{'f'}, k.id[:]...), k.seg)
}

func chunkKey(chunk, file flox.CID, off int64) []byte {
	b := append(append([]byte{'c'}, chunk[:]...), file[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(off))
}

func partKey(k key, off int64) []byte {
	return binary.BigEndian.AppendUint64(partPrefix(k), uint64(off))
}

func partPrefix(k key) []byte {
	return binary.BigEndian.AppendUint32(append([]byte{'p'}, k.id[:]...), k.seg)
}

func objectKey(object uint64) []byte { return binary.BigEndian.AppendUint64([]byte{'o'}, object) }

func memberPrefix(object uint64) []byte { return binary.BigEndian.AppendUint64([]byte{'l'}, object) }

func memberKey(object uint64, base int64, k key) []byte {
	b := binary.BigEndian.AppendUint64(memberPrefix(object), uint64(base))
	return binary.BigEndian.AppendUint32(append(b, k.id[:]...), k.seg)
}

func keepKey(id flox.CID, owner string) []byte {
	return append(append([]byte{'k'}, id[:]...), owner...)
}

func groupKey(owner string, id flox.CID) []byte {
	return append(append(append([]byte{'g'}, owner...), 0), id[:]...)
}

// readKey reads the id and segment at the end of a key or in a value.
func readKey(b []byte) (k key, ok bool) {
	if len(b) != flox.CIDSize+4 {
		return k, false
	}
	return key{flox.CID(b[:flox.CIDSize]), binary.BigEndian.Uint32(b[flox.CIDSize:])}, true
}

// index is the Pebble database. Nothing in it is worth an fsync but marks, keeps
// and what says that bytes are gone: whatever else a crash takes, it only makes the cache know less.
type index struct {
	*indexdb.DB

	life   sync.RWMutex // shared while the database is used, exclusive to close it
	closed bool
}

// durability of a commit
const (
	durable = true
	lazy    = false
)

// openIndex opens or makes the database in dir. On a disk without any room it
// opens what is there for reading only, as broken. ErrCorrupt: it is damaged.
func openIndex(dir, ballast string, log *slog.Logger) (*index, error) {
	opts := pebble.Options{
		Merger:             &pebble.Merger{Name: "flox.cache.add", Merge: mergeTotals},
		FormatMajorVersion: pebble.FormatNewest,
		CacheSize:          16 << 20,
		MaxOpenFiles:       128,
	}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	opts.CompactionConcurrencyRange = func() (int, int) { return 1, 1 }
	db, err := indexdb.Open(indexdb.Config{Name: "index of the cache", Dir: dir, Ballast: ballast, Most: 16 << 20, Log: log, Options: opts})
	if err != nil {
		return nil, err
	}
	return &index{DB: db}, nil
}

// use lets the caller read db until it calls done. It fails when db is closed.
func (ix *index) use() (done func(), err error) {
	ix.life.RLock()
	if ix.closed {
		ix.life.RUnlock()
		return nil, fmt.Errorf("cache: %w", flox.ErrClosed)
	}
	return ix.life.RUnlock, nil
}

// usable fails when the index is closed or broken.
func (ix *index) usable() error {
	done, err := ix.use()
	if err != nil {
		return err
	}
	done()
	return ix.Broken()
}

// get gives a copy of a value. ErrNotFound: there is none.
func (ix *index) get(k []byte) ([]byte, error) {
	done, err := ix.use()
	if err != nil {
		return nil, err
	}
	defer done()
	v, closer, err := ix.DB.Get(k)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, flox.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("index of the cache: %w", err)
	}
	defer closer.Close()
	return bytes.Clone(v), nil
}

// errStop ends a scan early.
var errStop = errors.New("stop")

// scan calls yield with each key and value in [from, behind prefix), both valid
// until it returns. An error of yield ends the scan and is returned, errStop as nil.
// The index may be written meanwhile; the scan sees what was there at its start.
// Yield must not use the index: close would wait for the scan, and yield for close.
func (ix *index) scan(ctx context.Context, prefix, from []byte, yield func(k, v []byte) error) error {
	done, err := ix.use()
	if err != nil {
		return err
	}
	defer done()
	it, err := ix.NewIter(ctx, &pebble.IterOptions{LowerBound: from, UpperBound: behind(prefix)})
	if err != nil {
		return fmt.Errorf("index of the cache: %w", err)
	}
	for ok := it.First(); ok && err == nil; ok = it.Next() {
		if err = ctx.Err(); err == nil {
			err = yield(it.Key(), it.Value())
		}
	}
	err = errors.Join(err, it.Close())
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// entry is a key of the index and its value.
type entry struct{ key, value []byte }

// page gives copies of at most n entries of [from, behind prefix).
func (ix *index) page(ctx context.Context, prefix, from []byte, n int) (list []entry, err error) {
	err = ix.scan(ctx, prefix, from, func(k, v []byte) error {
		list = append(list, entry{bytes.Clone(k), bytes.Clone(v)})
		if len(list) == n {
			return errStop
		}
		return nil
	})
	return list, err
}

// pages calls yield with all entries with prefix, in pages. Unlike
// that of scan, yield may use the index; it sees what changed meanwhile, or not.
func (ix *index) pages(ctx context.Context, prefix []byte, yield func([]entry) error) error {
	for from := prefix; ; {
		list, err := ix.page(ctx, prefix, from, 512)
		if err != nil || len(list) == 0 {
			return err
		}
		if err := yield(list); errors.Is(err, errStop) {
			return nil
		} else if err != nil {
			return err
		}
		from = append(list[len(list)-1].key, 0)
	}
}

// has says whether a key with prefix exists.
func (ix *index) has(prefix []byte) (found bool, err error) {
	err = ix.scan(context.Background(), prefix, prefix, func(_, _ []byte) error {
		found = true
		return errStop
	})
	return found, err
}

// behind is the first key that does not begin with prefix.
func behind(prefix []byte) []byte {
	b := bytes.Clone(prefix)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i]++; b[i] != 0 {
			return b[:i+1]
		}
	}
	return nil
}

// size is what the index takes on disk, in bytes; before if that cannot be told.
func (ix *index) size(before int64) int64 {
	done, err := ix.use()
	if err != nil {
		return before
	}
	defer done()
	return ix.Size(before)
}

func (ix *index) close() error {
	if ix.Broken() == nil {
		ix.life.Lock()
	} else if !ix.life.TryLock() {
		return nil // who uses it may wait for ever for one that is broken
	}
	defer ix.life.Unlock()
	if ix.closed {
		return nil
	}
	ix.closed = true
	return ix.DB.Close()
}

// batch is a set of changes that are made together or not at all.
type batch struct {
	ix  *index
	b   *pebble.Batch
	sum totals
}

func (ix *index) batch() *batch { return &batch{ix: ix, b: new(pebble.Batch)} }

// The error of a Set or Delete on a batch is always nil, but for one already committed.
func (b *batch) set(k, v []byte) { _ = b.b.Set(k, v, nil) }
func (b *batch) del(k []byte)    { _ = b.b.Delete(k, nil) }

// commit writes the batch. Concurrent commits of one key must be ordered by the caller.
func (b *batch) commit(sync bool) error {
	done, err := b.ix.use()
	if err != nil {
		return err
	}
	defer done()
	if err := b.ix.usable(); err != nil {
		return err
	}
	if b.sum != (totals{}) {
		_ = b.b.Merge(keyTotals, b.sum.append(nil), nil)
	}
	return b.ix.Apply(b.b, sync)
}
