package wire

import (
	"encoding/binary"
	"unicode/utf8"

	"github.com/floxctl/flox"
)

// begin appends a frame's head with room for its length; end fills it in.
func begin(dst []byte, t Type) ([]byte, int) {
	at := len(dst)
	return append(dst, 0, 0, 0, 0, byte(t)), at
}

func end(dst []byte, at int) []byte {
	binary.BigEndian.PutUint32(dst[at:], uint32(len(dst)-at-4))
	return dst
}

func appendString(dst []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(dst, uint16(len(s))), s...)
}

// AppendHello appends h as a frame; fields beyond their limits are cut.
func AppendHello(dst []byte, h Hello) []byte {
	dst, at := begin(dst, TypeHello)
	var flags byte
	if h.NoFilter {
		flags = 1
	}
	dst = append(dst, h.Version, h.Role, flags)
	dst = appendString(dst, h.Site[:min(len(h.Site), MaxSite)])
	addrs := h.Addrs[:min(len(h.Addrs), MaxAddrs)]
	dst = append(dst, byte(len(addrs)))
	for _, a := range addrs {
		dst = appendString(dst, a[:min(len(a), MaxAddr)])
	}
	return end(dst, at)
}

// ParseHello parses the body of a hello. Bytes behind what it knows are
// ignored, so that a later version may add to it.
func ParseHello(b []byte) (Hello, error) {
	if len(b) < 6 {
		return Hello{}, bad("hello of %d bytes", len(b))
	}
	h := Hello{Version: b[0], Role: b[1], NoFilter: b[2]&1 != 0}
	rest, ok := b[3:], false
	if h.Site, rest, ok = cutString(rest, MaxSite); !ok || len(rest) == 0 {
		return Hello{}, bad("hello with a bad site label")
	}
	n := int(rest[0])
	if n > MaxAddrs {
		return Hello{}, bad("hello with %d addresses, at most %d allowed", n, MaxAddrs)
	}
	rest = rest[1:]
	for range n {
		var a string
		if a, rest, ok = cutString(rest, MaxAddr); !ok {
			return Hello{}, bad("hello with a bad address")
		}
		h.Addrs = append(h.Addrs, a)
	}
	return h, nil
}

func cutString(b []byte, limit int) (string, []byte, bool) {
	text, rest, ok := cutBytes(b, limit)
	if !ok || !utf8.Valid(text) {
		return "", nil, false
	}
	return string(text), rest, true
}

// cutBytes takes a run of bytes with its length before it; it stays part of b.
func cutBytes(b []byte, limit int) (run, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if n > limit || len(b) < 2+n {
		return nil, nil, false
	}
	return b[2 : 2+n], b[2+n:], true
}

// AppendPing appends a ping or pong.
func AppendPing(dst []byte, t Type, nonce uint64) []byte {
	dst, at := begin(dst, t)
	return end(binary.BigEndian.AppendUint64(dst, nonce), at)
}

// ParsePing parses the body of a ping or pong.
func ParsePing(b []byte) (uint64, error) {
	if len(b) != 8 {
		return 0, bad("ping of %d bytes", len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}

// AppendFilterBegin appends f as a frame.
func AppendFilterBegin(dst []byte, f FilterBegin) []byte {
	dst, at := begin(dst, TypeFilterBegin)
	dst = binary.BigEndian.AppendUint32(dst, f.Gen)
	dst = binary.BigEndian.AppendUint32(dst, f.Words)
	dst = append(dst, f.Hashes)
	return end(binary.BigEndian.AppendUint32(dst, f.Count), at)
}

// ParseFilterBegin parses the body of a FilterBegin.
func ParseFilterBegin(b []byte) (FilterBegin, error) {
	if len(b) != 13 {
		return FilterBegin{}, bad("filter head of %d bytes", len(b))
	}
	f := FilterBegin{
		Gen:    binary.BigEndian.Uint32(b),
		Words:  binary.BigEndian.Uint32(b[4:]),
		Hashes: b[8],
		Count:  binary.BigEndian.Uint32(b[9:]),
	}
	if f.Words == 0 || f.Words > MaxFilterWords || f.Hashes == 0 || f.Hashes > 16 {
		return FilterBegin{}, bad("filter of %d words and %d hashes", f.Words, f.Hashes)
	}
	return f, nil
}

// AppendFilterPart appends f as a frame.
func AppendFilterPart(dst []byte, f FilterPart) []byte {
	dst, at := begin(dst, TypeFilterPart)
	dst = binary.BigEndian.AppendUint32(dst, f.Gen)
	dst = binary.BigEndian.AppendUint32(dst, f.Offset)
	return end(append(dst, f.Data...), at)
}

// ParseFilterPart parses the body of a FilterPart; Data stays part of b.
func ParseFilterPart(b []byte) (FilterPart, error) {
	if len(b) < 16 || len(b)%8 != 0 {
		return FilterPart{}, bad("filter part of %d bytes", len(b))
	}
	f := FilterPart{Gen: binary.BigEndian.Uint32(b), Offset: binary.BigEndian.Uint32(b[4:]), Data: b[8:]}
	if uint64(f.Offset)+uint64(len(f.Data)/8) > MaxFilterWords {
		return FilterPart{}, bad("filter part at word %d", f.Offset)
	}
	return f, nil
}

// AppendFilterAdd appends the keys (KeySize bytes each) of newly held blocks.
func AppendFilterAdd(dst []byte, gen uint32, keys [][KeySize]byte) []byte {
	dst, at := begin(dst, TypeFilterAdd)
	dst = binary.BigEndian.AppendUint32(dst, gen)
	for i := range keys {
		dst = append(dst, keys[i][:]...)
	}
	return end(dst, at)
}

// ParseFilterAdd parses the body of a FilterAdd; keys is a run of KeySize bytes each, part of b.
func ParseFilterAdd(b []byte) (gen uint32, keys []byte, err error) {
	if len(b) < 4 || (len(b)-4)%KeySize != 0 {
		return 0, nil, bad("filter delta of %d bytes", len(b))
	}
	return binary.BigEndian.Uint32(b), b[4:], nil
}

// AppendRequest appends r as a frame; at most MaxItems items.
func AppendRequest(dst []byte, r Request) []byte {
	dst, at := begin(dst, TypeRequest)
	dst = binary.BigEndian.AppendUint32(dst, r.Base)
	dst = append(dst, r.Flags)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(r.Items)))
	for i := range r.Items {
		it := &r.Items[i]
		dst = append(dst, it.ID[:]...)
		dst = binary.BigEndian.AppendUint32(dst, it.Offset)
		dst = binary.BigEndian.AppendUint32(dst, it.Length)
	}
	return end(dst, at)
}

