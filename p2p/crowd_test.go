package p2p

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

// gather has n agents fetch the same blocks at the same time, keep what they get and
// serve it. change may alter an agent; it gives how many blocks the storehouse read.
func gather(t *testing.T, seed, n int, blocks [][]byte, hints Hints, change func(i int, c *Config)) (reads int64, agents []*Host) {
	t.Helper()
	origin := newMemory(blocks...)
	store := start(t, seed, func(c *Config) { c.Role, c.Blocks = Storehouse, origin })
	held := make([]*memory, n)
	for i := range n {
		held[i] = newMemory()
		agents = append(agents, start(t, seed+1+i, func(c *Config) {
			c.Bootstrap, c.Blocks, c.patience = []PeerAddr{addrOf(store)}, held[i], 10*time.Second
			if change != nil {
				change(i, c)
			}
		}))
	}
	alike(t, store, agents...)
	errs := make([]error, n)
	var all sync.WaitGroup
	for i, a := range agents {
		all.Go(func() {
			var g got
			errs[i] = a.Fetch(within(t, time.Minute), wantsOf(blocks), hints, func(at int, b []byte, from Source) {
				g.take(at, b, from)
				a.Holding(held[i].put(b))
			})
			if errs[i] == nil && len(g.data) != len(blocks) {
				errs[i] = fmt.Errorf("%d of %d blocks", len(g.data), len(blocks))
			}
		})
	}
	all.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("agent %d: %v", i, err)
		}
	}
	return origin.gets.Load(), agents
}

// alike waits until a storehouse knows agents, and has it find them equally far, however
// busy the machine is.
func alike(t *testing.T, store *Host, agents ...*Host) {
	t.Helper()
	for _, a := range agents {
		eventually(t, "each is known to the storehouse", func() bool {
			return a.knows(store) && store.knows(a) && store.remote(a).trip.Load() > 0
		})
		store.remote(a).trip.Store(int64(time.Millisecond))
	}
}

// A crowd that wants the same blocks takes each of them about once from the
// storehouse, and the rest from each other, whether somebody waits or not.
func TestCrowdTakesEachBlockOnce(t *testing.T) {
	t.Parallel()
	for name, hints := range map[string]Hints{"readers": {}, "background": {Background: true, AnyOrder: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seed := 700
			if hints.Background {
				seed = 720
			}
			blocks := randomBlocks(uint64(seed), 150, 20_000)
			reads, agents := gather(t, seed, 6, blocks, hints, nil)
			if most := int64(len(blocks) * 3 / 2); reads > most {
				t.Errorf("the storehouse read %d blocks for 6 agents that want the same %d, want at most %d", reads, len(blocks), most)
			}
			for _, a := range agents {
				a.sched.empty(t)
			}
		})
	}
}

func (s *scheduler) empty(t *testing.T) {
	t.Helper()
	s.h.peers.mu.Lock()
	defer s.h.peers.mu.Unlock()
	if len(s.all)+len(s.parked)+len(s.flights) > 0 {
		t.Errorf("%d flights are left", len(s.all))
	}
}

// Where those that are asked have nothing to give, everybody still gets all, and the
// storehouse soon sends nobody there.
func TestCrowdOfThoseWhoKeepNothing(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(740, 60, 20_000)
	_, agents := gather(t, 740, 4, blocks, Hints{}, func(_ int, c *Config) { c.Blocks = newMemory() })
	for _, a := range agents {
		if n := a.serve.waiting.size(); n != 0 {
			t.Errorf("%d requests still wait", n)
		}
	}
}

func (w *waitingRoom) size() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count
}

// Who is sent to a machine that cannot be reached gets the block from the storehouse.
func TestSentToNobody(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(750, 20, 20_000)
	origin := newMemory(blocks...)
	store := start(t, 750, func(c *Config) { c.Role, c.Blocks = Storehouse, origin })
	boot := []PeerAddr{addrOf(store)}
	first := start(t, 751, func(c *Config) { c.Bootstrap = boot })
	second := start(t, 752, func(c *Config) {
		c.Bootstrap, c.Allowed = boot, func(id PeerID) bool { return id != first.ID() }
	})
	for _, h := range []*Host{first, second} {
		alike(t, store, first, second)
		var g got
		if err := h.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
			t.Fatal(err)
		}
		g.check(t, blocks)
		if g.from[store.ID()] != len(blocks) {
			t.Errorf("from %v", g.from)
		}
	}
	second.peers.mu.Lock()
	defer second.peers.mu.Unlock()
	if _, missed := second.sched.missed[first.self]; !missed {
		t.Error("it was not sent to the first, or does not remember that it is away")
	}
}

