package storehouse

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// maxSubstitutions is how many Substitute calls are answered at once, half of them of
// one peer, which may be a server that asks for many; the others wait.
const maxSubstitutions = 64

// Substitute is floxv1connect.UpstreamsHandler. What would be fetched any server
// says; the one that leads fetches, so that nothing is fetched twice.
func (s *rpc) Substitute(ctx context.Context, req *connect.Request[floxv1.SubstituteRequest], stream *connect.ServerStream[floxv1.SubstituteProgress]) error {
	if err := s.ready(ctx); err != nil {
		return api.ToConnect(err)
	}
	leave, err := s.substitutions.take(ctx, req.Peer().Addr)
	if err != nil {
		return api.ToConnect(err)
	}
	defer leave()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.stop, func() { cancel(flox.ErrClosed) })()
	return api.ToConnect(ended(ctx, s.substituteFor(ctx, req.Msg, func(p *floxv1.SubstituteProgress) {
		if err := stream.Send(p); err != nil {
			cancel(err) // nobody waits for it
		}
	})))
}

// substituteFor substitutes here or at the server that leads.
func (s *Server) substituteFor(ctx context.Context, q *floxv1.SubstituteRequest, send func(*floxv1.SubstituteProgress)) error {
	opts := SubstituteOptions{Paths: q.GetPaths(), Dry: q.GetDry(), Alone: q.GetAlone()}
	if q.GetDry() {
		return s.Substitute(ctx, opts, send)
	}
	for end := time.Now().Add(readWait); ; {
		leader, err := s.whoLeads(ctx, q.GetHere())
		if err != nil {
			return err
		}
		if leader == "" {
			return s.Substitute(ctx, opts, send)
		}
		err = substituteAt(ctx, s.servers.upstreams(leader), q, func(p *floxv1.SubstituteProgress) {
			end = time.Now().Add(readWait)
			send(p)
		})
		// What was fetched stays, so the next leader goes on from there.
		if !errors.Is(err, flox.ErrUnreachable) || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
		select {
		case <-time.After(leaderPause):
		case <-ctx.Done():
		}
	}
}

// substituteAt has another server substitute.
func substituteAt(ctx context.Context, at floxv1connect.UpstreamsClient, q *floxv1.SubstituteRequest, send func(*floxv1.SubstituteProgress)) error {
	there := proto.CloneOf(q)
	there.Here = true
	stream, err := at.Substitute(ctx, connect.NewRequest(there))
	if err != nil {
		return api.FromConnect(err)
	}
	for stream.Receive() {
		send(stream.Msg())
	}
	err = stream.Err()
	if closing := stream.Close(); err == nil {
		err = closing
	}
	return api.FromConnect(err)
}
