package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of the traces in one answer.
const (
	maxServedTraces = 64
	maxServedBytes  = 4 << 20
	// traceWait is how long an answer waits at most for traces that are being made:
	// those of who asks first after a restart, or right after a report.
	traceWait = 10 * time.Millisecond
	// maxSilentPaths is from how many unreported store paths on a trace says nothing
	// of their manifests, maxSilentPages how many pages of such it names.
	maxSilentPaths, maxSilentPages = 128, 32
	// maxWholeManifest is up to how many pages a reported manifest has all of them
	// named: a warm start reads pages that its recorder does not see.
	maxWholeManifest = 8
)

// answerTraces gives the accepted traces of valid paths, as far as they are made.
// A hint is not worth failing the facts for, nor letting them wait.
func (s *Server) answerTraces(ctx context.Context, paths []*floxv1.PathInfo) (out []*floxv1.StartTrace) {
	known := s.reportedStarts(ctx, paths[:min(len(paths), maxServedTraces)])
	var making []<-chan struct{}
	for _, k := range known {
		have := s.made.get(k.path)
		if have.current(k.reported, time.Now()) {
			continue
		}
		if done := s.made.want(k.path); done != nil && !have.useful() {
			making = append(making, done)
		}
	}
	awaitTraces(ctx, making)
	size := 0
	for _, k := range known {
		have := s.made.get(k.path)
		if !have.useful() {
			continue
		}
		if size += have.size; size > maxServedBytes {
			break
		}
		out = append(out, have.trace)
	}
	return out
}

// awaitTraces waits for traces, but not for long.
func awaitTraces(ctx context.Context, making []<-chan struct{}) {
	if len(making) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, traceWait)
	defer cancel()
	for _, done := range making {
		select {
		case <-done:
		case <-ctx.Done():
			return
		}
	}
}

// reportedStart is a path whose starts were reported, and when that was last.
type reportedStart struct {
	path     string
	reported uint64 // log index
}

// reportedStarts gives those of paths that reports are known of. What cannot be
// read is left out.
func (s *Server) reportedStarts(ctx context.Context, paths []*floxv1.PathInfo) (known []reportedStart) {
	r, err := s.node.View(ctx, tracesKind, cluster.Local)
	if err != nil {
		s.cfg.Log.Warn("start traces not read", "error", err)
		return nil
	}
	for _, p := range paths {
		path, reported, err := readReported(r, flox.StorePath(p.GetPath()).HashPart())
		switch {
		case errors.Is(err, flox.ErrNotFound):
		case err != nil:
			s.cfg.Log.Warn("start trace not read", "path", p.GetPath(), "error", err)
		case path == p.GetPath(): // or another path with that hash part was valid once
			known = append(known, reportedStart{path, reported})
		}
	}
	if err := r.Close(); err != nil {
		s.cfg.Log.Warn("start traces not read", "error", err)
	}
	return known
}

// readReported reads the path and the last report of a StartState and leaves out
// its thousands of chunks, for which facts would have to wait. ErrNotFound, ErrCorrupt.
func readReported(g getter, hashPart string) (path string, reported uint64, err error) {
	b, err := g.Get(hashKey(startKey, hashPart))
	if err != nil {
		return "", 0, err
	}
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n >= 0 {
			b = b[n:]
			switch {
			case number == 1 && kind == protowire.BytesType:
				path, n = protowire.ConsumeString(b)
			case number == 2 && kind == protowire.VarintType:
				reported, n = protowire.ConsumeVarint(b)
			default:
				n = protowire.ConsumeFieldValue(number, kind, b)
			}
		}
		if n < 0 {
			return "", 0, fmt.Errorf("starts of %s: %w: %w", hashPart, protowire.ParseError(n), flox.ErrCorrupt)
		}
		b = b[n:]
	}
	return path, reported, nil
}

