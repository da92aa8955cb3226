package agent

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
)

// rpcProtocol carries Connect calls between machines.
const rpcProtocol = "/flox/rpc/1"

// maxCallPeers bounds the HTTP clients kept, one per peer asked.
const maxCallPeers = 128

// maxAnswer bounds one message of an answer in bytes; a storehouse answers for
// whole closures.
const maxAnswer = 32 << 20

// calls makes Connect clients whose connections are streams of the p2p host.
type calls struct {
	dial func(ctx context.Context, peer p2p.PeerID, protocol string) (net.Conn, error)

	mu    sync.Mutex
	peers map[p2p.PeerID]*http.Client
}

func newCalls(dial func(context.Context, p2p.PeerID, string) (net.Conn, error)) *calls {
	return &calls{dial: dial, peers: make(map[p2p.PeerID]*http.Client)}
}

func (c *calls) client(peer p2p.PeerID) *http.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	if hc, ok := c.peers[peer]; ok {
		return hc
	}
	if len(c.peers) >= maxCallPeers {
		for id, hc := range c.peers { // any one: it is made again when needed
			hc.CloseIdleConnections()
			delete(c.peers, id)
			break
		}
	}
	hc := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return c.dial(ctx, peer, rpcProtocol)
		},
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true,
	}}
	c.peers[peer] = hc
	return hc
}

// facts is a client of a machine's Facts service.
func (c *calls) facts(peer p2p.PeerID) floxv1connect.FactsClient {
	return floxv1connect.NewFactsClient(c.client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// storehouse is a client of the storehouse's own service.
func (c *calls) storehouse(peer p2p.PeerID) floxv1connect.StorehouseClient {
	return floxv1connect.NewStorehouseClient(c.client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// members is a client of the storehouse's word on its members.
func (c *calls) members(peer p2p.PeerID) floxv1connect.MembershipClient {
	return floxv1connect.NewMembershipClient(c.client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

func (c *calls) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, hc := range c.peers {
		hc.CloseIdleConnections()
	}
}
