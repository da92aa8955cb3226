package cache

import (
	"context"
	"iter"
	"log/slog"
	"time"

	"github.com/floxctl/flox"
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
	// Miss: at least one byte is not here. Fetch it, PutChunk it.
	Miss State = iota
	// Hit: every byte is here and trusted.
	Hit
	// Unverified: every byte is here, but some were written before a power cut
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
	Reserve   int64         // bytes always left free on the disk; 0 = max(5 GiB, 5 % of the disk)
	Kernel    Kernel        // nil: nothing is ever warm or in use outside of ReadAt's sight
	BootID    string        // names the system session; "" = from the kernel's boot id and the mount of Dir
	Grace     time.Duration // how long a candidate for eviction may show itself used; 0 = 3 s
	SyncEvery time.Duration // between sync marks while content arrives; 0 = 10 s
	Memory    int64         // bytes of memory for the records of warm files; 0 = 32 MiB
	OpenFiles int           // content files held open; 0 = 512
	Log       *slog.Logger  // nil = discard
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
type Cache struct{ cfg Config }

var _ flox.Blocks = (*Cache)(nil)

// Open opens the cache in cfg.Dir, creating it if need be. ErrBusy: another
// process holds it. Whatever a crash left behind is cleaned up here.
func Open(cfg Config) (*Cache, error) { return &Cache{cfg: cfg}, nil }

// Close makes what is here durable and lets go of the directory. Reads
// after it are misses; everything else is ErrClosed.
func (c *Cache) Close() error { return nil }

// Run makes sync marks, watches budget and free disk space, and evicts, until
// ctx ends; then it returns nil.
func (c *Cache) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// ReadAt reads min(len(p), f.Size-off) bytes of f at off into p. Only with
// Hit is p filled, and n is that many; else n is 0 and p's content is undefined. Node is the mount's inode
// that is being read, 0 if none: it marks f as used and is remembered for the second chance.
func (c *Cache) ReadAt(f File, p []byte, off int64, node uint64) (n int, st State) { return 0, Miss }

// Used says that node was given bytes of f at off which did not come from
// ReadAt (a fetch answers its readers from memory).
func (c *Cache) Used(f File, off int64, node uint64) {}

// State says what ReadAt of n bytes of f at off would find, without marking f used.
func (c *Cache) State(f File, off, n int64) State { return Miss }

// Missing gives the parts of [off, off+n) of f of which no byte is here,
// in order. Unverified bytes count as here.
func (c *Cache) Missing(f File, off, n int64) []Range { return nil }

// PutChunk keeps a chunk of f that lies at off. The caller has checked data
// against chunk.ID, and took both from a signed manifest. ErrFull: there is no
// room now; use data and let it go. ErrBadInput: the sizes contradict each other.
func (c *Cache) PutChunk(ctx context.Context, f File, off int64, chunk flox.Chunk, data []byte) error {
	return nil
}

// Verify hashes the chunk of f that lies at off. If it is right its bytes are
// trusted from now on; if it is wrong or not all here, what is here of it is dropped, and ok is false.
func (c *Cache) Verify(ctx context.Context, f File, off int64, chunk flox.Chunk) (ok bool, err error) {
	return false, nil
}

// PutBlock keeps a block (a manifest's root, a page) whose bytes hash to id. It
// is evicted later than content. Errors as PutChunk.
func (c *Cache) PutBlock(ctx context.Context, id flox.CID, data []byte) error { return nil }

// Get gives a block, a chunk, or a whole small file by its CID. The bytes are
// hashed on every call, so peers can be served with them. ErrNotFound: not here (any more).
func (c *Cache) Get(ctx context.Context, id flox.CID) ([]byte, error) { return nil, flox.ErrNotFound }

// Has says for each id whether Get would find it. Bytes are not hashed.
func (c *Cache) Has(ids []flox.CID) []bool { return make([]bool, len(ids)) }

// Chunks calls yield with the id of everything Get would find, in no
// order, some more than once, until yield returns false.
func (c *Cache) Chunks(yield func(flox.CID) bool) {}

// Keep adds ids (of files and of blocks, here or not yet) to what owner keeps:
// they are never evicted until Unkeep. It is durable when Keep returns.
func (c *Cache) Keep(ctx context.Context, owner string, ids iter.Seq[flox.CID]) error { return nil }

// Unkeep lets go of all that owner keeps. ErrNotFound: owner keeps nothing.
func (c *Cache) Unkeep(ctx context.Context, owner string) error { return nil }

// Keeps lists the owners in order.
func (c *Cache) Keeps(ctx context.Context) ([]Kept, error) { return nil, nil }

// Usage says what the cache holds now.
func (c *Cache) Usage() Usage { return Usage{} }

// GC evicts until at most target bytes are used, or nothing evictable is left
// (kept and in use content stays). It gives the bytes freed on disk.
func (c *Cache) GC(ctx context.Context, target int64) (freed int64, err error) { return 0, nil }

// Sync makes everything put so far durable and trusted for good.
func (c *Cache) Sync(ctx context.Context) error { return nil }
