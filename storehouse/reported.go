package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// ReportDifference is floxv1connect.StorehouseHandler.
func (s *rpc) ReportDifference(ctx context.Context, req *connect.Request[floxv1.ReportDifferenceRequest]) (*connect.Response[floxv1.ReportDifferenceResponse], error) {
	err := s.ready(ctx)
	leave := func() {}
	if err == nil {
		leave, err = s.adding.take(ctx, req.Peer().Addr)
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	defer leave()
	recorded, err := s.reported(ctx, req.Msg, "machine "+req.Peer().Addr) // as of what it uploads
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.ReportDifferenceResponse{Recorded: recorded}), nil
}

// reported records that a machine was offered another NAR for a valid path, unless that
// one was already said to be by this machine. ErrNotFound if the path is not valid.
func (s *Server) reported(ctx context.Context, q *floxv1.ReportDifferenceRequest, by string) (bool, error) {
	p, err := flox.ParseStorePath(q.GetPath())
	if err == nil && len(q.GetNarHash()) != 32 {
		err = fmt.Errorf("%s: NAR hash of %d bytes, want 32: %w", p, len(q.GetNarHash()), flox.ErrBadInput)
	}
	if err != nil {
		return false, err
	}
	release, err := s.Hold(ctx, p) // what is added for it below must not find it gone
	if err != nil {
		return false, err
	}
	defer release()
	known, err := s.differences(ctx, p, maxDifferences)
	if err != nil {
		return false, err
	}
	valid, err := s.Info(ctx, p.HashPart())
	if err == nil && valid.Path != p {
		err = fmt.Errorf("%s: %w", p, flox.ErrNotFound)
	}
	if err != nil {
		return false, err
	}
	if bytes.Equal(valid.NarHash[:], q.GetNarHash()) || slices.ContainsFunc(known.GetDifferences(), func(d *floxv1.Difference) bool {
		return d.GetPublisher() == by && bytes.Equal(d.GetOfferedNarHash(), q.GetNarHash())
	}) {
		return false, nil
	}
	offered := *valid
	offered.NarHash = [32]byte(q.GetNarHash())
	reply, err := s.batch.addAll(ctx, []*flox.PathInfo{&offered}, "", by, nil)
	if err != nil {
		return false, err
	}
	for _, d := range reply.GetDifferences() {
		if d.GetPath() == string(p) && bytes.Equal(d.GetOfferedNarHash(), q.GetNarHash()) {
			if err := s.differs(&offered, d, by); !errors.Is(err, errDiffers) { // writes it into the log of this server
				return false, err
			}
			return true, nil
		}
	}
	return false, nil
}
