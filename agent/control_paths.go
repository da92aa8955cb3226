package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/cache"
)

// Path implements floxv1connect.AgentHandler.
func (c *control) Path(ctx context.Context, req *connect.Request[floxv1.PathRequest]) (*connect.Response[floxv1.PathResponse], error) {
	response, err := c.path(ctx, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
}

func (c *control) path(ctx context.Context, req *floxv1.PathRequest) (*floxv1.PathResponse, error) {
	info, rest, err := c.a.info(ctx, req.GetPath())
	if err == nil && strings.Trim(rest, "/") != "" {
		err = fmt.Errorf("%s lies inside a store path; want the store path itself: %w", req.GetPath(), flox.ErrBadInput)
	}
	if err != nil {
		return nil, err
	}
	infos := []*flox.PathInfo{info}
	if req.GetClosure() {
		if infos, err = c.a.closure(ctx, infos); err != nil {
			return nil, err
		}
	}
	kept, err := c.a.keptOwners(ctx)
	if err != nil {
		return nil, err
	}
	response := &floxv1.PathResponse{Paths: make([]*floxv1.PathDetails, len(infos))}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(openAtOnce)
	for i, info := range infos {
		group.Go(func() (err error) {
			response.Paths[i], err = c.a.details(ctx, info, kept[string(info.Path)])
			return err
		})
	}
	return response, group.Wait()
}

// openAtOnce is how many manifests one caller opens at once: each may be several
// round trips away.
const openAtOnce = 16

// openAll opens the trees of many paths and reads all of their manifests.
func (a *Agent) openAll(ctx context.Context, infos []*flox.PathInfo) ([]*tree, error) {
	trees := make([]*tree, len(infos))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(openAtOnce)
	for i, info := range infos {
		group.Go(func() (err error) {
			if trees[i], err = a.open(ctx, info); err != nil {
				return err
			}
			return trees[i].files(ctx, func(uint32, string, flox.Entry) error { return nil })
		})
	}
	return trees, group.Wait()
}

// details says how much of a path is here.
func (a *Agent) details(ctx context.Context, info *flox.PathInfo, kept bool) (*floxv1.PathDetails, error) {
	d := &floxv1.PathDetails{Info: api.FromPathInfo(info), Kept: kept}
	t, err := a.open(ctx, info)
	if err != nil {
		return nil, err
	}
	return d, t.files(ctx, func(_ uint32, _ string, e flox.Entry) error {
		d.Files++
		d.ContentBytes += e.Size
		d.LocalBytes += a.localBytes(t, e)
		return nil
	})
}

// localBytes is how much of a file is here; content that lies in the manifest
// counts, for the manifest is here when this is asked.
func (a *Agent) localBytes(t *tree, e flox.Entry) uint64 {
	if e.Size <= uint64(t.Params().InlineLimit) {
		return e.Size
	}
	missing := int64(0)
	for _, r := range a.cache.Missing(cache.File{ID: e.File, Size: int64(e.Size)}, 0, int64(e.Size)) { //nolint:gosec // sizes fit
		missing += r.Len
	}
	return e.Size - uint64(missing) //nolint:gosec // never more than the size
}

// files walks the regular files of a tree.
func (t *tree) files(ctx context.Context, visit func(i uint32, path string, e flox.Entry) error) error {
	var failed error
	err := t.Walk(ctx, 0, func(i uint32, path string, e flox.Entry) bool {
		if e.Kind == flox.Regular {
			failed = visit(i, path, e)
		}
		return failed == nil
	})
	return errors.Join(failed, err)
}

// find opens the tree a path lies in and finds its entry.
func (a *Agent) find(ctx context.Context, given string) (*tree, uint32, flox.Entry, error) {
	info, rest, err := a.info(ctx, given)
	if err != nil {
		return nil, 0, flox.Entry{}, err
	}
	t, err := a.open(ctx, info)
	if err != nil {
		return nil, 0, flox.Entry{}, err
	}
	i, e, err := t.Find(ctx, strings.Trim(path.Clean("/"+rest), "/"))
	if err != nil {
		return nil, 0, flox.Entry{}, fmt.Errorf("%s: %w", given, err)
	}
	return t, i, e, nil
}

// List implements floxv1connect.AgentHandler.
func (c *control) List(ctx context.Context, req *connect.Request[floxv1.ListRequest], stream *connect.ServerStream[floxv1.ListEntry]) error {
	t, top, e, err := c.a.find(ctx, req.Msg.GetPath())
	if err != nil {
		return api.ToConnect(err)
	}
	send := func(name string, e flox.Entry) error {
		m := &floxv1.ListEntry{Path: name, Kind: e.Kind.String(), Executable: e.Executable, Size: e.Size, Target: e.Target}
		if e.Kind == flox.Regular {
			m.LocalBytes = c.a.localBytes(t, e)
		}
		return stream.Send(m)
	}
	var failed error
	switch {
	case e.Kind != flox.Directory:
		failed = send("", e)
	case req.Msg.GetRecursive():
		base, perr := t.Path(ctx, top)
		if perr != nil {
			return api.ToConnect(perr)
		}
		last := top + e.Span
		err = t.Walk(ctx, top, func(i uint32, name string, e flox.Entry) bool {
			if i > last {
				return false
			}
			if i != top {
				failed = send(strings.TrimPrefix(strings.TrimPrefix(name, base), "/"), e)
			}
			return failed == nil
		})
	default:
		err = t.Children(ctx, top, 0, func(_ uint32, e flox.Entry) bool {
			failed = send(e.Name, e)
			return failed == nil
		})
	}
	return api.ToConnect(errors.Join(failed, err))
}

// Cat implements floxv1connect.AgentHandler.
func (c *control) Cat(ctx context.Context, req *connect.Request[floxv1.CatRequest], stream *connect.ServerStream[floxv1.CatResponse]) error {
	given := req.Msg.GetPath()
	t, i, e, err := c.a.find(ctx, given)
	if err == nil && e.Kind != flox.Regular {
		err = fmt.Errorf("%s is a %s, want a regular file: %w", given, e.Kind, flox.ErrBadInput)
	}
	if err == nil {
		err = t.readFile(ctx, i, int64(e.Size), streamWriter{stream}) //nolint:gosec // sizes fit
	}
	return api.ToConnect(err)
}

// streamWriter sends what is written as messages.
type streamWriter struct {
	stream *connect.ServerStream[floxv1.CatResponse]
}

// Write implements io.Writer.
func (w streamWriter) Write(p []byte) (int, error) {
	return len(p), w.stream.Send(&floxv1.CatResponse{Data: p})
}

// Verify implements floxv1connect.AgentHandler.
func (c *control) Verify(ctx context.Context, req *connect.Request[floxv1.VerifyRequest], stream *connect.ServerStream[floxv1.VerifyProgress]) error {
	infos, err := c.verified(ctx, req.Msg.GetPaths())
	if err != nil {
		return api.ToConnect(err)
	}
	progress := &verification{stream: stream}
	for _, info := range infos {
		t, err := c.a.open(ctx, info)
		if err != nil {
			if len(req.Msg.GetPaths()) == 0 && errors.Is(err, flox.ErrUnreachable) {
				continue // of a path only its facts are here: nothing to verify
			}
			return api.ToConnect(err)
		}
		err = t.files(ctx, func(i uint32, name string, e flox.Entry) error {
			return c.verifyFile(ctx, t, i, name, e, progress)
		})
		if err != nil {
			return api.ToConnect(err)
		}
	}
	progress.said.Finished = true
	return progress.say(true)
}

// maxBad bounds the places named by one check; more are counted with the last.
const maxBad = 1000

// verification is the progress of one Verify.
type verification struct {
	said   floxv1.VerifyProgress
	at     time.Time
	stream *connect.ServerStream[floxv1.VerifyProgress]
}

func (v *verification) bad(what string) {
	if len(v.said.Bad) == maxBad {
		what = "more than that; check again when these are fetched"
	}
	if len(v.said.Bad) <= maxBad {
		v.said.Bad = append(v.said.Bad, what)
	}
}

// say sends the progress, at most ten times a second.
func (v *verification) say(now bool) error {
	if !now && time.Since(v.at) < 100*time.Millisecond {
		return nil
	}
	v.at = time.Now()
	return v.stream.Send(&v.said)
}

// verified gives the infos of the paths asked for, or of all that are known.
func (c *control) verified(ctx context.Context, given []string) ([]*flox.PathInfo, error) {
	var infos []*flox.PathInfo
	for _, g := range given {
		info, _, err := c.a.info(ctx, g)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	if len(given) > 0 {
		return infos, nil
	}
	err := c.a.facts.each("", func(info *flox.PathInfo) bool {
		if c.a.cache.Has([]flox.CID{info.Manifest})[0] {
			infos = append(infos, info)
		}
		return true
	})
	return infos, err
}

// verifyFile hashes what is here of one file; what is wrong is dropped and said.
func (c *control) verifyFile(ctx context.Context, t *tree, i uint32, name string, e flox.Entry, progress *verification) error {
	if e.Size <= uint64(t.Params().InlineLimit) || c.a.localBytes(t, e) == 0 {
		return nil // in the manifest, which is checked whenever it is read; or not here
	}
	file := cache.File{ID: e.File, Size: int64(e.Size)} //nolint:gosec // sizes fit
	var failed error
	err := t.Chunks(ctx, i, 0, file.Size, func(off int64, chunk flox.Chunk) bool {
		if c.a.cache.State(file, off, int64(chunk.Size)) == cache.Miss {
			return true
		}
		ok, err := c.a.cache.Verify(ctx, file, off, chunk)
		if err != nil {
			failed = err
			return false
		}
		progress.said.DoneBytes += uint64(chunk.Size)
		if !ok {
			progress.bad(fmt.Sprintf("%s/%s: bytes %d to %d were wrong and are dropped; they are fetched again when read",
				c.a.cfg.StoreDir.Join(t.path), name, off, off+int64(chunk.Size)))
		}
		failed = progress.say(false)
		return failed == nil && ctx.Err() == nil
	})
	return errors.Join(failed, err, ctx.Err())
}

// keptOwners is the set of store paths that are kept.
func (a *Agent) keptOwners(ctx context.Context) (map[string]bool, error) {
	keeps, err := a.cache.Keeps(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool, len(keeps))
	for _, k := range keeps {
		out[k.Owner] = true
	}
	return out, nil
}

// Keep implements floxv1connect.AgentHandler.
func (c *control) Keep(ctx context.Context, req *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error) {
	infos, err := c.a.wanted(ctx, req.Msg.GetPaths(), req.Msg.GetClosure())
	response := &floxv1.KeepResponse{}
	for _, info := range infos {
		if err != nil {
			break
		}
		err = c.a.keep(ctx, info)
		response.Kept = append(response.Kept, c.a.cfg.StoreDir.Join(info.Path))
	}
	c.a.executed.again()
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
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
	for _, p := range paths {
		err := c.a.cache.Unkeep(ctx, string(p))
		switch {
		case err == nil:
			response.Kept = append(response.Kept, c.a.cfg.StoreDir.Join(p))
		case errors.Is(err, flox.ErrNotFound):
			missing = fmt.Errorf("%s is not kept: %w", c.a.cfg.StoreDir.Join(p), flox.ErrNotFound)
		default:
			return nil, err
		}
	}
	c.a.executed.again()
	if len(response.Kept) == 0 || !req.GetClosure() && missing != nil {
		return nil, missing
	}
	return response, nil
}

// knownClosure is roots and what they refer to, as far as it is known here.
func (a *Agent) knownClosure(roots []flox.StorePath) []flox.StorePath {
	seen := make(map[flox.StorePath]bool)
	queue := slices.Clone(roots)
	out := queue[:0:0]
	for i := 0; i < len(queue); i++ {
		p := queue[i]
		if seen[p] {
			continue
		}
		seen[p] = true
		out = append(out, p)
		if info, ok := a.facts.get(p.HashPart()); ok {
			queue = append(queue, info.References...)
		}
	}
	return out
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
