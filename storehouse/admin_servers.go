package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

// What operators do with servers is written into the audit log as these.
const (
	actionTransfer = "server.transfer"
	actionDrain    = "server.drain"
	actionUndrain  = "server.undrain"
	actionRemove   = "server.remove"
)

// changeWait is how long the servers may take to agree on a change among themselves.
const changeWait = 15 * time.Second

// Servers is floxv1connect.AdminHandler. Every member may ask.
func (a *admin) Servers(ctx context.Context, req *connect.Request[floxv1.ServersRequest]) (*connect.Response[floxv1.ServersResponse], error) {
	if _, err := a.may(ctx, req, anyMember, "server.list"); err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(&floxv1.ServersResponse{Servers: a.s.lookAtServers(ctx).servers, ClusterLevel: a.s.node.ClusterLevel()}, ctx.Err())
}

// findServer gives the server that is meant by a name, a peer ID or the beginning of one.
func (a *admin) findServer(ctx context.Context, what string) (*floxv1.Machine, error) {
	m, err := a.find(ctx, what)
	if errors.Is(err, flox.ErrNotFound) {
		for _, o := range a.s.servers.members() {
			if o.ID == what { // no member any more, and not out of the log yet
				return &floxv1.Machine{Peer: o.ID, Name: o.ID, Role: members.Server}, nil
			}
		}
	}
	if err != nil {
		return nil, err
	}
	if m.GetRole() != members.Server {
		return nil, fmt.Errorf("%s is no server but an %s; see: floxctl storehouse servers: %w", m.GetName(), m.GetRole(), flox.ErrBadInput)
	}
	return m, nil
}

// Transfer is floxv1connect.AdminHandler. It answers with the leader's peer ID.
func (a *admin) Transfer(ctx context.Context, req *connect.Request[floxv1.TransferRequest]) (*connect.Response[floxv1.TransferResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionTransfer)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	leader, err := a.transfer(ctx, who, req.Msg.GetServer())
	return answer(&floxv1.TransferResponse{Leader: leader}, err)
}

func (a *admin) transfer(ctx context.Context, who *floxv1.Actor, to string) (string, error) {
	peer := ""
	if to != "" {
		m, err := a.findServer(ctx, to)
		if err != nil {
			return "", err
		}
		peer = m.GetPeer()
	}
	limited, done := a.s.agreeing(ctx, changeWait)
	defer done()
	before := a.s.node.Status().Leader
	if err := a.s.node.Transfer(limited, peer); err != nil {
		return "", a.mayNotLead(ctx, peer, "", a.s.disagreed(ctx, limited, changeWait, err))
	}
	// This server may hear of it a moment after the one that gave leadership away.
	for {
		leader := a.s.node.Status().Leader
		if leader != "" && leader == peer && leader == before {
			return leader, nil // nothing was changed
		}
		if leader != "" && (leader == peer || peer == "" && leader != before) {
			return leader, a.s.note(ctx, who, actionTransfer, a.s.nameOf(leader), "before: "+a.s.nameOf(before))
		}
		select {
		case <-time.After(leaderPause):
		case <-limited.Done():
			return "", a.s.disagreed(ctx, limited, changeWait, limited.Err())
		}
	}
}

// mayNotLead says of a hand-over that was refused with ErrBusy which server cannot lead,
// why, and what to do: peer, or if that is "" all but the one that is called apart.
func (a *admin) mayNotLead(ctx context.Context, peer, apart string, refused error) error {
	if !errors.Is(refused, flox.ErrBusy) {
		return refused
	}
	var reasons []string
	fit := false
	for _, st := range a.s.lookAtServers(ctx).servers {
		if peer != "" && st.GetPeer() != peer || st.GetLeader() || st.GetName() == apart {
			continue
		}
		switch {
		case !st.GetVoter():
			reasons = append(reasons, fmt.Sprintf("%s does not vote", st.GetName()))
		case st.GetDrained():
			reasons = append(reasons, fmt.Sprintf("%s is drained (floxctl storehouse drain %s --undo)", st.GetName(), st.GetName()))
		case !st.GetHealthy():
			reasons = append(reasons, fmt.Sprintf("%s is not well (%s)", st.GetName(), nameOr(st.GetProblem(), "it does not answer")))
		default:
			fit = true
		}
	}
	switch {
	case fit:
		return fmt.Errorf("%s does not take over now, try again: %w", nameOr(a.s.nameOf(peer), "another server"), refused)
	case peer != "":
		return fmt.Errorf("%s, and cannot lead: %w", strings.Join(reasons, ", "), flox.ErrBusy)
	case len(reasons) == 0:
		reasons = []string{"there is none that votes"}
	}
	return fmt.Errorf("no other server could lead: %s: %w", strings.Join(reasons, ", "), flox.ErrBusy)
}