// ParseRequest parses the body of a request. Ranges are checked against
// maxBlock bytes.
func ParseRequest(b []byte, maxBlock uint32) (Request, error) {
	if len(b) < requestHeader {
		return Request{}, bad("request of %d bytes", len(b))
	}
	r := Request{Base: binary.BigEndian.Uint32(b), Flags: b[4]}
	n := int(binary.BigEndian.Uint16(b[5:]))
	if n == 0 || n > MaxItems || len(b) != requestHeader+n*itemSize {
		return Request{}, bad("request of %d blocks in %d bytes", n, len(b))
	}
	r.Items = make([]Item, n)
	for i := range r.Items {
		raw := b[requestHeader+i*itemSize:]
		it := Item{
			ID:     flox.CID(raw[:flox.CIDSize]),
			Offset: binary.BigEndian.Uint32(raw[flox.CIDSize:]),
			Length: binary.BigEndian.Uint32(raw[flox.CIDSize+4:]),
		}
		if uint64(it.Offset)+uint64(it.Length) > uint64(maxBlock) || (it.Length == 0 && it.Offset != 0) {
			return Request{}, bad("range %d+%d of a block", it.Offset, it.Length)
		}
		r.Items[i] = it
	}
	return r, nil
}

// AppendCancel appends the ids of items whose reply is no longer wanted; at
// most MaxItems. Each is still answered, once.
func AppendCancel(dst []byte, ids []uint32) []byte {
	dst, at := begin(dst, TypeCancel)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(ids)))
	for _, id := range ids {
		dst = binary.BigEndian.AppendUint32(dst, id)
	}
	return end(dst, at)
}

// ParseCancel parses the body of a cancel.
func ParseCancel(b []byte) ([]uint32, error) {
	if len(b) < 2 || len(b) != 2+4*int(binary.BigEndian.Uint16(b)) {
		return nil, bad("cancel of %d bytes", len(b))
	}
	ids := make([]uint32, (len(b)-2)/4)
	for i := range ids {
		ids[i] = binary.BigEndian.Uint32(b[2+4*i:])
	}
	return ids, nil
}

// AppendReply appends a reply's head and fixed part; r.Payload bytes must follow.
func AppendReply(dst []byte, r Reply) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(1+ReplyHeader+r.Payload))
	dst = append(dst, byte(TypeReply))
	dst = binary.BigEndian.AppendUint32(dst, r.ID)
	dst = append(dst, byte(r.Status), r.Flags)
	return binary.BigEndian.AppendUint32(dst, r.Size)
}

// AppendHolders appends the payload of a StatusElsewhere: at most MaxHolders, and
// of their addresses as many as fit.
func AppendHolders(dst []byte, holders []HolderAddr) []byte {
	start := len(dst)
	holders = holders[:min(len(holders), MaxHolders)]
	dst = append(dst, byte(len(holders)))
	for i, h := range holders {
		dst = appendString(dst, h.ID)
		at := len(dst)
		dst = append(dst, 0)
		// The holders behind it need room for their names.
		room := MaxElsewhere - (len(holders)-1-i)*(MaxPeerID+3)
		for _, a := range h.Addrs[:min(len(h.Addrs), MaxAddrs)] {
			if len(a) > MaxAddr || len(dst)-start+2+len(a) > room {
				continue
			}
			dst = appendString(dst, string(a))
			dst[at]++
		}
	}
	return dst
}

// ParseHolders parses what AppendHolders made.
func ParseHolders(b []byte) ([]HolderAddr, error) {
	if len(b) == 0 || len(b) > MaxElsewhere || b[0] == 0 || b[0] > MaxHolders {
		return nil, bad("%d bytes that name holders", len(b))
	}
	out, rest, ok := make([]HolderAddr, b[0]), b[1:], false
	for i := range out {
		var id []byte
		if id, rest, ok = cutBytes(rest, MaxPeerID); !ok || len(id) == 0 || len(rest) == 0 || rest[0] > MaxAddrs {
			return nil, bad("a holder's name")
		}
		out[i].ID = string(id)
		n := int(rest[0])
		rest = rest[1:]
		for range n {
			var a []byte
			if a, rest, ok = cutBytes(rest, MaxAddr); !ok {
				return nil, bad("a holder's address")
			}
			out[i].Addrs = append(out[i].Addrs, a)
		}
	}
	if len(rest) > 0 {
		return nil, bad("%d bytes behind the holders", len(rest))
	}
	return out, nil
}
