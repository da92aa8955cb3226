package p2p

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/zeebo/blake3"
	"go.uber.org/goleak"

	"github.com/floxctl/flox"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// Process-wide caches of libp2p's dependencies.
		goleak.IgnoreAnyFunction("github.com/ipfs/go-log/v2/writer.(*MirrorWriter).logRoutine"),
		goleak.IgnoreAnyFunction("github.com/libp2p/go-netroute.init.0"),
	)
}

var testSecret = []byte("a secret of the tests, 32 bytes.")

// seededKey gives the same key for the same n.
func seededKey(n int) ed25519.PrivateKey {
	seed := blake3.Sum256(fmt.Appendf(nil, "key %d", n))
	return ed25519.NewKeyFromSeed(seed[:])
}

// memory is a Holder in memory; its hooks let it lie and count.
type memory struct {
	mu     sync.Mutex
	blocks map[flox.CID][]byte
	gets   atomic.Int64
	asked  map[flox.CID]bool // by Has
	has    bool              // says it has what it has not
	get    func(ctx context.Context, id flox.CID, data []byte) ([]byte, error)
}

func newMemory(blocks ...[]byte) *memory {
	m := &memory{blocks: map[flox.CID][]byte{}, asked: map[flox.CID]bool{}}
	for _, b := range blocks {
		m.put(b)
	}
	return m
}

func (m *memory) put(b []byte) flox.CID {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := flox.CID(blake3.Sum256(b))
	m.blocks[id] = b
	return id
}

func (m *memory) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	m.gets.Add(1)
	m.mu.Lock()
	data, ok := m.blocks[id]
	ok = ok || m.has
	hook := m.get
	m.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("block %s: %w", id, flox.ErrNotFound)
	}
	if hook != nil {
		return hook(ctx, id, data)
	}
	return data, nil
}

func (m *memory) Has(ids []flox.CID) []bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]bool, len(ids))
	for i, id := range ids {
		_, out[i] = m.blocks[id]
		out[i] = out[i] || m.has
		m.asked[id] = true
	}
	return out
}

func (m *memory) Each(yield func(flox.CID) bool) {
	m.mu.Lock()
	ids := make([]flox.CID, 0, len(m.blocks))
	for id := range m.blocks {
		ids = append(ids, id)
	}
	m.mu.Unlock()
	for _, id := range ids {
		if !yield(id) {
			return
		}
	}
}

// randomBlocks gives n distinct blocks of size bytes.
func randomBlocks(seed uint64, n, size int) [][]byte {
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	out := make([][]byte, n)
	for i := range out {
		out[i] = make([]byte, size)
		rng.Read(out[i])
	}
	return out
}

func wantsOf(blocks [][]byte) []Want {
	out := make([]Want, len(blocks))
	for i, b := range blocks {
		out[i] = Want{ID: blake3.Sum256(b), Size: uint32(len(b))}
	}
	return out
}

// start makes and runs a host on loopback; change may alter its configuration.
func start(t testing.TB, n int, change func(*Config)) *Host {
	t.Helper()
	cfg := Config{
		Key: seededKey(n), Listen: []string{"127.0.0.1:0"}, Secret: testSecret, NoMDNS: true,
		maintainIn: 300 * time.Millisecond,
		Limits:     Limits{DialTimeout: 10 * time.Second}, // the machine may be busy
	}
	if change != nil {
		change(&cfg)
	}
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, flox.ErrClosed) {
			t.Errorf("run: %v", err)
		}
	})
	return h
}

func addrOf(h *Host) PeerAddr { return PeerAddr{ID: h.ID(), Addrs: h.Addrs()} }

// eventually waits until ok holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

// join connects a to b and waits until each has heard what the other holds.
func join(t testing.TB, a, b *Host) {
	t.Helper()
	if err := a.AddPeer(addrOf(b)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "two hosts know each other", func() bool { return a.knows(b) && b.knows(a) })
}

func (h *Host) knows(o *Host) bool {
	h.peers.mu.Lock()
	defer h.peers.mu.Unlock()
	r := h.peers.remotes[o.self]
	return r != nil && r.isReady
}

// tiers makes a host see others at given tiers.
func tiers(m map[PeerID]Tier) func(*Config) {
	return func(c *Config) {
		c.tierOf = func(id PeerID) (Tier, bool) { tier, ok := m[id]; return tier, ok }
	}
}

// idOf names the host that start makes of n.
func idOf(t testing.TB, n int) PeerID {
	t.Helper()
	id, err := IDFromKey(seededKey(n).Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// got collects what a fetch delivers.
type got struct {
	data  map[int][]byte
	from  map[PeerID]int
	bytes map[PeerID]int
}

func (g *got) take(i int, b []byte, from Source) {
	if g.data == nil {
		g.data, g.from, g.bytes = map[int][]byte{}, map[PeerID]int{}, map[PeerID]int{}
	}
	g.data[i] = b
	g.from[from.Peer]++
	g.bytes[from.Peer] += len(b)
}

func (g *got) check(t testing.TB, blocks [][]byte) {
	t.Helper()
	if len(g.data) != len(blocks) {
		t.Fatalf("%d blocks delivered, want %d", len(g.data), len(blocks))
	}
	for i, b := range blocks {
		if string(g.data[i]) != string(b) {
			t.Fatalf("block %d differs", i)
		}
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
