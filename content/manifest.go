package content

import (
	"context"
	"io"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// PageCache keeps decoded pages of manifests, the least recently used leaving
// first. It is safe for concurrent use.
type PageCache struct{}

// NewPageCache keeps at most maxBytes of pages; 0 means 32 MiB.
func NewPageCache(maxBytes int64) *PageCache { return &PageCache{} }

// Open is OpenManifest with pages kept in c.
func (c *PageCache) Open(ctx context.Context, id flox.CID, blocks flox.Blocks) (*Manifest, error) {
	return nil, flox.ErrClosed
}

// Manifest is an opened manifest: the file tree of one store path. It holds the
// root block only; pages are read when asked for and kept in a PageCache. It is
// safe for concurrent use. Errors of all methods: what flox.Blocks returns,
// ErrCorrupt for a block that breaks the format, ErrNotFound for an index
// or a name that does not exist, ErrBadInput for a wrong kind.
type Manifest struct{}

// OpenManifest reads the root block of the manifest id from blocks, and later
// its pages. Pages are kept in a cache of 32 MiB shared by the process.
func OpenManifest(ctx context.Context, id flox.CID, blocks flox.Blocks) (*Manifest, error) {
	return nil, flox.ErrClosed
}

// ID is the manifest's CID.
func (m *Manifest) ID() flox.CID { return flox.CID{} }

// NarSize is the size of the NAR in bytes.
func (m *Manifest) NarSize() uint64 { return 0 }

// Entries is the number of entries, at least 1.
func (m *Manifest) Entries() uint32 { return 0 }

// Params say how the content was cut.
func (m *Manifest) Params() Params { return Params{} }

// RootKind is what entry 0 is. It needs no page.
func (m *Manifest) RootKind() flox.Kind { return 0 }

// Pages are the blocks that hold the entries, in order; none if they lie in the
// root block itself.
func (m *Manifest) Pages() []flox.CID { return nil }

// Entry gives an entry by its index.
func (m *Manifest) Entry(ctx context.Context, i uint32) (flox.Entry, error) {
	return flox.Entry{}, flox.ErrClosed
}

// Child finds a direct child of a directory. It reads at most two pages.
func (m *Manifest) Child(ctx context.Context, dir uint32, name string) (uint32, flox.Entry, error) {
	return 0, flox.Entry{}, flox.ErrClosed
}

// Children calls yield with each direct child of dir in order, from the first
// whose index is at least from, until yield returns false.
func (m *Manifest) Children(ctx context.Context, dir, from uint32, yield func(uint32, flox.Entry) bool) error {
	return flox.ErrClosed
}

// Path gives an entry's path below the store path, "" for entry 0.
func (m *Manifest) Path(ctx context.Context, i uint32) (string, error) { return "", flox.ErrClosed }

// Find gives the entry at a path as Path returns it. It reads one page.
func (m *Manifest) Find(ctx context.Context, path string) (uint32, flox.Entry, error) {
	return 0, flox.Entry{}, flox.ErrClosed
}

// Walk calls yield with every entry from index from on, with its path, until
// yield returns false.
func (m *Manifest) Walk(ctx context.Context, from uint32, yield func(i uint32, path string, e flox.Entry) bool) error {
	return flox.ErrClosed
}

// Inline gives the content of a regular file that lies in the manifest; false
// if it is in chunks.
func (m *Manifest) Inline(ctx context.Context, i uint32) ([]byte, bool, error) {
	return nil, false, flox.ErrClosed
}

// Chunks calls yield with the chunks that cover the bytes [off, off+n) of
// regular file i, and each chunk's offset in the file, until yield returns false.
// An inline file has none.
func (m *Manifest) Chunks(ctx context.Context, i uint32, off, n int64, yield func(off int64, c flox.Chunk) bool) error {
	return flox.ErrClosed
}

// Blocks calls yield with every block the path consists of and its size in
// bytes, manifest blocks included, repeats possible, until yield returns false.
func (m *Manifest) Blocks(ctx context.Context, yield func(id flox.CID, size uint32) bool) error {
	return flox.ErrClosed
}

// Listing is the content of a .ls file.
func (m *Manifest) Listing(ctx context.Context) (*nix.Listing, error) { return nil, flox.ErrClosed }

// WriteNar writes the bytes [off, off+n) of the NAR to w, reading chunks ahead in
// a bounded window. n < 0 means up to the end.
func (m *Manifest) WriteNar(ctx context.Context, w io.Writer, blocks flox.Blocks, off, n int64) error {
	return flox.ErrClosed
}

// StoredBlock gives a block as it is kept: one zstd frame, or the plain bytes.
type StoredBlock func(ctx context.Context, id flox.CID) (data []byte, zstd bool, err error)

// WriteNarZstd writes the NAR as zstd, made of stored frames where there are any,
// so that nothing is compressed again.
func (m *Manifest) WriteNarZstd(ctx context.Context, w io.Writer, stored StoredBlock) error {
	return flox.ErrClosed
}
