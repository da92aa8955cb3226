package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// every decodes all frames of b and encodes them again.
func every(b []byte) ([]byte, error) {
	r := NewReader(bytes.NewReader(b), 512)
	var out []byte
	for {
		t, n, err := r.Next()
		if err != nil {
			return out, err
		}
		if t == TypeReply {
			rep, err := r.Reply(n)
			if err != nil {
				return out, err
			}
			p := make([]byte, rep.Payload)
			if err := r.Payload(p); err != nil {
				return out, err
			}
			if rep.Status == StatusElsewhere {
				holders, err := ParseHolders(p)
				if err != nil {
					return out, err
				}
				p = AppendHolders(nil, holders)
				rep.Payload = len(p)
			}
			out = append(AppendReply(out, rep), p...)
			continue
		}
		body, err := r.Body(n)
		if err != nil {
			return out, err
		}
		if out, err = again(out, t, body); err != nil {
			return out, err
		}
	}
}

func again(out []byte, t Type, body []byte) ([]byte, error) {
	switch t {
	case TypeHello:
		h, err := ParseHello(body)
		if err != nil {
			return out, err
		}
		return AppendHello(out, h), nil
	case TypePing, TypePong:
		n, err := ParsePing(body)
		return AppendPing(out, t, n), err
	case TypeFilterBegin:
		f, err := ParseFilterBegin(body)
		return AppendFilterBegin(out, f), err
	case TypeFilterPart:
		f, err := ParseFilterPart(body)
		return AppendFilterPart(out, f), err
	case TypeFilterAdd:
		gen, raw, err := ParseFilterAdd(body)
		var keys [][KeySize]byte
		for ; len(raw) > 0; raw = raw[KeySize:] {
			keys = append(keys, [KeySize]byte(raw))
		}
		return AppendFilterAdd(out, gen, keys), err
	case TypeRequest:
		r, err := ParseRequest(body, 1<<20)
		return AppendRequest(out, r), err
	case TypeCancel:
		ids, err := ParseCancel(body)
		return AppendCancel(out, ids), err
	}
	return out, errors.New("no such type")
}

func sample() []byte {
	b := AppendHello(nil, Hello{Version: 1, Role: 1, NoFilter: true, Site: "paris-2", Addrs: []string{"/ip4/10.0.0.1/tcp/1", "/ip6/::1/tcp/2"}})
	b = AppendPing(b, TypePing, 7)
	b = AppendPing(b, TypePong, 1<<63)
	b = AppendFilterBegin(b, FilterBegin{Gen: 2, Words: 64, Hashes: 7, Count: 9})
	b = AppendFilterPart(b, FilterPart{Gen: 2, Offset: 8, Data: make([]byte, 64)})
	b = AppendFilterAdd(b, 2, [][KeySize]byte{{1}, {2}})
	b = AppendRequest(b, Request{Base: 99, Flags: FlagZstd, Items: []Item{{ID: flox.CID{1}}, {ID: flox.CID{2}, Offset: 5, Length: 6}}})
	b = AppendCancel(b, []uint32{99, 100})
	b = append(AppendReply(b, Reply{ID: 99, Flags: FlagZstd, Size: 4, Payload: 3}), "abc"...)
	holders := AppendHolders(nil, []HolderAddr{{ID: "one", Addrs: [][]byte{{4, 1}, {6}}}, {ID: "two"}})
	b = append(AppendReply(b, Reply{ID: 101, Status: StatusElsewhere, Payload: len(holders)}), holders...)
	return AppendReply(b, Reply{ID: 100, Status: StatusBusy})
}

