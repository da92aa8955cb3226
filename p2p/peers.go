package p2p

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"

	"github.com/floxctl/flox/p2p/wire"
)

const (
	maxBans     = 4096 // remembered after a peer is gone
	maxLAN      = 4096
	maxSessions = 4 // hello streams of one peer: both may have dialed, and again
)

// remote is a peer as this host knows it. All but the counters is guarded by
// peerTable.mu, which the scheduler shares.
type remote struct {
	id    peer.ID
	name  PeerID
	fixed bool // a bootstrap peer: stays in the table when not connected

	connected bool
	since     time.Time
	sessions  []*session
	hello     wire.Hello
	greeted   bool
	ready     chan struct{} // closed once the peer said who it is and what it holds
	isReady   bool

	tier       Tier
	storehouse bool // believed to be one
	near       bool // on our subnet: compression does not pay
	filter     *filter
	askedAt    time.Time // of the ping not yet answered; zero = none

	rtt     time.Duration
	goodput float64       // bytes/s
	service time.Duration // average time from asking to having a block
	spread  time.Duration // its mean deviation
	in, out atomic.Uint64

	bannedUntil time.Time
	banWhy      string
	downUntil   time.Time // could not be reached: not tried before
	failed      bool      // the last attempt to reach it failed
	busyUntil   time.Time // said it is busy

	link link

	// of a storehouse's crowd
	seen  multiaddr.Multiaddr // the address it is connected from; guarded by peerTable.mu
	place atomic.Pointer[place]
	trip  atomic.Int64 // rtt, for those who do not hold the lock
	crowd crowdView    // guarded by crowd.mu
}

// peerTable knows every connected peer and the bootstrap peers.
type peerTable struct {
	h *Host

	mu      sync.Mutex
	remotes map[peer.ID]*remote
	boot    []peer.AddrInfo // those that are fixed; replaced, never changed
	bans    map[peer.ID]ban
	lan     map[peer.ID]time.Time // seen by multicast
	filters int                   // bytes of remotes' filters
}

type ban struct {
	until time.Time
	why   string
}

func newPeerTable(h *Host, boot []peer.AddrInfo) *peerTable {
	t := &peerTable{
		h:       h,
		remotes: map[peer.ID]*remote{},
		bans:    map[peer.ID]ban{},
		lan:     map[peer.ID]time.Time{},
	}
	for _, b := range boot {
		if b.ID == h.self {
			continue
		}
		t.boot = append(t.boot, b)
		r := t.get(b.ID)
		r.fixed = true
		// Until it says otherwise: a fetch may wait for the connection to it.
		r.storehouse = t.believes(b.ID, true)
		r.tier = TierStorehouse
	}
	return t
}

// get finds or makes the entry of id; t.mu is held (or t is not shared yet).
func (t *peerTable) get(id peer.ID) *remote {
	r := t.remotes[id]
	if r == nil {
		r = &remote{id: id, name: PeerID(id.String()), tier: TierFar, ready: make(chan struct{}), since: time.Now()}
		if b, ok := t.bans[id]; ok {
			r.bannedUntil, r.banWhy = b.until, b.why
		}
		t.remotes[id] = r
	}
	return r
}

// believes reports whether id may be a storehouse.
func (t *peerTable) believes(id peer.ID, bootstrap bool) bool {
	if f := t.h.cfg.Storehouses; f != nil {
		return f(PeerID(id.String()))
	}
	return bootstrap
}

// The peer table is told by libp2p of connections; it must not call back into
// the network while it holds its lock.
var _ network.Notifiee = (*peerTable)(nil)

func (t *peerTable) Listen(network.Network, multiaddr.Multiaddr)      {}
func (t *peerTable) ListenClose(network.Network, multiaddr.Multiaddr) {}

