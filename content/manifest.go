package content

import (
	"context"
	"fmt"
	"sort"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Manifest is an opened manifest: the file tree of one store path. It holds
// what the root block says; pages are read when asked for and kept in a
// PageCache. It is safe for concurrent use. Errors of all methods: what
// flox.Blocks returns, ErrCorrupt for a block that breaks the format, ErrNotFound
// for an index or a name that does not exist, ErrBadInput for an entry of the
// wrong kind.
type Manifest struct {
	id     flox.CID
	root   root   // without embedded, which is cached as a page
	size   uint32 // bytes of the root block
	blocks flox.Blocks
	cache  *PageCache
}

// OpenManifest reads the root block of the manifest id from blocks, and later
// its pages. Pages are kept in a cache shared by the process.
func OpenManifest(ctx context.Context, id flox.CID, blocks flox.Blocks) (*Manifest, error) {
	return openManifest(ctx, id, blocks, sharedPages())
}

func openManifest(ctx context.Context, id flox.CID, blocks flox.Blocks, cache *PageCache) (*Manifest, error) {
	r, size, err := readRoot(ctx, id, blocks)
	if err != nil {
		return nil, err
	}
	m := &Manifest{id: id, root: *r, size: uint32(size), blocks: blocks, cache: cache}
	if r.embedded != nil {
		// The page leaves the Manifest, so that thousands of them stay small.
		m.root.embedded = nil
		m.root.pages = []pageRef{{id: id}}
		if _, err := m.decode(0, r.embedded); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func readRoot(ctx context.Context, id flox.CID, blocks flox.Blocks) (r *root, size int, err error) {
	b, err := blocks.Get(ctx, id)
	if err != nil {
		return nil, 0, fmt.Errorf("manifest %s: %w", id, err)
	}
	r, err = decodeRoot(b)
	if err != nil {
		return nil, 0, fmt.Errorf("manifest %s: root: %w", id, err)
	}
	return r, len(b), nil
}

// ID is the manifest's CID.
func (m *Manifest) ID() flox.CID { return m.id }

// NarSize is the size of the NAR in bytes.
func (m *Manifest) NarSize() uint64 { return m.root.narSize }

// Entries is the number of entries, at least 1.
func (m *Manifest) Entries() uint32 { return m.root.entries }

// Params say how the content was cut.
func (m *Manifest) Params() Params { return m.root.params }

// RootKind is what entry 0 is. It needs no page.
func (m *Manifest) RootKind() flox.Kind { return m.root.kind }

// embedded reports whether the only page lies in the root block.
func (m *Manifest) embedded() bool { return m.root.pages[0].id == m.id }

// Pages are the blocks that hold the entries, in order; none if they lie in the
// root block itself.
func (m *Manifest) Pages() []flox.CID {
	if m.embedded() {
		return nil
	}
	ids := make([]flox.CID, len(m.root.pages))
	for i, p := range m.root.pages {
		ids[i] = p.id
	}
	return ids
}

// PageOf is the block that holds entry i; false if that is the root block, or
// there is no such entry.
func (m *Manifest) PageOf(i uint32) (flox.CID, bool) {
	if m.embedded() || i >= m.root.entries {
		return flox.CID{}, false
	}
	return m.root.pages[m.pageNumber(i)].id, true
}

// pageNumber is the number of the page that holds entry i.
func (m *Manifest) pageNumber(i uint32) int {
	return sort.Search(len(m.root.pages), func(n int) bool { return m.root.pages[n].first > i }) - 1
}

// page gives the n-th page, from the cache if it is there.
func (m *Manifest) page(ctx context.Context, n int) (*page, error) {
	if g := m.cache.get(m.key(n)); g != nil {
		return g, nil
	}
	if m.embedded() {
		r, _, err := readRoot(ctx, m.id, m.blocks)
		if err != nil {
			return nil, err
		}
		return m.decode(0, r.embedded)
	}
	b, err := m.blocks.Get(ctx, m.root.pages[n].id)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: page %d: %w", m.id, n, err)
	}
	return m.decode(n, b)
}

func (m *Manifest) key(n int) pageKey { return pageKey{m.root.pages[n].id, m.root.params} }

// decode checks the n-th page against what the root says of it, and caches it.
func (m *Manifest) decode(n int, b []byte) (*page, error) {
	g, err := decodePage(b, m.root.params)
	if err == nil {
		err = m.checkPage(n, g)
	}
	if err != nil {
		return nil, fmt.Errorf("manifest %s: page %d: %w", m.id, n, err)
	}
	m.cache.put(m.key(n), g)
	return g, nil
}

func (m *Manifest) checkPage(n int, g *page) error {
	ref, end := m.root.pages[n], m.pageEnd(n)
	last := n == len(m.root.pages)-1
	switch {
	case uint32(g.len()) != end-ref.first:
		return fmt.Errorf("%d entries, the root says %d: %w", g.len(), end-ref.first, flox.ErrCorrupt)
	case !m.embedded() && uint32(len(g.raw)) != ref.bytes:
		return fmt.Errorf("%d bytes, the root says %d: %w", len(g.raw), ref.bytes, flox.ErrCorrupt)
	case g.root != (n == 0) || g.path(0) != ref.path:
		return fmt.Errorf("begins with %q, the root says %q: %w", g.path(0), ref.path, flox.ErrCorrupt)
	case !last && !g.cut():
		return fmt.Errorf("%d bytes end too early: %w", len(g.raw), flox.ErrCorrupt)
	}
	if n > 0 {
		return nil
	}
	if e := g.entry(0); e.Kind != m.root.kind || e.Executable != m.root.exec || e.Dirs != m.root.dirs || e.Span != m.root.entries-1 {
		return fmt.Errorf("entry 0 is not what the root says: %w", flox.ErrCorrupt)
	}
	return nil
}

// pageEnd is the index behind the n-th page's last entry.
func (m *Manifest) pageEnd(n int) uint32 {
	if n+1 < len(m.root.pages) {
		return m.root.pages[n+1].first
	}
	return m.root.entries
}

// at gives the page that holds entry i, and i's index within it.
func (m *Manifest) at(ctx context.Context, i uint32) (g *page, k int, err error) {
	if i >= m.root.entries {
		return nil, 0, fmt.Errorf("manifest %s: entry %d of %d: %w", m.id, i, m.root.entries, flox.ErrNotFound)
	}
	n := m.pageNumber(i)
	if g, err = m.page(ctx, n); err != nil {
		return nil, 0, err
	}
	return g, int(i - m.root.pages[n].first), nil
}

// Entry gives an entry by its index.
func (m *Manifest) Entry(ctx context.Context, i uint32) (flox.Entry, error) {
	g, k, err := m.at(ctx, i)
	if err != nil {
		return flox.Entry{}, err
	}
	return g.entry(k), nil
}

// Path gives an entry's path below the store path, "" for entry 0.
func (m *Manifest) Path(ctx context.Context, i uint32) (string, error) {
	g, k, err := m.at(ctx, i)
	if err != nil {
		return "", err
	}
	return g.path(k), nil
}

// Find gives the entry at a path as Path returns it. It reads one page.
func (m *Manifest) Find(ctx context.Context, path string) (uint32, flox.Entry, error) {
	if validPath(path) {
		n := sort.Search(len(m.root.pages), func(n int) bool { return comparePaths(m.root.pages[n].path, path) > 0 }) - 1
		g, err := m.page(ctx, n)
		if err != nil {
			return 0, flox.Entry{}, err
		}
		if k, ok := g.find(path); ok {
			return m.root.pages[n].first + uint32(k), g.entry(k), nil
		}
	}
	return 0, flox.Entry{}, fmt.Errorf("manifest %s: %q: %w", m.id, path, flox.ErrNotFound)
}

// Child finds a direct child of a directory. It reads at most two pages.
func (m *Manifest) Child(ctx context.Context, dir uint32, name string) (uint32, flox.Entry, error) {
	g, k, err := m.dir(ctx, dir)
	if err != nil {
		return 0, flox.Entry{}, err
	}
	if !validName([]byte(name)) {
		return 0, flox.Entry{}, fmt.Errorf("manifest %s: %q in entry %d: %w", m.id, name, dir, flox.ErrNotFound)
	}
	return m.Find(ctx, joinPath(g.path(k), name))
}

// dir gives the page that holds directory i.
func (m *Manifest) dir(ctx context.Context, i uint32) (*page, int, error) {
	g, k, err := m.at(ctx, i)
	if err != nil {
		return nil, 0, err
	}
	if kind := g.entry(k).Kind; kind != flox.Directory {
		return nil, 0, fmt.Errorf("manifest %s: entry %d is a %s, want a directory: %w", m.id, i, kind, flox.ErrBadInput)
	}
	return g, k, nil
}

// Children calls yield with each direct child of dir in order, from the first
// whose index is at least from, until yield returns false.
func (m *Manifest) Children(ctx context.Context, dir, from uint32, yield func(uint32, flox.Entry) bool) error {
	g, k, err := m.dir(ctx, dir)
	if err != nil {
		return err
	}
	end := min(uint64(dir)+1+uint64(g.entry(k).Span), uint64(m.root.entries))
	next := uint64(dir) + 1
	if uint64(from) > next {
		if next, err = m.childFrom(ctx, g.path(k), int(g.depth[k])+1, from, end); err != nil {
			return err
		}
	}
	for next < end {
		if g, k, err = m.at(ctx, uint32(next)); err != nil {
			return err
		}
		e := g.entry(k)
		if !yield(uint32(next), e) {
			return nil
		}
		next += 1 + uint64(e.Span)
	}
	return nil
}

// childFrom gives the index of the first child at or behind entry from of a
// directory whose children lie at depth and end before end.
func (m *Manifest) childFrom(ctx context.Context, dir string, depth int, from uint32, end uint64) (uint64, error) {
	if uint64(from) >= end {
		return end, nil
	}
	g, k, err := m.at(ctx, from)
	if err != nil {
		return 0, err
	}
	if int(g.depth[k]) == depth {
		return uint64(from), nil
	}
	// from lies inside a child: go on behind that.
	name := []byte(g.path(k))
	if dir != "" {
		name = name[len(dir)+1:]
	}
	for i, c := range name {
		if c == '/' {
			name = name[:i]
			break
		}
	}
	i, e, err := m.Find(ctx, joinPath(dir, string(name)))
	return uint64(i) + 1 + uint64(e.Span), err
}

// Walk calls yield with every entry from index from on, and its path, until
// yield returns false.
func (m *Manifest) Walk(ctx context.Context, from uint32, yield func(i uint32, path string, e flox.Entry) bool) error {
	return m.walk(ctx, from, func(i uint32, path string, r *rec) bool { return yield(i, path, r.entry()) })
}

func (m *Manifest) walk(ctx context.Context, from uint32, yield func(i uint32, path string, r *rec) bool) error {
	for i := from; i < m.root.entries; {
		g, k, err := m.at(ctx, i)
		if err != nil {
			return err
		}
		for ; k < g.len(); k++ {
			if !yield(i, g.path(k), g.rec(k)) {
				return nil
			}
			i++
		}
	}
	return nil
}

// Listing is the content of a .ls file.
func (m *Manifest) Listing(ctx context.Context) (*nix.Listing, error) {
	var b nix.ListingBuilder
	var f nix.NarFramer
	var failed error
	err := m.walk(ctx, 0, func(_ uint32, path string, r *rec) bool {
		e := r.nar(path)
		if _, failed = f.Next(e); failed == nil {
			e.Offset = f.Offset()
			failed = b.Add(e)
		}
		return failed == nil
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, fmt.Errorf("manifest %s: listing: %w", m.id, err)
	}
	return b.Listing()
}

// nar is r as the nix package knows it.
func (r *rec) nar(path string) nix.NarEntry {
	e := nix.NarEntry{Path: path, Kind: r.kind, Executable: r.exec, Size: r.size}
	if r.kind == flox.Symlink {
		e.Target = r.data
	}
	return e
}