// startTrace gives what is accepted of a state, with the CIDs that the manifests
// have for it now.
func (s *Server) startTrace(ctx context.Context, state *floxv1.StartState) (*floxv1.StartTrace, error) {
	closure, err := s.closure(ctx, flox.StorePath(state.GetPath()))
	if err != nil {
		return nil, err
	}
	out := &floxv1.StartTrace{Path: state.GetPath()}
	for _, t := range state.GetTrees() {
		manifest, ok := closure[flox.StorePath(t.GetPath())]
		if !ok || !slices.ContainsFunc(t.GetChunks(), accepted) {
			continue
		}
		tree, err := s.traceTree(ctx, manifest, t)
		if err != nil {
			return nil, err
		}
		out.Trees = append(out.Trees, tree)
		delete(closure, flox.StorePath(t.GetPath()))
	}
	if len(out.Trees) > 0 {
		out.Trees = append(out.Trees, s.silentTrees(ctx, closure)...)
	}
	return out, nil
}

// silentTrees names the pages of manifests that no start reported, those with the
// fewest first: what was warm where a start was recorded is looked up all the same
// where nothing is, and asking for it later is a round trip. None of a large
// closure: see maxSilentPaths.
func (s *Server) silentTrees(ctx context.Context, closure map[flox.StorePath]flox.CID) (trees []*floxv1.TraceTree) {
	if len(closure) > maxSilentPaths {
		return nil
	}
	var manifests []*content.Manifest
	paths := make(map[*content.Manifest]flox.StorePath, len(closure))
	for p, id := range closure {
		m, err := content.OpenManifest(ctx, id, s.packs)
		if err != nil {
			s.cfg.Log.Warn("manifest of a start trace not read", "path", p, "error", err)
			continue
		}
		manifests, paths[m] = append(manifests, m), p
	}
	slices.SortFunc(manifests, func(x, y *content.Manifest) int {
		return cmp.Or(cmp.Compare(len(x.Pages()), len(y.Pages())), cmp.Compare(paths[x], paths[y]))
	})
	pages := 0
	for _, m := range manifests {
		if pages += len(m.Pages()); pages > maxSilentPages {
			break
		}
		if len(m.Pages()) == 0 {
			continue // all of it lies in the root block
		}
		id := m.ID()
		tree := &floxv1.TraceTree{Path: string(paths[m]), Manifest: id[:]}
		for _, page := range m.Pages() {
			tree.Pages = append(tree.Pages, page[:])
		}
		trees = append(trees, tree)
	}
	return trees
}

// accepted reports whether two machines saw a chunk.
func accepted(c *floxv1.SeenChunk) bool { return len(c.GetTag()) == 0 }

// traceTree names the blocks of one store path that a start needs.
func (s *Server) traceTree(ctx context.Context, manifest flox.CID, t *floxv1.SeenTree) (*floxv1.TraceTree, error) {
	m, err := content.OpenManifest(ctx, manifest, s.packs)
	if err != nil {
		return nil, err
	}
	out := &floxv1.TraceTree{Path: t.GetPath(), Manifest: manifest[:]}
	pages := m.Pages()
	blocks := make(map[flox.CID]bool)
	need := func(id flox.CID) bool {
		if !blocks[id] {
			blocks[id] = true
			out.Pages = append(out.Pages, id[:])
		}
		return true
	}
	for _, c := range t.GetChunks() {
		switch {
		case !accepted(c):
		case c.GetSize() == 0:
			if int(c.GetEntry()) < len(pages) {
				need(pages[c.GetEntry()])
			}
		default:
			id, ok := chunkAt(ctx, m, c.GetEntry(), c.GetOffset(), c.GetSize())
			if !ok {
				continue // the path went and came back as another one
			}
			if page, ok := m.PageOf(c.GetEntry()); ok {
				need(page)
			}
			if err := m.Lists(ctx, c.GetEntry(), int64(c.GetOffset()), 1, need); err != nil { //nolint:gosec // chunkAt checked it
				return nil, err
			}
			out.Chunks = append(out.Chunks, &floxv1.TraceChunk{Entry: c.GetEntry(), Offset: c.GetOffset(), Size: c.GetSize(), Id: id[:], Rank: c.GetRank()})
		}
	}
	if len(pages) <= maxWholeManifest {
		for _, page := range pages {
			need(page)
		}
	}
	slices.SortStableFunc(out.Chunks, func(a, b *floxv1.TraceChunk) int { return cmp.Compare(a.GetRank(), b.GetRank()) })
	return out, nil
}
