package storehouse

import (
	"context"
	"errors"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// ephemeralTTL is how long an ephemeral machine that nobody sees stays a member.
	ephemeralTTL = time.Hour
	// maxSeen bounds the machines whose streams one server tells of at once.
	maxSeen = maxWatchers
	// forgetBatch is how many machines one entry of the log forgets, seenBatch of how
	// many it says when they were there.
	forgetBatch = 64
	seenBatch   = 4096
	// seenParts is how often within EphemeralTTL the log hears who is there.
	seenParts = 6
	// seenGrace is how long a new leader listens to the other servers before it
	// forgets a machine: a few of their ticks.
	seenGrace = 2 * time.Minute
)

// seenBook knows which machines are there. The log hears of ephemeral ones now and
// then: a new leader goes on from that.
type seenBook struct {
	mu     sync.Mutex
	open   map[string]int       // watch streams of a machine at this server
	last   map[string]time.Time // of members only, see forgetUnseen
	logged map[string]time.Time // of ephemeral ones, as the log has it; on the leader
}

func newSeenBook() *seenBook {
	return &seenBook{open: map[string]int{}, last: map[string]time.Time{}, logged: map[string]time.Time{}}
}

// enter counts a watch stream of a machine until leave.
func (b *seenBook) enter(peer string) (leave func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open[peer]++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.open[peer]--; b.open[peer] == 0 {
			delete(b.open, peer)
		}
		b.last[peer] = time.Now()
	}
}

// look says whether a machine is there, and when it last was (Unix
// milliseconds), 0 = not since this server keeps the book.
func (b *seenBook) look(peer string) (connected bool, at int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[peer] > 0 {
		return true, time.Now().UnixMilli()
	}
	if t, ok := b.last[peer]; ok {
		return false, t.UnixMilli()
	}
	return false, 0
}

// heard notes machines that another server sees.
func (b *seenBook) heard(peers []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range peers {
		b.last[p] = time.Now()
	}
}

// here lists the machines with open streams.
func (b *seenBook) here() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]string, 0, len(b.open))
	for p := range b.open {
		if list = append(list, p); len(list) == maxSeen {
			break
		}
	}
	return list
}

// unseen gives those of the members that nobody saw for ttl. Members met for the
// first time count as seen now; who is no member is forgotten.
func (b *seenBook) unseen(all map[p2p.PeerID]*floxv1.Machine, ttl time.Duration) (peers []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	for _, times := range []map[string]time.Time{b.last, b.logged} {
		for p := range times {
			if _, ok := all[p2p.PeerID(p)]; !ok {
				delete(times, p)
			}
		}
	}
	for id, m := range all {
		p := string(id)
		at, known := b.last[p]
		switch {
		case b.open[p] > 0 || !known:
			b.last[p] = now
		case m.GetEphemeral() && now.Sub(at) > ttl && len(peers) < forgetBatch:
			peers = append(peers, p)
		}
	}
	return peers
}

// restart makes the clocks of all machines start anew, of ephemeral ones where the
// log says.
func (b *seenBook) restart(logged map[string]time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.last)
	b.logged = logged
	for p, at := range logged {
		b.last[p] = at
	}
}

// due gives when ephemeral machines were there of which the log does not know yet.
func (b *seenBook) due(all map[p2p.PeerID]*floxv1.Machine) (list []*floxv1.SeenMachine) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	for id, m := range all {
		if !m.GetEphemeral() || len(list) == seenBatch {
			continue
		}
		at := b.last[string(id)]
		if b.open[string(id)] > 0 {
			at = now
		}
		if !at.IsZero() && at.UnixMilli() > b.logged[string(id)].UnixMilli() {
			list = append(list, &floxv1.SeenMachine{Peer: string(id), AtUnixMs: at.UnixMilli()})
		}
	}
	return list
}

// told notes what the log knows now.
func (b *seenBook) told(list []*floxv1.SeenMachine) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range list {
		b.logged[m.GetPeer()] = time.UnixMilli(m.GetAtUnixMs())
	}
}

// seenLeader is what a leader remembers about the book.
type seenLeader struct {
	term     uint64 // this server last led in
	since    time.Time
	recorded time.Time // when the log last heard
}

// runSeen forgets ephemeral machines on the leader, and tells the leader of
// machines on the others, until ctx ends.
func (s *Server) runSeen(ctx context.Context) error {
	tick := time.NewTicker(min(s.cfg.EphemeralTTL/8, 30*time.Second))
	defer tick.Stop()
	l := &seenLeader{}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		st := s.node.Status()
		var err error
		switch {
		case st.State != "leader" && st.Leader != "":
			err = s.tellSeen(ctx, p2p.PeerID(st.Leader))
		case st.State == "leader":
			err = s.leadSeen(ctx, l, st.Term)
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Debug("who is there could not be settled", "error", err)
		}
	}
}

