package p2p

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

const (
	// crowdBlocks bounds the blocks whose takers are remembered, some 2 GiB of the
	// usual chunks; crowdFor is how long they are.
	crowdBlocks = 1 << 16
	crowdFor    = 30 * time.Second
	// maxTakers bounds the machines remembered for one block. Each sends it to a few
	// others, so that a few takers are enough for everybody.
	maxTakers = 16
	// maxMet bounds the machines that one asker is sent to: each is a connection.
	maxMet = 32
	// manyAskers machines that ask within askedFor are a crowd: it is sent to
	// machines far from each other, too, to spare this one.
	manyAskers = 4
	maxAsking  = 4096
	askedFor   = 2 * time.Second
	// maxVain times within vainFor that somebody who was sent to a machine came
	// back without the block, nobody is sent there any more.
	maxVain = 8
	vainFor = time.Minute
	// nearTrips is by how much the ways of machines of one place may differ.
	nearTrips = 20 * time.Millisecond
	// namedHolders is how many machines an asker is sent to for one block.
	namedHolders = 2
)

// crowd is what a storehouse remembers of the blocks that it handed out a moment
// ago. Who asks for one of them is sent to a machine that has it: so a crowd that
// wants the same blocks at the same time takes each of them once from here.
type crowd struct {
	mu     sync.Mutex
	blocks map[flox.CID]*handed
	ring   []flox.CID // of blocks, in the order in which they came in
	next   int        // place in ring of the oldest, once it is full
	asking map[peer.ID]time.Time
}

// handed is who took a block.
type handed struct {
	at     time.Time // when it was first handed out
	takers []taker
}

type taker struct {
	r *remote
	// via is where it was sent for the block; nil = it got it here.
	via *remote
	// depth counts the machines between this one and it, sent those that were sent
	// to it: the least of their sum is expected to have time first.
	depth, sent int
}

// place is where a machine is, as it is seen from here.
type place struct {
	site string
	ip   netip.Addr
	// reachable says that it listens at the address it is seen at: no NAT is between.
	reachable bool
	addrs     [][]byte
}

// crowdView is what a crowd knows of a remote; guarded by crowd.mu.
type crowdView struct {
	met    map[*remote]struct{} // where it was sent
	vain   int                  // times that somebody was sent there in vain
	vainAt time.Time            // the last of them
}

func newCrowd() *crowd {
	return &crowd{blocks: map[flox.CID]*handed{}, asking: map[peer.ID]time.Time{}}
}

// placeOf says where a machine is that is seen at an address and listens at others.
func placeOf(seen multiaddr.Multiaddr, site string, listens []multiaddr.Multiaddr) *place {
	p := &place{site: site, ip: ipOf(seen)}
	for _, a := range listens {
		if ip := ipOf(a); !ip.IsValid() || ip.IsLoopback() && !p.ip.IsLoopback() {
			continue
		} else if ip == p.ip {
			p.reachable = true
		}
		p.addrs = append(p.addrs, a.Bytes())
	}
	return p
}

func ipOf(a multiaddr.Multiaddr) netip.Addr {
	if a == nil {
		return netip.Addr{}
	}
	ip, err := manet.ToIP(a)
	if err != nil {
		return netip.Addr{}
	}
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}

// together reports whether two machines are likely near each other: of one site, of
// one subnet, or behind one address.
func (p *place) together(o *place) bool {
	if p.site != "" && p.site == o.site || p.ip == o.ip {
		return true
	}
	bits := 24
	if p.ip.Is6() {
		bits = 64
	}
	prefix, err := p.ip.Prefix(bits)
	return err == nil && prefix.Contains(o.ip)
}

