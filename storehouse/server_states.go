package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// stateWait is how long a server, or whoever leads, is waited for when all are asked
// how they are: one that is dead is to be seen, not to be waited for.
const stateWait = 3 * time.Second

// State is floxv1connect.ServersHandler.
func (h *houses) State(ctx context.Context, req *connect.Request[floxv1.StateRequest]) (*connect.Response[floxv1.StateResponse], error) {
	if err := h.caller(req.Peer().Addr); err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(h.ownState(ctx))
}

// ownState is what this server alone knows of itself. It waits for nobody.
func (s *Server) ownState(ctx context.Context) (*floxv1.StateResponse, error) {
	usage, err := s.Usage(ctx)
	if err != nil {
		return nil, err
	}
	usage.Collecting = s.collectPhase()
	lacking, rate, err := s.lacks(ctx)
	if err != nil {
		return nil, err
	}
	used, err := s.disk.usage()
	if err != nil {
		return nil, err
	}
	st := &floxv1.ServerState{
		Peer: string(s.id.peer), Name: s.machineName(), Applied: s.node.Applied(), Version: s.cfg.Version, Level: s.node.Level(),
		LackingBlocks: lacking.blocks, LackingBytes: lacking.bytes, CatchUpRate: rate, DiskUsed: used / 100,
		Builds: s.builds.state(),
	}
	switch sealed := s.roster.now.Load().secrets.GetVersion(); {
	case s.outcast.lost():
		st.Problem = outcastWords
	case sealed > s.sealed.Load():
		st.Problem = "the storehouse's keys are not open on it"
	case usage.GetWatermark() != "":
		st.Problem = fmt.Sprintf("its disk is %.0f %% full", used)
	}
	return &floxv1.StateResponse{State: st, Usage: usage}, nil
}

// houseState is what is known of all servers at one moment.
type houseState struct {
	servers  []*floxv1.ServerState // by name
	leading  error                 // why nobody could say what whoever leads sees
	phase    string                // of the collection under way
	answered map[string]bool       // by peer ID
}

// find gives a server's state; nil if it is none.
func (h *houseState) find(peer string) *floxv1.ServerState {
	for _, st := range h.servers {
		if st.GetPeer() == peer {
			return st
		}
	}
	return nil
}

// lookAtServers asks every server how it is, all at once, and the leader how it sees
// them. It ends within stateWait, whoever is away.
func (s *Server) lookAtServers(ctx context.Context) *houseState {
	ctx, cancel := context.WithTimeout(ctx, stateWait)
	defer cancel()
	var seen []cluster.ServerStatus
	var leading error
	var group sync.WaitGroup
	if leading = errOutcast; !s.takesNoPart() {
		group.Go(func() { seen, leading = s.node.Servers(ctx) })
	}

	all := map[string]string{string(s.id.peer): ""} // names by peer ID
	for _, m := range s.servers.members() {
		all[m.ID] = ""
	}
	for _, m := range s.roster.servers() {
		all[m.GetPeer()] = m.GetName()
	}
	peers := slices.Sorted(maps.Keys(all))
	peers = peers[:min(len(peers), maxServers)]
	states, errs := make([]*floxv1.StateResponse, len(peers)), make([]error, len(peers))
	for i, peer := range peers {
		group.Go(func() { states[i], errs[i] = s.stateOf(ctx, p2p.PeerID(peer)) })
	}
	group.Wait()
	if leading != nil && s.node.Status().Leader == "" {
		i := slices.Index(peers, string(s.id.peer))
		if i >= 0 && (s.outcast.lost() || castOut(slices.Concat(errs[:i], errs[i+1:]))) { // some may have answered before it was
			s.foundOutcast(true)
			leading, states[i].State.Problem = errOutcast, outcastWords
		}
	}

	out := &houseState{leading: leading, answered: map[string]bool{}}
	for i, peer := range peers {
		st := states[i].GetState()
		if st == nil {
			st = &floxv1.ServerState{Problem: silence(errs[i])}
		} else {
			out.answered[peer] = true
			out.phase = nameOr(out.phase, states[i].GetUsage().GetCollecting())
		}
		st.Peer, st.Name = peer, nameOr(all[peer], st.GetName())
		s.judge(st, seen, leading, errs[i] == nil)
		out.servers = append(out.servers, st)
	}
	slices.SortStableFunc(out.servers, func(a, b *floxv1.ServerState) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return out
}

// stateOf asks one server, or this one itself.
func (s *Server) stateOf(ctx context.Context, peer p2p.PeerID) (*floxv1.StateResponse, error) {
	if peer == s.id.peer {
		return s.ownState(ctx)
	}
	resp, err := s.servers.client(peer).State(ctx, connect.NewRequest(&floxv1.StateRequest{}))
	if errors.Is(err, flox.ErrDenied) {
		return nil, err // there was no connection to ask over: to connect that is unreachable
	}
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return resp.Msg, nil
}

// silence says why a server did not answer.
func silence(err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("it does not answer within %s", stateWait)
	case errors.Is(err, flox.ErrDenied):
		return "it does not take this server for one: " + err.Error()
	}
	return "it does not answer: " + strings.Join(strings.Fields(err.Error()), " ") // those of libp2p are of several lines
}

