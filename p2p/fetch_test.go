package p2p

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// A block that a peer holds comes from the peer, and the storehouse is not asked.
func TestFetchFromPeerNotStorehouse(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(1, 40, 50_000)
	origin := newMemory(blocks...)
	store := start(t, 1, func(c *Config) { c.Role = Storehouse; c.Blocks = origin })
	boot := []PeerAddr{addrOf(store)}
	peer := start(t, 2, func(c *Config) { c.Bootstrap = boot; c.Blocks = newMemory(blocks...) })
	me := start(t, 3, func(c *Config) { c.Bootstrap = boot; c.patience = time.Minute })
	join(t, me, peer)
	eventually(t, "storehouse known", func() bool { return me.knows(store) })

	var g got
	if err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	if g.from[peer.ID()] != len(blocks) || origin.gets.Load() != 0 {
		t.Fatalf("sources %v, storehouse asked %d times", g.from, origin.gets.Load())
	}
}

// What no peer holds comes from the storehouse, with the peers' part from the peers.
func TestStorehouseIsLast(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(2, 60, 20_000)
	ids := map[string]PeerID{}
	for i, name := range []string{"store", "lan", "site", "far", "me"} {
		ids[name] = idOf(t, 10+i)
	}
	origin := newMemory(blocks...)
	store := start(t, 10, func(c *Config) { c.Role = Storehouse; c.Blocks = origin })
	lan := start(t, 11, func(c *Config) { c.Blocks = newMemory(blocks[:20]...) })
	site := start(t, 12, func(c *Config) { c.Blocks = newMemory(blocks[:30]...) })
	far := start(t, 13, func(c *Config) { c.Blocks = newMemory(blocks[:40]...) })
	me := start(t, 14, func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.patience = time.Minute // nobody is overtaken, however busy the machine
		tiers(map[PeerID]Tier{ids["lan"]: TierLAN, ids["site"]: TierSite, ids["far"]: TierFar})(c)
	})
	for _, h := range []*Host{lan, site, far} {
		join(t, me, h)
	}
	var g got
	if err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	want := map[PeerID]int{lan.ID(): 20, site.ID(): 10, far.ID(): 10, store.ID(): 20}
	if diff := cmp.Diff(want, g.from); diff != "" {
		t.Fatal(diff)
	}
}

// Only a storehouse's word makes a block "not found".
func TestNotFoundOnlyFromStorehouse(t *testing.T) {
	t.Parallel()
	want := wantsOf(randomBlocks(3, 1, 100))
	store := start(t, 20, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory() })
	impostor := start(t, 21, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory() })
	me := start(t, 22, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	lonely := start(t, 23, nil)
	join(t, me, store)
	join(t, lonely, impostor)
	if err := me.Fetch(within(t, time.Minute), want, Hints{}, nil); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("with a storehouse: %v", err)
	}
	if err := lonely.Fetch(within(t, time.Minute), want, Hints{}, nil); !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("with one that only says it is a storehouse: %v", err)
	}
	if err := lonely.FetchFrom(within(t, time.Minute), impostor.ID(), want, nil); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("from one peer: %v", err)
	}
	if err := start(t, 24, nil).Fetch(within(t, time.Minute), want, Hints{}, nil); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("alone: %v", err)
	}
}

// A batch with missing blocks still delivers the others.
func TestPartialBatch(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(4, 10, 1000)
	store := start(t, 25, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks[:7]...) })
	me := start(t, 26, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	var g got
	err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take)
	if !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "3 of 10") {
		t.Fatal(err)
	}
	g.check(t, blocks[:7])
}

