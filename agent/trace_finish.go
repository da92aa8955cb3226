package agent

import (
	"cmp"
	"context"
	"slices"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
)

// Bounds of one start trace, recorded or replayed.
const (
	maxTraceChunks = 4096
	maxTraceBytes  = 64 << 20
	maxTraceTrees  = 1024
	maxTracePages  = 256 // of one tree
	// maxClosure bounds the store paths a start may read from.
	maxClosure = 8192
)

// localManifest opens a manifest from what is here; nothing is fetched.
func (a *Agent) localManifest(ctx context.Context, id flox.CID) (*content.Manifest, error) {
	return a.pages.Open(ctx, id, a.cache)
}

// keepRoot stores a block of a manifest and gives the manifest's pages if it is its root.
func (a *Agent) keepRoot(ctx context.Context, id flox.CID, data []byte) []flox.CID {
	a.fetcher.store(ctx, piece{chunk: flox.Chunk{ID: id}}, data)
	m, err := a.localManifest(ctx, id)
	if err != nil {
		return nil
	}
	return m.Pages()
}

// localClosure gives everything p refers to, as far as its facts are here.
func (a *Agent) localClosure(p flox.StorePath) map[flox.StorePath]*flox.PathInfo {
	found := make(map[flox.StorePath]*flox.PathInfo)
	a.eachKnown([]flox.StorePath{p}, func(p flox.StorePath, info *flox.PathInfo) bool {
		if info != nil {
			found[p] = info
		}
		return len(found) < maxClosure
	})
	return found
}

// trace says what a recording saw, in chunks. What cannot be told without
// asking others for a manifest is left out.
func (a *Agent) trace(ctx context.Context, rec *recording) *floxv1.StartTrace {
	trees := make(map[flox.StorePath]*tracedTree)
	keys := make([]fileKey, 0, len(rec.files))
	for key := range rec.files {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(x, y fileKey) int { return cmp.Compare(rec.files[x].rank, rec.files[y].rank) })
	for _, key := range keys {
		f := rec.files[key]
		t := trees[f.path]
		if t == nil {
			m, err := a.localManifest(ctx, key.manifest)
			if err != nil || len(trees) >= maxTraceTrees {
				continue
			}
			t = &tracedTree{m: m, seen: make(map[chunkKey]int), out: &floxv1.TraceTree{Path: string(f.path), Manifest: key.manifest[:]}}
			trees[f.path] = t
		}
		t.add(ctx, key.entry, f)
	}
	return assemble(rec.path, trees)
}

// chunkKey is where a chunk lies in a tree.
type chunkKey struct {
	entry uint32
	off   uint64
}

// tracedTree gathers what was used of one store path.
type tracedTree struct {
	m    *content.Manifest
	seen map[chunkKey]int // index in out.Chunks
	out  *floxv1.TraceTree
}

func (t *tracedTree) add(ctx context.Context, entry uint32, f *seenFile) {
	t.pages(ctx, entry)
	for _, run := range f.runs {
		// An error says that it is no regular file, or its page is not here: then it
		// is not told.
		_ = t.m.Chunks(ctx, entry, run.off, run.end-run.off, func(off int64, c flox.Chunk) bool {
			key := chunkKey{entry, uint64(off)} //nolint:gosec // not negative
			if i, ok := t.seen[key]; ok {
				t.out.Chunks[i].Rank = min(t.out.Chunks[i].GetRank(), run.rank)
				return true
			}
			t.seen[key] = len(t.out.Chunks)
			t.out.Chunks = append(t.out.Chunks, &floxv1.TraceChunk{Entry: entry, Offset: key.off, Size: c.Size, Id: c.ID[:], Rank: run.rank})
			return len(t.out.Chunks) < maxTraceChunks
		})
	}
}

// pages adds the pages that an entry and the directories above it lie in: they
// are looked up one after the other.
func (t *tracedTree) pages(ctx context.Context, entry uint32) {
	page := func(i uint32) {
		id, ok := t.m.PageOf(i)
		if ok && len(t.out.Pages) < maxTracePages && !slices.ContainsFunc(t.out.Pages, func(have []byte) bool { return flox.CID(have) == id }) {
			t.out.Pages = append(t.out.Pages, id[:])
		}
	}
	page(entry)
	if len(t.m.Pages()) < 2 {
		return
	}
	path, err := t.m.Path(ctx, entry)
	for i := len(path) - 1; i > 0 && err == nil; i-- {
		if path[i] != '/' {
			continue
		}
		var dir uint32
		if dir, _, err = t.m.Find(ctx, path[:i]); err == nil {
			page(dir)
		}
	}
}

// assemble orders trees, and cuts off what is too much, last used first.
func assemble(path flox.StorePath, trees map[flox.StorePath]*tracedTree) *floxv1.StartTrace {
	out := &floxv1.StartTrace{Path: string(path)}
	var all []*floxv1.TraceChunk
	for _, t := range trees {
		all = append(all, t.out.GetChunks()...)
		out.Trees = append(out.Trees, t.out)
	}
	slices.SortFunc(out.Trees, func(x, y *floxv1.TraceTree) int { return cmp.Compare(x.GetPath(), y.GetPath()) })
	slices.SortFunc(all, func(x, y *floxv1.TraceChunk) int { return cmp.Compare(x.GetRank(), y.GetRank()) })
	bytes, last := uint64(0), ^uint32(0)
	for i, c := range all {
		if bytes += uint64(c.GetSize()); i >= maxTraceChunks || bytes > maxTraceBytes {
			last = c.GetRank()
			break
		}
	}
	for _, t := range out.Trees {
		t.Chunks = slices.DeleteFunc(t.GetChunks(), func(c *floxv1.TraceChunk) bool { return c.GetRank() >= last && last != ^uint32(0) })
	}
	return out
}
