package raft

import (
	"encoding/binary"
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

// stateFormat is the Pebble format this program writes. It is raised by hand,
// with a fixture, so that an upgrade of Pebble alone changes nothing on disk.
const stateFormat = pebble.FormatColumnarBlocks

// currentFile names the directory the state is in.
const currentFile = "current"

// Keys of the node itself, behind ownSpace.
var (
	keyApplied = []byte{ownSpace, 'a'} // log index of the last entry in the state, big endian
	keyTime    = []byte{ownSpace, 't'} // its time, Unix milliseconds, big endian
	// keyRestored is what keyApplied was when the state was restored from a snapshot.
	// The snapshot's index may lie before it, and this server's log end there.
	keyRestored = []byte{ownSpace, 'b'}
)

// database is one generation of the state. A restore replaces it while readers
// still look at the one before, so it is counted and closed by the last.
type database struct {
	*pebble.DB
	dir string

	mu     sync.Mutex
	refs   int
	remove bool // and delete the directory

	broken atomic.Bool // Pebble gave up: nothing in it may be called any more
}

// release gives one reference back.
func (d *database) release() error {
	d.mu.Lock()
	d.refs--
	last := d.refs == 0
	remove := d.remove
	d.mu.Unlock()
	if !last || d.broken.Load() {
		return nil // a broken database might wait for itself for ever
	}
	err := d.DB.Close()
	if remove {
		err = errors.Join(err, os.RemoveAll(d.dir))
	}
	return err
}

// state owns the directory of the state: numbered databases and a file that
// says which one is in force.
type state struct {
	dir   string
	cache int64
	fs    vfs.FS
	log   *slog.Logger

	rotten atomic.Pointer[func(error)] // told when the files turn out to be damaged

	mu     sync.Mutex
	cur    *database
	number uint64
}

// rot tells that the files in dir are damaged.
func (s *state) rot(dir string, err error) {
	s.log.Error("state is damaged", "dir", dir, "error", err)
	if f := s.rotten.Load(); f != nil {
		(*f)(fmt.Errorf("state %s: %w: %w", dir, err, flox.ErrCorrupt))
	}
}

// openState opens the state in dir of a file system, making an empty one if there is
// none. What an interrupted restore left is removed.
func openState(fs vfs.FS, dir string, cache int64, log *slog.Logger) (*state, error) {
	s := &state{dir: dir, cache: cache, fs: fs, log: log}
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, currentFile))
	fresh := errors.Is(err, os.ErrNotExist)
	if err != nil && !fresh {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if !fresh {
		s.number, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s holds %q, want the number of a directory: %w", filepath.Join(dir, currentFile), shorten(b), flox.ErrCorrupt)
		}
		if _, err := os.Stat(s.path(s.number)); err != nil {
			return nil, fmt.Errorf("state %s is missing: %w: %w", s.path(s.number), err, flox.ErrCorrupt)
		}
	}
	if err := s.removeOthers(fresh); err != nil {
		return nil, err
	}
	if fresh {
		// Nothing was ever applied here, or the pointer was not yet written: the
		// log and the snapshots lead to the same state again.
		return s, s.replace(func(dir string) error { return makeDir(dir) }, nil)
	}
	s.cur, err = s.openDB(s.path(s.number))
	return s, err
}

func (s *state) path(number uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%08d", number))
}

// removeOthers deletes every database but the one in force.
func (s *state) removeOthers(all bool) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("open state: %w", err)
	}
	for _, e := range entries {
		n, err := strconv.ParseUint(e.Name(), 10, 64)
		if err != nil || (!all && n == s.number) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			return fmt.Errorf("remove unused state: %w", err)
		}
	}
	return nil
}

// stateTable is how much of the state is in memory before it is written, in bytes.
const stateTable = 16 << 20

// openDB opens one database. A panic of Pebble on a damaged file is an error.
func (s *state) openDB(dir string) (*database, error) {
	d := &database{dir: dir, refs: 1}
	cache := pebble.NewCache(s.cache)
	defer cache.Unref()
	opts := &pebble.Options{
		Cache:              cache,
		FormatMajorVersion: stateFormat,
		MemTableSize:       stateTable,
		Logger:             pebbleLog{s.log, func(err error) { d.broken.Store(true); s.rot(dir, err) }},
		FS:                 versionlog.FS(s.fs), // one is named, without the watch for slow disks, whose goroutine outlives a failed Open
	}
	// Pebble's own answer to a damaged file ends the process.
	opts.EventListener = &pebble.EventListener{DataCorruption: func(i pebble.DataCorruptionInfo) {
		s.rot(dir, fmt.Errorf("%s: %w", i.Path, i.Details))
	}}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	err := versionlog.Check(s.fs, dir)
	if err == nil {
		err = guarded(func() (err error) {
			d.DB, err = pebble.Open(dir, opts)
			return err
		})
	}
	if err != nil {
		kind := flox.ErrCorrupt
		if isFull(err) {
			kind = flox.ErrFull
		}
		return nil, fmt.Errorf("open state %s: %w: %w", dir, err, kind)
	}
	return d, nil
}

// acquire gives the database in force; release it.
func (s *state) acquire() (*database, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur == nil {
		return nil, fmt.Errorf("state: %w", flox.ErrClosed)
	}
	s.cur.mu.Lock()
	s.cur.refs++
	s.cur.mu.Unlock()
	return s.cur, nil
}

// replace lets build fill a new directory and puts the database in it in force,
// once opened, if not nil, has had it. A crash at any moment leaves the old one or
// the new one.
func (s *state) replace(build func(dir string) error, opened func(*database) error) error {
	number := s.number + 1
	dir := s.path(number)
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("replace state: %w", err)
	}
	err := build(dir)
	var db *database
	if err == nil {
		db, err = s.openDB(dir)
	}
	if err == nil {
		if opened != nil {
			err = opened(db)
		}
		if err == nil {
			err = syncDir(s.dir)
		}
		if err == nil {
			err = writeFile(filepath.Join(s.dir, currentFile), []byte(strconv.FormatUint(number, 10)+"\n"))
		}
		if err != nil {
			err = errors.Join(err, db.release())
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("replace state: %w", err), os.RemoveAll(dir))
	}
	s.mu.Lock()
	old := s.cur
	s.cur, s.number = db, number
	s.mu.Unlock()
	if old == nil {
		return nil
	}
	old.mu.Lock()
	old.remove = true
	old.mu.Unlock()
	return old.release()
}

// close closes the database once its readers are done.
func (s *state) close() error {
	s.mu.Lock()
	cur := s.cur
	s.cur = nil
	s.mu.Unlock()
	if cur == nil {
		return nil
	}
	return cur.release()
}

// applied reads the index and time of the last entry in r's state; 0 if none.
func applied(r reader) (index uint64, unixMilli int64, err error) {
	if index, err = number(r, keyApplied); err != nil {
		return 0, 0, err
	}
	at, err := number(r, keyTime)
	return index, int64(at), err
}

// number reads a key of the node itself, 0 if there is none.
func number(r reader, key []byte) (uint64, error) {
	b, err := get(r, key)
	if errors.Is(err, flox.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("state: key %q of %d bytes, want a number: %w", key, len(b), flox.ErrCorrupt)
	}
	return binary.BigEndian.Uint64(b), nil
}
