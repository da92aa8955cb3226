package pack

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/versionlog"
)

// index is the Pebble side of a Store. Writers are serialized by the Store. Its
// files lie in a directory "index" or "index-N": one that is damaged is never
// repaired but made anew from the packs beside the old one, also while the old one
// is read.
type index struct {
	mu     sync.Mutex // guards what follows; only writers change it
	db     *indexDB
	counts counts
	packs  map[uint32]packState
	remote map[uint32]remotePack // the packs that the bucket has
}

// indexDB is a Pebble that is closed when it had to go and nobody reads it.
type indexDB struct {
	*pebble.DB
	dir    string
	log    *slog.Logger
	rotten atomic.Bool // damaged: nothing is written any more
	found  func(error) // told of damage once; it must not wait

	mu   sync.Mutex // guards what follows
	refs int
	gone chan struct{} // closed when nobody reads any more; nil = not told to go
}

// acquire gives the Pebble to read from; release must follow.
func (x *index) acquire() *indexDB {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.db.mu.Lock()
	defer x.db.mu.Unlock()
	x.db.refs++
	return x.db
}

func (x *index) release(db *indexDB) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.refs--; db.refs == 0 && db.gone != nil {
		close(db.gone)
	}
}

// retire gives a channel that is closed when nobody reads any more.
func (db *indexDB) retire() <-chan struct{} {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.gone = make(chan struct{}); db.refs == 0 {
		close(db.gone)
	}
	return db.gone
}

// replace goes over to what next holds.
func (x *index) replace(next *index) (old *indexDB) {
	x.mu.Lock()
	defer x.mu.Unlock()
	old = x.db
	x.db, x.counts, x.packs, x.remote = next.db, next.counts, next.packs, next.remote
	return old
}

// readError is what a reader of the index says; damage is noted.
func (db *indexDB) readError(err error) error {
	if errors.Is(err, pebble.ErrNotFound) {
		return flox.ErrNotFound
	}
	db.rot(err)
	return fmt.Errorf("index: %w: %w", err, flox.ErrCorrupt)
}

// rot notes damage.
func (db *indexDB) rot(err error) {
	if db.rotten.CompareAndSwap(false, true) {
		db.found(err)
	}
}

// rotten says whether the index is damaged.
func (x *index) rotten() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.db.rotten.Load()
}

// sound refuses work on a damaged index.
func (x *index) sound() error {
	if x.rotten() {
		return fmt.Errorf("the block index is damaged and is being made anew from the packs, try again later: %w", flox.ErrBusy)
	}
	return nil
}

// In the store's directory: the file that says the index is damaged, and the one
// that names the directory in use.
const (
	indexName    = "index"
	damagedName  = "index.damaged"
	currentName  = "index.current"
	indexNumbers = indexName + "-"
)

// currentIndex gives the name of the index's directory.
func currentIndex(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, currentName))
	name := strings.TrimSpace(string(b))
	if _, ok := indexNumber(name); err != nil || !ok {
		return indexName
	}
	return name
}

func indexNumber(name string) (uint64, bool) {
	if name == indexName {
		return 0, true
	}
	digits, ok := strings.CutPrefix(name, indexNumbers)
	n, err := strconv.ParseUint(digits, 10, 32)
	return n, ok && err == nil
}

// newIndexDir gives the directory of the index that follows current.
func newIndexDir(dir, current string) (string, error) {
	n, _ := indexNumber(current)
	next := filepath.Join(dir, indexNumbers+strconv.FormatUint((n+1)%1_000_000, 10))
	return next, os.RemoveAll(next) // of a start that did not get to its end
}

// useIndex makes the index in a directory, now whole, the one in use.
func useIndex(dir, path string) error {
	current := filepath.Join(dir, currentName)
	f, err := os.OpenFile(current+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(filepath.Base(path) + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(current+".new", current); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, damagedName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return syncDir(dir)
}

// removeOldIndexes removes what is not in use.
func removeOldIndexes(dir, inUse string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if _, ok := indexNumber(e.Name()); ok && e.IsDir() && e.Name() != inUse {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// openIndex opens the index in dir of a file system.
func openIndex(fs vfs.FS, dir string, log *slog.Logger, found func(error)) (*index, error) {
	x := &index{packs: make(map[uint32]packState), remote: make(map[uint32]remotePack), db: &indexDB{dir: dir, log: log, found: found}}
	opts := &pebble.Options{
		// One is named, so that Pebble does not watch it with a goroutine that a failed
		// Open leaves behind.
		FS:                 versionlog.FS(fs),
		DisableWAL:         true,
		FormatMajorVersion: pebble.FormatNewest,
		Logger:             indexLog{x.db},
		MemTableSize:       8 << 20,
		EventListener: &pebble.EventListener{
			DataCorruption: func(info pebble.DataCorruptionInfo) { x.db.rot(info.Details) },
			BackgroundError: func(err error) {
				log.Error("index", "error", err)
				if pebble.IsCorruptionError(err) {
					x.db.rot(err)
				}
			},
		},
	}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	err := versionlog.Check(fs, dir)
	var db *pebble.DB
	if err == nil {
		db, err = pebble.Open(dir, opts)
	}
	if err != nil {
		return nil, fmt.Errorf("index %s: %w", dir, err)
	}
	x.db.DB = db
	if err := x.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("index %s: %w", dir, err), db.Close())
	}
	return x, nil
}

// indexLog passes what Pebble says to a logger.
type indexLog struct{ db *indexDB }

func (l indexLog) Infof(format string, args ...any) {
	l.db.log.Debug("index", "message", fmt.Sprintf(format, args...))
}

func (l indexLog) Errorf(format string, args ...any) {
	l.db.log.Error("index", "message", fmt.Sprintf(format, args...))
}

// Fatalf is called where Pebble's own files are not as they were or can no longer
// be written, and expects the process to end. But the packs are whole and the
// index can be made anew: until then nothing is written to this one.
func (l indexLog) Fatalf(format string, args ...any) {
	l.db.rot(fmt.Errorf(format, args...))
}
