package storehouse

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of the traces in one answer.
const (
	maxServedTraces = 64
	maxServedBytes  = 4 << 20
	// maxMadeTraces is how many traces are kept as they are sent.
	maxMadeTraces = 512
)

// madeTraces keeps traces as they are sent: to make one reads many manifests.
type madeTraces struct {
	mu   sync.Mutex
	made map[string]madeTrace // by path
}

type madeTrace struct {
	reported uint64 // of the state it was made of
	trace    *floxv1.StartTrace
}

// answerTraces gives the accepted traces of valid paths.
func (s *Server) answerTraces(ctx context.Context, paths []*floxv1.PathInfo) ([]*floxv1.StartTrace, error) {
	var states []*floxv1.StartState
	r, err := s.node.View(ctx, tracesKind, cluster.Local)
	if err != nil {
		return nil, err
	}
	for _, p := range paths[:min(len(paths), maxServedTraces)] {
		state, err := readStart(r, flox.StorePath(p.GetPath()).HashPart())
		if errors.Is(err, flox.ErrNotFound) || err == nil && state.GetPath() != p.GetPath() {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, r.Close())
		}
		states = append(states, state)
	}
	if err := r.Close(); err != nil {
		return nil, err
	}
	var out []*floxv1.StartTrace
	size := 0
	for _, state := range states {
		trace, err := s.startTrace(ctx, state)
		if err != nil {
			// A hint is not worth failing the facts for.
			s.cfg.Log.Debug("start trace not made", "path", state.GetPath(), "error", err)
			continue
		}
		if size += proto.Size(trace); size > maxServedBytes {
			break
		}
		if len(trace.GetTrees()) > 0 {
			out = append(out, trace)
		}
	}
	return out, nil
}

// startTrace gives what is accepted of a state, with the CIDs that the manifests
// have for it now.
func (s *Server) startTrace(ctx context.Context, state *floxv1.StartState) (*floxv1.StartTrace, error) {
	s.made.mu.Lock()
	have, ok := s.made.made[state.GetPath()]
	s.made.mu.Unlock()
	if ok && have.reported == state.GetReported() {
		return have.trace, nil
	}
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
	}
	s.made.mu.Lock()
	defer s.made.mu.Unlock()
	for other := range s.made.made { // any one: it is made again
		if len(s.made.made) < maxMadeTraces {
			break
		}
		delete(s.made.made, other)
	}
	s.made.made[state.GetPath()] = madeTrace{state.GetReported(), out}
	return out, nil
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
	slices.SortStableFunc(out.Chunks, func(a, b *floxv1.TraceChunk) int { return cmp.Compare(a.GetRank(), b.GetRank()) })
	return out, nil
}
