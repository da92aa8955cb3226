package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// keptOwners is the set of store paths that are kept by their own names, and not
// because a profile leads to them.
func (a *Agent) keptOwners(ctx context.Context) (map[string]bool, error) {
	owners, err := a.cache.Owners(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool, len(owners))
	for _, o := range owners {
		if !strings.HasPrefix(o, profileMark) {
			out[o] = true
		}
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
	response := &floxv1.KeepResponse{}
	for _, link := range req.GetProfiles() {
		if err := c.a.profiles.keep(ctx, link, policy); err != nil {
			return nil, err
		}
		response.Profiles = append(response.Profiles, c.a.complete.profile(ctx, link))
	}
	if len(response.GetProfiles()) > 0 && len(req.GetPaths()) == 0 {
		return response, nil
	}
	infos, err := c.a.wanted(ctx, req.GetPaths(), req.GetClosure())
	if err != nil {
		return nil, err
	}
	defer c.a.executed.again()
	defer c.a.roots.changed()
	owned := make(map[string]ownedPolicy, len(infos))
	for _, info := range infos {
		owned[string(info.Path)] = ownedPolicy{Policy: policy, Paths: []flox.StorePath{info.Path}}
	}
	if policy != "" {
		if err := c.a.policies.fits(owned, caller(ctx)); err != nil {
			return nil, err
		}
	}
	for _, info := range infos {
		if err := c.a.keep(ctx, info); err != nil {
			return nil, err
		}
		response.Kept = append(response.Kept, c.a.cfg.StoreDir.Join(info.Path))
	}
	if policy == "" {
		return response, nil
	}
	if err := c.a.policies.set(owned, caller(ctx)); err != nil {
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
	if len(req.GetPaths()) > 0 {
		if err := mayTake(ctx); err != nil {
			return nil, err
		}
	}
	var paths []flox.StorePath
	for _, given := range req.GetPaths() {
		p, _, err := c.a.parse(given)
		if err != nil {
			return nil, err
		}
		paths = append(paths, p)
	}
	response := &floxv1.KeepResponse{}
	for _, link := range req.GetProfiles() {
		was, err := c.a.profiles.unkeep(ctx, link)
		if errors.Is(err, flox.ErrNotFound) { // it may have been kept as what it leads to
			if err = mayTake(ctx); err != nil {
				return nil, err
			}
			if was.Path, err = c.a.profiles.target(ctx, link); err == nil {
				paths = append(paths, was.Path)
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		response.Profiles = append(response.Profiles, &floxv1.KeptProfile{Link: link, Path: c.a.cfg.StoreDir.Join(was.Path), Offline: was.Policy})
	}
	if len(paths) == 0 {
		if len(response.GetProfiles()) > 0 {
			return response, nil
		}
		return nil, fmt.Errorf("no path given: %w", flox.ErrBadInput)
	}
	if req.GetClosure() {
		paths = c.a.knownClosure(paths)
	}
	return response, c.letGo(ctx, paths, req.GetClosure(), response)
}

// letGo lets paths be evicted, and adds them to what is told. That one was not kept is
// an error, but not of a closure of which others were.
func (c *control) letGo(ctx context.Context, paths []flox.StorePath, closure bool, response *floxv1.KeepResponse) error {
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
			return err
		}
	}
	c.a.executed.again()
	c.a.roots.changed()
	if err := c.a.policies.drop(gone...); err != nil {
		return err
	}
	if len(response.Kept) == 0 || !closure && missing != nil {
		return missing
	}
	return nil
}

// knownClosure is roots and what they refer to, as far as it is known here.
func (a *Agent) knownClosure(roots []flox.StorePath) []flox.StorePath {
	var out []flox.StorePath
	find := func(p flox.StorePath) (*flox.PathInfo, bool) {
		if info, ok := a.facts.get(p.HashPart()); ok {
			return info, true
		}
		return a.stagedInfo(p)
	}
	eachFound(roots, find, func(p flox.StorePath, _ *flox.PathInfo) bool {
		out = append(out, p)
		return true
	})
	return out
}

// eachKnown calls yield once with each of roots and what they refer to, at any
// distance, as far as signed facts are here, until yield returns false. The info is
// nil for a path of which there are none.
func (a *Agent) eachKnown(roots []flox.StorePath, yield func(flox.StorePath, *flox.PathInfo) bool) {
	eachFound(roots, func(p flox.StorePath) (*flox.PathInfo, bool) { return a.facts.get(p.HashPart()) }, yield)
}

// eachFound is eachKnown of what find knows.
func eachFound(roots []flox.StorePath, find func(flox.StorePath) (*flox.PathInfo, bool), yield func(flox.StorePath, *flox.PathInfo) bool) {
	seen := make(map[flox.StorePath]bool)
	queue := slices.Clone(roots)
	for i := 0; i < len(queue); i++ {
		p := queue[i]
		if seen[p] {
			continue
		}
		seen[p] = true
		info, ok := find(p)
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
	return a.keepAs(ctx, string(info.Path), info)
}

// keepAs is keep for an owner of a name.
func (a *Agent) keepAs(ctx context.Context, owner string, info *flox.PathInfo) error {
	var failed error
	err := a.cache.Keep(ctx, owner, func(yield func(flox.CID) bool) {
		failed = a.contentOf(ctx, info, blocks{a, info.Path, a.cfg.ReadTimeout}, yield)
	})
	return errors.Join(failed, err)
}

// contentOf yields what a store path consists of, blocks and files, as far as from has
// the blocks.
func (a *Agent) contentOf(ctx context.Context, info *flox.PathInfo, from flox.Blocks, yield func(flox.CID) bool) error {
	// A manifest does not name its chunk lists, but they are read through it.
	lists := &recorder{Blocks: from}
	m, err := a.pages.Open(ctx, info.Manifest, lists)
	if err != nil {
		return fmt.Errorf("manifest of %s: %w", info.Path, err)
	}
	t := &tree{Manifest: m, path: info.Path, a: a}
	if !yield(info.Manifest) {
		return nil
	}
	for _, page := range t.Pages() {
		if !yield(page) {
			return nil
		}
	}
	listed := func() bool { return !slices.ContainsFunc(lists.take(), func(id flox.CID) bool { return !yield(id) }) }
	err = t.files(ctx, func(i uint32, _ string, e flox.Entry) error {
		if !listed() {
			return io.EOF
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
	if errors.Is(err, io.EOF) {
		return nil
	}
	listed()
	return err
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
