package p2p

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"
)

// Bounds of what Callers keep of a peer.
const (
	callsIdle    = time.Minute // a connection without a call
	callsPerPeer = 4           // connections kept without a call
)

// Callers makes HTTP clients whose connections are streams to members, one
// client per peer.
type Callers struct {
	dial     func(ctx context.Context, peer PeerID, protocol string) (net.Conn, error)
	protocol string
	most     int

	mu    sync.Mutex
	uses  uint64
	peers map[PeerID]*caller
}

type caller struct {
	client *http.Client
	used   uint64 // Callers.uses when it was last asked for
}

// NewCallers makes the clients of a protocol ("/flox/rpc/1"). It keeps those of
// the most peers asked last. dial is Host.Dial, or one that waits for a Host.
func NewCallers(dial func(ctx context.Context, peer PeerID, protocol string) (net.Conn, error), protocol string, most int) *Callers {
	return &Callers{dial: dial, protocol: protocol, most: max(most, 1), peers: map[PeerID]*caller{}}
}

// Client calls a peer. The host of its URLs does not matter. What Dial refuses
// with comes back wrapped in the errors of net/http.
func (c *Callers) Client(peer PeerID) *http.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses++
	if known := c.peers[peer]; known != nil {
		known.used = c.uses
		return known.client
	}
	if len(c.peers) >= c.most {
		c.dropOne()
	}
	client := &http.Client{Transport: &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx, peer, c.protocol) },
		MaxIdleConnsPerHost: callsPerPeer, IdleConnTimeout: callsIdle, DisableCompression: true,
	}}
	c.peers[peer] = &caller{client, c.uses}
	return client
}

// dropOne forgets who was not asked for longest; calls under way go on. c.mu is held.
func (c *Callers) dropOne() {
	var oldest PeerID
	for id, p := range c.peers {
		if have := c.peers[oldest]; have == nil || p.used < have.used {
			oldest = id
		}
	}
	c.peers[oldest].client.CloseIdleConnections()
	delete(c.peers, oldest)
}

// Close closes the connections that no call uses.
func (c *Callers) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.peers {
		p.client.CloseIdleConnections()
	}
}
