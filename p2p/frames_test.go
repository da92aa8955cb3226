package p2p

import (
	"bytes"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// What came compressed is passed on so on a LAN, where nothing is compressed for the
// wire alone, and before it is anywhere else on the machine.
func TestFramesArePassedOn(t *testing.T) {
	t.Parallel()
	blocks := [][]byte{bytes.Repeat([]byte("compressible "), 4000)}
	store := start(t, 780, func(c *Config) { c.Role, c.Blocks = Storehouse, newMemory(blocks...) })
	boot := []PeerAddr{addrOf(store)}
	empty := newMemory()
	first := start(t, 781, func(c *Config) {
		c.Bootstrap, c.Blocks = boot, empty
		tiers(map[PeerID]Tier{store.ID(): TierStorehouse})(c) // seen from afar
	})
	second := start(t, 782, func(c *Config) { c.Blocks = newMemory() })
	join(t, first, store)
	join(t, second, first)
	var wire int
	take := func(_ int, b []byte, from Source) {
		if wire = from.Wire; !bytes.Equal(b, blocks[0]) {
			t.Error("another block came")
		}
	}
	if err := first.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, take); err != nil || wire > len(blocks[0])/2 {
		t.Fatalf("from afar: %d bytes of %d, %v", wire, len(blocks[0]), err)
	}
	if err := second.FetchFrom(within(t, time.Minute), first.ID(), wantsOf(blocks), take); err == nil {
		t.Error("what the first does not say it has was given without being told that it has it")
	}
	empty.put(blocks[0])
	if err := second.FetchFrom(within(t, time.Minute), first.ID(), wantsOf(blocks), take); err != nil || wire > len(blocks[0])/2 {
		t.Errorf("on the LAN: %d bytes of %d, %v", wire, len(blocks[0]), err)
	}
	if n := empty.gets.Load(); n != 0 {
		t.Errorf("it was read %d times from where it is kept", n)
	}
}

// What is kept of what came is bounded, and soon gone.
func TestFramesAreBounded(t *testing.T) {
	t.Parallel()
	s := newFrames()
	defer s.close()
	for i := range 100 {
		s.put(flox.CID{byte(i)}, frame{data: make([]byte, 1<<20), size: 1 << 20})
		s.put(flox.CID{byte(i)}, frame{data: make([]byte, 1<<20), size: 1 << 20})
	}
	if s.bytes != framesBytes || len(s.by) != framesBytes>>20 || len(s.order) != len(s.by) {
		t.Errorf("%d bytes of %d blocks are kept, in a list of %d", s.bytes, len(s.by), len(s.order))
	}
	if _, ok := s.get(flox.CID{99}); !ok {
		t.Error("the last is not kept")
	}
	for id, f := range s.by {
		f.at = f.at.Add(-framesFor)
		s.by[id] = f
	}
	s.age()
	if s.bytes != 0 || len(s.by) != 0 || len(s.order) != 0 || s.timer != nil {
		t.Errorf("%d bytes of %d blocks are left", s.bytes, len(s.by))
	}
}
