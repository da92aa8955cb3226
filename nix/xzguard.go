package nix

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// xzLeastDict is the smallest dictionary of LZMA2.
const xzLeastDict = 4096

// xzGuard passes an xz file through and refuses it before its decoder would
// take too much memory: the decoder makes a new dictionary, of whatever size
// the header says, for every block, also for an empty one. So a dictionary may
// be at most maxDict, and blocks beyond the first must bring content worth
// their dictionaries: real encoders cut blocks of several dictionaries' size.
//
// It also refuses a file that ends early, which the decoder would not always
// notice. It follows the format (xz file format 1.2.1; LZMA2 chunks are framed with
// their sizes) without decoding anything.
type xzGuard struct {
	r       io.Reader
	maxDict uint64
	// budget is how many bytes of dictionaries may still be made.
	budget uint64
	// step takes the next want bytes; steps are named after what those are.
	step   func(g *xzGuard, b []byte) error
	want   int
	have   []byte
	skip   uint64 // bytes to pass before that
	check  uint64 // size of a block's check
	block  uint64 // bytes of the current block behind its header
	left   uint64 // varints to come in the index
	index  uint64 // bytes of the index so far
	behind bool   // a stream has ended, none has begun since
	err    error
}

const (
	xzHeaderLen = 12
	xzFooterLen = 12
)

func newXZGuard(r io.Reader, maxDict uint64) *xzGuard {
	return &xzGuard{r: r, maxDict: maxDict, budget: 2 * maxDict, step: (*xzGuard).streamHeader, want: xzHeaderLen}
}

