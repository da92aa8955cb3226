package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// defaultDifferences is how many are listed unless more are asked for.
const defaultDifferences = 1000

// Differences is floxv1connect.AdminHandler.
func (a *admin) Differences(ctx context.Context, req *connect.Request[floxv1.DifferencesRequest]) (*connect.Response[floxv1.DifferencesResponse], error) {
	_, err := a.may(ctx, req, anyMember, "content.differences")
	path := flox.StorePath("")
	if err == nil && req.Msg.GetPath() != "" {
		path, err = a.pathOf(req.Msg.GetPath())
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.differences(ctx, path, int(min(req.Msg.GetLimit(), maxDifferences))))
}

// differences lists where another NAR was offered for a valid path, newest first:
// of one path, or of all.
func (s *Server) differences(ctx context.Context, path flox.StorePath, limit int) (*floxv1.DifferencesResponse, error) {
	if limit == 0 {
		limit = defaultDifferences
	}
	var all []*floxv1.Difference
	err := s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		var failed error
		err := r.Iterate([]byte{differKey}, nil, func(key, value []byte) bool {
			d := &floxv1.Difference{}
			if err := proto.Unmarshal(value, d); err != nil {
				failed = fmt.Errorf("facts: %q: %w: %w", bytes.Clone(key), err, flox.ErrCorrupt)
				return false
			}
			if path == "" || d.GetPath() == string(path) {
				all = append(all, d) // at most maxDifferences
			}
			return true
		})
		return errors.Join(err, failed)
	})
	out := &floxv1.DifferencesResponse{More: len(all) > limit}
	for i := len(all) - 1; i >= 0 && len(out.GetDifferences()) < limit; i-- {
		out.Differences = append(out.Differences, all[i])
	}
	return out, err
}