func (t *peerTable) Connected(_ network.Network, c network.Conn) {
	if id := c.RemotePeer(); !t.h.cfg.membership().member(id) {
		// Removed since the handshake, maybe before Kick could see the connection.
		t.h.spawn(func() { t.h.hangUp(id) })
		return
	}
	near := sameSubnet(c.RemoteMultiaddr())
	t.mu.Lock()
	r := t.get(c.RemotePeer())
	if !r.connected {
		r.connected, r.since = true, time.Now()
	}
	r.near = near
	r.seen = c.RemoteMultiaddr()
	r.downUntil = time.Time{}
	t.mu.Unlock()
	if c.Stat().Direction == network.DirOutbound {
		t.h.spawn(func() { t.h.openHello(c.RemotePeer()) })
	}
}

func (t *peerTable) Disconnected(n network.Network, c network.Conn) {
	t.disconnected(n, c.RemotePeer())
}

// disconnected ends what was asked of id, if there is no connection to it.
func (t *peerTable) disconnected(n network.Network, id peer.ID) {
	if n.Connectedness(id) == network.Connected {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.remotes[id]
	if r == nil {
		return
	}
	r.connected = false
	t.forget(r)
	if !r.fixed {
		delete(t.remotes, r.id)
	}
	t.h.sched.lost(r)
	select {
	case t.h.wake <- struct{}{}:
	default:
	}
}

// forget drops what only holds while connected; t.mu is held.
func (t *peerTable) forget(r *remote) {
	t.setFilter(r, nil)
	r.greeted = false
	r.place.Store(nil)
	r.askedAt = time.Time{}
	if r.isReady {
		r.isReady, r.ready = false, make(chan struct{})
	}
}

// setFilter replaces r's filter within the budget; t.mu is held.
func (t *peerTable) setFilter(r *remote, f *filter) bool {
	if r.filter != nil {
		t.filters -= 8 * len(r.filter.words)
	}
	r.filter = nil
	if f == nil || t.filters+8*len(f.words) > t.h.cfg.Limits.FilterBytes {
		return false
	}
	r.filter = f
	t.filters += 8 * len(f.words)
	return true
}

// greet takes a peer's hello.
func (t *peerTable) greet(r *remote, hello wire.Hello) {
	t.mu.Lock()
	r.hello, r.greeted = hello, true
	t.rank(r)
	if Role(hello.Role) == Agent && t.h.cfg.Role == Storehouse {
		listens, _ := parseAddrs(hello.Addrs) // none, if it tells nonsense
		r.place.Store(placeOf(r.seen, hello.Site, listens))
	}
	tier := r.tier
	if hello.NoFilter {
		t.markReady(r)
	}
	t.mu.Unlock()
	// The nearer, the longer a connection is kept when there are too many.
	worth := map[Tier]int{TierLAN: 50, TierSite: 20, TierStorehouse: 100}
	t.h.net.ConnManager().TagPeer(r.id, "tier", worth[tier])
}

func (t *peerTable) tier(r *remote) Tier {
	_, lan := t.lan[r.id]
	if f := t.h.cfg.tierOf; f != nil {
		if tier, ok := f(r.name); ok {
			r.near = tier == TierLAN
			return tier
		}
	}
	switch {
	case r.storehouse:
		return TierStorehouse
	case lan || r.near:
		return TierLAN
	case r.hello.Site != "" && r.hello.Site == t.h.cfg.Site:
		return TierSite
	}
	return TierFar
}

// markReady lets look-ups and fetches count on r; t.mu is held.
func (t *peerTable) markReady(r *remote) {
	if !r.isReady {
		r.isReady = true
		close(r.ready)
	}
	t.h.sched.poke()
}

// sawOnLAN remembers that multicast showed id.
func (t *peerTable) sawOnLAN(id peer.ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.lan) >= maxLAN {
		dropOldest(t.lan, func(at time.Time) time.Time { return at })
	}
	t.lan[id] = time.Now()
	if r := t.remotes[id]; r != nil && r.greeted {
		r.tier = t.tier(r)
	}
}

