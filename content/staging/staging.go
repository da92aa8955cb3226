// Package staging keeps the store paths that were added on this machine and that
// the storehouse does not have, or does not have yet: sources, .drv files, texts,
// and what users add without anybody's signature. What Add acknowledged is
// durable; a crash leaves a path whole or not at all.
//
// It checks what it takes in (content addresses, derivations, references). It must
// not know who asks, nor how paths get to the storehouse.
package staging

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/indexdb"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/nix"
)

// Config of a Store. Dir and StoreDir are needed; every other zero value is the default.
type Config struct {
	// Dir holds everything; it is created if missing. One process at a time.
	Dir string
	// StoreDir is part of every path's hash.
	StoreDir flox.StoreDir
	// Budget is how many bytes may be staged at most; default 20 GiB. More is ErrFull.
	Budget int64
	// Reserve is how many bytes of the disk stay free; default 256 MiB.
	Reserve int64
	// Used is told how many bytes are staged whenever that changed; nil = nobody is.
	Used func(bytes int64)
	// Known gives the facts of a path that is valid elsewhere, for references to
	// it: ErrNotFound if it is not. Nil: nothing is.
	Known func(ctx context.Context, p flox.StorePath) (*flox.PathInfo, error)
	// Derivation gives the content of a .drv file that is valid elsewhere. Nil:
	// there are none.
	Derivation func(ctx context.Context, p flox.StorePath) ([]byte, error)
	// Log defaults to nothing.
	Log *slog.Logger

	// openRoom is how much of the disk has to be free to open the packs: their index
	// writes then, and what it cannot write it tries for ever. 0 = 8 MiB.
	openRoom int64
	// fs is where the index is. nil = the machine's file systems
	fs vfs.FS
}

// check fills in the defaults.
func (c *Config) check() error {
	if c.Dir == "" || c.StoreDir == "" {
		return fmt.Errorf("staging: directory %q and store directory %q are both needed: %w", c.Dir, c.StoreDir, flox.ErrBadInput)
	}
	if c.Budget == 0 {
		c.Budget = 20 << 30
	}
	if c.Reserve == 0 {
		c.Reserve = 256 << 20
	}
	if c.openRoom == 0 {
		c.openRoom = 8 << 20
	}
	if c.Budget < 0 || c.Reserve < 0 {
		return fmt.Errorf("staging %s: budget %d and reserve %d bytes, want none below 0: %w", c.Dir, c.Budget, c.Reserve, flox.ErrBadInput)
	}
	if c.Known == nil {
		c.Known = func(_ context.Context, p flox.StorePath) (*flox.PathInfo, error) {
			return nil, fmt.Errorf("%s: %w", p, flox.ErrNotFound)
		}
	}
	if c.Derivation == nil {
		c.Derivation = func(_ context.Context, p flox.StorePath) ([]byte, error) {
			return nil, fmt.Errorf("derivation %s: %w", p, flox.ErrNotFound)
		}
	}
	if c.Used == nil {
		c.Used = func(int64) {}
	}
	if c.fs == nil {
		c.fs = vfs.Default
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Store is a directory of staged paths, safe for concurrent use.
type Store struct {
	cfg    Config
	hasher *nix.DrvHasher
	swept  chan struct{} // holds one when packs hold what nobody needs
	loose  chan struct{} // holds one when a path may not be on disk yet

	// db and its log are there once opened is closed, packs once packed is: see ready, openPacks.
	db      *indexdb.DB
	log     *lateFS
	opened  chan struct{}
	packs   *pack.Store
	packed  chan struct{}
	opening sync.Mutex
	exists  bool // under opening: something was staged here once

	// valid is held shared while a path becomes valid, from the check of its
	// references on, and alone while paths are removed.
	valid sync.RWMutex
	told  map[uint32]int // bytes of realisations by owner; under valid once it is open

	mu     sync.Mutex
	closed bool
	adding map[string]chan struct{} // by hash part: a path that becomes valid right now
	stats  Stats
}

// Stats say what is staged.
type Stats struct {
	Paths    uint64 // staged paths
	Uploaded uint64 // of those, how many the storehouse has meanwhile
	NarBytes uint64 // of all their NARs
	Bytes    uint64 // they take on disk, about
	Budget   uint64 // bytes they may take
}

// Open opens or creates the store in cfg.Dir. Errors: ErrBadInput for a wrong
// Config, ErrBusy, ErrFull.
func Open(cfg Config) (s *Store, err error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s = &Store{cfg: cfg, swept: make(chan struct{}, 1), loose: make(chan struct{}, 1), opened: make(chan struct{}), packed: make(chan struct{}), adding: make(map[string]chan struct{})}
	s.hasher = &nix.DrvHasher{Dir: cfg.StoreDir, Read: s.readDerivation}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("staging: %w", err)
	}
	s.stats.Budget = uint64(s.cfg.Budget)
	_, err = os.Lstat(filepath.Join(cfg.Dir, "content"))
	s.exists = err == nil
	switch err := s.ready(false); {
	case err == nil, errors.Is(err, flox.ErrNotFound):
	case errors.Is(err, flox.ErrFull): // others can be read all the same
		cfg.Log.Warn("what was added on this machine cannot be read until its disk has room", "error", err)
	default:
		return nil, errors.Join(err, s.Close())
	}
	s.tell()
	return s, nil
}

// ready opens the index if need be. Before something is staged for the first time
// there is none: most machines add nothing. ErrNotFound without create if so,
// ErrFull while the disk has no room for what is needed.
func (s *Store) ready(create bool) error {
	if s.isOpen() {
		return nil
	}
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.isOpen() {
		return nil
	}
	if err := s.usable(); err != nil {
		return err
	}
	if !s.exists && !create {
		return errNothing
	}
	return s.open()
}

// usable says whether it is closed: ErrClosed.
func (s *Store) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("staging: %w", flox.ErrClosed)
	}
	return nil
}