// Read passes bytes on that were looked at.
func (g *xzGuard) Read(p []byte) (int, error) {
	if g.err != nil {
		return 0, g.err
	}
	n, err := g.r.Read(p)
	if g.err = g.scan(p[:n]); g.err != nil {
		return 0, g.err
	}
	// The decoder takes an end between two blocks for the end of the file.
	if errors.Is(err, io.EOF) && !(g.behind && g.skip == 0 && len(g.have) == 0) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (g *xzGuard) scan(b []byte) error {
	for len(b) > 0 {
		if g.skip > 0 {
			n := min(g.skip, uint64(len(b)))
			g.skip -= n
			b = b[n:]
			continue
		}
		n := min(g.want-len(g.have), len(b))
		g.have = append(g.have, b[:n]...)
		b = b[n:]
		if len(g.have) < g.want {
			return nil
		}
		taken := g.have
		g.have = g.have[:0]
		if err := g.step(g, taken); err != nil {
			return err
		}
	}
	return nil
}

// next says what follows after skip bytes.
func (g *xzGuard) next(skip uint64, want int, step func(*xzGuard, []byte) error) error {
	g.skip, g.want, g.step = skip, want, step
	return nil
}

func (g *xzGuard) streamHeader(b []byte) error {
	// Sizes of checks by type; the decoder refuses those it does not know.
	sizes := [16]uint64{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}
	g.check = sizes[b[7]&15]
	return g.next(0, 1, (*xzGuard).blockSize)
}

// blockSize is the first byte of a block's header, or 0 of the index.
func (g *xzGuard) blockSize(b []byte) error {
	if b[0] == 0 {
		g.index = 1
		return g.next(0, 1, (*xzGuard).indexCount)
	}
	return g.next(0, (int(b[0])+1)*4-1, (*xzGuard).blockHeader)
}

func (g *xzGuard) blockHeader(b []byte) error {
	flags, rest := b[0], b[1:]
	sizes := int(flags>>6&1) + int(flags>>7)
	for range sizes {
		if _, n := binary.Uvarint(rest); n > 0 {
			rest = rest[n:]
		}
	}
	for range flags&3 + 1 {
		id, n := binary.Uvarint(rest)
		if n <= 0 {
			return errors.New("xz: malformed block header")
		}
		rest = rest[n:]
		size, n := binary.Uvarint(rest)
		if n <= 0 || size > uint64(len(rest)-n) {
			return errors.New("xz: malformed block header")
		}
		props := rest[n : n+int(size)]
		rest = rest[n+int(size):]
		if id == 0x21 && len(props) == 1 {
			if err := g.dictionary(props[0] & 63); err != nil {
				return err
			}
		}
	}
	g.block = 0
	return g.next(0, 1, (*xzGuard).chunk)
}

func (g *xzGuard) dictionary(code byte) error {
	size := uint64(1)<<32 - 1
	if code < 40 {
		size = (2 | uint64(code&1)) << (code/2 + 11)
	}
	if size > g.maxDict {
		return fmt.Errorf("xz: it needs a dictionary of %d bytes, at most %d are given", size, g.maxDict)
	}
	if size > g.budget {
		return errors.New("xz: many blocks with little in them")
	}
	g.budget -= size
	return nil
}

// chunk is the control byte of an LZMA2 chunk.
func (g *xzGuard) chunk(b []byte) error {
	g.block++
	switch c := b[0]; {
	case c == 0:
		return g.next(-g.block&3+g.check, 1, (*xzGuard).blockSize)
	case c < 3:
		return g.next(0, 2, (*xzGuard).plainChunk)
	case c >= 0x80:
		props := 0
		if c >= 0xc0 {
			props = 1
		}
		g.earn(uint64(c&31) << 16)
		return g.next(0, 4+props, (*xzGuard).packedChunk)
	default:
		return fmt.Errorf("xz: chunk of kind %d", c)
	}
}

func (g *xzGuard) plainChunk(b []byte) error {
	size := uint64(binary.BigEndian.Uint16(b)) + 1
	g.earn(size)
	g.block += 2 + size
	return g.next(size, 1, (*xzGuard).chunk)
}

func (g *xzGuard) packedChunk(b []byte) error {
	g.earn(uint64(binary.BigEndian.Uint16(b)) + 1)
	size := uint64(binary.BigEndian.Uint16(b[2:])) + 1
	g.block += uint64(len(b)) + size
	return g.next(size, 1, (*xzGuard).chunk)
}

// earn lets content pay for dictionaries to come.
func (g *xzGuard) earn(plain uint64) {
	const perByte = 4
	g.budget = min(g.budget+perByte*plain, 1<<62)
}

// indexCount and indexRecords read varints byte by byte; a last byte has no
// top bit.
func (g *xzGuard) indexCount(b []byte) error {
	if g.index == 1 {
		g.left = 0
	}
	if g.index > 9 {
		return errors.New("xz: malformed index")
	}
	g.left |= uint64(b[0]&0x7f) << (7 * (g.index - 1))
	g.index++
	if b[0]&0x80 != 0 {
		return g.next(0, 1, (*xzGuard).indexCount)
	}
	if g.left > 1<<60 {
		return errors.New("xz: malformed index")
	}
	g.left *= 2
	return g.indexNext()
}

func (g *xzGuard) indexRecords(b []byte) error {
	g.index++
	if b[0]&0x80 == 0 {
		g.left--
	}
	return g.indexNext()
}

func (g *xzGuard) indexNext() error {
	if g.left > 0 {
		return g.next(0, 1, (*xzGuard).indexRecords)
	}
	const crc = 4
	g.behind = true
	return g.next(-g.index&3+crc+xzFooterLen, 4, (*xzGuard).padding)
}

// padding is what may lie between streams: zeros, four at a time.
func (g *xzGuard) padding(b []byte) error {
	if binary.BigEndian.Uint32(b) == 0 {
		return g.next(0, 4, (*xzGuard).padding)
	}
	g.behind = false
	// The first four bytes of a header; its flags are behind the magic.
	return g.next(0, xzHeaderLen-4, func(g *xzGuard, rest []byte) error {
		return g.streamHeader(append([]byte{0, 0, 0, 0}, rest...))
	})
}
