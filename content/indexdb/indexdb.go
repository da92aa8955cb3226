// Package indexdb opens Pebble databases that live on when the disk is full: for
// that they have a ballast, and without any room left they are read and not written.
//
// It knows nothing of what is in a database.
package indexdb

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/ballast"
	"github.com/floxctl/flox/content/versionlog"
)

// Config configures a DB. All fields but FS are needed.
type Config struct {
	Name    string // of the database, for people: "index of the cache"
	Dir     string // of the database; its parent exists
	Ballast string // file on the same disk
	Most    int64  // bytes of the ballast, on a large disk
	Log     *slog.Logger
	// Options are Pebble's, but for those that are set here: FS, Logger, MemTableSize, ReadOnly.
	Options pebble.Options
	// FS is where the database is; its lock and ballast are on the machine's. nil = all is there
	FS vfs.FS
}

// pause is between two tables when the disk had no room for the first.
const pause = 5 * time.Second

// DB is a Pebble database. Its methods may be called by many goroutines at once,
// but for Close, beside which nothing may run.
//
// Pebble has no way back from a write of its log or manifest that failed: it counts
// on the process to end. Here the database is given up for writing instead; what is
// in it can still be read.
type DB struct {
	cfg  Config
	size int64     // bytes of the ballast
	lock io.Closer // of the directory

	early   *early     // read until db is there, nil = db was there at once
	db      *pebble.DB // valid when ready is closed; nil: it could not be opened, and is broken
	ready   chan struct{}
	passing atomic.Bool           // Pebble is told of errors: it opens or closes
	ballast *ballast.Ballast      // what is set aside for noting what is gone, which makes room
	once    sync.Once             // of broken
	cause   atomic.Pointer[error] // why it must not be written any more
	broken  chan struct{}         // closed behind cause
	closing chan struct{}         // closed by Close
}

// Open opens or makes the database. What is there can be read at once; it is opened for
// writing meanwhile, which waits for the disk several times, and whoever writes waits for that. On a disk
// without any room it stays as it is, broken. ErrCorrupt: it is damaged. ErrFull: there is no room to make it.
func Open(cfg Config) (*DB, error) {
	d := &DB{cfg: cfg, broken: make(chan struct{}), closing: make(chan struct{}), ready: make(chan struct{})}
	if d.cfg.FS == nil {
		d.cfg.FS = vfs.Default
	}
	total, _, err := ballast.Disk(filepath.Dir(cfg.Ballast))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.Name, err)
	}
	d.size = min(max(total/64, 1<<20), cfg.Most)
	d.ballast = ballast.New(cfg.Ballast, cfg.Name, d.size, cfg.Log)
	if _, err := os.Lstat(d.damaged()); err == nil {
		return nil, fmt.Errorf("open %s: it could be read and not be opened for writing: %w", cfg.Dir, flox.ErrCorrupt)
	}
	if d.early = d.newEarly(); d.early != nil {
		go d.prepare()
		return d, nil
	}
	defer close(d.ready) // there is none yet, or it is damaged
	if d.db, err = d.openToWrite(); err != nil {
		_ = d.unlock()
		if isCorrupt(err) {
			return nil, fmt.Errorf("open %s: %w: %w", cfg.Dir, flox.ErrCorrupt, err)
		}
		return nil, fmt.Errorf("open %s: %w", cfg.Dir, Full(err))
	}
	d.ballast.Set()
	return d, nil
}

// openToWrite gives up the ballast if it has to.
func (d *DB) openToWrite() (*pebble.DB, error) {
	db, err := d.open(false)
	if isFull(err) {
		d.ballast.Drop()
		db, err = d.open(false)
	}
	return db, err
}

// prepare makes a database that can be read one that can be written.
func (d *DB) prepare() {
	db, err := d.openToWrite()
	if isCorrupt(err) {
		// The next process hears of it before it reads, and does what it does of damage.
		err = errors.Join(fmt.Errorf("%w: %w", flox.ErrCorrupt, err), os.WriteFile(d.damaged(), nil, 0o600))
	}
	if err != nil {
		d.giveUp(fmt.Errorf("open %s: %w", d.cfg.Dir, Full(err)))
		close(d.ready)
		return
	}
	d.db = db
	d.ballast.Set()
	close(d.ready)
	d.early.end() // nobody reads it who comes from here on
}

// damaged is a file that says that the database is.
func (d *DB) damaged() string { return filepath.Join(d.cfg.Dir, "damaged") }

func isCorrupt(err error) bool {
	return pebble.IsCorruptionError(err) || errors.Is(err, flox.ErrCorrupt)
}

