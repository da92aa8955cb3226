// Package pack keeps blocks on a local disk, or in a bucket: append-only pack files with
// checksummed frames, and a Pebble index that can be rebuilt from them.
//
// It must not know what a block means (chunk, page, manifest) nor who may have it.
package pack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/ballast"
)

// Config of a Store. The zero value of every field but Dir means the default.
type Config struct {
	// Dir holds the packs and the index; it is created if missing. One process
	// at a time: a second gets ErrBusy.
	Dir string
	// PackSize is the size in bytes at which a pack file is closed and the next
	// begun; default 256 MiB, at most 2 GiB.
	PackSize int64
	// Reserve is how many bytes of the disk stay free, so that the index can be
	// written; default 64 MiB. Put returns ErrFull before it would use them.
	Reserve int64
	// Uncompressed keeps every block as it is.
	Uncompressed bool
	// Lost, if set, is told during Open and Run of blocks that were here and are not
	// any more (a pack is gone or shorter than it was, a frame damaged when the index
	// was made anew), also of some that never were durable. The zero CID says that
	// there may be others that nothing names: ask Has for what should be here.
	Lost func(id flox.CID)
	// Bucket, if set, is where packs live; Dir then holds what is not there yet and a
	// cache. Sync returns when the bucket has everything.
	Bucket *BucketConfig
	// Log defaults to nothing.
	Log *slog.Logger
}

// check fills in the defaults.
func (c *Config) check() error {
	if c.Dir == "" {
		return fmt.Errorf("block store: Dir is empty, want a directory: %w", flox.ErrBadInput)
	}
	if c.PackSize == 0 {
		c.PackSize = 256 << 20
	}
	if c.Reserve == 0 {
		c.Reserve = 64 << 20
	}
	if c.PackSize < 1<<10 || c.PackSize > 2<<30 || c.Reserve < 0 {
		return fmt.Errorf("block store %s: PackSize %d and Reserve %d, want 1 KiB to 2 GiB and at least 0: %w", c.Dir, c.PackSize, c.Reserve, flox.ErrBadInput)
	}
	if c.Bucket != nil {
		own := *c.Bucket
		if err := own.check(); err != nil {
			return err
		}
		c.Bucket = &own
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Store is a directory of blocks. It is safe for concurrent use and is a
// flox.Blocks and a flox.BlockSink.
type Store struct {
	cfg   Config
	log   *slog.Logger
	lock  *os.File
	index *index
	// ballast is for the index on a full disk; indexFS gives it up.
	ballast *ballast.Ballast
	indexFS vfs.FS
	files   *files
	// remote is nil without a bucket.
	remote *remote
	enc    *zstd.Encoder // nil = store plain
	dec    *zstd.Decoder

	// rot is told when damage of the index is found.
	rot chan struct{}

	// writing serializes those who fsync packs, upload them and change the index.
	writing gate

	mu       sync.RWMutex
	closed   bool
	broken   error // a failed fsync: what is on disk is unknown until the next Open
	active   *os.File
	activeID uint32
	lastID   uint32 // the highest number given to a pack
	size     int64  // of the active pack
	// syncedSize is how much of the active pack is durable.
	syncedSize int64
	// begun is how much of the active pack the disk was asked to begin to write.
	begun    int64
	sizes    map[uint32]int64 // of the others
	unsynced []sealed         // closed packs not yet durable
	pending  map[flox.CID]loc // appended, not yet in the index
	appended uint64           // frames appended since Open
	synced   uint64           // of those, in the index
	checked  int64            // bytes appended since the free space was looked at
	sessions map[*Session]struct{}
	retired  []*indexDB // no longer in use, but not closed yet
	// lingering holds one for each sweep: what sessions closed during it count on.
	lingering map[*Session]struct{}
}

// gate is a mutex for which one waits with a context.
type gate chan struct{}

func (g gate) lock(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g gate) unlock() { <-g }

// sealed is a pack that is full but not yet durable.
type sealed struct {
	id     uint32
	file   *os.File
	size   int64
	synced int64 // how much of it is durable
}

// maxBallast is enough for two tables of the index (MemTableSize), in bytes: what it
// has in memory when it is opened after a crash, and a little for its own files.
const maxBallast = 16 << 20

// Open opens or creates the store in cfg.Dir, drops the torn tail of a write
// that never ended, and brings the index up to the packs. Errors: ErrBusy,
// ErrBadInput for a wrong Config, ErrFull.
func Open(cfg Config) (s *Store, err error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "packs"), 0o755); err != nil {
		return nil, fmt.Errorf("block store: %w", err)
	}
	s = &Store{
		cfg: cfg, log: cfg.Log, sizes: make(map[uint32]int64),
		pending: make(map[flox.CID]loc), sessions: make(map[*Session]struct{}), lingering: make(map[*Session]struct{}),
		rot: make(chan struct{}, 1), writing: make(gate, 1),
		// The first Put looks at the free space.
		checked: checkSpace,
	}
	s.files = newFiles(s.packPath)
	s.ballast = ballast.New(filepath.Join(cfg.Dir, "ballast"), "the index of "+cfg.Dir, min(maxBallast, cfg.Reserve/4), cfg.Log)
	s.indexFS = s.ballast.FS(vfs.Default)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.release())
			s = nil
		}
	}()
	if s.lock, err = lockDir(cfg.Dir); err != nil {
		return s, err
	}
	if err := s.openCodecs(); err != nil {
		return s, fmt.Errorf("block store %s: %w", cfg.Dir, err)
	}
	if err := s.openBucket(); err != nil {
		return s, err
	}
	if err := s.loadIndex(); err != nil {
		return s, diskError(err, "open "+cfg.Dir)
	}
	s.ballast.Set()
	if s.remote != nil {
		return s, s.openRemote()
	}
	return s, nil
}