// nameOf is what a server is called, its peer ID if nobody knows.
func (s *Server) nameOf(peer string) string {
	for _, m := range s.roster.servers() {
		if m.GetPeer() == peer {
			return m.GetName()
		}
	}
	return peer
}

// Drain is floxv1connect.AdminHandler.
func (a *admin) Drain(ctx context.Context, req *connect.Request[floxv1.DrainRequest]) (*connect.Response[floxv1.DrainResponse], error) {
	action, change := actionDrain, a.s.node.Drain
	if req.Msg.GetUndo() {
		action, change = actionUndrain, a.s.node.Undrain
	}
	who, err := a.may(ctx, req, adminOnly, action)
	var m *floxv1.Machine
	if err == nil {
		m, err = a.findServer(ctx, req.Msg.GetServer())
	}
	if err == nil {
		limited, done := a.s.agreeing(ctx, changeWait)
		err = a.s.disagreed(ctx, limited, changeWait, change(limited, m.GetPeer()))
		done()
		if !req.Msg.GetUndo() && errors.Is(err, flox.ErrBusy) {
			err = fmt.Errorf("%s is not drained: %w", m.GetName(), a.mayNotLead(ctx, "", m.GetName(), err))
		}
	}
	if err == nil {
		err = a.s.note(ctx, who, action, m.GetName(), "")
	}
	return answer(&floxv1.DrainResponse{}, err)
}

// RemoveServer is floxv1connect.AdminHandler: it takes a server out of the log's and
// revokes its key, so that it is cut off and has to join again as a new one.
func (a *admin) RemoveServer(ctx context.Context, req *connect.Request[floxv1.RemoveServerRequest]) (*connect.Response[floxv1.RemoveServerResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionRemove)
	if err == nil {
		err = a.removeServer(ctx, who, req.Msg.GetServer(), req.Msg.GetForce())
	}
	return answer(&floxv1.RemoveServerResponse{}, err)
}

func (a *admin) removeServer(ctx context.Context, who *floxv1.Actor, what string, force bool) error {
	if a.s.takesNoPart() && (what == string(a.s.id.peer) || strings.EqualFold(what, a.s.machineName())) {
		return nil // the others have taken it out already
	}
	m, err := a.findServer(ctx, what)
	if err != nil {
		return err
	}
	house := a.s.lookAtServers(ctx)
	err = house.mayGo(m, force)
	// While content comes in, some server lacks a bit of it at most moments.
	for until := time.Now().Add(changeWait); errors.Is(err, errBehind) && time.Now().Before(until) && ctx.Err() == nil; err = house.mayGo(m, force) {
		select {
		case <-time.After(removalEvery):
		case <-ctx.Done():
		}
		house = a.s.lookAtServers(ctx)
	}
	if err != nil {
		return err
	}
	reason := "taken out of the servers"
	if force {
		reason += ", by force"
	}
	return a.takeOut(ctx, who, m, house, reason, force)
}

