package p2p

import (
	"errors"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// Which machines are the storehouse may change: a new one is met, believed and
// asked, one that is none any more is asked as others are.
func TestStorehousesAreReplaced(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(510, 4, 3000)
	house := func(n int) *Host {
		return start(t, n, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	}
	one, two := house(510), house(511)
	agent := start(t, 512, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(one)} })
	eventually(t, "the first is met", func() bool { return agent.knows(one) })
	if err := agent.SetStorehouses([]PeerAddr{{ID: two.ID(), Addrs: []string{"nonsense"}}}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("nonsense: %v", err)
	}
	if err := agent.SetStorehouses([]PeerAddr{addrOf(one), addrOf(two)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second is met", func() bool { return agent.knows(two) })
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	var g got
	if err := agent.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	if g.check(t, blocks); g.from[two.ID()] != len(blocks) {
		t.Errorf("blocks came from %v", g.from)
	}
	if err := agent.SetStorehouses([]PeerAddr{addrOf(two)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first is forgotten", func() bool {
		agent.peers.mu.Lock()
		defer agent.peers.mu.Unlock()
		return agent.peers.remotes[one.self] == nil
	})
	if err := agent.SetStorehouses(nil); err != nil {
		t.Fatal(err)
	}
	for _, p := range agent.Peers() {
		if p.Tier == TierStorehouse {
			t.Errorf("%s is still taken for a storehouse", p.ID)
		}
	}
	if rtt, ok := agent.Reach(two.ID()); !ok || rtt <= 0 {
		t.Errorf("who is connected is reached: %v, %v", ok, rtt)
	}
	if _, ok := agent.Reach(one.ID()); ok {
		t.Error("who is gone is reached")
	}
}

// A machine that only asks the DHT is in nobody's table, from when that is said.
func TestHostLeavesTheDHT(t *testing.T) {
	t.Parallel()
	a, b := start(t, 520, nil), start(t, 521, nil)
	join(t, a, b)
	eventually(t, "they serve each other", func() bool { return a.dht.RoutingTable().Size() == 1 && b.dht.RoutingTable().Size() == 1 })
	a.SetDHTClient(true)
	eventually(t, "the other does not ask it any more", func() bool { return b.dht.RoutingTable().Size() == 0 })
	key := PathKey(testPath)
	if err := a.Announce([]flox.CID{key}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is found by others all the same", func() bool { return finds(b, key, a.ID()) })
	a.SetDHTClient(false)
	eventually(t, "the other asks it again", func() bool { return b.dht.RoutingTable().Size() == 1 })
}
