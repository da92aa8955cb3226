package cache

import (
	"context"
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
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/indexdb"
)

// File names the content of one regular file.
type File struct {
	ID   flox.CID // BLAKE3 of the whole content
	Size int64    // bytes
}

// Range is a run of a file's bytes.
type Range struct{ Off, Len int64 }

// State says whether bytes of a file can be read from the cache.
type State uint8

const (
	// Miss says that at least one byte is not here. Fetch it, PutChunk it.
	Miss State = iota
	// Hit says that every byte is here and trusted.
	Hit
	// Unverified says that every byte is here, but some were written before a power cut
	// (or another loss of the system session) that no sync mark precedes. Verify
	// the chunks of the range, then read again.
	Unverified
)

// Kernel is what the cache asks of the mount, because warm reads never reach
// it. Both calls may be slow; they are made from Run and GC only.
type Kernel interface {
	// DropPages makes the kernel forget the cached pages of these inodes of the
	// mount, so that a next use comes back as a ReadAt. Unknown inodes are ignored.
	DropPages(ctx context.Context, nodes []uint64) error
	// InUse gives the inodes of the mount that a process has open or mapped.
	InUse(ctx context.Context) (map[uint64]struct{}, error)
}

// Config configures a Cache. The zero value of every field but Dir means its default.
type Config struct {
	Dir       string        // the cache's own directory; created if missing
	Budget    int64         // bytes on disk at most, index included; 0 = min(20 GiB, 10 % of the disk)
	Others    func() int64  // bytes of the budget that somebody else uses now; nil = 0. It must not wait
	Reserve   int64         // bytes always left free on the disk; 0 = max(5 GiB, 5 % of the disk)
	Kernel    Kernel        // nil: nothing is ever warm or in use outside of ReadAt's sight
	BootID    string        // names the system session; "" = from the kernel's boot id and the mount of Dir
	Grace     time.Duration // how long a candidate for eviction may show itself used; 0 = 3 s
	SyncEvery time.Duration // between sync marks while content arrives; 0 = 10 s
	Memory    int64         // bytes of memory for the records of warm files; 0 = 32 MiB
	OpenFiles int           // content files held open; 0 = 512
	Log       *slog.Logger  // nil = discard

	// Set by tests of this package.
	segment int64                                            // bytes of a segment; 0 = 64 MiB
	small   int64                                            // files up to here go into packs; 0 = 128 KiB
	pack    int64                                            // bytes of a pack; 0 = 32 MiB, at most Budget/16
	wait    func(ctx context.Context, d time.Duration) error // lets the grace pass
}

// Usage says what the cache holds.
type Usage struct {
	Bytes    int64 // on disk: content, what of packs is dead, and the index
	Budget   int64 // at most so many
	Limit    int64 // at most so many now, because Reserve is kept free; <= Budget
	Kept     int64 // bytes of content that eviction never takes
	Files    int64 // files and file segments with at least one byte here
	Blocks   int64 // blocks put by PutBlock
	FreeDisk int64 // bytes free for us on the disk
	Reserve  int64 // bytes left free for others
	Evicted  int64 // bytes evicted since Open
	Refused  int64 // puts refused with ErrFull since Open
	Dropped  int64 // bytes found wrong and dropped since Open
}

// Kept is a group of kept content.
type Kept struct {
	Owner string
	Files int64 // names kept, here or not
	Bytes int64 // bytes of them that are here
}

// Cache is a content cache in a directory of its own. All methods may be called
// by many goroutines at once.
type Cache struct {
	cfg     Config
	dir     *os.File
	lock    *os.File
	index   *index
	session *session
	memory  *memory
	objects *objects

	keeping sync.RWMutex // shared by puts: a new record sees the keeps of before
	sum     struct {
		sync.Mutex
		totals
	}
	pending   atomic.Int64 // bytes of puts under way
	indexSize atomic.Int64 // bytes, as of the last look
	poke      chan struct{}
	evicting  chan struct{} // holds one token: who has it may evict
	hand      hand          // owned by who evicts

	evicted, refused, dropped atomic.Int64
}