// dropOldest removes the entry with the earliest time.
func dropOldest[K comparable, V any](m map[K]V, at func(V) time.Time) {
	var oldest K
	var when time.Time
	for k, v := range m {
		if when.IsZero() || at(v).Before(when) {
			oldest, when = k, at(v)
		}
	}
	delete(m, oldest)
}

// punish keeps r from being asked for blocks for a while; t.mu is held. The
// connection stays: calls and the DHT are not affected by a bad disk.
func (t *peerTable) punish(r *remote, d time.Duration, why string) {
	if r.storehouse {
		d /= 100 // the last resort must come back soon
	}
	until := time.Now().Add(d)
	r.bannedUntil, r.banWhy = until, why
	if len(t.bans) >= maxBans {
		dropOldest(t.bans, func(b ban) time.Time { return b.until })
	}
	t.bans[r.id] = ban{until, why}
	t.h.log.Warn("peer is not asked for blocks for a while", "peer", r.name, "why", why, "for", d)
	t.h.sched.dropLink(r)
}

// expected is the time r is likely to need for size bytes more.
func (r *remote) expected(size int) time.Duration {
	rtt, rate := r.rtt, r.goodput
	if rtt == 0 {
		rtt = 20 * time.Millisecond
	}
	if rate == 0 {
		rate = 8 << 20
		if r.tier == TierLAN {
			rate = 64 << 20
		}
	}
	return rtt + time.Duration(float64(r.link.pending+size)/rate*float64(time.Second))
}

// Peers lists connected members, nearest first.
func (h *Host) Peers() []PeerStat {
	t := h.peers
	t.mu.Lock()
	var out []PeerStat
	ids := map[PeerID]peer.ID{}
	for _, r := range t.remotes {
		if r.connected && r.greeted {
			out = append(out, r.stat())
			ids[r.name] = r.id
		}
	}
	t.mu.Unlock()
	for i := range out {
		var reached []string
		for _, c := range h.net.Network().ConnsToPeer(ids[out[i].ID]) {
			addr := c.RemoteMultiaddr().String()
			out[i].Addrs = append(out[i].Addrs, addr)
			if c.Stat().Direction == network.DirOutbound {
				reached = append(reached, addr)
			}
		}
		said := out[i].Listens
		out[i].Listens = reached
		for _, addr := range said {
			if len(out[i].Listens) < maxAddrs && !slices.Contains(out[i].Listens, addr) {
				out[i].Listens = append(out[i].Listens, addr)
			}
		}
	}
	slices.SortFunc(out, func(a, b PeerStat) int {
		return cmp.Or(cmp.Compare(a.Tier, b.Tier), cmp.Compare(a.Score, b.Score), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func (r *remote) stat() PeerStat {
	const sample = 256 << 10
	s := PeerStat{
		ID: r.name, Listens: r.hello.Addrs, Tier: r.tier, Role: Role(r.hello.Role), Site: r.hello.Site,
		RTT: r.rtt, Goodput: r.goodput, BytesIn: r.in.Load(), BytesOut: r.out.Load(),
		Connected: r.since, Holds: -1, Score: r.expected(sample).Seconds(),
	}
	if r.filter != nil {
		s.Holds = r.filter.count
	}
	s.Why = fmt.Sprintf("%s tier", r.tier)
	if r.rtt > 0 {
		s.Why += fmt.Sprintf(", round trip %s", r.rtt.Round(10*time.Microsecond))
	}
	if r.goodput > 0 {
		s.Why += fmt.Sprintf(", %.1f MiB/s", r.goodput/(1<<20))
	}
	if r.link.pending > 0 {
		s.Why += fmt.Sprintf(", %d bytes asked for", r.link.pending)
	}
	if left := time.Until(r.bannedUntil); left > 0 {
		s.Why += fmt.Sprintf(", not asked for %s more: %s", left.Round(time.Second), r.banWhy)
	}
	return s
}
