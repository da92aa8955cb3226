package p2p

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"

	"github.com/floxctl/flox/p2p/wire"
)

// light makes a member that is no more than a libp2p host with the secret: it
// keeps to none of our rules. It does not listen.
func light(t *testing.T, n int) host.Host {
	t.Helper()
	key, err := crypto.UnmarshalEd25519PrivateKey(seededKey(n))
	if err != nil {
		t.Fatal(err)
	}
	h, err := libp2p.New(libp2p.Identity(key), libp2p.NoListenAddrs, libp2p.DisableRelay(), libp2p.DisableMetrics(),
		libp2p.Transport(tcp.NewTCPTransport, tcp.DisableReuseport()),
		libp2p.Security(string(securityID), newProof(testSecret)),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.ResourceManager(&network.NullResourceManager{}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// An office of 250 laptops behind one address comes at once after the storehouse
// was restarted, and everybody gets in. Loopback addresses have no limits, so it
// needs a network of its own; that libp2p's defaults lock the office out shows
// that the limits are in force there.
func TestOfficeBehindOneAddress(t *testing.T) {
	t.Parallel()
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	command(t, "ip link set lo up",
		"ip link add v0 type veth peer name v1",
		"ip addr add 10.9.9.1/24 dev v0",
		"ip link set v0 up",
		"ip link set v1 up")
	laptops := 250
	if testing.Short() { // as under the race detector
		laptops = 80
	}
	store := start(t, 800, func(c *Config) { c.Role = Storehouse; c.Listen = []string{"10.9.9.1:7800"} })
	l, err := store.Listen("/flox/echo/1")
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the listener, which ends with the host
		for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
			go func() { _, _ = io.Copy(conn, conn); _ = conn.Close() }()
		}
	}()
	strict, err := libp2p.New(libp2p.ListenAddrStrings("/ip4/10.9.9.1/tcp/7801"), libp2p.DisableRelay(), libp2p.DisableMetrics(),
		libp2p.Transport(tcp.NewTCPTransport, tcp.DisableReuseport()),
		libp2p.Security(string(securityID), newProof(testSecret)), libp2p.Muxer(yamux.ID, yamux.DefaultTransport))
	if err != nil {
		t.Fatal(err)
	}
	defer strict.Close()

	hosts := make([]host.Host, laptops)
	for i := range hosts {
		hosts[i] = light(t, 1000+i)
	}
	at := mustInfo(t, addrOf(store))
	control := peer.AddrInfo{ID: strict.ID(), Addrs: strict.Addrs()}
	ctx := within(t, 2*time.Minute)
	var in, locked atomic.Int64
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() {
			if err := insist(ctx, h, at); err != nil {
				t.Errorf("laptop %d: %v", i, err)
				return
			}
			in.Add(1)
			if i < 40 && h.Connect(ctx, control) != nil {
				locked.Add(1)
			}
		})
	}
	wg.Wait()
	if got := in.Load(); int(got) != laptops {
		t.Errorf("%d of %d laptops got in", got, laptops)
	}
	if locked.Load() == 0 {
		t.Error("libp2p's own limits let all in: this test shows nothing")
	}
	t.Logf("%d laptops got in; with libp2p's limits %d of 40 did not", in.Load(), locked.Load())
	// Whoever loses its connection is back at once.
	for _, h := range hosts[:laptops/2] {
		wg.Go(func() {
			_ = h.Network().ClosePeer(at.ID)
			if err := insist(ctx, h, at); err != nil {
				t.Errorf("come back: %v", err)
			}
		})
	}
	wg.Wait()
}

// insist is echoed, again where a busy machine was too slow for a dial's time: limits
// let nobody in the second time either.
func insist(ctx context.Context, h host.Host, to peer.AddrInfo) (err error) {
	for range 3 {
		if err = echoed(ctx, h, to); err == nil || ctx.Err() != nil {
			return err
		}
		if s, ok := h.Network().(*swarm.Swarm); ok {
			s.Backoff().Clear(to.ID)
		}
	}
	return err
}