// A machine asked for a block that is on its way there gives it when it comes, or says
// after a while that it did not.
func TestBlockOnItsWayIsWaitedFor(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(760, 2, 20_000)
	held := newMemory()
	holder := start(t, 760, func(c *Config) { c.Blocks = held })
	me := start(t, 761, nil)
	join(t, me, holder)
	ask := func(b []byte) <-chan error {
		done := make(chan error, 1)
		s := me.sched
		c := &call{ctx: t.Context(), results: make(chan result, 1), open: map[*flight]int{}, only: holder.self}
		me.peers.mu.Lock()
		f := &flight{key: flightKey{id: wantsOf([][]byte{b})[0].ID}, waiters: []waiter{{c, 0}}, only: holder.self, steered: steered{to: []peer.ID{holder.self}}}
		s.all[f] = struct{}{}
		c.open[f]++
		s.assign(f)
		me.peers.mu.Unlock()
		s.flush()
		go func() { done <- (<-c.results).err }()
		return done
	}
	late, never := ask(blocks[0]), ask(blocks[1])
	eventually(t, "both wait", func() bool { return holder.serve.waiting.size() == 2 })
	holder.Holding(held.put(blocks[0]))
	if err := <-late; err != nil {
		t.Errorf("the block that came: %v", err)
	}
	if err := <-never; err == nil {
		t.Error("the block that did not come was given")
	}
	if n := holder.serve.waiting.size(); n != 0 {
		t.Errorf("%d requests still wait", n)
	}
}

// Who is sent where: the near first, each to a few, and nobody in a circle or to where
// others went in vain.
func TestSteering(t *testing.T) {
	t.Parallel()
	at := func(ip, site string) *remote {
		r := &remote{id: peer.ID(ip)}
		a := multiaddr.StringCast("/ip4/" + ip + "/tcp/1")
		r.place.Store(placeOf(a, site, []multiaddr.Multiaddr{a}))
		return r
	}
	c := newCrowd()
	ids := func(rs []*remote) (out []string) {
		for _, r := range rs {
			out = append(out, string(r.id))
		}
		return out
	}
	check := func(what string, block byte, r *remote, want ...string) {
		t.Helper()
		if got := ids(c.steer(flox.CID{block}, r)); !slices.Equal(got, want) {
			t.Errorf("%s: sent to %v, want %v", what, got, want)
		}
	}
	a, b, d := at("10.0.0.1", ""), at("10.0.0.2", ""), at("10.0.0.3", "")
	far := at("10.9.0.1", "")
	check("the first", 1, a)
	check("the second of the subnet", 1, b, "10.0.0.1")
	check("one far away, who is not a crowd", 1, far)
	check("the first again", 1, a)
	check("the third", 1, d, "10.0.0.1", "10.0.0.2")
	check("the third again: not to those behind it; four are a crowd", 1, d, "10.0.0.1", "10.9.0.1")
	check("one that is near nobody, to those who have done least", 1, at("10.8.0.1", ""), "10.9.0.1", "10.0.0.2")
	// One that calls its request off, or finds the storehouse busy, takes nobody else away.
	e := at("10.0.0.4", "")
	up := &upload{srv: &server{crowd: c}, r: e}
	for _, status := range []wire.Status{wire.StatusCancelled, wire.StatusBusy} {
		up.noteServed(upItem{item: wire.Item{ID: flox.CID{1}}}, wire.Reply{Status: status})
		check("after one that was not served", 1, d, "10.0.0.1", "10.9.0.1")
	}
	c.steer(flox.CID{8}, e)
	up.noteServed(upItem{item: wire.Item{ID: flox.CID{8}}}, wire.Reply{Status: wire.StatusBusy})
	check("nobody is sent to one that was not served", 8, d)
	up.noteServed(upItem{item: wire.Item{ID: flox.CID{8}}}, wire.Reply{Status: wire.StatusNotFound})
	check("nobody has what is not there", 8, a)
	for i := range maxVain {
		x := at(fmt.Sprint("10.0.0.", 100+i), "")
		c.steer(flox.CID{2}, a)
		check("sent in vain", 2, x, "10.0.0.1")
		c.served(flox.CID{2}, x)
		c.blocks = map[flox.CID]*handed{}
	}
	check("who takes it", 3, a)
	check("nobody is sent there any more", 3, b)

	x, y := at("192.0.2.1", "paris"), at("198.51.100.1", "paris")
	c = newCrowd()
	check("of a site", 4, x)
	check("the other of that site", 4, y, "192.0.2.1")
	y.place.Store(nil)
	x.place.Store(nil)
	check("those who left", 4, at("198.51.100.2", "paris"))
	// Of one subnet, says the address, but the ways there differ.
	c = newCrowd()
	here, away := at("10.1.0.1", ""), at("10.1.0.2", "")
	here.trip.Store(int64(200 * time.Microsecond))
	away.trip.Store(int64(50 * time.Millisecond))
	check("near the storehouse", 7, here)
	check("far from it", 7, away)
	same := at("10.1.0.3", "")
	same.trip.Store(int64(53 * time.Millisecond))
	check("as far", 7, same, "10.1.0.2")
	// Behind a NAT only those of the same network can reach it.
	c = newCrowd()
	nat := at("203.0.113.1", "")
	nat.place.Store(placeOf(multiaddr.StringCast("/ip4/203.0.113.1/tcp/5"), "", []multiaddr.Multiaddr{multiaddr.StringCast("/ip4/192.168.1.5/tcp/1")}))
	check("behind a NAT", 5, nat)
	for i := range manyAskers {
		c.steer(flox.CID{6}, at(fmt.Sprint("10.", i, ".0.1"), ""))
	}
	check("from elsewhere", 5, at("10.0.0.9", ""))
	check("from behind it", 5, at("203.0.113.1", ""), "203.0.113.1", "10.0.0.9")
	if !nat.place.Load().ip.IsValid() || nat.place.Load().ip != netip.MustParseAddr("203.0.113.1") {
		t.Error("its address was not kept")
	}
}