func (s *Store) openCodecs() (err error) {
	if !s.cfg.Uncompressed {
		s.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false),
			zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithWindowSize(content.MaxBlock))
		if err != nil {
			return err
		}
	}
	s.dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithDecoderMaxMemory(content.MaxBlock))
	return err
}

// lockDir takes the directory for this process.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("block store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.Read(holder)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("block store %s is in use by process %q; stop it or use another directory: %w", dir, strings.TrimSpace(string(holder[:n])), flox.ErrBusy)
		}
		return nil, fmt.Errorf("block store %s: lock: %w", dir, err)
	}
	// Only for the message above.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return f, nil
}

// closeWait is how long Close waits for the index to be written.
const closeWait = 10 * time.Second

// Close syncs and releases everything. It waits for no reader: the caller has
// stopped using the store.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.writing <- struct{}{} // an upload ends in bounded time
	defer s.writing.unlock()
	err := s.flush()
	// Saves the next Open some reading. On a full disk Pebble would try for ever.
	if done, flushErr := s.index.db.AsyncFlush(); flushErr == nil {
		select {
		case <-done:
		case <-time.After(closeWait):
			s.log.Warn("index not written, the next start reads the packs instead", "dir", s.cfg.Dir)
		}
	}
	return errors.Join(err, s.release())
}

// release lets go of what Open took.
func (s *Store) release() error {
	var errs []error
	if s.index != nil {
		if err := s.index.db.Close(); s.index.rotten() {
			s.log.Warn("damaged index closed", "dir", s.index.db.dir, "error", err)
		} else {
			errs = append(errs, err)
		}
	}
	for _, old := range s.retired {
		s.closeOld(old)
	}
	for _, p := range s.unsynced {
		errs = append(errs, p.file.Close())
	}
	if s.active != nil {
		errs = append(errs, s.active.Close())
	}
	s.files.close()
	if s.enc != nil {
		errs = append(errs, s.enc.Close())
	}
	if s.dec != nil {
		s.dec.Close()
	}
	if s.lock != nil {
		// Closing is not enough: a process that is just being started has it, too.
		errs = append(errs, unix.Flock(int(s.lock.Fd()), unix.LOCK_UN), s.lock.Close())
	}
	return errors.Join(errs...)
}

func (s *Store) packPath(id uint32) string {
	return filepath.Join(s.cfg.Dir, "packs", fmt.Sprintf("%08d.pack", id))
}

// usable refuses work on a store that is closed or broken; mu is held.
func (s *Store) usable() error {
	if s.closed {
		return fmt.Errorf("block store %s: %w", s.cfg.Dir, flox.ErrClosed)
	}
	return s.broken
}

// Stats counts what is in a store.
type Stats struct {
	Blocks      uint64 // durable ones
	PlainBytes  uint64 // of those blocks
	StoredBytes uint64 // of those blocks, frames included
	Packs       int
	DiskBytes   uint64 // of all packs on the local disk, deleted blocks included
	// With a bucket: the packs that only the local disk has, and what the bucket has,
	// of all servers.
	Unplaced    int
	BucketPacks int
	BucketBytes uint64
}

// Stat counts what is in the store.
func (s *Store) Stat() Stats {
	s.index.mu.Lock()
	c := s.index.counts
	s.index.mu.Unlock()
	unplaced := 0
	if s.remote != nil {
		unplaced = len(s.unplaced())
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := Stats{Blocks: c.blocks, PlainBytes: c.plain, StoredBytes: c.stored, Packs: len(s.sizes)}
	for _, n := range s.sizes {
		st.DiskBytes += uint64(n)
	}
	if s.active != nil {
		st.Packs++
		st.DiskBytes += uint64(s.size)
	}
	if st.Unplaced = unplaced; s.remote != nil {
		for _, p := range s.index.remotes() {
			st.BucketPacks++
			st.BucketBytes += uint64(p.Size)
		}
	}
	return st
}

// isFull reports whether err says that there is no room.
func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

// diskError adds what was done, and ErrFull where it fits.
func diskError(err error, what string) error {
	if isFull(err) {
		return fmt.Errorf("block store: %s: %w: %w; free space on its disk", what, err, flox.ErrFull)
	}
	return fmt.Errorf("block store: %s: %w", what, err)
}
