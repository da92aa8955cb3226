package p2p

import (
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
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

// resourceManager is libp2p's with limits for a swarm of members: an office
// behind one NAT address must not lock itself out (libp2p allows 8 connections
// and one new one every 5 s per address), and one peer carries many calls.
func resourceManager(maxPeers int) (network.ResourceManager, error) {
	scaling := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&scaling)
	conns := rcmgr.LimitVal(2*maxPeers + 256)
	streams := rcmgr.LimitVal(64*maxPeers + 8192)
	perPeer := rcmgr.ResourceLimits{
		Streams: 2048, StreamsInbound: 1024, StreamsOutbound: 1024,
		Memory: 256 << 20,
	}
	shared := rcmgr.ResourceLimits{Streams: streams, StreamsInbound: streams, StreamsOutbound: streams, Memory: 2 << 30}
	system := shared
	system.Conns, system.ConnsInbound, system.ConnsOutbound, system.FD = conns, conns, conns, conns
	transient := rcmgr.ResourceLimits{
		Conns: 512, ConnsInbound: 384, ConnsOutbound: 384, FD: 512,
		Streams: 2048, StreamsInbound: 1024, StreamsOutbound: 1024, Memory: 256 << 20,
	}
	inPeer := perPeer
	inPeer.Conns, inPeer.ConnsInbound, inPeer.ConnsOutbound, inPeer.FD = 16, 8, 8, 16
	partial := rcmgr.PartialLimitConfig{
		System:              system,
		Transient:           transient,
		PeerDefault:         inPeer,
		ProtocolDefault:     shared,
		ProtocolPeerDefault: perPeer,
		ServiceDefault:      shared,
	}
	subnet := func(bits int) []rcmgr.ConnLimitPerSubnet {
		return []rcmgr.ConnLimitPerSubnet{{PrefixLength: bits, ConnCount: int(conns)}}
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

// muxer is yamux with a first window that fills a line of 50 ms, where growing
// from 256 KiB costs an 8 MiB object half of its rate.
func muxer() network.Multiplexer {
	t := *yamux.DefaultTransport
	t.InitialStreamWindowSize = 2 << 20
	t.WriteCoalesceDelay = 0
	return &t
}