// openPacks opens where the blocks of large paths lie, if need be. ErrFull: the disk has no room
// for that. Then small paths are read all the same. It needs s.opening.
func (s *Store) openPacks() error {
	if closed(s.packed) {
		return nil
	}
	if free, err := s.free(); err != nil {
		return err
	} else if free < s.cfg.openRoom {
		return fmt.Errorf("what was added on this machine cannot be opened; free some space on the disk of %s: %d bytes are free, want %d: %w", s.cfg.Dir, free, s.cfg.openRoom, flox.ErrFull)
	}
	packs, err := pack.Open(pack.Config{Dir: filepath.Join(s.cfg.Dir, "content"), PackSize: 64 << 20, Reserve: s.cfg.Reserve, Log: s.cfg.Log})
	if err != nil {
		return fmt.Errorf("staging: %w", indexdb.Full(err))
	}
	s.packs = packs
	close(s.packed)
	if packs.Stat().DiskBytes > 0 {
		s.sweepSoon() // an add that the end of a process cut off may have left something
	}
	return nil
}

// blocks gives the packs. ErrFull: the disk has no room to open them.
func (s *Store) blocks() (*pack.Store, error) {
	if closed(s.packed) {
		return s.packs, nil
	}
	s.opening.Lock()
	defer s.opening.Unlock()
	if err := s.usable(); err != nil {
		return nil, err
	}
	if err := s.openPacks(); err != nil {
		return nil, err
	}
	return s.packs, nil
}

// Shut says why what is staged cannot be told: ErrFull, while the disk has no room
// to open the index. Nil: it can, and what is not found is not staged.
func (s *Store) Shut() error {
	err := s.ready(false)
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	return err
}

var errNothing = fmt.Errorf("nothing is staged: %w", flox.ErrNotFound)

