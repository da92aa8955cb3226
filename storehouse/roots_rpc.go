package storehouse

import (
	"context"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// RenewRoots is floxv1connect.MembershipHandler. The caller is who its connection
// proved it to be.
func (s *rpc) RenewRoots(ctx context.Context, req *connect.Request[floxv1.RenewRootsRequest]) (*connect.Response[floxv1.RenewRootsResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	unknown, err := s.renewRoots(ctx, req.Peer().Addr, req.Msg.GetSet())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.RenewRootsResponse{Unknown: unknown}), nil
}

// SetRoots is floxv1connect.MembershipHandler.
func (s *rpc) SetRoots(ctx context.Context, req *connect.Request[floxv1.SetRootsRequest]) (*connect.Response[floxv1.SetRootsResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	id, err := s.setRoots(ctx, req.Peer().Addr, req.Msg.GetHashes())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.SetRootsResponse{Set: id[:]}), nil
}
