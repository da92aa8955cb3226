package content

import (
	"context"
	"fmt"

	"github.com/floxctl/flox"
)

// treeEncoder cuts the entries of a tree into pages and puts them and the root
// block into a sink.
type treeEncoder struct {
	sink   flox.BlockSink
	root   root
	blocks uint32

	page   []byte
	ref    pageRef  // of the page being filled
	dirs   []string // names of the directories above the entry, the root left out
	paths  int      // bytes of all pages' paths
	before *rec
}

// encodeTree writes the manifest of recs, which are in NAR order and whole.
func encodeTree(ctx context.Context, recs []rec, narSize uint64, p Params, sink flox.BlockSink) (id flox.CID, blocks uint32, err error) {
	first := &recs[0]
	t := &treeEncoder{sink: sink, root: root{
		params: p, entries: uint32(len(recs)), narSize: narSize, kind: first.kind, exec: first.exec, dirs: first.dirs,
	}}
	for i := range recs {
		if err := t.add(ctx, uint32(i), &recs[i], i == len(recs)-1); err != nil {
			return flox.CID{}, 0, err
		}
	}
	block := t.root.encode()
	id, err = t.put(ctx, block, "root")
	return id, t.blocks, err
}

func (t *treeEncoder) add(ctx context.Context, index uint32, r *rec, last bool) error {
	up := t.climb(r)
	if len(t.page) == 0 {
		up = 0
		t.begin(index, r)
	}
	start := len(t.page)
	t.page = appendEntry(t.page, r, up)
	if !last && !cutsPage(len(t.page), t.page[start:]) {
		return nil
	}
	if last && len(t.root.pages) == 0 {
		t.root.embedded = t.page
		return nil
	}
	id, err := t.put(ctx, t.page, "page")
	if err != nil {
		return err
	}
	t.ref.id, t.ref.bytes = id, uint32(len(t.page))
	if t.paths += len(t.ref.path); t.paths > maxRootPaths {
		return fmt.Errorf("manifest: the paths of its %d pages have more than %d bytes together: %w", len(t.root.pages)+1, maxRootPaths, flox.ErrBadInput)
	}
	t.root.pages = append(t.root.pages, t.ref)
	t.page = t.page[:0]
	return nil
}

// climb moves from the entry before to r and gives the levels gone up.
func (t *treeEncoder) climb(r *rec) (up int) {
	if before := t.before; before != nil {
		level := int(before.depth)
		if before.kind == flox.Directory {
			level++
			if before.depth > 0 {
				t.dirs = append(t.dirs, before.name)
			}
		}
		up = level - int(r.depth)
		t.dirs = t.dirs[:max(int(r.depth)-1, 0)]
	}
	t.before = r
	return up
}

// begin starts a page with r as its first entry.
func (t *treeEncoder) begin(index uint32, r *rec) {
	parent := ""
	for _, name := range t.dirs {
		parent = joinPath(parent, name)
	}
	t.page = appendText(append(t.page, magicPage...), parent)
	t.ref = pageRef{first: index, path: joinPath(parent, r.name), offset: r.offset}
	if index == 0 {
		t.ref.offset = 0
	}
}

func (t *treeEncoder) put(ctx context.Context, b []byte, what string) (flox.CID, error) {
	if len(b) > MaxBlock {
		return flox.CID{}, fmt.Errorf("manifest: a %s of %d bytes, want at most %d; the tree has too many entries: %w", what, len(b), MaxBlock, flox.ErrBadInput)
	}
	id := Hash(b)
	t.blocks++
	if err := t.sink.Put(ctx, id, b); err != nil {
		return flox.CID{}, fmt.Errorf("put the manifest's %s %s: %w", what, id, err)
	}
	return id, nil
}
