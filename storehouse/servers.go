package storehouse

import (
	"context"
	"net"
	"net/http"
	"slices"
	"sync"
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
	self p2p.PeerID
	told []p2p.PeerID                 // the servers that a new one was told of when it joined
	node atomic.Pointer[cluster.Node] // set once it is open; connections come before
	dial func(ctx context.Context, peer p2p.PeerID, protocol string) (net.Conn, error)

	roster *roster

	mu      sync.Mutex
	clients map[p2p.PeerID]*http.Client
}

// maxServers bounds what is kept per server: a storehouse has 1, 3 or 5 voters
// and some that only follow.
const maxServers = 64

func newServers(id *identity, list *roster) *servers {
	s := &servers{self: id.peer, roster: list, clients: map[p2p.PeerID]*http.Client{}}
	if id.joined != nil {
		for _, p := range id.joined.Storehouse {
			s.told = append(s.told, p2p.PeerID(p.ID))
		}
	}
	return s
}

// allowed reports whether a machine is a server. What the log says counts, and
// before there is any of it, what this server was told when it joined.
func (s *servers) allowed(id p2p.PeerID) bool {
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
	s.mu.Lock()
	defer s.mu.Unlock()
	hc := s.clients[id]
	if hc == nil {
		if len(s.clients) >= maxServers {
			for old, c := range s.clients { // any one: it is made again when needed
				c.CloseIdleConnections()
				delete(s.clients, old)
				break
			}
		}
		hc = &http.Client{Transport: &http.Transport{
			DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx, id, rpcProtocol) },
			MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute, DisableCompression: true,
		}}
		s.clients[id] = hc
	}
	return floxv1connect.NewServersClient(hc, "http://server", connect.WithReadMaxBytes(maxMessage))
}

// close ends idle connections.
func (s *servers) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clients {
		c.CloseIdleConnections()
	}
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
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("the servers are not yet as the member list says", "error", err)
		}
	}
}