// Callers that want the same block cause one request; the block goes on when
// one of them leaves, and stops when all have.
func TestSingleFlight(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(5, 1, 10_000)
	held := newMemory(blocks...)
	asked := make(chan struct{}, 10)
	release := make(chan struct{})
	held.get = func(ctx context.Context, _ flox.CID, data []byte) ([]byte, error) {
		asked <- struct{}{}
		select {
		case <-release:
			return data, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	store := start(t, 30, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 31, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	eventually(t, "storehouse known", func() bool { return me.knows(store) })

	first, leave := context.WithCancel(context.Background())
	results := make(chan error, 3)
	fetch := func(ctx context.Context) {
		var g got
		err := me.Fetch(ctx, wantsOf(blocks), Hints{}, g.take)
		if err == nil {
			g.check(t, blocks)
		}
		results <- err
	}
	go fetch(first)
	<-asked
	go fetch(within(t, time.Minute))
	go fetch(within(t, time.Minute))
	eventually(t, "all wait for one flight", func() bool {
		me.peers.mu.Lock()
		defer me.peers.mu.Unlock()
		for f := range me.sched.all {
			return len(f.waiters) == 3
		}
		return false
	})
	leave()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Fatalf("who left got %v", err)
	}
	close(release)
	for range 2 {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	if n := held.gets.Load(); n != 1 {
		t.Fatalf("the block was read %d times", n)
	}
}

// When nobody waits any more, what was queued is not asked for.
func TestCancelStopsWork(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(6, 200, 4096) // few enough for one stream
	held := newMemory(blocks...)
	release := make(chan struct{})
	held.get = func(ctx context.Context, _ flox.CID, data []byte) ([]byte, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return data, nil
	}
	store := start(t, 32, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 33, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- me.Fetch(ctx, wantsOf(blocks), Hints{}, func(int, []byte, Source) {}) }()
	eventually(t, "reading", func() bool { return held.gets.Load() > 0 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "cancels sent", func() bool {
		me.peers.mu.Lock()
		defer me.peers.mu.Unlock()
		for _, l := range me.peers.remotes[store.self].link.lanes {
			if len(l.cancels) > 0 {
				return false
			}
		}
		return len(me.sched.all) == 0
	})
	// A request that follows the cancels is seen after them.
	last := randomBlocks(7, 1, 100)
	id := held.put(last[0])
	go func() {
		var g got
		done <- me.Fetch(within(t, time.Minute), wantsOf(last), Hints{}, g.take)
	}()
	eventually(t, "the last request arrives", func() bool {
		held.mu.Lock()
		defer held.mu.Unlock()
		return held.asked[id]
	})
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := held.gets.Load(); n > 10 {
		t.Fatalf("%d of 200 blocks read though nobody waited", n)
	}
}

// Ten thousand small blocks go in pipelined batches.
func TestManySmallBlocks(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(8, 10_000, 300)
	held := newMemory(blocks...)
	store := start(t, 34, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 35, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)}; c.patience = time.Minute })
	var g got
	if err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	if n := held.gets.Load(); n != 10_000 {
		t.Fatalf("%d blocks read", n)
	}
}

// Blocks whose size is not known, of every awkward size, compressed or not.
func TestSizes(t *testing.T) {
	t.Parallel()
	var blocks [][]byte
	for _, n := range []int{0, 1, 511, 512, 65_536, 65_537, MaxBlock - 1, MaxBlock} {
		blocks = append(blocks, randomBlocks(uint64(100+n), 1, n)[0], bytes.Repeat([]byte("ab"), n/2))
	}
	blocks = slices.CompactFunc(blocks, func(a, b []byte) bool { return len(a) == 0 && len(b) == 0 })
	wants := wantsOf(blocks)
	for i := range wants {
		wants[i].Size = 0
	}
	store := start(t, 36, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	for n, near := range []bool{true, false} {
		me := start(t, 37+n, func(c *Config) {
			c.Bootstrap = []PeerAddr{addrOf(store)}
		})
		eventually(t, "storehouse known", func() bool { return me.knows(store) })
		me.peers.mu.Lock()
		me.peers.remotes[store.self].near = near
		me.peers.mu.Unlock()
		var g got
		wire := 0
		err := me.Fetch(within(t, time.Minute), wants, Hints{}, func(i int, b []byte, from Source) {
			g.take(i, b, from)
			wire += from.Wire
		})
		if err != nil {
			t.Fatal(err)
		}
		g.check(t, blocks)
		if plain := g.bytes[store.ID()]; (wire > plain) != near {
			t.Errorf("near %t: %d bytes on the wire for %d", near, wire, plain)
		}
	}
	if err := store.Fetch(within(t, time.Second), []Want{{ID: wants[0].ID, Size: MaxBlock + 1}}, Hints{}, nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too large a want: %v", err)
	}
}

// A range comes without the rest of its block, and proven.
func TestFetchRange(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(9, 4, 1)
	for i, n := range []int{100, 16 << 10, 100_000, MaxBlock} {
		blocks[i] = randomBlocks(uint64(i), 1, n)[0]
	}
	store := start(t, 40, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	me := start(t, 41, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	ctx := within(t, time.Minute)
	for _, b := range blocks {
		want := wantsOf([][]byte{b})[0]
		n := len(b)
		for _, r := range [][2]int{{0, 1}, {0, n}, {n - 1, 1}, {n / 3, n / 3}, {n / 2, n - n/2}} {
			data, from, err := me.FetchRange(ctx, want, uint32(r[0]), uint32(r[1]), Hints{})
			if err != nil {
				t.Fatalf("%v of %d: %v", r, n, err)
			}
			if !bytes.Equal(data, b[r[0]:r[0]+r[1]]) {
				t.Fatalf("%v of %d: wrong bytes", r, n)
			}
			if from.Wire > r[1]+sliceOverhead(uint32(r[1])) {
				t.Errorf("%v of %d took %d bytes", r, n, from.Wire)
			}
		}
	}
	if _, _, err := me.FetchRange(ctx, wantsOf(blocks)[0], 50, 51, Hints{}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("beyond the end: %v", err)
	}
}

// A peer that answers too slowly is overtaken by the next one.
func TestSlowPeerIsOvertaken(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(10, 3, 5000)
	slow := newMemory(blocks...)
	slow.get = func(ctx context.Context, _ flox.CID, data []byte) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	a := start(t, 42, func(c *Config) { c.Blocks = slow })
	store := start(t, 43, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	me := start(t, 44, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	join(t, me, a)
	var g got
	if err := me.Fetch(within(t, 8*time.Second), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	if g.from[store.ID()] != 3 || slow.gets.Load() == 0 {
		t.Fatalf("from %v, the slow one was asked %d times", g.from, slow.gets.Load())
	}
}

// Killed mid-transfer, a peer's part comes from elsewhere.
func TestPeerDiesMidTransfer(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(11, 300, 30_000)
	dying := newMemory(blocks...)
	a := start(t, 45, func(c *Config) { c.Blocks = dying })
	var once sync.Once
	dying.get = func(_ context.Context, _ flox.CID, data []byte) ([]byte, error) {
		if dying.gets.Load() > 50 {
			once.Do(func() { go a.Close() })
		}
		return data, nil
	}
	store := start(t, 46, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	me := start(t, 47, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	join(t, me, a)
	var g got
	if err := me.Fetch(within(t, 15*time.Second), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	t.Log(g.from)
}

// Peers that are busy are asked again later, or somebody else is.
func TestUploadSlots(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(12, 40, 2000)
	held := newMemory(blocks...)
	var now, most atomic.Int64
	held.get = func(_ context.Context, _ flox.CID, data []byte) ([]byte, error) {
		most.Store(max(most.Load(), now.Add(1)))
		defer now.Add(-1)
		time.Sleep(5 * time.Millisecond)
		return data, nil
	}
	store := start(t, 48, func(c *Config) { c.Role = Storehouse; c.Blocks = held; c.Limits.UploadSlots = 1 })
	var wg sync.WaitGroup
	for n := range 3 {
		me := start(t, 49+n, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
		wg.Go(func() {
			var g got
			if err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Fatalf("%d uploads at once, want 1", most.Load())
	}
}

// Blocks that a peer gets while connected are found on it soon after.
func TestDeltas(t *testing.T) {
	t.Parallel()
	held := newMemory()
	a := start(t, 52, func(c *Config) { c.Blocks = held })
	me := start(t, 53, nil)
	join(t, me, a)
	blocks := randomBlocks(13, 2500, 64)
	for _, b := range blocks {
		a.Holding(held.put(b))
	}
	eventually(t, "all blocks come from the peer", func() bool {
		var g got
		return me.Fetch(within(t, 5*time.Second), wantsOf(blocks), Hints{}, g.take) == nil && len(g.data) == len(blocks)
	})
}

// Blocks that somebody waits for go before background work for the same peer,
// also when the background asked for them first.
func TestHurryGoesFirst(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(14, 3000, 4096)
	held := newMemory(blocks...)
	store := start(t, 54, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 55, func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.Limits.InFlight = 64 << 10
		c.patience = time.Minute
	})
	gate := make(chan struct{})
	held.get = func(_ context.Context, _ flox.CID, data []byte) ([]byte, error) {
		<-gate
		return data, nil
	}
	wants := wantsOf(blocks)
	done := make(chan error, 1)
	go func() {
		done <- me.Fetch(within(t, time.Minute), wants, Hints{Background: true}, func(int, []byte, Source) {})
	}()
	eventually(t, "background work is queued", func() bool { return held.gets.Load() > 0 })
	urgent := make(chan int64, 1)
	go func() {
		if err := me.Fetch(within(t, time.Minute), wants[2990:], Hints{}, func(int, []byte, Source) {}); err != nil {
			t.Error(err)
		}
		urgent <- held.gets.Load()
	}()
	eventually(t, "the urgent ones joined", func() bool { return me.hurries(wants[2990:]) })
	close(gate)
	if n := <-urgent; n > 500 {
		t.Errorf("the urgent blocks came after %d of 3000", n)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// hurries reports whether somebody is asked for all of wants, at once or next.
func (h *Host) hurries(wants []Want) bool {
	h.peers.mu.Lock()
	defer h.peers.mu.Unlock()
	return !slices.ContainsFunc(wants, func(w Want) bool {
		f := h.sched.flights[flightKey{id: w.ID}]
		return f == nil || f.background || len(f.active) == 0
	})
}

// So do those that were asked for in the background only, once somebody says that
// they are waited for.
func TestHurriedBackgroundGoesFirst(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(14, 3000, 4096)
	held := newMemory(blocks...)
	store := start(t, 54, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 55, func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.Limits.InFlight = 64 << 10
		c.patience = time.Minute
	})
	gate := make(chan struct{})
	held.get = func(_ context.Context, _ flox.CID, data []byte) ([]byte, error) {
		<-gate
		return data, nil
	}
	wants := wantsOf(blocks)
	done := make(chan error, 1)
	came, urgent := 0, 0
	go func() {
		done <- me.Fetch(within(t, time.Minute), wants, Hints{Background: true}, func(i int, _ []byte, _ Source) {
			if came++; i == 2990 {
				urgent = came
			}
		})
	}()
	eventually(t, "background work is queued", func() bool { return held.gets.Load() > 0 })
	me.Hurry([]flox.CID{wants[2990].ID, {1}}) // the second is of nobody's
	eventually(t, "the urgent one is in front", func() bool { return me.hurries(wants[2990:2991]) })
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if urgent == 0 || urgent > 500 {
		t.Errorf("the urgent block came as number %d of 3000", urgent)
	}
}

// What somebody says of a size plans a fetch and binds nobody.
func TestSizesFromHearsay(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(15, 300, 20_000)
	store := start(t, 56, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	for _, about := range []uint32{1, 20_000, 1 << 20, 1<<32 - 1} {
		me := start(t, 57, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
		wants := wantsOf(blocks)
		for i := range wants {
			wants[i].Size, wants[i].About = 0, about
		}
		n := 0
		err := me.Fetch(within(t, time.Minute), wants, Hints{}, func(int, []byte, Source) { n++ })
		if err != nil || n != len(blocks) {
			t.Errorf("about %d bytes: %d of %d blocks, %v", about, n, len(blocks), err)
		}
		if err := me.Close(); err != nil {
			t.Error(err)
		}
	}
	small, large := flightKey{}.cost(sizes{about: 1}), flightKey{}.cost(sizes{exact: 7, about: 1 << 20})
	if small != leastCost || large != 7 {
		t.Errorf("cost %d and %d, want %d and 7", small, large, leastCost)
	}
}

// A storehouse that spoilt one block still gives the others.
func TestStorehouseWithOneBadBlock(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(15, 50, 5000)
	held := newMemory(blocks...)
	wants := wantsOf(blocks)
	held.get = func(_ context.Context, id flox.CID, data []byte) ([]byte, error) {
		if id == wants[17].ID {
			data = bytes.Clone(data)
			data[99] ^= 4
		}
		return data, nil
	}
	store := start(t, 56, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 57, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)} })
	var g got
	err := me.Fetch(within(t, time.Minute), wants, Hints{}, g.take)
	if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) || len(g.data) != 49 {
		t.Fatalf("%d blocks, %v", len(g.data), err)
	}
}

// packedMemory keeps blocks compressed as a storehouse does, some of them wrongly.
type packedMemory struct {
	*memory
	sent atomic.Int64
	bad  map[flox.CID]bool
}

func (m *packedMemory) Packed(ctx context.Context, id flox.CID) (data []byte, size int, zstd bool, err error) {
	plain, err := m.Get(ctx, id)
	m.gets.Add(-1)
	m.sent.Add(1)
	if err != nil || m.bad[id] {
		return bytes.Repeat([]byte{7}, len(plain)), len(plain), false, err
	}
	if small := pack(plain); len(small) < len(plain) {
		return small, len(plain), true, nil
	}
	return plain, len(plain), false, nil
}

// What is kept compressed goes out as it is kept, to those who are not near, and
// what a holder keeps wrongly reaches no reader.
func TestPackedBlocksAreSentAsKept(t *testing.T) {
	t.Parallel()
	blocks := [][]byte{bytes.Repeat([]byte("well packed "), 4000), bytes.Repeat([]byte("x"), 70_000), []byte("short")}
	blocks = append(blocks, randomBlocks(9, 3, 30_000)...)
	wrong := []byte(strings.Repeat("rotten ", 3000))
	kept := &packedMemory{memory: newMemory(append(blocks, wrong)...), bad: map[flox.CID]bool{}}
	kept.bad[wantsOf([][]byte{wrong})[0].ID] = true
	store := start(t, 70, func(c *Config) { c.Role = Storehouse; c.Blocks = kept })
	me := start(t, 71, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)}; c.patience = time.Minute })
	eventually(t, "storehouse known", func() bool { return me.knows(store) })
	me.peers.mu.Lock()
	me.peers.remotes[store.self].near = false
	me.peers.mu.Unlock()
	var g got
	if err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	if kept.gets.Load() != 0 || kept.sent.Load() != int64(len(blocks)) {
		t.Errorf("%d blocks were sent as kept and %d unpacked first, want %d and none", kept.sent.Load(), kept.gets.Load(), len(blocks))
	}
	var none got
	if err := me.Fetch(within(t, time.Minute), wantsOf([][]byte{wrong}), Hints{}, none.take); err == nil {
		t.Error("a block that is not what it is called was taken")
	}
}
