package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// keptOwners is the set of store paths that are kept.
func (a *Agent) keptOwners(ctx context.Context) (map[string]bool, error) {
	owners, err := a.cache.Owners(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool, len(owners))
	for _, o := range owners {
		out[o] = true
	}
	return out, nil
}

// Keep implements floxv1connect.AgentHandler.
func (c *control) Keep(ctx context.Context, req *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error) {
	response, err := c.keep(ctx, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
}

func (c *control) keep(ctx context.Context, req *floxv1.KeepRequest) (*floxv1.KeepResponse, error) {
	policy := req.GetOffline()
	if policy != "" {
		if err := checkPolicy(policy); err != nil {
			return nil, err
		}
	}
	infos, err := c.a.wanted(ctx, req.GetPaths(), req.GetClosure())
	if err != nil {
		return nil, err
	}
	defer c.a.executed.again()
	defer c.a.roots.changed()
	response := &floxv1.KeepResponse{}
	owned := make(map[string]ownedPolicy, len(infos))
	for _, info := range infos {
		if err := c.a.keep(ctx, info); err != nil {
			return nil, err
		}
		owned[string(info.Path)] = ownedPolicy{Policy: policy, Paths: []flox.StorePath{info.Path}}
		response.Kept = append(response.Kept, c.a.cfg.StoreDir.Join(info.Path))
	}
	if policy == "" {
		return response, nil
	}
	if err := c.a.policies.set(owned); err != nil {
		return nil, err
	}
	c.a.complete.poke()
	return response, nil
}

// Unkeep implements floxv1connect.AgentHandler.
func (c *control) Unkeep(ctx context.Context, req *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error) {
	response, err := c.unkeep(ctx, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
}

// unkeep asks nobody else: also what is valid no longer can be let go of.
func (c *control) unkeep(ctx context.Context, req *floxv1.KeepRequest) (*floxv1.KeepResponse, error) {
	if err := mayTake(ctx); err != nil {
		return nil, err
	}
	var paths []flox.StorePath
	for _, given := range req.GetPaths() {
		p, _, err := c.a.parse(given)
		if err != nil {
			return nil, err
		}
		paths = append(paths, p)
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("no path given: %w", flox.ErrBadInput)
	}
	if req.GetClosure() {
		paths = c.a.knownClosure(paths)
	}
	response := &floxv1.KeepResponse{}
	var missing error
	var gone []string
	for _, p := range paths {
		err := c.a.cache.Unkeep(ctx, string(p))
		switch {
		case err == nil:
			response.Kept = append(response.Kept, c.a.cfg.StoreDir.Join(p))
			gone = append(gone, string(p))
		case errors.Is(err, flox.ErrNotFound):
			missing = fmt.Errorf("%s is not kept: %w", c.a.cfg.StoreDir.Join(p), flox.ErrNotFound)
		default:
			return nil, err
		}
	}
	c.a.executed.again()
	c.a.roots.changed()
	if err := c.a.policies.drop(gone...); err != nil {
		return nil, err
	}
	if len(response.Kept) == 0 || !req.GetClosure() && missing != nil {
		return nil, missing
	}
	return response, nil
}

// knownClosure is roots and what they refer to, as far as it is known here.
func (a *Agent) knownClosure(roots []flox.StorePath) []flox.StorePath {
	var out []flox.StorePath
	a.eachKnown(roots, func(p flox.StorePath, _ *flox.PathInfo) bool {
		out = append(out, p)
		return true
	})
	return out
}

// eachKnown calls yield once with each of roots and what they refer to, at any
// distance, as far as that is known here, until yield returns false. The info is
// nil for a path of which nothing is known.
func (a *Agent) eachKnown(roots []flox.StorePath, yield func(flox.StorePath, *flox.PathInfo) bool) {
	seen := make(map[flox.StorePath]bool)
	queue := slices.Clone(roots)
	for i := 0; i < len(queue); i++ {
		p := queue[i]
		if seen[p] {
			continue
		}
		seen[p] = true
		info, ok := a.facts.get(p.HashPart())
		if !ok || info.Path != p {
			info = nil
		}
		if !yield(p, info) {
			return
		}
		if info != nil {
			queue = append(queue, info.References...)
		}
	}
}

// wanted finds the infos of paths, with their closures if asked.
func (a *Agent) wanted(ctx context.Context, given []string, closure bool) ([]*flox.PathInfo, error) {
	if len(given) == 0 {
		return nil, fmt.Errorf("no path given: %w", flox.ErrBadInput)
	}
	var infos []*flox.PathInfo
	for _, g := range given {
		info, _, err := a.info(ctx, g)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	if !closure {
		return infos, nil
	}
	return a.closure(ctx, infos)
}

// keep keeps everything one store path consists of: blocks and files.
func (a *Agent) keep(ctx context.Context, info *flox.PathInfo) error {
	// A manifest does not name its chunk lists, but they are read through it.
	lists := &recorder{Blocks: blocks{a, info.Path, a.cfg.ReadTimeout}}
	m, err := a.pages.Open(ctx, info.Manifest, lists)
	if err != nil {
		return fmt.Errorf("manifest of %s: %w", info.Path, err)
	}
	t := &tree{Manifest: m, path: info.Path, a: a}
	var failed error
	ids := iter.Seq[flox.CID](func(yield func(flox.CID) bool) {
		if !yield(info.Manifest) {
			return
		}
		for _, page := range t.Pages() {
			if !yield(page) {
				return
			}
		}
		failed = t.files(ctx, func(i uint32, _ string, e flox.Entry) error {
			for _, id := range lists.take() {
				if !yield(id) {
					return io.EOF
				}
			}
			if e.Size <= uint64(t.Params().InlineLimit) {
				return nil // it lies in the manifest
			}
			if !yield(e.File) {
				return io.EOF
			}
			if e.Size < uint64(t.Params().MinChunk)*leastListed {
				return nil
			}
			return t.Chunks(ctx, i, 0, -1, func(int64, flox.Chunk) bool { return true })
		})
		for _, id := range lists.take() {
			if !yield(id) {
				return
			}
		}
	})
	err = a.cache.Keep(ctx, string(info.Path), ids)
	if errors.Is(failed, io.EOF) {
		failed = nil
	}
	return errors.Join(failed, err)
}

// leastListed is the least number of chunks of a file whose chunks are listed in
// blocks of their own (content/DESIGN.md).
const leastListed = 1024

// recorder remembers which blocks were read through it.
type recorder struct {
	flox.Blocks
	ids []flox.CID
}

// Get implements flox.Blocks.
func (r *recorder) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	r.ids = append(r.ids, id)
	return r.Blocks.Get(ctx, id)
}

// take gives the blocks read since the last call.
func (r *recorder) take() []flox.CID {
	ids := r.ids
	r.ids = nil
	return ids
}