// takeOut makes a server that may go hand over if it leads, revokes its key, takes it
// out of the log's servers and cuts it off.
func (a *admin) takeOut(ctx context.Context, who *floxv1.Actor, m *floxv1.Machine, house *houseState, reason string, force bool) error {
	limited, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	if house.find(m.GetPeer()).GetLeader() {
		if err := a.s.node.Transfer(limited, ""); err != nil {
			return noMajority(ctx, changeWait, err)
		}
	}
	// While the server itself, if it is the one asked, can still say so.
	if err := a.s.keysWereKnown(ctx, who, m, a.s.keysKnownTo(m.GetPeer())); err != nil {
		return err
	}
	// Out of the member list first: who is in it would be taken into the log again.
	remove := &floxv1.RemoveMachine{Peer: m.GetPeer(), Reason: reason, Revoked: true}
	_, err := a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Remove{Remove: remove}})
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if m.GetPeer() == string(a.s.id.peer) {
		return noMajority(ctx, changeWait, a.s.awaitRemoval(limited))
	}
	takeOut := a.s.node.RemoveServer
	if force {
		takeOut = a.s.node.ForceRemoveServer
	}
	err = takeOut(limited, m.GetPeer())
	for errors.Is(err, flox.ErrBusy) && limited.Err() == nil { // a new leader does not know at once who is well
		select {
		case <-time.After(removalEvery):
			err = takeOut(limited, m.GetPeer())
		case <-limited.Done():
		}
	}
	if errors.Is(err, flox.ErrNotFound) {
		err = nil // the leader does so as well, and was quicker
	}
	if err != nil {
		return fmt.Errorf("%s is revoked, and is taken out of the log as soon as a majority allows it: %w", m.GetName(), noMajority(ctx, changeWait, err))
	}
	err = a.s.roster.refresh(ctx, a.s)
	a.s.swarm.Kick()
	return err
}

// awaitRemoval waits until this server is out of the log's servers. One that was
// stopped before would count as a voter that is away, and the others might be no
// majority without it.
func (s *Server) awaitRemoval(ctx context.Context) error {
	tick := time.NewTicker(removalEvery)
	defer tick.Stop()
	for {
		err := s.node.RemoveServer(ctx, string(s.id.peer))
		in := slices.ContainsFunc(s.servers.members(), func(m cluster.Member) bool { return m.ID == string(s.id.peer) })
		if err == nil || !in || errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrDenied) {
			return nil // who is denied is none of them any more
		}
		if errors.Is(err, flox.ErrBusy) {
			return fmt.Errorf("this server is revoked, and is taken out of the log as soon as a majority allows it; let it run until then: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// removalEvery is how often it is tried again to take a server out.
const removalEvery = 200 * time.Millisecond

// errBehind is why a server stays for the moment: others lack what may be on it alone.
var errBehind = fmt.Errorf("others have not caught up: %w", flox.ErrBusy)

// mayGo refuses to take a server out while that would risk something, unless forced.
// Without a majority nothing can be forced: nobody could agree on it.
func (h *houseState) mayGo(m *floxv1.Machine, force bool) error {
	voters, healthy := 0, 0
	var behind []string
	for _, st := range h.servers {
		if st.GetPeer() == m.GetPeer() || !st.GetVoter() {
			continue
		}
		voters++
		if st.GetHealthy() {
			healthy++
		}
		if st.GetLackingBlocks() > 0 {
			behind = append(behind, fmt.Sprintf("%s lacks %d blocks", st.GetName(), st.GetLackingBlocks()))
		}
	}
	st := h.find(m.GetPeer())
	switch {
	case voters == 0 && st.GetVoter():
		return fmt.Errorf("%s is the only server that votes, and cannot be taken out: %w", m.GetName(), flox.ErrBusy)
	case st.GetVoter() && healthy <= voters/2:
		return fmt.Errorf("without %s, %d of %d voters would be healthy, which is no majority: the storehouse would stand still; start or add another server first: %w",
			m.GetName(), healthy, voters, flox.ErrBusy)
	case force:
		return nil
	case !st.GetHealthy():
		return fmt.Errorf("%s is not well (%s): if it is gone for good, take it out by force; what only it has of the content is lost then: %w",
			m.GetName(), nameOr(st.GetProblem(), "it does not answer"), flox.ErrBusy)
	case len(behind) > 0:
		return fmt.Errorf("%s: what they lack may be on %s; wait until they have caught up, or use force, which may lose it: %w",
			strings.Join(behind, ", "), m.GetName(), errBehind)
	}
	return nil
}