// leadSeen is what a leader does at every tick.
func (s *Server) leadSeen(ctx context.Context, l *seenLeader, term uint64) error {
	now := time.Now()
	if l.term != term {
		logged := map[string]time.Time{}
		r, err := s.view(ctx, members.Kind, cluster.Linearizable)
		if err == nil {
			err = errors.Join(members.Seen(r, func(peer string, at time.Time) bool {
				logged[peer] = at
				return true
			}), r.Close())
		}
		if err != nil {
			return err
		}
		s.seen.restart(logged)
		*l = seenLeader{term: term, since: now} // what it hears until the grace is over is told then
		return nil
	}
	if now.Sub(l.since) < min(s.cfg.EphemeralTTL/4, seenGrace) {
		return nil
	}
	var err error
	if now.Sub(l.recorded) >= s.cfg.EphemeralTTL/seenParts {
		if err = s.recordSeen(ctx); err == nil {
			l.recorded = now
		}
	}
	return errors.Join(err, s.forgetUnseen(ctx))
}

// recordSeen has the log note when ephemeral machines were there. While a server
// runs a program that does not know this, the next leader takes them for seen.
func (s *Server) recordSeen(ctx context.Context) error {
	for {
		list := s.seen.due(s.roster.now.Load().machines)
		if len(list) == 0 {
			return nil
		}
		_, err := s.enterMembers(freeing(ctx), &floxv1.MembersCommand{
			Level: seenLevel, Command: &floxv1.MembersCommand_Seen{Seen: &floxv1.NoteSeen{Machines: list}},
		})
		if errors.Is(err, cluster.ErrLevel) {
			return nil
		}
		if err != nil {
			return err
		}
		s.seen.told(list)
		if len(list) < seenBatch {
			return nil
		}
	}
}

// forgetUnseen takes ephemeral machines that left out of the member list.
func (s *Server) forgetUnseen(ctx context.Context) error {
	gone := s.seen.unseen(s.roster.now.Load().machines, s.cfg.EphemeralTTL)
	if len(gone) == 0 {
		return nil
	}
	_, err := s.proposeMembers(ctx, &floxv1.MembersCommand{
		Actor: s.actor(), Command: &floxv1.MembersCommand_Forget{Forget: &floxv1.ForgetMachines{Peers: gone}},
	})
	return err
}

// tellSeen tells the leader whose streams are open here.
func (s *Server) tellSeen(ctx context.Context, leader p2p.PeerID) error {
	here := s.seen.here()
	if len(here) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := s.servers.client(leader).Seen(ctx, connect.NewRequest(&floxv1.SeenRequest{Peers: here}))
	return api.FromConnect(err)
}

// Seen is floxv1connect.ServersHandler.
func (h *houses) Seen(_ context.Context, req *connect.Request[floxv1.SeenRequest]) (*connect.Response[floxv1.SeenResponse], error) {
	if err := h.caller(req.Peer().Addr); err != nil {
		return nil, api.ToConnect(err)
	}
	all := h.roster.now.Load().machines
	var known []string
	for _, p := range req.Msg.GetPeers() {
		if _, ok := all[p2p.PeerID(p)]; ok {
			known = append(known, p)
		}
	}
	h.seen.heard(known)
	return connect.NewResponse(&floxv1.SeenResponse{}), nil
}

// seenElsewhereWait is how long a list of machines waits for what other servers see.
const seenElsewhereWait = time.Second

// seenElsewhere asks the other servers which machines they see, all or one of them, by
// peer ID: a machine is connected to one server, and servers to none for themselves. A
// server that is away is not waited for.
func (s *Server) seenElsewhere(ctx context.Context, machine string) map[string]*floxv1.MachineState {
	ctx, cancel := context.WithTimeout(ctx, seenElsewhereWait)
	defer cancel()
	by, err := forWhom(s.actor())
	if err != nil {
		return nil
	}
	others, _, _ := s.servers.others()
	others = others[:min(len(others), maxServers)]
	answers := make([]*floxv1.ListMachinesResponse, len(others))
	var group sync.WaitGroup
	for i, id := range others {
		group.Go(func() {
			req := connect.NewRequest(&floxv1.ListMachinesRequest{Machine: machine})
			req.Header().Set(actorHeader, by) // it tells what it sees itself
			if resp, err := s.servers.admin(id).ListMachines(ctx, req); err == nil {
				answers[i] = resp.Msg
			}
		})
	}
	group.Wait()
	all := map[string]*floxv1.MachineState{}
	for _, answer := range answers {
		for _, m := range answer.GetMachines() {
			peer := m.GetMachine().GetPeer()
			if have := all[peer]; have == nil {
				all[peer] = m
			} else {
				have.Connected, have.SeenUnixMs = have.GetConnected() || m.GetConnected(), max(have.GetSeenUnixMs(), m.GetSeenUnixMs())
			}
		}
	}
	return all
}
