package p2p

import (
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/libp2p/go-libp2p/x/rate"
)

func orDefault[T int | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

// withDefaults fills in what is zero.
func (l Limits) withDefaults(role Role) Limits {
	slots, peers := 32, 160
	if role == Storehouse {
		slots, peers = 256, 4096
	}
	l.InFlight = orDefault(l.InFlight, 8<<20)
	l.CallBytes = orDefault(l.CallBytes, 16<<20)
	l.UploadSlots = orDefault(l.UploadSlots, slots)
	l.Peers = orDefault(l.Peers, peers)
	l.FilterBytes = orDefault(l.FilterBytes, 32<<20)
	l.DialTimeout = orDefault(l.DialTimeout, 500*time.Millisecond)
	l.LookupWait = orDefault(l.LookupWait, 20*time.Millisecond)
	l.Ban = orDefault(l.Ban, 15*time.Minute)
	return l
}

// reserved is what yamux books for a stream, whatever its window is.
const reserved = 256 << 10

// firstWindow is how much a peer may send on a new stream before it is read. An
// agent's fills a line of 50 ms: growing from 256 KiB costs an 8 MiB object half
// of its rate. A storehouse rather has many streams.
func firstWindow(role Role) uint32 {
	if role == Storehouse {
		return 512 << 10
	}
	return 2 << 20
}

// streamsOfPeer is how many streams one peer may open. yamux does not book the
// first window, so this is what bounds the memory of streams that are not read:
// 256 MiB for a member that does its worst.
func streamsOfPeer(role Role) int { return 256 << 20 / int(firstWindow(role)) }

// resourceManager is libp2p's with limits for a swarm of members: an office
// behind one NAT address must not lock itself out (libp2p allows 8 connections
// and one new one every 5 s per address), nor many that come at once after a
// restart (libp2p identifies 64 on a small machine), and no member may take what
// the others need.
func resourceManager(role Role, maxPeers int) (network.ResourceManager, error) {
	scaling := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&scaling)
	partial := shares(streamsOfPeer(role), maxPeers)
	conns := int(partial.System.Conns)
	subnet := func(bits int) []rcmgr.ConnLimitPerSubnet {
		return []rcmgr.ConnLimitPerSubnet{{PrefixLength: bits, ConnCount: conns}}
	}
	perAddress := rate.Limit{RPS: 50, Burst: 512}
	limiter := &rate.Limiter{SubnetRateLimiter: rate.SubnetLimiter{
		IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: perAddress}},
		IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: 56, Limit: perAddress}},
		GracePeriod:      time.Minute,
	}}
	return rcmgr.NewResourceManager(
		rcmgr.NewFixedLimiter(partial.Build(scaling.AutoScale())),
		rcmgr.WithLimitPerSubnet(subnet(32), subnet(56)),
		rcmgr.WithConnRateLimiters(limiter),
		rcmgr.WithMetricsDisabled(),
	)
}

// shares says what all, one peer, and one peer with one protocol may have.
func shares(ofPeer, maxPeers int) rcmgr.PartialLimitConfig {
	conns := rcmgr.LimitVal(2*maxPeers + 256)
	all := bothWays(64*maxPeers+8192, 64*maxPeers+8192)
	// Booked, not used: 16 streams of every peer, and room for windows that grow.
	all.Memory = rcmgr.LimitVal64(maxPeers)*16*reserved + 2<<30
	system := all
	system.Conns, system.ConnsInbound, system.ConnsOutbound, system.FD = conns, conns, conns, conns
	// Streams that have not said what they are for. One peer cannot take them all.
	transient := bothWays(4096, 4096)
	transient.Conns, transient.ConnsInbound, transient.ConnsOutbound, transient.FD = 512, 384, 384, 512
	transient.Memory = 256 << 20
	peer := bothWays(ofPeer, 1024)
	peer.Conns, peer.ConnsInbound, peer.ConnsOutbound, peer.FD = 16, 8, 8, 16
	peer.Memory = 256 << 20
	protocolPeer := bothWays(ofPeer/2, 512) // the other half is for other protocols
	protocolPeer.Memory = peer.Memory
	few := func(in, out int) rcmgr.ResourceLimits {
		l := bothWays(in, out)
		l.Memory = peer.Memory
		return l
	}
	return rcmgr.PartialLimitConfig{
		System:              system,
		Transient:           transient,
		PeerDefault:         peer,
		ProtocolDefault:     all,
		ServiceDefault:      all,
		ProtocolPeerDefault: protocolPeer,
		Service:             map[string]rcmgr.ResourceLimits{identify.ServiceName: all},
		Protocol:            map[protocol.ID]rcmgr.ResourceLimits{identify.ID: all, identify.IDPush: all},
		ProtocolPeer: map[protocol.ID]rcmgr.ResourceLimits{
			protoHello:  few(2*maxSessions, 2*maxSessions),
			protoBlocks: few(2*maxServed, 64),
			protoDHT:    few(16, 512), // each may announce a message of 4 MiB, which is allocated
		},
	}
}

func bothWays(in, out int) rcmgr.ResourceLimits {
	return rcmgr.ResourceLimits{
		Streams: rcmgr.LimitVal(in + out), StreamsInbound: rcmgr.LimitVal(in), StreamsOutbound: rcmgr.LimitVal(out),
	}
}

func muxer(role Role) network.Multiplexer {
	t := *yamux.DefaultTransport
	t.InitialStreamWindowSize = firstWindow(role)
	t.WriteCoalesceDelay = 0
	return &t
}