// steer says who has a block, or will in a moment, for r to ask; nobody = it is to be
// given out here. Either way r is one of those who have it soon.
func (c *crowd) steer(id flox.CID, r *remote) []*remote {
	at := r.place.Load()
	if at == nil {
		return nil
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	many := c.asked(r, now)
	b := c.block(id, now)
	// One that asks again is sent only where it was before others were sent to it.
	depth := maxTakers
	if i := slices.IndexFunc(b.takers, func(t taker) bool { return t.r == r }); i >= 0 {
		depth = b.takers[i].depth
	}
	var found []*taker
	near := map[*taker]bool{}
	for i := range b.takers {
		t := &b.takers[i]
		where := t.r.place.Load()
		if t.r == r || where == nil || t.depth >= depth || !r.mayMeet(t.r) || t.r.crowd.inVain(now) {
			continue
		}
		if near[t] = at.together(where) && !r.apart(t.r); near[t] || many && where.reachable {
			found = append(found, t)
		}
	}
	slices.SortStableFunc(found, func(a, b *taker) int {
		if near[a] != near[b] {
			if near[a] {
				return -1
			}
			return 1
		}
		return a.depth + a.sent - b.depth - b.sent
	})
	found = found[:min(len(found), namedHolders)]
	out := make([]*remote, len(found))
	for i, t := range found {
		out[i] = t.r
		r.meet(t.r)
	}
	if len(found) == 0 {
		b.take(taker{r: r})
		return nil
	}
	found[0].sent++
	b.take(taker{r: r, via: found[0].r, depth: found[0].depth + 1})
	return out
}

// served notes that r got a block here. If it had been sent elsewhere for it, that
// was in vain.
func (c *crowd) served(id flox.CID, r *remote) {
	if r.place.Load() == nil {
		return
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked(r, now)
	b := c.block(id, now)
	if i := slices.IndexFunc(b.takers, func(t taker) bool { return t.r == r }); i >= 0 && b.takers[i].via != nil {
		via := b.takers[i].via
		via.crowd.miss(now)
		b.takers = slices.DeleteFunc(b.takers, func(t taker) bool { return t.r == via || t.r == r })
	}
	b.take(taker{r: r})
}

// refused forgets r for a block that it was not given. If it is not here, nobody has it.
func (c *crowd) refused(id flox.CID, r *remote, absent bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b := c.blocks[id]; b != nil {
		b.takers = slices.DeleteFunc(b.takers, func(t taker) bool { return absent || t.r == r })
	}
}

// asked notes that r asks, and reports whether many do. Who has not for a while is
// dropped. c.mu is held.
func (c *crowd) asked(r *remote, now time.Time) (many bool) {
	if len(c.asking) >= maxAsking {
		clear(c.asking)
	}
	c.asking[r.id] = now
	n := 0 // no further than it must
	for id, at := range c.asking {
		if now.Sub(at) > askedFor {
			delete(c.asking, id)
		} else if n++; n >= manyAskers {
			return true
		}
	}
	return false
}

// block gives what is remembered of a block, nothing at first; c.mu is held.
func (c *crowd) block(id flox.CID, now time.Time) *handed {
	if b := c.blocks[id]; b != nil {
		if now.Sub(b.at) > crowdFor {
			b.at, b.takers = now, nil
		}
		return b
	}
	if len(c.ring) < crowdBlocks {
		c.ring = append(c.ring, id)
	} else {
		delete(c.blocks, c.ring[c.next])
		c.ring[c.next] = id
		c.next = (c.next + 1) % crowdBlocks
	}
	b := &handed{at: now}
	c.blocks[id] = b
	return b
}

// take adds or renews one who takes the block, if there is room.
func (b *handed) take(t taker) {
	if i := slices.IndexFunc(b.takers, func(o taker) bool { return o.r == t.r }); i >= 0 {
		t.sent = b.takers[i].sent
		b.takers[i] = t
	} else if len(b.takers) < maxTakers {
		b.takers = append(b.takers, t)
	}
}

// apart reports whether two machines cannot be near each other: the way between them is
// at least as long as their ways to here differ.
func (r *remote) apart(o *remote) bool {
	a, b := time.Duration(r.trip.Load()), time.Duration(o.trip.Load())
	return a > 0 && b > 0 && max(a, b)-min(a, b) > max(nearTrips, max(a, b)/2)
}

// mayMeet reports whether r may be sent to o: it was before, or not to many others.
func (r *remote) mayMeet(o *remote) bool {
	_, met := r.crowd.met[o]
	return met || len(r.crowd.met) < maxMet
}

func (r *remote) meet(o *remote) {
	if r.crowd.met == nil {
		r.crowd.met = map[*remote]struct{}{}
	}
	for old := range r.crowd.met {
		if old.place.Load() == nil {
			delete(r.crowd.met, old) // it is gone
		}
	}
	r.crowd.met[o] = struct{}{}
}

// miss counts one who was sent there in vain.
func (v *crowdView) miss(now time.Time) {
	if now.Sub(v.vainAt) > vainFor {
		v.vain = 0
	}
	v.vain, v.vainAt = v.vain+1, now
}

func (v *crowdView) inVain(now time.Time) bool {
	return v.vain >= maxVain && now.Sub(v.vainAt) < vainFor
}

// elsewhere makes the answer that sends a peer to others. Addresses are told once
// on a stream.
func (up *upload) elsewhere(id uint32, to []*remote) (wire.Reply, []byte) {
	holders := make([]wire.HolderAddr, 0, len(to))
	for _, r := range to {
		h := wire.HolderAddr{ID: string(r.id)}
		if _, told := up.told[r]; !told {
			if at := r.place.Load(); at != nil {
				h.Addrs = at.addrs
			}
			if len(up.told) >= 4*maxMet {
				clear(up.told)
			}
			up.told[r] = struct{}{}
		}
		holders = append(holders, h)
	}
	return wire.Reply{ID: id, Status: wire.StatusElsewhere}, wire.AppendHolders(nil, holders)
}
