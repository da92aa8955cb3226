package p2p

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/query"

	"github.com/floxctl/flox"
)

const testPath = flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-hello-2.12")

func finds(h *Host, key flox.CID, want PeerID) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	list, err := h.FindProviders(ctx, key, 10)
	return err == nil && slices.ContainsFunc(list, func(p PeerAddr) bool { return p.ID == want && len(p.Addrs) > 0 })
}

// Agents that only know the storehouse find each other, and each other's
// blocks, when it is gone.
func TestSwarmOutlivesStorehouse(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(400, 5, 2000)
	store := start(t, 400, func(c *Config) { c.Role = Storehouse })
	boot := []PeerAddr{addrOf(store)}
	var agents []*Host
	for n := range 6 {
		agents = append(agents, start(t, 401+n, func(c *Config) {
			c.Bootstrap = boot
			c.Site = fmt.Sprintf("site-%d", n%2)
			c.patience = time.Minute
			if n == 0 {
				c.Blocks = newMemory(blocks...)
			}
		}))
	}
	if err := agents[0].Announce([]flox.CID{PathKey(testPath)}); err != nil {
		t.Fatal(err)
	}
	for _, h := range agents[1:] {
		eventually(t, "the path is found", func() bool { return finds(h, PathKey(testPath), agents[0].ID()) })
		eventually(t, "others are in the routing table", func() bool { return h.dht.RoutingTable().Size() > 2 })
	}
	store.Close()
	for _, h := range agents[1:] {
		eventually(t, "the path is found without the storehouse", func() bool { return finds(h, PathKey(testPath), agents[0].ID()) })
	}
	for _, h := range agents[1:3] {
		var g got
		if err := h.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{Paths: []flox.StorePath{testPath}}, g.take); err != nil {
			t.Fatal(err)
		}
		g.check(t, blocks)
		if g.from[agents[0].ID()] != len(blocks) {
			t.Fatal(g.from)
		}
	}
	// What nobody holds is an error soon, not at the deadline.
	began := time.Now()
	err := agents[1].Fetch(within(t, time.Minute), wantsOf(randomBlocks(401, 1, 10)), Hints{Paths: []flox.StorePath{testPath}}, nil)
	if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("after %s: %v", time.Since(began), err)
	}
}

// A holder that is not connected is found by the path it announced, met, and
// asked before the storehouse.
func TestLookupBeforeStorehouse(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(402, 30, 3000)
	origin := newMemory(blocks...)
	store := start(t, 410, func(c *Config) { c.Role = Storehouse; c.Blocks = origin })
	quiet := func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.maintainIn = time.Hour
		c.Limits.LookupWait = 10 * time.Second
		c.patience = time.Minute
	}
	holder := start(t, 411, func(c *Config) { quiet(c); c.Site = "there"; c.Blocks = newMemory(blocks...) })
	if err := holder.Announce([]flox.CID{PathKey(testPath)}); err != nil {
		t.Fatal(err)
	}
	me := start(t, 412, func(c *Config) { quiet(c); c.Site = "here" })
	eventually(t, "the path is found", func() bool { return finds(me, PathKey(testPath), holder.ID()) })
	// In so small a net the DHT has made them meet: part them.
	eventually(t, "they are apart", func() bool {
		me.net.Network().ClosePeer(holder.self)
		return !me.knows(holder) && !holder.knows(me)
	})
	var g got
	if err := me.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{Paths: []flox.StorePath{testPath}}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks)
	if origin.gets.Load() != 0 {
		t.Fatalf("from %v; the storehouse was asked %d times", g.from, origin.gets.Load())
	}
}

// Look-ups that find nobody are waited for a few times only: what a start touches
// after that comes from the storehouse at once.
func TestVainLookupsAreNotWaitedFor(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(403, vainLookups+1, 3000)
	store := start(t, 413, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	me := start(t, 414, func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.maintainIn = time.Hour
		c.Limits.LookupWait = time.Minute
		c.Tracker = func(ctx context.Context, _ flox.CID, _ int) ([]PeerAddr, error) {
			<-ctx.Done() // a tracker that does not answer
			return nil, ctx.Err()
		}
	})
	eventually(t, "the storehouse is there", func() bool { return me.knows(store) })
	path := func(i int) Hints {
		return Hints{Paths: []flox.StorePath{flox.StorePath(fmt.Sprintf("%032d-path", i))}}
	}
	ctx := within(t, time.Minute)
	waited := make(chan error, vainLookups)
	for i := range vainLookups { // each looks for the site, too, which is one look-up
		go func() { waited <- me.Fetch(ctx, wantsOf(blocks[i:i+1]), path(i), func(int, []byte, Source) {}) }()
	}
	eventually(t, "all look-ups run", func() bool {
		me.finds.mu.Lock()
		defer me.finds.mu.Unlock()
		return me.finds.vain >= vainLookups+1
	})
	var g got
	if err := me.Fetch(ctx, wantsOf(blocks[vainLookups:]), path(vainLookups), g.take); err != nil {
		t.Fatal(err)
	}
	if n := len(waited); n == vainLookups {
		t.Error("it was had only when the look-ups before it were over")
	}
	for range vainLookups {
		if err := <-waited; err != nil {
			t.Error(err)
		}
	}
}

// Announcements end when they are not renewed, and are renewed while they stand.
func TestAnnouncementsEnd(t *testing.T) {
	t.Parallel()
	short := func(c *Config) { c.recordTTL = 3 * time.Second }
	store := start(t, 420, func(c *Config) { c.Role = Storehouse; short(c) })
	boot := func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)}; short(c) }
	a, b := start(t, 421, boot), start(t, 422, boot)
	first, second := PathKey(testPath), PathKey(testPath+"-dev")
	if err := a.Announce([]flox.CID{first, second}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both are found", func() bool { return finds(b, first, a.ID()) && finds(b, second, a.ID()) })
	if err := a.Announce([]flox.CID{second}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the withdrawn one ends", func() bool { return !finds(b, first, a.ID()) })
	if !finds(b, second, a.ID()) {
		t.Error("the other one was not renewed")
	}
	if err := a.Announce(make([]flox.CID, maxKeys+1)); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too many keys: %v", err)
	}
}

// A flood of announcements is refused instead of filling the memory.
func TestRecordsAreBounded(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	b := newBoundedStore(100)
	key := func(i int) datastore.Key { return datastore.NewKey(fmt.Sprint("providers/", i)) }
	for i := range 100 {
		if err := b.Put(ctx, key(i), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Put(ctx, key(7), []byte("y")); err != nil {
		t.Errorf("renewal: %v", err)
	}
	if err := b.Put(ctx, key(100), nil); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	if err := b.Delete(ctx, key(3)); err != nil {
		t.Fatal(err)
	}
	if err := b.Put(ctx, key(100), nil); err != nil {
		t.Errorf("after a delete: %v", err)
	}
	res, err := b.Query(ctx, query.Query{Prefix: "/providers"})
	if err != nil {
		t.Fatal(err)
	}
	if all, err := res.Rest(); err != nil || len(all) != 100 {
		t.Errorf("%d records, %v", len(all), err)
	}
}
