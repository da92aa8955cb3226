package p2p

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/libp2p/go-libp2p/core/network"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

// liar is a member that says it holds blocks and answers requests with answer.
func liar(t *testing.T, n int, blocks [][]byte, answer func(s network.Stream, req wire.Request)) *Host {
	t.Helper()
	h := start(t, n, func(c *Config) { c.Blocks = newMemory(blocks...) })
	h.net.SetStreamHandler(protoBlocks, func(s network.Stream) {
		defer s.Reset()
		in := wire.NewReader(s, 4096)
		for {
			typ, n, err := in.Next()
			if err != nil {
				return
			}
			body, err := in.Body(n)
			if err != nil {
				return
			}
			if typ == wire.TypeRequest {
				if req, err := wire.ParseRequest(body, MaxBlock); err == nil {
					answer(s, req)
				}
			}
		}
	})
	return h
}

func reply(s io.Writer, id uint32, flags uint8, size int, payload []byte) {
	b := wire.AppendReply(nil, wire.Reply{ID: id, Flags: flags, Size: uint32(size), Payload: len(payload)})
	s.Write(append(b, payload...))
}

func bomb() []byte {
	e, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer e.Close()
	return e.EncodeAll(make([]byte, 256<<20), nil)
}

// Nothing a lying peer sends reaches a reader; it is not asked again, and the
// block comes from the storehouse.
func TestLiars(t *testing.T) {
	const size = 8000
	blocks := randomBlocks(200, 8, size)
	packed := bomb()
	cases := []struct {
		name   string
		banned bool
		answer func(s network.Stream, req wire.Request)
	}{
		{"bit flip", true, func(s network.Stream, req wire.Request) {
			for i := range req.Items {
				b := bytes.Clone(blocks[i])
				b[i*7%size] ^= 1
				reply(s, req.Base+uint32(i), 0, size, b)
			}
		}},
		{"truncated block", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, 0, size-1, blocks[0][:size-1])
		}},
		{"stream ends inside a block", false, func(s network.Stream, req wire.Request) {
			b := wire.AppendReply(nil, wire.Reply{ID: req.Base, Size: size, Payload: size})
			s.Write(append(b, blocks[0][:size/2]...))
			s.Close()
		}},
		{"longer than asked for", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, 0, MaxBlock, make([]byte, MaxBlock))
		}},
		{"4 GiB frame", true, func(s network.Stream, req wire.Request) {
			s.Write(append(binary.BigEndian.AppendUint32(nil, 1<<32-1), byte(wire.TypeReply)))
			s.Write(make([]byte, 64<<10))
		}},
		{"endless data", true, func(s network.Stream, req wire.Request) {
			for range 1000 {
				if _, err := s.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}},
		{"answers what was not asked", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base+100_000, 0, size, blocks[0])
		}},
		{"answers twice", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, 0, size, blocks[0])
			reply(s, req.Base, 0, size, blocks[0])
		}},
		{"zstd bomb", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, wire.FlagZstd, size, packed[:min(len(packed), size)])
		}},
		{"empty zstd", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, wire.FlagZstd, size, nil)
		}},
		{"slice instead of a block", true, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, wire.FlagSlice, size, blocks[0])
		}},
		{"one byte now and then", true, func(s network.Stream, req wire.Request) {
			s.Write(wire.AppendReply(nil, wire.Reply{ID: req.Base, Size: size, Payload: size}))
			for range size {
				if _, err := s.Write([]byte{1}); err != nil {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
		}},
		{"silence", true, func(network.Stream, wire.Request) {}},
	}
	origin := newMemory(blocks...)
	store := start(t, 100, func(c *Config) { c.Role = Storehouse; c.Blocks = origin })
	for n, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bad := liar(t, 110+n, blocks, c.answer)
			me := start(t, 130+n, func(c *Config) {
				c.Bootstrap = []PeerAddr{addrOf(store)}
				c.stall = 500 * time.Millisecond
			})
			join(t, me, bad)
			eventually(t, "storehouse known", func() bool { return me.knows(store) })
			var g got
			if err := me.Fetch(within(t, 15*time.Second), wantsOf(blocks), Hints{}, g.take); err != nil {
				t.Fatal(err)
			}
			g.check(t, blocks)
			if c.banned {
				eventually(t, "the liar is banned", func() bool { return me.banned(bad) })
				if err := me.FetchFrom(within(t, time.Second), bad.ID(), wantsOf(blocks), nil); !errors.Is(err, flox.ErrUnreachable) {
					t.Errorf("asked again: %v", err)
				}
				for _, p := range me.Peers() {
					if p.ID == bad.ID() && !strings.Contains(p.Why, "not asked") {
						t.Errorf("the reason is not shown: %s", p.Why)
					}
				}
			}
		})
	}
}

func (h *Host) banned(o *Host) bool {
	h.peers.mu.Lock()
	defer h.peers.mu.Unlock()
	r := h.peers.remotes[o.self]
	return r != nil && r.bannedUntil.After(time.Now())
}

// A range with a forged proof, or the right proof for another range, is refused.
func TestLyingSlices(t *testing.T) {
	t.Parallel()
	block := randomBlocks(201, 1, 300_000)
	other := bytes.Clone(block[0])
	other[150_000] ^= 1
	for n, payload := range []func() []byte{
		func() []byte { b, _ := slice(other, 150_000, 10); return b },
		func() []byte { b, _ := slice(block[0], 0, 10); return b },
		func() []byte { b, _ := slice(block[0], 150_000, 10); return b[:len(b)-1] },
		func() []byte { b, _ := slice(block[0], 150_000, 10); return append(b, 0) },
		func() []byte { return nil },
		func() []byte { return bytes.Repeat([]byte{0xff}, 9000) },
	} {
		bad := liar(t, 160+n, block, func(s network.Stream, req wire.Request) {
			reply(s, req.Base, wire.FlagSlice, len(block[0]), payload())
		})
		me := start(t, 170+n, nil)
		join(t, me, bad)
		data, _, err := me.FetchRange(within(t, time.Minute), wantsOf(block)[0], 150_000, 10, Hints{})
		if err == nil {
			t.Errorf("case %d: got %d bytes", n, len(data))
		}
		if !me.banned(bad) {
			t.Errorf("case %d: not banned", n)
		}
	}
}