// open needs s.opening.
func (s *Store) open() (err error) {
	// Opened first: its lock says best who else is there.
	if err := s.openPacks(); err != nil && !(s.exists && errors.Is(err, flox.ErrFull)) {
		return err
	}
	s.log = newLateFS(s.cfg.fs)
	s.db, err = indexdb.Open(indexdb.Config{
		Name: "index of what was added", Dir: filepath.Join(s.cfg.Dir, "paths"), Ballast: filepath.Join(s.cfg.Dir, "ballast"), Most: 16 << 20,
		Log: s.cfg.Log, Options: s.options(), FS: s.log,
	})
	if err != nil {
		return fmt.Errorf("staging %s: %w", s.cfg.Dir, err)
	}
	// What a process left that was killed may not be on the disk before that, and it would be
	// said to be added.
	s.db.Wait()
	if err := errors.Join(s.count(), s.countRealised()); err != nil {
		return errors.Join(err, s.db.Close())
	}
	s.exists = true
	close(s.opened)
	return nil
}

// options are those of the index. Most look-ups are of paths that are about to be
// added: filters answer them.
func (s *Store) options() pebble.Options {
	o := pebble.Options{CacheSize: 16 << 20}
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	return o
}

// tell tells Config.Used.
func (s *Store) tell() { s.cfg.Used(int64(s.Stat().Bytes)) }

// Close lets go of the directory. It may be called twice; nothing may use the
// store any more.
func (s *Store) Close() error {
	s.opening.Lock()
	defer s.opening.Unlock()
	s.mu.Lock()
	was := s.closed
	s.closed = true
	s.mu.Unlock()
	if was {
		return nil
	}
	var errs []error
	if s.isOpen() {
		errs = append(errs, s.db.Close())
	}
	if closed(s.packed) {
		errs = append(errs, s.packs.Close())
	}
	return errors.Join(errs...)
}

func (s *Store) isOpen() bool { return closed(s.opened) }

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// count reads what is there.
func (s *Store) count() error {
	counted := Stats{Budget: uint64(s.cfg.Budget)}
	err := s.eachOpened("", func(p *Path) bool {
		counted.add(p, 1)
		return true
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats = counted
	return err
}

// add counts a path, or with n = -1 one that is gone.
func (t *Stats) add(p *Path, n int64) {
	t.Paths += uint64(n)
	t.NarBytes += uint64(n) * p.Info.NarSize
	t.Bytes += uint64(n * p.inline)
	if p.Uploaded {
		t.Uploaded += uint64(n)
	}
}

// Stat says what is staged. It does not wait for the disk.
func (s *Store) Stat() Stats {
	s.mu.Lock()
	st := s.stats
	s.mu.Unlock()
	if closed(s.packed) {
		st.Bytes += s.packs.Stat().DiskBytes
	}
	return st
}

// room says whether n more bytes may be staged. ErrFull.
func (s *Store) room(n int64) error {
	if st := s.Stat(); st.Bytes+uint64(n) > st.Budget {
		return fmt.Errorf("%d bytes are staged, of %d that may be: upload or remove some of it, or raise the budget: %w", st.Bytes, st.Budget, flox.ErrFull)
	}
	free, err := s.free()
	if err != nil {
		return err
	}
	if free-n < s.cfg.Reserve {
		return fmt.Errorf("%d bytes are free on the disk of %s, %d stay so; free some space: %w", free, s.cfg.Dir, s.cfg.Reserve, flox.ErrFull)
	}
	return s.Full()
}

// Full says what to do while nothing can be added because the disk has no room to write it
// down, with ErrFull; nil: it can, or nothing was added yet.
func (s *Store) Full() error {
	if !s.isOpen() {
		return nil
	}
	if err := s.db.Room(); err != nil {
		return s.unkept(err)
	}
	if _, err := s.blocks(); errors.Is(err, flox.ErrFull) {
		return err
	}
	return nil
}

func (s *Store) unkept(err error) error {
	return fmt.Errorf("what is added on this machine cannot be written down; free some space on the disk of %s: %w", s.cfg.Dir, err)
}

// free is how many bytes of the disk are.
func (s *Store) free() (int64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &fs); err != nil {
		return 0, fmt.Errorf("staging: statfs %s: %w", s.cfg.Dir, err)
	}
	return int64(fs.Bavail) * fs.Bsize, nil
}
