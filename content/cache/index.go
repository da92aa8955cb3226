package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
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
	db      *pebble.DB
	ballast string
	log     *slog.Logger

	life   sync.RWMutex // shared while db is used, exclusive to close it
	closed bool
	broken atomic.Pointer[error] // db must not be used any more
}

// durability of a commit
const (
	durable = true
	lazy    = false
)

// openIndex opens or makes the database in dir. ErrCorrupt: it is damaged.
func openIndex(dir, ballast string, disk int64, log *slog.Logger) (*index, error) {
	ix := &index{ballast: ballast, log: log}
	room := min(max(disk/64, 1<<20), 16<<20) // ballast; a quarter of it is a memtable
	opts := &pebble.Options{
		FS:                 vfs.OnDiskFull(vfs.Default, ix.dropBallast),
		Logger:             pebbleLog{ix},
		Merger:             &pebble.Merger{Name: "flox.cache.add", Merge: mergeTotals},
		FormatMajorVersion: pebble.FormatNewest,
		CacheSize:          16 << 20,
		MemTableSize:       uint64(room / 4),
		MaxOpenFiles:       128,
	}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	opts.CompactionConcurrencyRange = func() (int, int) { return 1, 1 }
	db, err := pebble.Open(dir, opts)
	if err != nil {
		if pebble.IsCorruptionError(err) {
			return nil, fmt.Errorf("open %s: %w: %w", dir, flox.ErrCorrupt, err)
		}
		return nil, fmt.Errorf("open %s: %w", dir, full(err))
	}
	ix.db = db
	ix.setBallast(room)
	return ix, nil
}

// setBallast sets room aside that the index gets when the disk is full, because
// making room takes some: what is gone must be noted first.
func (ix *index) setBallast(size int64) {
	f, err := os.OpenFile(ix.ballast, os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = errors.Join(syscall.Fallocate(int(f.Fd()), 0, 0, size), f.Close())
	}
	if err != nil {
		ix.log.Warn("no ballast for the cache's index", "size", size, "err", err)
	}
}

func (ix *index) dropBallast() {
	if err := os.Truncate(ix.ballast, 0); err != nil {
		ix.log.Warn("drop the cache's ballast", "err", err)
	}
}

// refill sets the ballast aside again, once the disk has room.
func (ix *index) refill(disk, free int64) {
	size := min(max(disk/64, 1<<20), 16<<20)
	if st, err := os.Stat(ix.ballast); (err != nil || st.Size() < size) && free > 2*size {
		ix.setBallast(size)
	}
}

// use lets the caller use db until it calls done. It fails when db is closed or broken.
func (ix *index) use() (done func(), err error) {
	ix.life.RLock()
	if ix.closed {
		ix.life.RUnlock()
		return nil, fmt.Errorf("cache: %w", flox.ErrClosed)
	}
	if p := ix.broken.Load(); p != nil {
		ix.life.RUnlock()
		return nil, fmt.Errorf("index of the cache: %w", *p)
	}
	return ix.life.RUnlock, nil
}

// usable fails when the index is closed or broken.
func (ix *index) usable() error {
	done, err := ix.use()
	if err == nil {
		done()
	}
	return err
}

// get gives a copy of a value. ErrNotFound: there is none.
func (ix *index) get(k []byte) ([]byte, error) {
	done, err := ix.use()
	if err != nil {
		return nil, err
	}
	defer done()
	v, closer, err := ix.db.Get(k)
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
	it, err := ix.db.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: behind(prefix)})
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

// size is what the index takes on disk, in bytes.
func (ix *index) size() int64 {
	done, err := ix.use()
	if err != nil {
		return 0
	}
	defer done()
	return int64(ix.db.Metrics().DiskSpaceUsage())
}

func (ix *index) close() error {
	ix.life.Lock()
	defer ix.life.Unlock()
	if ix.closed || ix.broken.Load() != nil { // the locks of a broken one may be held for ever
		return nil
	}
	ix.closed = true
	if err := ix.db.Close(); err != nil {
		return fmt.Errorf("close the cache's index: %w", err)
	}
	return nil
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
func (b *batch) commit(sync bool) (err error) {
	done, err := b.ix.use()
	if err != nil {
		return err
	}
	defer done()
	defer func() {
		// Pebble has no way back from a write that failed, and tells so
		// through pebbleLog.Fatalf. A cache can live without its index.
		if p := recover(); p != nil {
			fatal, ok := p.(fatalError)
			if !ok {
				panic(p)
			}
			err = fatal.error
			b.ix.broken.CompareAndSwap(nil, &err)
		}
	}()
	if b.sum != (totals{}) {
		_ = b.b.Merge(keyTotals, b.sum.append(nil), nil)
	}
	opt := pebble.NoSync
	if sync {
		opt = pebble.Sync
	}
	if err := b.ix.db.Apply(b.b, opt); err != nil {
		return fmt.Errorf("index of the cache: %w", full(err))
	}
	return nil
}

type fatalError struct{ error }

// pebbleLog takes Pebble's messages. Fatalf must not return.
type pebbleLog struct{ ix *index }

func (pebbleLog) Infof(string, ...any) {}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.ix.log.Warn("cache index", "msg", fmt.Sprintf(format, args...))
}

func (l pebbleLog) Fatalf(format string, args ...any) {
	err := fmt.Errorf(format+": %w", append(args, flox.ErrFull)...)
	l.ix.log.Error("cache index cannot be written", "err", err)
	panic(fatalError{err})
}

// full adds ErrFull to an error that says that a disk has no room.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", flox.ErrFull, err)
	}
	return err
}