func isFull(err error) bool {
	return err != nil && !isCorrupt(err) && errors.Is(Full(err), flox.ErrFull)
}

// open is one attempt. That the disk is full may be heard of while Pebble is at it: it would
// try for ever then, and is left behind.
func (d *DB) open(readOnly bool) (*pebble.DB, error) {
	opts := d.cfg.Options // a copy
	at := &attempt{DB: d, full: make(chan error, 1)}
	at.opening.Store(true)
	opts.FS = &vitalFS{FS: versionlog.FS(d.ballast.FS(d.cfg.FS)), of: at}
	opts.Logger = pebbleLog{d}
	opts.EventListener = &pebble.EventListener{FlushEnd: func(i pebble.FlushInfo) { at.flushed(i.Err) }}
	opts.MemTableSize = uint64(d.size / 4) //nolint:gosec // positive
	opts.ReadOnly = readOnly
	type opened struct {
		db  *pebble.DB
		err error
	}
	done := make(chan opened, 1)
	d.passing.Store(true)
	defer d.passing.Store(false)
	go func() {
		db, err := d.start(&opts)
		done <- opened{db, err}
	}()
	select {
	case o := <-done:
		at.opening.Store(false)
		return o.db, o.err
	case err := <-at.full:
		return nil, err
	}
}

func (d *DB) start(opts *pebble.Options) (db *pebble.DB, err error) {
	defer recoverFatal(&err)
	if err := versionlog.Check(d.cfg.FS, d.cfg.Dir); err != nil {
		return nil, err
	}
	return pebble.Open(d.cfg.Dir, opts)
}

// Close lets go of the database, unless it was broken while it was written: goroutines
// may hold its locks for ever then, and only the end of the process lets go of it.
func (d *DB) Close() error {
	<-d.ready
	var errs []error
	if d.db != nil {
		if d.Broken() != nil {
			return nil
		}
		d.passing.Store(true)
		close(d.closing)
		errs = append(errs, d.db.Close())
	}
	if d.early != nil {
		d.early.end()
		<-d.early.over
		errs = append(errs, d.early.err)
	}
	if err := errors.Join(append(errs, d.unlock())...); err != nil {
		return fmt.Errorf("close %s: %w", d.cfg.Name, err)
	}
	return nil
}

// Wait returns when the database is open for writing, or broken: then what is read is on the disk, unless
// it is broken.
func (d *DB) Wait() { <-d.ready }

// Size is what the database takes on disk, in bytes; before, if that cannot be told.
func (d *DB) Size(before int64) int64 {
	if d.Broken() != nil || !d.writable() {
		return before // who broke it may hold its locks for ever
	}
	return int64(d.db.Metrics().DiskSpaceUsage()) //nolint:gosec // of one disk
}

// Apply makes all changes of a batch or none, durably if sync is set. The batch must not be
// used any more. ErrFull: they are not made, or not known to be durable; the
// database is broken.
func (d *DB) Apply(b *pebble.Batch, sync bool) error {
	<-d.ready
	if err := d.Broken(); err != nil {
		return err
	}
	opt := pebble.NoSync
	if sync {
		opt = pebble.Sync
	}
	done := make(chan error, 1)
	go func() { done <- d.apply(b, opt) }() // a broken database keeps it for ever
	select {
	case err := <-done:
		return err
	case <-d.broken:
	}
	select {
	case err := <-done:
		return err
	default:
		return d.Broken()
	}
}

func (d *DB) apply(b *pebble.Batch, opt *pebble.WriteOptions) (err error) {
	defer recoverFatal(&err)
	if err := d.db.Apply(b, opt); err != nil {
		return fmt.Errorf("%s: %w", d.cfg.Name, Full(err))
	}
	return nil
}

// Break gives the database up for writing.
func (d *DB) Break(cause error) {
	d.once.Do(func() {
		cause = fmt.Errorf("%s: %w", d.cfg.Name, cause)
		d.cause.Store(&cause)
		close(d.broken)
	})
}

// Broken says why the database must not be written any more, with ErrFull; nil: it may be.
func (d *DB) Broken() error {
	if p := d.cause.Load(); p != nil {
		return *p
	}
	return nil
}

// Low says that the disk was full and the ballast is gone. What is written then
// should make room.
func (d *DB) Low() bool { return d.ballast.Low() }