var _ flox.Blocks = (*Cache)(nil)

// Open opens the cache in cfg.Dir, creating it if need be. ErrBusy: another
// process holds it. ErrFull: the disk has no room even for an empty index. If it
// has none to write an index that is there, what is trusted can be read, puts say
// ErrFull, and Run returns once there is room. Whatever a crash left behind is
// cleaned up here.
func Open(cfg Config) (*Cache, error) {
	c := &Cache{cfg: cfg, poke: make(chan struct{}, 1), evicting: make(chan struct{}, 1)}
	if err := c.open(); err != nil {
		return nil, errors.Join(err, c.release())
	}
	return c, nil
}

func (c *Cache) open() (err error) {
	cfg := &c.cfg
	if cfg.Dir == "" {
		return fmt.Errorf("cache: no directory given: %w", flox.ErrBadInput)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "data"), 0o700); err != nil {
		return fmt.Errorf("cache: %w", indexdb.Full(err))
	}
	if c.lock, err = lockDir(cfg.Dir); err != nil {
		return err
	}
	if c.dir, err = os.Open(cfg.Dir); err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	total, _, err := c.disk()
	if err != nil {
		return err
	}
	if err := cfg.check(total); err != nil {
		return err
	}
	if cfg.BootID == "" {
		if cfg.BootID, err = systemSession(c.dir); err != nil {
			return fmt.Errorf("cache: %w", err)
		}
	}
	if c.index, err = c.openIndex(); err != nil {
		return err
	}
	if c.session, err = openSession(c.index, c.dir, cfg.BootID, cfg.Log); err != nil {
		return err
	}
	c.memory = newMemory(c.index, cfg.Memory)
	c.objects = newObjects(filepath.Join(cfg.Dir, "data"), cfg.pack, cfg.OpenFiles)
	return c.adopt()
}

// check fills in defaults for a disk of total bytes.
func (cfg *Config) check(total int64) error {
	for _, v := range []struct {
		name  string
		value *int64
		def   int64
	}{
		{"Budget", &cfg.Budget, min(20<<30, total/10)},
		{"Reserve", &cfg.Reserve, max(5<<30, total/20)},
		{"Memory", &cfg.Memory, 32 << 20},
		{"Grace", (*int64)(&cfg.Grace), int64(3 * time.Second)},
		{"SyncEvery", (*int64)(&cfg.SyncEvery), int64(10 * time.Second)},
		{"segment", &cfg.segment, 64 << 20},
		{"small", &cfg.small, 128 << 10},
	} {
		if *v.value < 0 {
			return fmt.Errorf("cache: %s is %d, want 0 for the default or more: %w", v.name, *v.value, flox.ErrBadInput)
		}
		if *v.value == 0 {
			*v.value = v.def
		}
	}
	if cfg.pack == 0 {
		cfg.pack = min(32<<20, cfg.Budget/16)
	}
	if cfg.OpenFiles <= 0 {
		cfg.OpenFiles = 512
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Others == nil {
		cfg.Others = func() int64 { return 0 }
	}
	if cfg.wait == nil {
		cfg.wait = sleep
	}
	return nil
}

// lockDir makes this process the only one that uses dir.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cache: %w", indexdb.Full(err))
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 20)
		n, _ := f.ReadAt(holder, 0)
		f.Close()
		return nil, fmt.Errorf("cache directory %s is in use by process %s: stop that, or give another directory: %w",
			dir, strings.TrimSpace(string(holder[:n])), flox.ErrBusy)
	}
	// Who holds it is only told to people: a full disk must not stop us.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(strconv.AppendInt(nil, int64(os.Getpid()), 10), 0)
	}
	return f, nil
}

// openIndex opens the index; a damaged one is replaced: it is a cache.
func (c *Cache) openIndex() (*index, error) {
	dir, ballast := filepath.Join(c.cfg.Dir, "index"), filepath.Join(c.cfg.Dir, "ballast")
	ix, err := openIndex(dir, ballast, c.cfg.Log)
	if err == nil || !errors.Is(err, flox.ErrCorrupt) {
		return ix, err
	}
	c.cfg.Log.Error("cache index is damaged: the cache and its keeps begin anew", "dir", dir, "err", err)
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("remove the damaged index %s: %w", dir, err)
	}
	return openIndex(dir, ballast, c.cfg.Log)
}

