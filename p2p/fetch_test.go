package p2p

import (
	"testing"
	"time"
)

// A block that a peer holds comes from the peer, and the storehouse is not asked.
func TestFetchFromPeerNotStorehouse(t *testing.T) {
	blocks := randomBlocks(1, 40, 50_000)
	origin := newMemory(blocks...)
	store := start(t, 1, func(c *Config) { c.Role = Storehouse; c.Blocks = origin })
	boot := []PeerAddr{addrOf(store)}
	peer := start(t, 2, func(c *Config) { c.Bootstrap = boot; c.Blocks = newMemory(blocks...) })
	me := start(t, 3, func(c *Config) { c.Bootstrap = boot })
	join(t, me, peer)
	eventually(t, "storehouse known", func() bool { return me.knows(store) })

	var g got
	if err := me.Fetch(within(t, 10*time.Second), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	if g.from[peer.ID()] != len(blocks) || origin.gets.Load() != 0 {
		t.Fatalf("sources %v, storehouse asked %d times", g.from, origin.gets.Load())
	}
}