// Room is nil unless the disk was full and has no more room than half of the ballast now, or
// the database is broken: ErrFull.
func (d *DB) Room() error {
	if err := d.Broken(); err != nil || !d.Low() {
		return err
	}
	if _, free, err := ballast.Disk(filepath.Dir(d.cfg.Ballast)); err == nil && free < d.size/2 {
		return fmt.Errorf("%s: %d bytes are free on the disk of %s: %w", d.cfg.Name, free, d.cfg.Dir, flox.ErrFull)
	}
	return nil
}

// Tend is to be called every second or so: it sets the ballast aside again once the
// disk has room. ErrFull: the database is broken, but there is room again now, or it is
// damaged (ErrCorrupt, too). It is let go of only by the end of the process, which must start anew.
func (d *DB) Tend() error {
	cause := d.Broken()
	if cause == nil {
		d.ballast.Tend()
		return nil
	}
	_, free, err := ballast.Disk(filepath.Dir(d.cfg.Ballast))
	if err == nil && free > 4*d.size || errors.Is(cause, flox.ErrCorrupt) {
		return fmt.Errorf("%s must be opened anew: %w", d.cfg.Dir, cause)
	}
	return nil
}

// lockFile locks the directory once for all attempts.
func (d *DB) lockFile(name string) error {
	if d.lock != nil {
		return nil
	}
	lock, err := vfs.Default.Lock(name)
	d.lock = lock
	return err
}

func (d *DB) unlock() error {
	if d.lock == nil {
		return nil
	}
	return d.lock.Close()
}

// attempt is what Pebble does for one open.
type attempt struct {
	*DB
	opening atomic.Bool
	gone    atomic.Bool  // left behind
	full    chan error   // why
	after   atomic.Int64 // when the next table may be written, in Unix nanoseconds
}

// flushed hears how a flush ended, under Pebble's lock. Pebble tries for ever, and
// whoever writes waits for it.
func (a *attempt) flushed(err error) {
	switch {
	case !errors.Is(Full(err), flox.ErrFull):
	case a.opening.Load():
		if !a.gone.Swap(true) {
			a.full <- err
		}
	case !a.passing.Load():
		a.giveUp(err)
	}
}

// failed hears of a write that Pebble cannot go on without, in place of Pebble.
func (a *attempt) failed(err error) error {
	if a.passing.Load() && !a.gone.Load() {
		return err
	}
	if !a.gone.Load() {
		a.giveUp(err)
	}
	select {} // with no lock held that readers need
}

// slow has the next table wait: Pebble writes one that failed anew at once, and again.
func (a *attempt) slow(err error) {
	if errors.Is(Full(err), flox.ErrFull) {
		a.after.Store(time.Now().Add(pause).UnixNano())
	}
}

// begin is called before a table is made, with no lock held.
func (a *attempt) begin() {
	if a.gone.Load() || a.Broken() != nil && !a.passing.Load() {
		select {}
	}
	left := time.NewTimer(time.Until(time.Unix(0, a.after.Load())))
	defer left.Stop()
	select {
	case <-left.C:
	case <-a.closing:
	}
}

// giveUp: whatever the disk's trouble is, for who writes it is as good as full.
func (d *DB) giveUp(err error) {
	if !errors.Is(err, flox.ErrFull) {
		err = fmt.Errorf("%w: %w", flox.ErrFull, err)
	}
	d.Break(err)
	d.cfg.Log.Error("database cannot be written any more", "of", d.cfg.Name, "err", err)
}

// fatalError is what a call of ours panics with where Pebble says it cannot go on.
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
type pebbleLog struct{ d *DB }

// Infof is pebble.Logger.
func (pebbleLog) Infof(string, ...any) {}

// Errorf is pebble.Logger.
func (l pebbleLog) Errorf(format string, args ...any) {
	l.d.cfg.Log.Warn("database", "of", l.d.cfg.Name, "msg", fmt.Sprintf(format, args...))
}

// Fatalf is pebble.Logger. Calls of ours come back with an error, and goroutines of Pebble's own
// stop where they are; nobody needs them for reading.
func (l pebbleLog) Fatalf(format string, args ...any) {
	err := fmt.Errorf(format+": %w", append(args, flox.ErrFull)...)
	ours := called()
	if !ours || !l.d.passing.Load() { // one that cannot be opened is not broken yet
		l.d.giveUp(err)
	}
	if ours {
		panic(fatalError{err})
	}
	select {}
}

// called says whether a call of ours, and not a goroutine of Pebble's, is running.
func called() bool {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, "indexdb.(*DB).apply") || strings.HasSuffix(f.Function, "indexdb.(*DB).start") {
			return true
		}
		if !more {
			return false
		}
	}
}

// Full adds ErrFull to an error that says that a disk has no room.
func Full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", flox.ErrFull, err)
	}
	return err
}
