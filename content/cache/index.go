package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
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

	life     sync.RWMutex // shared while db is used, exclusive to close it
	closed   bool
	readOnly bool                  // opened without room on the disk; broken from the start
	low      atomic.Bool           // there is no ballast
	broken   atomic.Pointer[error] // db must not be written any more
}

// durability of a commit
const (
	durable = true
	lazy    = false
)

// ballastSize is what is set aside on a disk of so many bytes.
func ballastSize(disk int64) int64 { return min(max(disk/64, 1<<20), 16<<20) }

// openIndex opens or makes the database in dir. On a disk without any room it
// opens what is there for reading only, as broken. ErrCorrupt: it is damaged.
func openIndex(dir, ballast string, disk int64, log *slog.Logger) (*index, error) {
	ix := &index{ballast: ballast, log: log}
	err := ix.open(dir, disk, false)
	if err != nil && !pebble.IsCorruptionError(err) && errors.Is(full(err), flox.ErrFull) {
		ix.dropBallast()
		if err = ix.open(dir, disk, false); err != nil && errors.Is(full(err), flox.ErrFull) {
			cause := fmt.Errorf("the disk of %s has no room: %w", dir, flox.ErrFull)
			ix.broken.Store(&cause)
			err = ix.open(dir, disk, true)
		}
	}
	if err != nil {
		if pebble.IsCorruptionError(err) {
			return nil, fmt.Errorf("open %s: %w: %w", dir, flox.ErrCorrupt, err)
		}
		return nil, fmt.Errorf("open %s: %w", dir, full(err))
	}
	if ix.usable() == nil {
		ix.setBallast(ballastSize(disk))
	}
	return ix, nil
}

func (ix *index) open(dir string, disk int64, readOnly bool) (err error) {
	defer recoverFatal(&err)
	opts := &pebble.Options{
		FS:                 vfs.OnDiskFull(vfs.Default, ix.dropBallast),
		Logger:             pebbleLog{ix},
		Merger:             &pebble.Merger{Name: "flox.cache.add", Merge: mergeTotals},
		FormatMajorVersion: pebble.FormatNewest,
		CacheSize:          16 << 20,
		MemTableSize:       uint64(ballastSize(disk) / 4),
		MaxOpenFiles:       128,
		ReadOnly:           readOnly,
	}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	opts.CompactionConcurrencyRange = func() (int, int) { return 1, 1 }
	ix.readOnly = readOnly
	ix.db, err = pebble.Open(dir, opts)
	return err
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
	ix.low.Store(err != nil)
}

// dropBallast is called by whoever finds the disk full. From then on nothing is
// put, until there is a ballast again.
func (ix *index) dropBallast() {
	ix.low.Store(true)
	if err := os.Truncate(ix.ballast, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		ix.log.Warn("drop the cache's ballast", "err", err)
	}
}

// refill sets the ballast aside again, once the disk has room.
func (ix *index) refill(disk, free int64) {
	if size := ballastSize(disk); ix.low.Load() && free > 2*size {
		ix.setBallast(size)
	}
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
	if p := ix.broken.Load(); p != nil {
		return fmt.Errorf("index of the cache: %w", *p)
	}
	return nil
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

// size is what the index takes on disk, in bytes; before if that cannot be told.
func (ix *index) size(before int64) int64 {
	done, err := ix.use()
	if err != nil {
		return before
	}
	defer done()
	if ix.broken.Load() != nil {
		return before // who broke it may hold its locks for ever
	}
	return int64(ix.db.Metrics().DiskSpaceUsage())
}

func (ix *index) close() error {
	if ix.broken.Load() != nil && !ix.readOnly {
		// Writes under way and goroutines of Pebble's may hold its locks for ever.
		if ix.life.TryLock() {
			ix.closed = true
			ix.life.Unlock()
		}
		return nil
	}
	ix.life.Lock()
	defer ix.life.Unlock()
	if ix.closed || ix.db == nil {
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
	if err := b.ix.usable(); err != nil {
		return err
	}
	if b.sum != (totals{}) {
		_ = b.b.Merge(keyTotals, b.sum.append(nil), nil)
	}
	opt := pebble.NoSync
	if sync {
		opt = pebble.Sync
	}
	if err := b.ix.apply(b.b, opt); err != nil {
		return fmt.Errorf("index of the cache: %w", full(err))
	}
	return nil
}

func (ix *index) apply(b *pebble.Batch, opt *pebble.WriteOptions) (err error) {
	defer recoverFatal(&err)
	return ix.db.Apply(b, opt)
}

// Pebble has no way back from a write that failed: it calls Fatalf and counts
// on that not returning. A cache can live without writing its index: what is in
// it can still be read. So calls of ours come back with an error, and goroutines
// of Pebble's own stop where they are; nobody needs them for reading.

type fatalError struct{ error }

func recoverFatal(err *error) {
	if p := recover(); p != nil {
		fatal, ok := p.(fatalError)
		if !ok {
			panic(p)
		}
		*err = fatal.error
	}
}

// pebbleLog takes Pebble's messages.
type pebbleLog struct{ ix *index }

func (pebbleLog) Infof(string, ...any) {}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.ix.log.Warn("cache index", "msg", fmt.Sprintf(format, args...))
}

func (l pebbleLog) Fatalf(format string, args ...any) {
	// Whatever the disk's trouble is, for who puts it is as good as full.
	err := fmt.Errorf(format+": %w", append(args, flox.ErrFull)...)
	l.ix.broken.CompareAndSwap(nil, &err)
	l.ix.log.Error("cache index cannot be written any more", "err", err)
	if l.ix.called() {
		panic(fatalError{err})
	}
	select {}
}

// called says whether a call of ours, and not a goroutine of Pebble's, is running.
func (ix *index) called() bool {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, "(*index).apply") || strings.HasSuffix(f.Function, "(*index).open") {
			return true
		}
		if !more {
			return false
		}
	}
}

// full adds ErrFull to an error that says that a disk has no room.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", flox.ErrFull, err)
	}
	return err
}
