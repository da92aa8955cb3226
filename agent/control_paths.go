package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"
	"strings"

	"connectrpc.com/connect"

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
	response := &floxv1.PathResponse{}
	for _, info := range infos {
		d := &floxv1.PathDetails{Info: api.FromPathInfo(info), Kept: kept[string(info.Path)]}
		t, err := c.a.open(ctx, info)
		if err != nil {
			return nil, err
		}
		err = t.files(ctx, func(_ uint32, _ string, e flox.Entry) error {
			d.Files++
			d.ContentBytes += e.Size
			d.LocalBytes += c.a.localBytes(ctx, t, e)
			return nil
		})
		if err != nil {
			return nil, err
		}
		response.Paths = append(response.Paths, d)
	}
	return response, nil
}

// localBytes is how much of a file is here; content that lies in the manifest
// counts, for the manifest is here when this is asked.
func (a *Agent) localBytes(_ context.Context, t *tree, e flox.Entry) uint64 {
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
			m.LocalBytes = c.a.localBytes(ctx, t, e)
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
	progress := &floxv1.VerifyProgress{}
	for _, info := range infos {
		t, err := c.a.open(ctx, info)
		if err != nil {
			if len(req.Msg.GetPaths()) == 0 && errors.Is(err, flox.ErrUnreachable) {
				continue // of a path only its facts are here: nothing to verify
			}
			return api.ToConnect(err)
		}
		err = t.files(ctx, func(i uint32, name string, e flox.Entry) error {
			return c.verifyFile(ctx, t, i, name, e, progress, stream)
		})
		if err != nil {
			return api.ToConnect(err)
		}
	}
	progress.Finished = true
	return stream.Send(progress)
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
func (c *control) verifyFile(ctx context.Context, t *tree, i uint32, name string, e flox.Entry,
	progress *floxv1.VerifyProgress, stream *connect.ServerStream[floxv1.VerifyProgress],
) error {
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
		progress.DoneBytes += uint64(chunk.Size)
		if !ok {
			progress.Bad = append(progress.Bad, fmt.Sprintf("%s/%s: bytes %d to %d were wrong and are dropped; they are fetched again when read",
				c.a.cfg.StoreDir.Join(t.path), name, off, off+int64(chunk.Size)))
		}
		return ctx.Err() == nil
	})
	if err := errors.Join(failed, err); err != nil {
		return err
	}
	return stream.Send(progress)
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
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
}

// Unkeep implements floxv1connect.AgentHandler.
func (c *control) Unkeep(ctx context.Context, req *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error) {
	err := mayTake(ctx)
	var infos []*flox.PathInfo
	if err == nil {
		infos, err = c.a.wanted(ctx, req.Msg.GetPaths(), req.Msg.GetClosure())
	}
	response := &floxv1.KeepResponse{}
	for n, info := range infos {
		if err != nil {
			break
		}
		err = c.a.cache.Unkeep(ctx, string(info.Path))
		if errors.Is(err, flox.ErrNotFound) && (req.Msg.GetClosure() || n > 0) {
			err = nil // part of a closure that was kept by itself or not at all
			continue
		}
		response.Kept = append(response.Kept, c.a.cfg.StoreDir.Join(info.Path))
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
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
	t, err := a.open(ctx, info)
	if err != nil {
		return err
	}
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
		failed = t.files(ctx, func(_ uint32, _ string, e flox.Entry) error {
			if !yield(e.File) {
				return io.EOF
			}
			return nil
		})
	})
	err = a.cache.Keep(ctx, string(info.Path), ids)
	if errors.Is(failed, io.EOF) {
		failed = nil
	}
	return errors.Join(failed, err)
}
