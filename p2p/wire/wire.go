// Package wire encodes and decodes the frames of /flox/hello/1 and
// /flox/blocks/1. It reads foreign bytes: every length is checked before
// anything is allocated, and nothing here knows of hosts, streams or disks.
//
// A frame is a big-endian uint32 that counts the rest, a type byte and a body.
package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/floxctl/flox"
)

// Type says what a frame is.
type Type uint8

// The frames. 1–15 belong to the hello stream, 16–31 to block streams.
const (
	TypeHello       Type = 1
	TypePing        Type = 2
	TypePong        Type = 3
	TypeFilterBegin Type = 4
	TypeFilterPart  Type = 5
	TypeFilterAdd   Type = 6

	TypeRequest Type = 16
	TypeCancel  Type = 17
	TypeReply   Type = 18
)

// Limits of the protocol. A frame beyond them is a protocol error and ends the stream.
const (
	MaxPayload     = 1<<20 + 128<<10 // a block of 1 MiB, or a slice of it with its proof
	MaxItems       = 256             // blocks of one request
	MaxFilterWords = 4 << 20 / 8     // 64-bit words of a filter: 4 MiB
	MaxFilterPart  = 4 << 10         // words of one part: 32 KiB
	MaxFilterAdd   = 1024            // keys of one delta
	MaxSite        = 128             // bytes of a site label
	MaxAddrs       = 16              // addresses of a hello
	MaxAddr        = 256             // bytes of one address
	MaxPeerID      = 64              // bytes of a peer's ID
	MaxHolders     = 4               // peers that one reply names
	MaxElsewhere   = 2 << 10         // bytes of the payload that names them
	KeySize        = 16              // bytes of a CID's digest that filters look at
	ReplyHeader    = 10              // bytes of a reply's body before its payload
	FrameHeader    = 5               // bytes before a frame's body
	itemSize       = flox.CIDSize + 8
	requestHeader  = 7
	maxHello       = 64 << 10
)

// Status is how a request item was answered.
type Status uint8

// The statuses of a reply.
const (
	StatusData      Status = 0
	StatusNotFound  Status = 1
	StatusBusy      Status = 2 // no upload slot free: ask somebody else, or later
	StatusCancelled Status = 3
	StatusFailed    Status = 4 // the holder could not read it
	// StatusElsewhere answers FlagSteer only: the payload names peers (AppendHolders)
	// that have the block, or will in a moment.
	StatusElsewhere Status = 5
)

// Flags of a request and of its replies.
const (
	FlagZstd  uint8 = 1 << 0 // request: may be compressed; reply: payload is one zstd frame
	FlagSlice uint8 = 1 << 1 // request: a verifiable slice is wanted; reply: payload is a Bao slice in groups of 16 KiB
	FlagSteer uint8 = 1 << 2 // request: the answer may be where else to ask
	FlagSoon  uint8 = 1 << 3 // request: the block may be on its way to the holder: it is waited for
	FlagAsIs  uint8 = 1 << 4 // request: may be compressed if the holder has it so, but not for this
)

// Hello is the first frame either side sends on /flox/hello/1.
type Hello struct {
	Version uint8
	Role    uint8
	// NoFilter says that no filter will follow: the peer does not say what it holds.
	NoFilter bool
	Site     string
	Addrs    []string
}

// FilterBegin announces a new filter; parts follow until all words were sent.
type FilterBegin struct {
	Gen    uint32 // counts the filters of one hello stream
	Words  uint32 // size in 64-bit words
	Hashes uint8  // bits set per key
	Count  uint32 // keys in it
}

// FilterPart is a run of a filter's words, little-endian.
type FilterPart struct {
	Gen    uint32
	Offset uint32 // in words
	Data   []byte // a multiple of 8 bytes; valid until the next read
}

// Item is one block, or a range of one, that is asked for.
type Item struct {
	ID     flox.CID
	Offset uint32
	Length uint32 // 0 = the whole block
}