// What a crowd is remembered by is bounded.
func TestCrowdIsBounded(t *testing.T) {
	t.Parallel()
	c := newCrowd()
	r := &remote{id: "one"}
	r.place.Store(&place{})
	for i := range crowdBlocks + 100 {
		c.steer(flox.CID{byte(i), byte(i >> 8), byte(i >> 16), 1}, r)
	}
	if len(c.blocks) != crowdBlocks || len(c.ring) != crowdBlocks {
		t.Errorf("%d blocks, ring of %d, want %d", len(c.blocks), len(c.ring), crowdBlocks)
	}
	for i := range 10_000 {
		o := &remote{id: peer.ID(fmt.Sprint(i))}
		o.place.Store(&place{})
		c.steer(flox.CID{1}, o)
	}
	for _, b := range c.blocks {
		if len(b.takers) > maxTakers {
			t.Fatalf("%d takers", len(b.takers))
		}
	}
}

// Only a storehouse that was asked to may send elsewhere.
func TestPeerMayNotSteer(t *testing.T) {
	t.Parallel()
	h := start(t, 770, nil)
	for _, a := range []*attempt{
		{r: &remote{}, flags: wire.FlagSteer},
		{r: &remote{storehouse: true}},
	} {
		if err := h.sched.elsewhere(a, []wire.HolderAddr{{ID: "x"}}); err == nil {
			t.Error("it was believed")
		}
	}
}

// What the storehouse does not have it says at once to everybody, not only to the first.
func TestCrowdOfWhatIsNotThere(t *testing.T) {
	t.Parallel()
	store := start(t, 790, func(c *Config) { c.Role, c.Blocks = Storehouse, newMemory() })
	want := wantsOf(randomBlocks(790, 1, 100))
	for n := range 3 {
		a := start(t, 791+n, func(c *Config) { c.Bootstrap, c.patience = []PeerAddr{addrOf(store)}, time.Minute })
		eventually(t, "known", func() bool { return store.knows(a) && a.knows(store) })
		if err := a.Fetch(within(t, 30*time.Second), want, Hints{}, nil); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("agent %d: %v", n, err)
		}
	}
}

// A reader waits once for a machine that is there and gives nothing.
func TestSentInVainOnce(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(795, 2, 1000)
	origin := newMemory(blocks...)
	store := start(t, 795, func(c *Config) { c.Role, c.Blocks = Storehouse, origin })
	boot := []PeerAddr{addrOf(store)}
	stuck := newMemory()
	stuck.has = true // and never answers
	stuck.get = func(ctx context.Context, _ flox.CID, _ []byte) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	first := start(t, 796, func(c *Config) { c.Bootstrap, c.Blocks = boot, stuck })
	second := start(t, 797, func(c *Config) { c.Bootstrap = boot })
	for _, h := range []*Host{first, second} {
		eventually(t, "known", func() bool { return store.knows(h) && h.knows(store) })
	}
	join(t, first, second)
	for _, b := range blocks {
		store.serve.crowd.steer(wantsOf([][]byte{b})[0].ID, store.remote(first))
	}
	for i := range blocks {
		var g got
		if err := second.Fetch(within(t, time.Minute), wantsOf(blocks[i:i+1]), Hints{}, g.take); err != nil {
			t.Fatal(err)
		}
	}
	second.peers.mu.Lock()
	defer second.peers.mu.Unlock()
	if _, missed := second.sched.missed[first.self]; !missed || stuck.gets.Load() == 0 {
		t.Errorf("asked %d times, remembered as giving nothing: %t", stuck.gets.Load(), missed)
	}
}

func (h *Host) remote(o *Host) *remote {
	h.peers.mu.Lock()
	defer h.peers.mu.Unlock()
	return h.peers.remotes[o.self]
}
