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

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// admission is how long a server that was let in may take until it is part of
// the replicated configuration.
const admission = time.Minute

// servers says which machines are servers of this storehouse, and calls them.
type servers struct {
	self p2p.PeerID
	told []p2p.PeerID                 // the servers that a new one was told of when it joined
	node atomic.Pointer[cluster.Node] // set once it is open; connections come before
	dial func(ctx context.Context, peer p2p.PeerID, protocol string) (net.Conn, error)

	mu       sync.Mutex
	admitted map[p2p.PeerID]time.Time // until when
	clients  map[p2p.PeerID]*http.Client
}

// maxServers bounds what is kept per server: a storehouse has 1, 3 or 5 voters
// and some that only follow.
const maxServers = 64

func newServers(id *identity) *servers {
	s := &servers{self: id.peer, admitted: map[p2p.PeerID]time.Time{}, clients: map[p2p.PeerID]*http.Client{}}
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
	members := s.members()
	if slices.ContainsFunc(members, func(m cluster.Member) bool { return m.ID == string(id) }) {
		return true
	}
	if len(members) == 0 && slices.Contains(s.told, id) {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.admitted[id])
}

// members is the replicated configuration as this server knows it.
func (s *servers) members() []cluster.Member {
	if node := s.node.Load(); node != nil {
		return node.Status().Members
	}
	return nil
}

// admit lets a machine in that is about to become a server. ErrFull if there
// are too many.
func (s *servers) admit(id p2p.PeerID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for old, until := range s.admitted {
		if time.Now().After(until) {
			delete(s.admitted, old)
		}
	}
	if len(s.admitted) >= maxServers {
		return flox.ErrFull
	}
	s.admitted[id] = time.Now().Add(admission)
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

// run cuts removed servers off within a second or two: the consensus door asks
// who may use it when a connection begins, and here for those that are open.
func (s *servers) run(ctx context.Context, line *p2p.Line) error {
	if line == nil {
		return nil
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			line.Kick()
		case <-ctx.Done():
			return nil
		}
	}
}