// A peer that asks for too much, or breaks the protocol, is cut off; memory
// stays bounded and others are served.
func TestHostileRequests(t *testing.T) {
	blocks := randomBlocks(202, 64, MaxBlock)
	held := newMemory(blocks...)
	victim := start(t, 180, func(c *Config) { c.Blocks = held })
	good := start(t, 181, nil)
	bad := start(t, 182, nil)
	join(t, good, victim)
	join(t, bad, victim)

	var items []wire.Item
	for _, w := range wantsOf(blocks) {
		items = append(items, wire.Item{ID: w.ID})
	}
	flood := func() []byte {
		var b []byte
		for base := range uint32(20) { // 1280 blocks: more than may be due
			b = wire.AppendRequest(b, wire.Request{Base: base * 64, Items: items})
		}
		return b
	}
	for name, raw := range map[string][]byte{
		"garbage":        bytes.Repeat([]byte{0xee}, 1000),
		"reply":          wire.AppendReply(nil, wire.Reply{}),
		"same id twice":  append(wire.AppendRequest(nil, wire.Request{Items: items}), wire.AppendRequest(nil, wire.Request{Items: items})...),
		"too many":       flood(),
		"lying request":  {0, 0, 0, 8, byte(wire.TypeRequest), 0, 0, 0, 0, 0, 1, 0},
		"2 GiB request":  {0x80, 0, 0, 0, byte(wire.TypeRequest)},
		"hello on block": wire.AppendHello(nil, wire.Hello{Version: 1}),
	} {
		s, err := bad.net.NewStream(within(t, time.Minute), victim.self, protoBlocks)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		s.SetDeadline(time.Now().Add(15 * time.Second))
		s.Write(raw)
		if n, err := io.Copy(io.Discard, s); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %d bytes, then %v; want the stream reset", name, n, err)
		}
		s.Reset()
	}

	// Streams that ask for everything and read nothing hold one block each.
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	refused := 0
	for range 20 {
		s, err := bad.net.NewStream(within(t, time.Minute), victim.self, protoBlocks)
		if err != nil {
			refused++
			continue
		}
		defer s.Reset()
		for base := range uint32(10) {
			s.Write(wire.AppendRequest(nil, wire.Request{Base: base * 64, Items: items}))
		}
	}
	var g got
	if err := good.FetchFrom(within(t, time.Minute), victim.ID(), wantsOf(blocks)[:4], g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks[:4])
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grew := int64(after.HeapAlloc) - int64(before.HeapAlloc); grew > 64<<20 {
		t.Errorf("20 streams that do not read cost %d MiB", grew>>20)
	}
}

// A peer whose hello stream breaks the rules costs nothing lasting, and a
// connection without a hello is closed.
func TestHostileHello(t *testing.T) {
	t.Parallel()
	victim := start(t, 190, func(c *Config) { c.Limits.FilterBytes = 8 << 20 })
	hello := wire.AppendHello(nil, wire.Hello{Version: helloVersion})
	big := wire.AppendFilterBegin(nil, wire.FilterBegin{Gen: 1, Words: wire.MaxFilterWords, Hashes: filterHashes})
	for n, raw := range [][]byte{
		bytes.Repeat([]byte{7}, 100),
		wire.AppendPing(nil, wire.TypePing, 1),
		wire.AppendHello(nil, wire.Hello{Version: 99}),
		append(bytes.Clone(hello), hello...),
		append(append(bytes.Clone(hello), big...), wire.AppendFilterPart(nil, wire.FilterPart{Gen: 1, Offset: 4096, Data: make([]byte, 8)})...),
		append(bytes.Clone(hello), wire.AppendRequest(nil, wire.Request{Items: []wire.Item{{}}})...),
	} {
		bad := start(t, 191+n, nil)
		bad.net.RemoveStreamHandler(protoHello)
		join := bad.connect(within(t, 5*time.Second), mustInfo(t, addrOf(victim)))
		if join != nil {
			t.Fatal(join)
		}
		s, err := bad.net.NewStream(within(t, 5*time.Second), victim.self, protoHello)
		if err != nil {
			t.Fatal(err)
		}
		s.SetDeadline(time.Now().Add(10 * time.Second))
		s.Write(raw)
		if _, err := io.Copy(io.Discard, s); err == nil {
			t.Errorf("case %d: the stream ended well", n)
		}
	}
	// Many large filters do not take more than the budget.
	var open atomic.Int64
	bad := start(t, 198, nil)
	if err := bad.connect(within(t, 5*time.Second), mustInfo(t, addrOf(victim))); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s, err := bad.net.NewStream(within(t, 5*time.Second), victim.self, protoHello)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Reset()
		s.Write(append(bytes.Clone(hello), big...))
		open.Add(1)
	}
	eventually(t, "budget in use", func() bool {
		victim.peers.mu.Lock()
		defer victim.peers.mu.Unlock()
		return victim.peers.filters >= 4<<20
	})
	victim.peers.mu.Lock()
	defer victim.peers.mu.Unlock()
	if victim.peers.filters > 8<<20 {
		t.Errorf("filters take %d bytes", victim.peers.filters)
	}
}