// What is encoded is decoded to the same.
func TestRoundTrip(t *testing.T) {
	want := sample()
	got, err := every(want)
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

// A stream cut anywhere is an error, never a short frame.
func TestCutAnywhere(t *testing.T) {
	b := sample()
	whole := map[int]bool{}
	for at := 0; at < len(b); at += frameLength(b[at:]) {
		whole[at] = true
	}
	for i := range b {
		_, err := every(b[:i])
		if clean := errors.Is(err, io.EOF); clean != whole[i] {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
}

// frameLength is that of the frame b begins with.
func frameLength(b []byte) int { return 4 + int(binary.BigEndian.Uint32(b)) }

func frame(t Type, body ...byte) []byte {
	return append(append(binary.BigEndian.AppendUint32(nil, uint32(1+len(body))), byte(t)), body...)
}

func elsewhere(payload ...byte) []byte {
	return append(AppendReply(nil, Reply{Status: StatusElsewhere, Payload: len(payload)}), payload...)
}

// Holders with more addresses than fit are told with those that do.
func TestHoldersFit(t *testing.T) {
	var many []HolderAddr
	for range MaxHolders {
		h := HolderAddr{ID: string(make([]byte, MaxPeerID))}
		for range MaxAddrs {
			h.Addrs = append(h.Addrs, make([]byte, MaxAddr))
		}
		many = append(many, h)
	}
	b := AppendHolders(nil, many)
	got, err := ParseHolders(b)
	if err != nil || len(b) > MaxElsewhere || len(got) != MaxHolders || len(got[0].Addrs) == 0 {
		t.Fatalf("%d holders in %d bytes, the first with %d addresses: %v", len(got), len(b), len(got[0].Addrs), err)
	}
}

// Frames that break a limit are refused, and before their body is read.
func TestRefusesBadFrames(t *testing.T) {
	huge := func(t Type, n uint32) []byte { return append(binary.BigEndian.AppendUint32(nil, n), byte(t)) }
	for name, b := range map[string][]byte{
		"length 0":             {0, 0, 0, 0, 2},
		"unknown type":         frame(77, 1),
		"4 GiB ping":           huge(TypePing, 1<<32-1),
		"2 GiB reply":          huge(TypeReply, 1<<31),
		"reply over limit":     huge(TypeReply, 1+ReplyHeader+MaxPayload+1),
		"short reply":          frame(TypeReply, 1, 2, 3),
		"request of nothing":   frame(TypeRequest, 0, 0, 0, 0, 0, 0, 0),
		"request, lying count": frame(TypeRequest, 0, 0, 0, 0, 0, 1, 0),
		"range beyond a block": AppendRequest(nil, Request{Items: []Item{{Offset: 1 << 20, Length: 1}}}),
		"range overflows":      AppendRequest(nil, Request{Items: []Item{{Offset: 1<<32 - 1, Length: 1<<32 - 1}}}),
		"open range":           AppendRequest(nil, Request{Items: []Item{{Offset: 1}}}),
		"filter of 0 words":    AppendFilterBegin(nil, FilterBegin{Hashes: 7}),
		"filter too large":     AppendFilterBegin(nil, FilterBegin{Words: MaxFilterWords + 1, Hashes: 7}),
		"filter, 255 hashes":   AppendFilterBegin(nil, FilterBegin{Words: 1, Hashes: 255}),
		"part beyond":          AppendFilterPart(nil, FilterPart{Offset: MaxFilterWords, Data: make([]byte, 8)}),
		"odd delta":            frame(TypeFilterAdd, 0, 0, 0, 0, 1),
		"hello, long site":     frame(TypeHello, 1, 0, 0, 0xff, 0xff, 0),
		"hello, 255 addresses": frame(TypeHello, 1, 0, 0, 0, 0, 255),
		"hello, not UTF-8":     frame(TypeHello, 1, 0, 0, 0, 1, 0xff, 0),
		"cancel, lying count":  frame(TypeCancel, 0, 9),
		"no holders":           elsewhere(0),
		"five holders":         elsewhere(5, 0, 1, 'x', 0),
		"holder without name":  elsewhere(1, 0, 0, 0),
		"holder, lying name":   elsewhere(1, 0, 9, 'x', 0),
		"holder, 255 addrs":    elsewhere(1, 0, 1, 'x', 255),
		"bytes behind holders": elsewhere(1, 0, 1, 'x', 0, 7),
	} {
		if _, err := every(b); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A frame's announced length allocates nothing by itself.
func TestLyingLengthsCostNothing(t *testing.T) {
	b := append(binary.BigEndian.AppendUint32(nil, 1+ReplyHeader+MaxPayload), byte(TypeReply))
	b = append(b, make([]byte, ReplyHeader)...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 1000 {
		r := NewReader(bytes.NewReader(b), 512)
		_, n, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Reply(n); err != nil {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if grew := after.TotalAlloc - before.TotalAlloc; grew > 4<<20 {
		t.Fatalf("1000 lying heads allocated %d bytes", grew)
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(sample())
	f.Add(frame(TypeHello, 1, 0, 0, 0, 0, 0))
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := every(b)
		if !errors.Is(err, io.EOF) {
			return
		}
		// What was accepted encodes to something that is accepted and equal to itself.
		twice, err := every(out)
		if !errors.Is(err, io.EOF) || !bytes.Equal(out, twice) {
			t.Fatalf("not stable: %v", err)
		}
	})
}
