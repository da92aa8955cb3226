package storehouse

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// servers says which machines are servers of this storehouse, and calls them.
type servers struct {
	self  p2p.PeerID
	told  []p2p.PeerID                 // the servers that are known without the log
	node  atomic.Pointer[cluster.Node] // set once it is open; connections come before
	calls *p2p.Callers                 // set with the swarm

	roster *roster
	// alone: a storehouse that was restored has not begun its epoch. Whoever was a
	// server before may still run, and would take this one for what it was.
	alone atomic.Bool
	// old: why the leader does not take servers in whose program is too old, by peer
	// ID; of the leader alone. It is replaced, not changed.
	old atomic.Pointer[map[string]string]
}

// tooOld gives why servers are not taken in whose program is too old.
func (s *servers) tooOld() map[string]string {
	if old := s.old.Load(); old != nil {
		return *old
	}
	return nil
}

// maxServers bounds what is kept per server: a storehouse has 1, 3 or 5 voters
// and some that only follow.
const maxServers = 64

func newServers(id *identity, list *roster) *servers {
	s := &servers{self: id.peer, roster: list}
	for _, p := range id.others {
		s.told = append(s.told, p2p.PeerID(p.ID))
	}
	return s
}

// allowed reports whether a machine is a server. What the log says counts, and
// before there is any of it, what this server noted of it, or was told when it joined.
func (s *servers) allowed(id p2p.PeerID) bool {
	if s.alone.Load() {
		return id == s.self
	}
	known := s.members()
	if slices.ContainsFunc(known, func(m cluster.Member) bool { return m.ID == string(id) }) {
		return true
	}
	if len(known) == 0 && slices.Contains(s.told, id) {
		return true
	}
	return s.roster.is(id, members.Server)
}

// members is the replicated configuration as this server knows it.
func (s *servers) members() []cluster.Member {
	if node := s.node.Load(); node != nil {
		return node.Status().Members
	}
	return nil
}

// others lists the servers beside this one, and of them those that vote.
func (s *servers) others() (all, voters []p2p.PeerID, votes bool) {
	for _, m := range s.members() {
		switch id := p2p.PeerID(m.ID); {
		case id == s.self:
			votes = m.Voter
		case m.Voter:
			all, voters = append(all, id), append(voters, id)
		default:
			all = append(all, id)
		}
	}
	return all, voters, votes
}

// client calls a server over its /flox/rpc/1.
func (s *servers) client(id p2p.PeerID) floxv1connect.ServersClient {
	return floxv1connect.NewServersClient(s.calls.Client(id), "http://server", connect.WithReadMaxBytes(maxMessage))
}

// upstreams has a server fetch what a machine asked this one for.
func (s *servers) upstreams(id p2p.PeerID) floxv1connect.UpstreamsClient {
	return floxv1connect.NewUpstreamsClient(s.calls.Client(id), "http://server", connect.WithReadMaxBytes(maxMessage))
}

// admin has a server do what an operator asked of this one.
func (s *servers) admin(id p2p.PeerID) floxv1connect.AdminClient {
	return floxv1connect.NewAdminClient(s.calls.Client(id), "http://server", connect.WithReadMaxBytes(maxMessage))
}

// close ends idle connections.
func (s *servers) close() error {
	s.calls.Close()
	return nil
}

// tendEvery is how often the leader compares the member list with who takes part.
const tendEvery = time.Second

// runServers keeps the servers together until ctx ends.
func (s *Server) runServers(ctx context.Context) error {
	if s.Ready(ctx) != nil {
		return nil // ctx ended
	}
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if s.line != nil {
			s.line.Kick() // who was let in and is no server any more
		}
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := s.tendServers(limited)
		cancel()
		if err := s.keepFiles(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("the upload token or invite.json on disk is not the one in force", "error", err)
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("the servers are not yet as the member list says", "error", err)
		}
	}
}