// judge adds what the leader sees of a server, and says whether it is well.
func (s *Server) judge(st *floxv1.ServerState, seen []cluster.ServerStatus, leading error, answered bool) {
	st.LastContactMs = -1
	i := slices.IndexFunc(seen, func(o cluster.ServerStatus) bool { return o.ID == st.GetPeer() })
	switch {
	case i >= 0:
		o := seen[i]
		st.Address, st.Leader, st.Voter, st.WantsVote, st.Drained = reachedAt(o), o.Leader, o.Voter, o.WantsVote, o.Drained
		if !o.Contact.IsZero() {
			st.LastContactMs = max(time.Since(o.Contact).Milliseconds(), 0)
		}
		if !answered {
			st.Applied, st.Version, st.Level = o.Applied, o.Version, o.Level
		}
		if st.Problem == "" && !o.Healthy && !o.Leader {
			st.Problem = "it does not keep up with the log"
		}
		st.Healthy = answered && (o.Healthy || o.Leader)
		st.RttUs = uint32(min(o.RTT.Microseconds(), 1<<31))
		if o.Voter && !o.Leader {
			st.Advice = farAdvice(st.GetName(), o.RTT, s.node.Heartbeat())
		}
	case leading != nil: // nobody leads: what this server knows of who takes part
		for _, m := range s.servers.members() {
			if m.ID == st.GetPeer() {
				st.Voter, st.Address = m.Voter, reachedAt(cluster.ServerStatus{ID: m.ID, Address: m.Address})
			}
		}
		if !errors.Is(leading, errOutcast) {
			st.Problem = nameOr(st.Problem, "no majority of the servers reaches each other, so nobody leads")
		}
	case s.roster.is(p2p.PeerID(st.GetPeer()), members.Server):
		st.Problem = nameOr(st.Problem, "it takes no part in the log yet")
		if why, ok := s.servers.tooOld()[st.GetPeer()]; ok {
			st.Problem = "it is not taken in: " + why
		}
	case st.GetPeer() == string(s.id.peer):
		st.Problem = nameOr(st.Problem, "it is none of the servers")
	}
}

// farAdvice says what long round trips to a voter change, which servers do by
// themselves, and where they do not follow any more what to do.
func farAdvice(name string, rtt, heartbeat time.Duration) string {
	if rtt <= heartbeat/2 {
		return ""
	}
	const step = 10 * time.Millisecond
	took := rtt.Round(time.Millisecond)
	if wait, lease := cluster.Patience(heartbeat, rtt); 2*rtt < lease {
		return fmt.Sprintf("a round trip to it takes %s, so servers wait %s for their leader, and a leader %s for a majority, and not the heartbeat of %s: "+
			"another one leads only as long after a leader failed; they do not wait for servers without a vote (floxctl machine label %s voter=false)",
			took, wait.Round(step), lease.Round(step), heartbeat, name)
	}
	return fmt.Sprintf("a round trip to it takes %s, too long for the storehouse to wait for it as it should: it may change its leader for no reason; "+
		"set heartbeat = %q on every server and start one after the other, or take its vote (floxctl machine label %s voter=false)",
		took, (4 * rtt).Round(100*time.Millisecond).String(), name)
}

// reachedAt is host:port of a server's address, which begins with its peer ID.
func reachedAt(o cluster.ServerStatus) string {
	if rest, ok := strings.CutPrefix(o.Address, o.ID); ok && len(rest) > 1 {
		return rest[1:]
	}
	return o.Address
}

// underPlaced is how many blocks at most are on fewer than a majority of the voters.
// A path is valid only with its content on a majority, so what is not there was
// lost by a disk, or was on a server that is gone. Which blocks a server lacks is
// known to it alone: for a block to be under-placed so many voters must lack it that
// no majority is left, so it is among the blocks of the one of these that lacks
// least. One that does not answer counts as having none.
func (h *houseState) underPlaced() uint64 {
	var lacking []uint64
	for _, st := range h.servers {
		if !st.GetVoter() {
			continue
		}
		n := st.GetLackingBlocks()
		if !h.answered[st.GetPeer()] {
			n = ^uint64(0)
		}
		lacking = append(lacking, n)
	}
	slices.SortFunc(lacking, func(a, b uint64) int { return cmp.Compare(b, a) })
	majority := len(lacking)/2 + 1
	need := len(lacking) - majority + 1 // so many lack it
	if len(lacking) == 0 {
		return 0
	}
	if n := lacking[need-1]; n != ^uint64(0) {
		return n
	}
	return 0 // no majority answers: nobody can say, and the servers' problems do
}
