package p2p

import (
	"context"
	"encoding/binary"
	"testing"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

func numbered(n int) flox.CID {
	return blake3.Sum256(binary.BigEndian.AppendUint64(nil, uint64(n)))
}

// A full filter never misses a key and is seldom wrong.
func TestFilterRates(t *testing.T) {
	t.Parallel()
	const n = 50_000
	f := newFilter(n)
	for i := range n {
		f.add(keyOf(numbered(i)))
	}
	wrong := 0
	for i := range n {
		if !f.has(keyOf(numbered(i))) {
			t.Fatalf("key %d is missing", i)
		}
		if f.has(keyOf(numbered(i + n))) {
			wrong++
		}
	}
	if wrong > n*2/100 {
		t.Errorf("%d of %d answers are wrong", wrong, n)
	}
	if bits := len(f.words) * 64 / n; bits > 12 {
		t.Errorf("%d bits per key", bits)
	}
}

// A scan tells what Holding was not called for, forgets what was evicted, and
// sends a peer only what it lacks.
func TestHoldingsFollowTheHolder(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	held := newMemory()
	for i := range 1000 {
		held.blocks[numbered(i)] = nil
	}
	h := newHoldings(held, Agent)
	if u, _ := h.since(0, 0); u.whole != nil || u.gen != 0 {
		t.Fatal("something is told before the first scan")
	}
	h.scan(ctx)
	u, _ := h.since(0, 0)
	if u.whole == nil || !u.whole.has(keyOf(numbered(999))) {
		t.Fatal("the first scan is not told whole")
	}
	h.add([]flox.CID{numbered(1000)})
	held.blocks[numbered(1000)] = nil
	held.blocks[numbered(1001)] = nil
	h.scan(ctx)
	gen := u.gen
	if u, _ = h.since(gen, u.pos); u.whole != nil || len(u.keys) != 2 || u.gen != gen {
		t.Fatalf("two additions are told as %d keys, whole %t", len(u.keys), u.whole != nil)
	}
	for i := range 900 {
		delete(held.blocks, numbered(i))
	}
	h.scan(ctx)
	if u, _ = h.since(u.gen, u.pos); u.whole == nil || u.whole.has(keyOf(numbered(5))) || !u.whole.has(keyOf(numbered(1001))) {
		t.Fatal("evicted blocks are still told of")
	}
	for i := range 40_000 {
		held.blocks[numbered(i)] = nil
	}
	h.scan(ctx)
	u, _ = h.since(u.gen, u.pos)
	for i := range deltaLog + 5000 {
		h.add([]flox.CID{numbered(100_000 + i)})
	}
	if late, _ := h.since(u.gen, u.pos); late.whole == nil {
		t.Fatal("a peer far behind is not sent the whole filter")
	}
	for i := range 60_000 {
		h.add([]flox.CID{numbered(200_000 + i)})
	}
	select {
	case <-h.full:
	default:
		t.Fatal("an overfull filter is not grown")
	}
}
