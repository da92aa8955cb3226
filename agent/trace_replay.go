package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/cache"
	"github.com/floxctl/flox/p2p"
)

const (
	// bundleWindow is how many bytes of a bundle are asked for at once, and so how
	// much of it may be held in memory until its manifests are here.
	bundleWindow = 32 << 20
	// aboutPage is the usual size of a manifest's page.
	aboutPage = 64 << 10
	// maxBundleRoots is of how many paths of the closure the root blocks come with a
	// bundle, whether the trace names them or not: each look-up there would be a
	// round trip.
	maxBundleRoots = 128
)

// errLiar ends the replay of a trace that says what is not so.
var errLiar = fmt.Errorf("the trace does not fit the manifests: %w", flox.ErrCorrupt)

// bundle brings what a trace names in one request. A trace is hearsay: which
// files there are, and what they hold, only signed manifests say. So a chunk
// that arrives before the manifest that names it is held, and goes into the cache
// under the file, the offset and the size found there, or not at all.
type bundle struct {
	a      *Agent
	path   flox.StorePath
	cancel context.CancelCauseFunc

	mu    sync.Mutex
	trees map[flox.StorePath]*bundleTree
	held  int // bytes
}

// bundleTree is one store path of a bundle.
type bundleTree struct {
	info   *flox.PathInfo
	m      *content.Manifest // nil until its root block is here
	claims map[flox.CID]*floxv1.TraceChunk
	held   map[flox.CID][]byte // arrived, and nothing vouches for it yet
}

func newBundle(a *Agent, p flox.StorePath) *bundle {
	return &bundle{a: a, path: p, trees: make(map[flox.StorePath]*bundleTree)}
}

// fetch brings what is not here, and tells how many blocks that were.
func (b *bundle) fetch(ctx context.Context, trace *floxv1.StartTrace) (blocks int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b.cancel = cancel
	pieces := b.plan(ctx, trace)
	var hints p2p.Hints
	if len(pieces) > 0 {
		hints = b.a.hints(b.path)
	}
	for len(pieces) > 0 {
		n, size := 0, uint64(0)
		for n < len(pieces) && (n == 0 || size+pieces[n].size() <= bundleWindow) {
			size += pieces[n].size()
			n++
		}
		err = errors.Join(err, b.a.ahead.fetch(ctx, aheadTrace, pieces[:n], hints, nil))
		if cause := context.Cause(ctx); cause != nil {
			return blocks, cause
		}
		blocks, pieces = blocks+n, pieces[n:]
	}
	return blocks, err
}

// plan lists what is missing: blocks of manifests first, then chunks in the
// order a start used them.
func (b *bundle) plan(ctx context.Context, trace *floxv1.StartTrace) []piece {
	closure := b.a.localClosure(b.path)
	var manifests, chunks []piece
	var ranks []uint32
	for _, t := range trace.GetTrees()[:min(len(trace.GetTrees()), maxTraceTrees)] {
		info := closure[flox.StorePath(t.GetPath())]
		if info == nil || string(info.Manifest[:]) != string(t.GetManifest()) || b.trees[info.Path] != nil {
			continue // no part of the closure, or not as signed
		}
		tree := &bundleTree{info: info, claims: make(map[flox.CID]*floxv1.TraceChunk), held: make(map[flox.CID][]byte)}
		b.trees[info.Path] = tree
		tree.m, _ = b.a.localManifest(ctx, info.Manifest)
		manifests = append(manifests, b.manifests(tree, t)...)
		for _, c := range t.GetChunks()[:min(len(t.GetChunks()), maxTraceChunks)] {
			if one, ok := b.chunk(ctx, tree, c); ok {
				chunks = append(chunks, one)
				ranks = append(ranks, c.GetRank())
			}
		}
	}
	if len(closure) <= maxBundleRoots && len(chunks) > 0 {
		for p, info := range closure {
			if b.trees[p] == nil {
				b.trees[p] = &bundleTree{info: info, held: make(map[flox.CID][]byte)}
				manifests = append(manifests, b.manifests(b.trees[p], nil)...)
			}
		}
	}
	order := make([]int, len(chunks))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(ranks[i], ranks[j]) })
	pieces, size := manifests, uint64(0)
	for _, i := range order {
		if size += chunks[i].size(); size > maxTraceBytes || len(pieces) >= maxTraceChunks+maxTraceTrees {
			break
		}
		pieces = append(pieces, chunks[i])
	}
	return pieces
}

// manifests lists the missing blocks of a tree's manifest.
func (b *bundle) manifests(tree *bundleTree, t *floxv1.TraceTree) (missing []piece) {
	ids := []flox.CID{tree.info.Manifest}
	for _, page := range t.GetPages()[:min(len(t.GetPages()), maxTracePages)] {
		if len(page) == flox.CIDSize {
			ids = append(ids, flox.CID(page))
		}
	}
	for i, here := range b.a.cache.Has(ids) {
		if !here {
			missing = append(missing, piece{chunk: flox.Chunk{ID: ids[i]}, loose: b.loose(tree, aboutPage, true)})
		}
	}
	return missing
}

