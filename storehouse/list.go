package storehouse

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of one ListPaths call, in names; one has at most maxName bytes, so that
// a page fits a message.
const (
	maxListed     = 4096
	defaultListed = 1024
	maxName       = flox.HashPartLen + 1 + flox.MaxNameLen
)

// ListPaths is floxv1connect.StorehouseHandler.
func (s *rpc) ListPaths(ctx context.Context, req *connect.Request[floxv1.ListValidRequest]) (*connect.Response[floxv1.ListValidResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	out, err := s.listPaths(ctx, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(out), nil
}

// listPaths gives the valid paths whose names sort behind after; the key of a
// path is its hash part, which sorts as its name does. After may be any
// beginning of a name.
func (s *Server) listPaths(ctx context.Context, q *floxv1.ListValidRequest) (out *floxv1.ListValidResponse, err error) {
	after, limit := q.GetAfter(), q.GetLimit()
	switch {
	case len(after) > maxName:
		return nil, fmt.Errorf("list paths behind a name of %d bytes, want at most %d: %w", len(after), maxName, flox.ErrBadInput)
	case limit > maxListed:
		return nil, fmt.Errorf("list %d paths, want at most %d at once: %w", limit, maxListed, flox.ErrBadInput)
	case limit == 0:
		limit = defaultListed
	}
	// A listing has everything that was valid when it began, whoever made it so.
	// The pages behind the first are read from a state that is no older.
	if after != "" {
		err = s.read(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
			out, err = readNames(ctx, r, after, int(limit))
			return err
		})
		return out, err
	}
	err = s.readAged(ctx, q.GetMaxAgeMs(), func(r *cluster.Reader) (bool, error) {
		out, err = readNames(ctx, r, after, int(limit))
		return true, err
	})
	return out, err
}

// readNames reads a page of names behind after.
func readNames(ctx context.Context, r *cluster.Reader, after string, limit int) (*floxv1.ListValidResponse, error) {
	out := &floxv1.ListValidResponse{Index: r.Index()}
	var failed error
	from := hashKey(infoKey, after[:min(len(after), flox.HashPartLen)])
	err := r.Iterate([]byte{infoKey}, from, func(key, value []byte) bool {
		name, _, ok := api.PeekPathInfo(value)
		switch {
		case !ok:
			failed = fmt.Errorf("facts of %q: %w", key[1:], flox.ErrCorrupt)
		case name <= after:
		case len(out.Paths) == limit:
			out.More = true
		default:
			out.Paths = append(out.Paths, name)
		}
		return failed == nil && !out.More && ctx.Err() == nil
	})
	if err == nil {
		err = failed
	}
	if err == nil {
		err = ctx.Err()
	}
	return out, err
}