// echoed connects, says who it is and has a word echoed.
func echoed(ctx context.Context, h host.Host, to peer.AddrInfo) error {
	if err := h.Connect(ctx, to); err != nil {
		return err
	}
	hello, err := h.NewStream(ctx, to.ID, protoHello)
	if err != nil {
		return err
	}
	if _, err := hello.Write(wire.AppendHello(nil, wire.Hello{Version: helloVersion, NoFilter: true})); err != nil {
		return err
	}
	s, err := h.NewStream(ctx, to.ID, "/flox/echo/1")
	if err != nil {
		return err
	}
	defer drop(s)
	if _, err := s.Write([]byte("word")); err != nil {
		return err
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "word" {
		return fmt.Errorf("got %q: %w", got, err)
	}
	return nil
}

// Peers that ask for blocks and do not read them lose their upload slots as soon
// as somebody else wants one.
func TestSlotsAreNotHeldByWhoDoesNotRead(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(801, 8, MaxBlock)
	victim := start(t, 801, func(c *Config) {
		c.Blocks = newMemory(blocks...)
		c.Limits.UploadSlots = 4
	})
	var items []wire.Item
	for _, w := range wantsOf(blocks) {
		items = append(items, wire.Item{ID: w.ID})
	}
	for n := range 2 {
		bad := start(t, 802+n, nil) // answers pings: it is not taken for dead
		join(t, bad, victim)
		for range maxServed {
			s, err := bad.net.NewStream(within(t, time.Minute), victim.self, protoBlocks)
			if err != nil {
				t.Fatal(err)
			}
			defer drop(s)
			for base := range uint32(16) { // far more than a window
				if _, err := s.Write(wire.AppendRequest(nil, wire.Request{Base: base * 64, Items: items})); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	eventually(t, "all slots are held", func() bool { return len(victim.serve.slots) == 4 })
	good := start(t, 804, nil)
	join(t, good, victim)
	var g got
	// Well before the 30 s that a slot was held otherwise; a peer that is told
	// "busy" asks again.
	ctx := within(t, 25*time.Second)
	for len(g.data) < len(blocks) {
		g = got{}
		if err := good.FetchFrom(ctx, victim.ID(), wantsOf(blocks), g.take); err != nil && ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	g.check(t, blocks)
}

// Streams that one peer has waiting to be accepted leave room for another's.
func TestBacklogShares(t *testing.T) {
	t.Parallel()
	const proto = "/flox/test/1"
	victim, good := start(t, 810, nil), start(t, 811, nil)
	l, err := victim.Listen(proto)
	if err != nil {
		t.Fatal(err)
	}
	bad := light(t, 812)
	if err := bad.Connect(within(t, time.Minute), mustInfo(t, addrOf(victim))); err != nil {
		t.Fatal(err)
	}
	for range 3 * backlog {
		s, err := bad.NewStream(within(t, time.Minute), victim.self, proto)
		if err != nil {
			break // the share of the protocol
		}
		defer drop(s)
		_, _ = s.Write([]byte("x"))
	}
	eventually(t, "its share is used up", func() bool { return len(l.(*listener).in) == peerBacklog })
	join(t, good, victim)
	conn, err := good.Dial(within(t, time.Minute), victim.ID(), proto)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it waits beside them", func() bool { return len(l.(*listener).in) == peerBacklog+1 })
	for range peerBacklog + 1 {
		accepted := make(chan net.Conn, 1)
		go func() {
			if c, err := l.Accept(); err == nil {
				accepted <- c
			}
		}()
		select {
		case c := <-accepted:
			if c.RemoteAddr().String() == string(good.ID()) {
				return
			}
			_ = c.Close()
		case <-time.After(20 * time.Second):
			t.Fatal("the other peer's stream never came")
		}
	}
	t.Fatal("more than its share was one peer's")
}

// A member that opens 10,000 streams with broken and with giant frames is
// refused, costs little memory, and others are served meanwhile.
func TestTenThousandStreams(t *testing.T) {
	blocks := randomBlocks(820, 4, MaxBlock)
	victim := start(t, 820, func(c *Config) { c.Role = Storehouse; c.Blocks = newMemory(blocks...) })
	if _, err := victim.Listen("/flox/test/1"); err != nil { // nobody accepts
		t.Fatal(err)
	}
	good := start(t, 821, nil)
	join(t, good, victim)
	bad := light(t, 822)
	if err := bad.Connect(within(t, time.Minute), mustInfo(t, addrOf(victim))); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	giant := binary.BigEndian.AppendUint32(nil, 1<<30)
	frames := map[protocol.ID][]byte{
		protoHello: append(giant, byte(wire.TypeHello)), protoBlocks: append(giant, byte(wire.TypeRequest)),
		protoDHT: binary.AppendUvarint(nil, 4<<20), "/flox/test/1": giant, "": giant, // no protocol at all
	}
	garbage := bytes.Repeat([]byte{0xee}, 32<<10)
	var wg sync.WaitGroup
	var opened atomic.Int64
	conn := bad.Network().ConnsToPeer(victim.self)[0]
	for proto, frame := range frames {
		wg.Go(func() {
			for range 2000 {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				s, err := conn.NewStream(ctx)
				cancel()
				if err != nil {
					return // it cut us off
				}
				opened.Add(1)
				_ = s.SetWriteDeadline(time.Now().Add(5 * time.Second))
				if proto != "" {
					_, _ = s.Write(lines("/multistream/1.0.0", string(proto)))
				}
				_, _ = s.Write(frame)
				_, _ = s.Write(garbage) // and it stays open
			}
		})
	}
	served := 0
	attack := make(chan struct{})
	go func() { wg.Wait(); close(attack) }()
	for over := false; !over; served++ {
		var g got
		if err := good.FetchFrom(within(t, time.Minute), victim.ID(), wantsOf(blocks), g.take); err != nil {
			t.Fatal(err)
		}
		g.check(t, blocks)
		select {
		case <-attack:
			over = true
		default:
		}
	}
	open := 0
	for _, c := range victim.net.Network().ConnsToPeer(bad.ID()) {
		open += len(c.GetStreams())
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	grew := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) >> 20
	t.Logf("%d streams opened, %d open at the victim, %d MiB more at both ends, others served %d times", opened.Load(), open, grew, served)
	if limit := streamsOfPeer(Storehouse); open > limit {
		t.Errorf("%d streams are open, want at most %d", open, limit)
	}
	if grew > 256 {
		t.Errorf("the attack costs %d MiB", grew)
	}
}

// lines are messages of multistream-select.
func lines(texts ...string) []byte {
	var b []byte
	for _, text := range texts {
		b = binary.AppendUvarint(b, uint64(len(text)+1))
		b = append(append(b, text...), '\n')
	}
	return b
}
