package agent

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

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
	w, err := c.a.complete.wishes(ctx)
	if err != nil {
		return nil, err
	}
	response := &floxv1.PathResponse{Paths: make([]*floxv1.PathDetails, len(infos))}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(openAtOnce)
	for i, info := range infos {
		group.Go(func() (err error) {
			response.Paths[i], err = c.a.details(ctx, info, w.policies[string(info.Path)])
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

// details says how much of a path is here; policy is that of one that is kept.
func (a *Agent) details(ctx context.Context, info *flox.PathInfo, policy string) (*floxv1.PathDetails, error) {
	d := &floxv1.PathDetails{Info: api.FromPathInfo(info), Kept: policy != "", Offline: policy}
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
	if e.Size <= uint64(t.Params().InlineLimit) || t.staged.Load() {
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
