package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// memberBatch is how many members one message of a stream holds.
	memberBatch = 1000
	// memberAge is how old the member list of a server may be that still tells
	// others of it: a revocation reaches everybody within it and a moment.
	memberAge = 3 * time.Second
)

// WatchMembers is floxv1connect.MembershipHandler. Long lists come in several
// messages; only the last of them has an index.
func (s *rpc) WatchMembers(ctx context.Context, req *connect.Request[floxv1.WatchMembersRequest], stream *connect.ServerStream[floxv1.MembersEvent]) error {
	select {
	case s.memberWatchers <- struct{}{}:
		defer func() { <-s.memberWatchers }()
	default:
		return api.ToConnect(fmt.Errorf("%d machines watch the members already: %w", maxWatchers, flox.ErrFull))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	if err := s.ready(ctx); err != nil {
		return api.ToConnect(err)
	}
	defer s.seen.enter(req.Peer().Addr)()
	w := &memberWatch{s: s.Server, at: req.Msg.GetAfterIndex(), send: stream.Send}
	err := w.run(ctx)
	if s.stop.Err() != nil {
		err = errStopping
	}
	return api.ToConnect(err)
}

// memberWatch is one stream.
type memberWatch struct {
	s       *Server
	at      uint64 // what the watcher knows of
	secrets [][]byte
	send    func(*floxv1.MembersEvent) error
}

func (w *memberWatch) run(ctx context.Context) error {
	for began := false; ; began = true {
		news := w.s.news.wait() // before the look: nothing between them is missed
		if err := w.tell(ctx, !began); err != nil {
			return err
		}
		pause := time.NewTimer(watchHeartbeat)
		select {
		case <-news:
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// tell sends what changed, or a heartbeat: the list is what it was a moment ago.
func (w *memberWatch) tell(ctx context.Context, first bool) error {
	e := &floxv1.MembersEvent{Open: w.s.cfg.OpenMembership}
	r, err := w.view(ctx, first)
	if err != nil {
		return err
	}
	err = w.read(r, e, first)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	e.Heartbeat = !e.GetReset_() && len(e.GetPut())+len(e.GetGone())+len(e.GetRevoked()) == 0
	if secrets := w.s.id.ring.secrets(); e.GetReset_() || !slices.EqualFunc(secrets, w.secrets, bytes.Equal) {
		e.SwarmSecrets, w.secrets = secrets, secrets
	}
	for len(e.GetPut()) > memberBatch || len(e.GetRevoked()) > memberBatch {
		part := &floxv1.MembersEvent{Reset_: e.GetReset_(), Open: e.GetOpen()}
		n := min(len(e.GetPut()), memberBatch)
		part.Put, e.Put = e.GetPut()[:n], e.GetPut()[n:]
		n = min(len(e.GetRevoked()), memberBatch)
		part.Revoked, e.Revoked = e.GetRevoked()[:n], e.GetRevoked()[n:]
		if err := w.send(part); err != nil {
			return err
		}
		e.Reset_ = false
	}
	w.at = e.GetIndex()
	return w.send(e)
}

// view gives the state here, if it is not too old. One that knows less than the
// watcher is brought up to date first: another server may have told it more.
func (w *memberWatch) view(ctx context.Context, first bool) (*cluster.Reader, error) {
	r, err := w.s.node.ViewWithin(ctx, members.Kind, memberAge)
	if err != nil || !first || w.at <= r.Index() {
		return r, err
	}
	if err := r.Close(); err != nil {
		return nil, err
	}
	return w.s.view(ctx, members.Kind, cluster.Linearizable)
}

// read fills e with what changed behind w.at.
func (w *memberWatch) read(r *cluster.Reader, e *floxv1.MembersEvent, first bool) error {
	e.Index = r.Index()
	peers, ok, err := members.Changes(r, w.at)
	if err != nil {
		return err
	}
	if !ok || first && w.at == 0 {
		e.Reset_ = true
		err := members.Machines(r, func(m *floxv1.Machine) bool {
			e.Put = append(e.Put, memberOf(m))
			return true
		})
		if err != nil || !e.GetOpen() {
			return err
		}
		return members.Revocations(r, func(rev *floxv1.Revoked) bool {
			e.Revoked = append(e.Revoked, rev.GetPeer())
			return true
		})
	}
	for _, p := range peers {
		m, err := members.Machine(r, p)
		switch {
		case errors.Is(err, flox.ErrNotFound):
			e.Gone = append(e.Gone, p)
			if _, err := members.Revocation(r, p); err == nil && e.GetOpen() {
				e.Revoked = append(e.Revoked, p)
			} else if err != nil && !errors.Is(err, flox.ErrNotFound) {
				return err
			}
		case err != nil:
			return err
		default:
			e.Put = append(e.Put, memberOf(m))
		}
	}
	return nil
}

// memberOf is what every machine is told of a member.
func memberOf(m *floxv1.Machine) *floxv1.Member {
	out := &floxv1.Member{Peer: m.GetPeer(), Name: m.GetName(), Role: m.GetRole(), Site: members.Label(m, "site"), Ephemeral: m.GetEphemeral()}
	if m.GetRole() == members.Server {
		out.Addrs, out.HttpUrl = m.GetAddrs(), m.GetHttpUrl()
	}
	return out
}

// Leave is floxv1connect.MembershipHandler: the caller leaves, nobody else can
// be made to.
func (s *rpc) Leave(ctx context.Context, req *connect.Request[floxv1.LeaveRequest]) (*connect.Response[floxv1.LeaveResponse], error) {
	peer := req.Peer().Addr
	m, ok := s.roster.machine(p2p.PeerID(peer))
	if !ok {
		return nil, api.ToConnect(fmt.Errorf("this machine is not in the member list: %w", flox.ErrNotFound))
	}
	who := &floxv1.Actor{Peer: peer, Machine: m.GetName(), User: req.Msg.GetUser()[:min(len(req.Msg.GetUser()), maxUserName)]}
	_, err := s.proposeMembers(ctx, &floxv1.MembersCommand{
		Actor: who, Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: peer, Reason: "it left"}},
	})
	return answer(&floxv1.LeaveResponse{}, err)
}

// everybody lists the members, sorted by peer ID.
func (s *Server) everybody() (list []*floxv1.Member) {
	all := s.roster.now.Load().machines
	for _, p := range slices.Sorted(maps.Keys(all)) {
		list = append(list, memberOf(all[p]))
	}
	return list
}