// adopt looks through the objects on disk and removes those the index does not know:
// a crash came between their bytes and their entry, or between the removal of both.
func (c *Cache) adopt() error {
	if raw, err := c.index.get(keyTotals); err == nil {
		if c.sum.totals, err = readTotals(raw); err != nil {
			return err
		}
	} else if !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	known := map[uint64]bool{} // whether it is a pack
	prefix := []byte{'o'}
	err := c.index.scan(context.Background(), prefix, prefix, func(k, v []byte) error {
		object := binary.BigEndian.Uint64(k[1:])
		known[object] = len(v) == 0
		c.objects.adopt(object, false, 0) // numbers of lost objects are not used again either
		return nil
	})
	if err != nil {
		return err
	}
	err = c.objects.found(func(object uint64, size int64) error {
		pack, ok := known[object]
		if !ok {
			return os.Remove(c.objects.path(object))
		}
		c.objects.adopt(object, pack, size)
		delete(known, object)
		return nil
	})
	if err != nil {
		return err
	}
	for object, pack := range known {
		if err := c.strike(object, pack); err != nil && c.index.Broken() == nil {
			return err
		}
	}
	return nil // one that cannot be written goes on as it is: what is missing is never taken for content
}

// strike takes an object that is not on the disk any more off the index.
func (c *Cache) strike(object uint64, pack bool) error {
	var keys []key
	if pack {
		list, _, err := c.members(context.Background(), object)
		if err != nil {
			return err
		}
		keys = list
	} else if raw, err := c.index.get(objectKey(object)); err == nil {
		if k, ok := readKey(raw); ok {
			keys = append(keys, k)
		}
	}
	for _, k := range keys {
		r := c.record(k)
		if r == nil {
			continue
		}
		if ct := r.cur.Load(); ct.object == object {
			if err := c.drop(k, ct, 0, uint32(ct.length)); err != nil {
				return err
			}
		}
	}
	b := c.index.batch()
	b.del(objectKey(object))
	return b.commit(lazy)
}

// Close makes what is here durable and lets go of the directory. Reads
// after it are misses; everything else is ErrClosed.
func (c *Cache) Close() error {
	c.evicting <- struct{}{} // waits for an eviction, and lets none begin
	defer func() { <-c.evicting }()
	if c.index.Broken() != nil {
		return c.release() // a put may wait for ever for an index that cannot be written
	}
	c.keeping.Lock() // waits for puts
	defer c.keeping.Unlock()
	if errors.Is(c.index.usable(), flox.ErrClosed) {
		return nil
	}
	err := errors.Join(c.memory.flush(), c.session.close())
	return errors.Join(err, c.release())
}

// release lets go of everything that open took.
func (c *Cache) release() (err error) {
	if c.index != nil {
		err = c.index.close()
	}
	if c.objects != nil {
		c.objects.close()
	}
	if c.lock != nil {
		// Closing is not enough: a process that is just being started has it, too.
		_ = unix.Flock(int(c.lock.Fd()), unix.LOCK_UN)
	}
	for _, f := range []*os.File{c.dir, c.lock} {
		if f != nil {
			f.Close()
		}
	}
	return err
}

// segmentOf splits a place in a file into a segment and the place in it.
func (c *Cache) segmentOf(f File, off int64) (k key, within int64) {
	return key{f.ID, uint32(off / c.cfg.segment)}, off % c.cfg.segment
}

// segmentSize is how many bytes of a file of size bytes lie in segment seg.
func (c *Cache) segmentSize(size int64, seg uint32) int64 {
	return min(size-int64(seg)*c.cfg.segment, c.cfg.segment)
}

// disk gives the size of the disk and what is free of it for us, in bytes.
func (c *Cache) disk() (total, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(c.dir.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("cache: statfs %s: %w", c.cfg.Dir, err)
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}