// chunk says how a chunk that is not here is fetched.
func (b *bundle) chunk(ctx context.Context, tree *bundleTree, c *floxv1.TraceChunk) (piece, bool) {
	if len(c.GetId()) != flox.CIDSize || c.GetSize() == 0 || c.GetSize() > p2p.MaxBlock {
		return piece{}, false
	}
	id := flox.CID(c.GetId())
	if tree.claims[id] == nil {
		tree.claims[id] = c
	}
	one, err := b.place(ctx, tree, c)
	switch {
	case err == nil:
		return one, len(b.a.cache.Missing(one.file, one.off, int64(one.chunk.Size))) > 0
	case !errors.Is(err, flox.ErrNotFound):
		return piece{}, false // the manifest is here and says otherwise
	}
	if b.a.cache.Has([]flox.CID{id})[0] {
		return piece{}, false
	}
	return piece{chunk: flox.Chunk{ID: id}, loose: b.loose(tree, c.GetSize(), false)}, true
}

func (b *bundle) loose(tree *bundleTree, about uint32, manifest bool) *loose {
	return &loose{about: about, manifest: manifest, keep: func(ctx context.Context, id flox.CID, data []byte) {
		b.arrived(ctx, tree, id, data, manifest)
	}}
}

// place finds a chunk in the tree's manifest. ErrNotFound: the manifest is not
// here yet; ErrCorrupt: it says something else.
func (b *bundle) place(ctx context.Context, tree *bundleTree, c *floxv1.TraceChunk) (one piece, err error) {
	if tree.m == nil {
		return one, flox.ErrNotFound
	}
	if c.GetEntry() >= tree.m.Entries() || c.GetOffset() > 1<<62 {
		return one, errLiar
	}
	e, err := tree.m.Entry(ctx, c.GetEntry())
	if err != nil {
		return one, err
	}
	off := int64(c.GetOffset()) //nolint:gosec // checked
	if e.Kind != flox.Regular || off >= int64(e.Size) {
		return one, errLiar
	}
	err = tree.m.Chunks(ctx, c.GetEntry(), off, 1, func(at int64, have flox.Chunk) bool {
		if at == off && have.Size == c.GetSize() && string(have.ID[:]) == string(c.GetId()) {
			one = piece{file: cache.File{ID: e.File, Size: int64(e.Size)}, off: at, chunk: have}
		}
		return false
	})
	if err == nil && one.file.ID.IsZero() {
		err = errLiar
	}
	return one, err
}

// arrived takes a block in that nothing vouched for when it was asked for.
func (b *bundle) arrived(ctx context.Context, tree *bundleTree, id flox.CID, data []byte, manifest bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := tree.claims[id]; !manifest && (c == nil || int(c.GetSize()) != len(data)) {
		b.cancel(errLiar)
		return
	}
	if id == tree.info.Manifest { // this the facts vouch for
		b.a.fetcher.store(ctx, piece{chunk: flox.Chunk{ID: id}}, data)
		if tree.m == nil {
			tree.m, _ = b.a.localManifest(ctx, id)
		}
	} else if b.held+len(data) <= bundleWindow {
		tree.held[id] = data
		b.held += len(data)
	}
	if manifest {
		b.settle(ctx, tree)
	} else if tree.m != nil {
		b.settleChunk(ctx, tree, id)
	}
}

// settle puts what is held into the cache as far as the manifest vouches for it
// now; b.mu is held.
func (b *bundle) settle(ctx context.Context, tree *bundleTree) {
	if tree.m == nil {
		return
	}
	for _, id := range tree.m.Pages() {
		b.vouched(ctx, tree, id, piece{chunk: flox.Chunk{ID: id}})
	}
	for id := range tree.held {
		b.settleChunk(ctx, tree, id)
	}
}

// settleChunk is settle for one held chunk.
func (b *bundle) settleChunk(ctx context.Context, tree *bundleTree, id flox.CID) {
	c := tree.claims[id]
	if c == nil {
		return // a chunk list, if anything: see lists
	}
	one, err := b.place(ctx, tree, c)
	if errors.Is(err, flox.ErrNotFound) && b.lists(ctx, tree, c) {
		one, err = b.place(ctx, tree, c)
	}
	switch {
	case err == nil:
		b.vouched(ctx, tree, id, one)
	case !errors.Is(err, flox.ErrNotFound):
		b.drop(tree, id)
	}
}

// lists stores the chunk lists that name a chunk, if they are held.
func (b *bundle) lists(ctx context.Context, tree *bundleTree, c *floxv1.TraceChunk) (some bool) {
	_ = tree.m.Lists(ctx, c.GetEntry(), int64(c.GetOffset()), 1, func(id flox.CID) bool { //nolint:gosec // place checked it
		some = b.vouched(ctx, tree, id, piece{chunk: flox.Chunk{ID: id}}) || some
		return true
	})
	return some
}

// vouched stores a held block as the signed manifest names it.
func (b *bundle) vouched(ctx context.Context, tree *bundleTree, id flox.CID, as piece) bool {
	data, ok := tree.held[id]
	if ok {
		b.drop(tree, id)
		b.a.fetcher.store(ctx, as, data)
	}
	return ok
}

// drop lets go of a held block.
func (b *bundle) drop(tree *bundleTree, id flox.CID) {
	b.held -= len(tree.held[id])
	delete(tree.held, id)
}
