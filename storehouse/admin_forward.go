package storehouse

import (
	"context"
	"encoding/base64"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
)

// actorHeader names in a call from another server on whose behalf it is made.
// That server has found that the caller may do it.
const actorHeader = "Flox-Actor"

const (
	// leaderPause is how long a server that knows no leader waits before it looks again.
	leaderPause = 50 * time.Millisecond
	// passedWait is how long a server that is taken for the leader waits to be it.
	passedWait = time.Second
)

// passedOn gives who asked another server for what that one passes on. Servers
// alone are believed: any of them could write the same into the log itself.
func (a *admin) passedOn(from p2p.PeerID, header string) (*floxv1.Actor, error) {
	if !a.s.servers.allowed(from) || a.s.revoked(from) { // a revoked one takes part in the log for a moment more
		return nil, fmt.Errorf("%s passes a call on and is no server of this storehouse: %w", from, flox.ErrDenied)
	}
	who := &floxv1.Actor{}
	b, err := base64.RawURLEncoding.DecodeString(header)
	if err == nil {
		err = proto.Unmarshal(b, who)
	}
	if err != nil || len(who.GetUser()) > maxUserName {
		return nil, fmt.Errorf("%s does not say for whom it passes a call on: %w", from, flox.ErrBadInput)
	}
	return who, nil
}

// forWhom is what passedOn reads.
func forWhom(who *floxv1.Actor) (string, error) {
	b, err := proto.Marshal(who)
	return base64.RawURLEncoding.EncodeToString(b), err
}

// passedFor is a request to another server on somebody's behalf.
func passedFor[T any](who *floxv1.Actor, q *T) (*connect.Request[T], error) {
	by, err := forWhom(who)
	if err != nil {
		return nil, err
	}
	req := connect.NewRequest(q)
	req.Header().Set(actorHeader, by)
	return req, nil
}

// leader gives who leads: nil if this server does. It waits through an election.
// A call that was passed on is not passed on again: who passed it on does so once
// it has heard of another leader.
func (a *admin) leader(ctx context.Context, passed bool) (floxv1connect.AdminClient, error) {
	id, err := a.s.whoLeads(ctx, passed)
	if err != nil || id == "" {
		return nil, err
	}
	return a.s.servers.admin(id), nil
}

// whoLeads gives the server that leads, "" if this one does; see leader.
func (s *Server) whoLeads(ctx context.Context, passed bool) (p2p.PeerID, error) {
	patience := readWait
	if passed {
		patience = passedWait
	}
	wait, done := s.agreeing(ctx, patience)
	defer done()
	for {
		st := s.node.Status()
		switch {
		case st.State == "leader":
			return "", nil
		case st.Leader != "" && st.Leader != string(s.id.peer) && !passed:
			return p2p.PeerID(st.Leader), nil
		}
		select {
		case <-time.After(leaderPause):
		case <-wait.Done():
			if passed && ctx.Err() == nil {
				return "", fmt.Errorf("this server does not lead, try again: %w", flox.ErrUnreachable)
			}
			return "", s.disagreed(ctx, wait, patience, wait.Err())
		}
	}
}

// byLeader has the server that leads answer: this one by own, or else another, which is asked
// on behalf of who.
func byLeader[Q, R any](ctx context.Context, a *admin, who *floxv1.Actor, req *connect.Request[Q], own func() (*R, error),
	ask func(floxv1connect.AdminClient, context.Context, *connect.Request[Q]) (*connect.Response[R], error),
) (*connect.Response[R], error) {
	leader, err := a.leader(ctx, req.Header().Get(actorHeader) != "")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	if leader == nil {
		return answer(own())
	}
	there, err := passedFor(who, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	resp, err := ask(leader, ctx, there)
	if err != nil {
		return nil, api.ToConnect(api.FromConnect(err))
	}
	return connect.NewResponse(resp.Msg), nil
}
