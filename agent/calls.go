package agent

import (
	"context"
	"net"

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
type calls struct{ *p2p.Callers }

func newCalls(dial func(context.Context, p2p.PeerID, string) (net.Conn, error)) *calls {
	return &calls{p2p.NewCallers(dial, rpcProtocol, maxCallPeers)}
}

// facts is a client of a machine's Facts service.
func (c *calls) facts(peer p2p.PeerID) floxv1connect.FactsClient {
	return floxv1connect.NewFactsClient(c.Client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// storehouse is a client of the storehouse's own service.
func (c *calls) storehouse(peer p2p.PeerID) floxv1connect.StorehouseClient {
	return floxv1connect.NewStorehouseClient(c.Client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// upstreams is a client of the storehouse's upstreams.
func (c *calls) upstreams(peer p2p.PeerID) floxv1connect.UpstreamsClient {
	return floxv1connect.NewUpstreamsClient(c.Client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// admin is a client of what the storehouse tells members about itself.
func (c *calls) admin(peer p2p.PeerID) floxv1connect.AdminClient {
	return floxv1connect.NewAdminClient(c.Client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// buildsClient asks the storehouse about derivations.
type buildsClient = floxv1connect.BuildsClient

// builds is a client of the storehouse's word on derivations.
func (c *calls) builds(peer p2p.PeerID) buildsClient {
	return floxv1connect.NewBuildsClient(c.Client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}

// members is a client of the storehouse's word on its members.
func (c *calls) members(peer p2p.PeerID) floxv1connect.MembershipClient {
	return floxv1connect.NewMembershipClient(c.Client(peer), "http://peer", connect.WithReadMaxBytes(maxAnswer))
}