// HolderAddr is a peer that has a block, and how to reach it: Addrs are multiaddrs,
// in their binary form, at most MaxAddrs; none if it was named on this stream before.
type HolderAddr struct {
	ID    string // a peer ID in its binary form
	Addrs [][]byte
}

// Request asks for Items, whose replies carry the ids Base, Base+1, …
type Request struct {
	Base  uint32
	Flags uint8
	Items []Item
}

// Reply answers one item. Its payload, if any, follows and must be read from
// the Reader before the next frame.
type Reply struct {
	ID     uint32
	Status Status
	Flags  uint8
	Size   uint32 // plain size of the whole block
	// Payload is how many bytes follow.
	Payload int
}

func bad(format string, args ...any) error {
	return fmt.Errorf("peer protocol: "+format+": %w", append(args, flox.ErrCorrupt)...)
}

// maxBody is the largest body of each type, without a reply's payload.
func maxBody(t Type) int {
	switch t {
	case TypeHello:
		return maxHello
	case TypePing, TypePong:
		return 8
	case TypeFilterBegin:
		return 13
	case TypeFilterPart:
		return 8 + 8*MaxFilterPart
	case TypeFilterAdd:
		return 4 + KeySize*MaxFilterAdd
	case TypeRequest:
		return requestHeader + itemSize*MaxItems
	case TypeCancel:
		return 2 + 4*MaxItems
	case TypeReply:
		return ReplyHeader + MaxPayload
	}
	return -1
}

// Reader reads frames. It is not safe for use by several goroutines.
type Reader struct {
	r    *bufio.Reader
	body []byte // kept between frames; never larger than the largest body but a reply's
}

// NewReader reads frames from r through a buffer of size bytes.
func NewReader(r io.Reader, size int) *Reader { return &Reader{r: bufio.NewReaderSize(r, size)} }

// Next reads the head of the next frame: its type and the length of its body,
// which is within the type's limit. The body must be read with Body or Reply.
func (r *Reader) Next() (Type, int, error) {
	var head [FrameHeader]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		return 0, 0, err
	}
	t, n := Type(head[4]), binary.BigEndian.Uint32(head[:4])
	limit := maxBody(t)
	if limit < 0 {
		return 0, 0, bad("unknown frame type %d", t)
	}
	if n == 0 || int64(n)-1 > int64(limit) {
		return 0, 0, bad("frame type %d of %d bytes, at most %d allowed", t, n, limit+1)
	}
	return t, int(n) - 1, nil
}

// Body reads a body of n bytes; it is valid until the next call.
func (r *Reader) Body(n int) ([]byte, error) {
	if cap(r.body) < n {
		r.body = make([]byte, n)
	}
	b := r.body[:n]
	_, err := io.ReadFull(r.r, b)
	return b, noEOF(err)
}

// Reply reads the fixed part of a reply whose body has n bytes.
func (r *Reader) Reply(n int) (Reply, error) {
	if n < ReplyHeader {
		return Reply{}, bad("reply of %d bytes", n)
	}
	var b [ReplyHeader]byte
	if _, err := io.ReadFull(r.r, b[:]); err != nil {
		return Reply{}, noEOF(err)
	}
	return Reply{
		ID:      binary.BigEndian.Uint32(b[0:]),
		Status:  Status(b[4]),
		Flags:   b[5],
		Size:    binary.BigEndian.Uint32(b[6:]),
		Payload: n - ReplyHeader,
	}, nil
}

// Payload fills p with the next len(p) bytes of a reply's payload.
func (r *Reader) Payload(p []byte) error {
	_, err := io.ReadFull(r.r, p)
	return noEOF(err)
}

// Buffered reports whether more bytes are here without waiting.
func (r *Reader) Buffered() bool { return r.r.Buffered() > 0 }

// noEOF turns an end inside a frame into what it is.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
