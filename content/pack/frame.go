package pack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// fileMagic begins every pack file. Frames follow without gaps.
const fileMagic = "flxpack1"

// A frame is a header and the stored bytes of one block. The header, numbers
// little endian:
//
//	0   "FXB1"
//	4   CID of the plain bytes
//	36  plain size
//	40  stored size
//	44  encoding, three zeros
//	48  CRC-32C of the stored bytes
//	52  CRC-32C of the header before
const (
	frameMagic = "FXB1"
	headerSize = 56
)

// encoding says how a block is stored.
type encoding uint8

const (
	encodingRaw encoding = iota
	encodingZstd
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is a frame's header.
type header struct {
	id            flox.CID
	plain, stored uint32
	enc           encoding
	crc           uint32 // of the stored bytes
}

// put writes the header to the first headerSize bytes of b.
func (h *header) put(b []byte) {
	copy(b, frameMagic)
	copy(b[4:], h.id[:])
	binary.LittleEndian.PutUint32(b[36:], h.plain)
	binary.LittleEndian.PutUint32(b[40:], h.stored)
	binary.LittleEndian.PutUint32(b[44:], uint32(h.enc))
	binary.LittleEndian.PutUint32(b[48:], h.crc)
	binary.LittleEndian.PutUint32(b[52:], crc32.Checksum(b[:52], castagnoli))
}

// parseHeader checks a header; b has at least headerSize bytes.
func parseHeader(b []byte) (h header, err error) {
	switch {
	case string(b[:4]) != frameMagic:
		return h, fmt.Errorf("a frame begins with %q: %w", b[:4], flox.ErrCorrupt)
	case crc32.Checksum(b[:52], castagnoli) != binary.LittleEndian.Uint32(b[52:]):
		return h, fmt.Errorf("a frame's header does not match its checksum: %w", flox.ErrCorrupt)
	}
	h = header{
		id:     flox.CID(b[4:36]),
		plain:  binary.LittleEndian.Uint32(b[36:]),
		stored: binary.LittleEndian.Uint32(b[40:]),
		crc:    binary.LittleEndian.Uint32(b[48:]),
	}
	enc := binary.LittleEndian.Uint32(b[44:])
	h.enc = encoding(enc)
	if enc > uint32(encodingZstd) || h.plain > content.MaxBlock || h.stored > h.plain || h.enc == encodingRaw && h.stored != h.plain {
		return h, fmt.Errorf("a frame of %d bytes stored in %d, encoding %d: %w", h.plain, h.stored, enc, flox.ErrCorrupt)
	}
	return h, nil
}

// check checks the stored bytes.
func (h *header) check(stored []byte) error {
	if crc32.Checksum(stored, castagnoli) != h.crc {
		return fmt.Errorf("a frame of %d bytes does not match its checksum: %w", h.stored, flox.ErrCorrupt)
	}
	return nil
}

// maxFrame is the largest frame, scanWindow how many bytes of a pack are held
// while it is scanned.
const (
	maxFrame   = headerSize + content.MaxBlock
	scanWindow = 4 * maxFrame
)

// scan calls found with every whole frame of f from offset off to size. What is no
// frame, or one whose bytes do not match, is passed over up to the next that does
// match; hurt is told of those whose header is whole. It returns the end of the last
// frame found, and how many bytes before that were passed over.
func scan(f io.ReaderAt, off, size int64, found func(off int64, h header) error, hurt func(off int64, h header)) (end, skipped int64, err error) {
	buf := make([]byte, scanWindow)
	var win []byte // bytes of f from off on
	for end = off; off < size; {
		if len(win) < maxFrame && off+int64(len(win)) < size {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
			if err != nil && !errors.Is(err, io.EOF) {
				return end, skipped, err
			}
			if win = buf[:n]; n == 0 {
				break // the file got shorter
			}
		}
		h, whole, n := nextFrame(win)
		if h != nil && !whole {
			hurt(off, *h)
		} else if h != nil {
			skipped += off - end
			if err := found(off, *h); err != nil {
				return end, skipped, err
			}
			end = off + int64(n)
		}
		off += int64(n)
		win = win[n:]
	}
	return end, skipped, nil
}

// nextFrame gives the frame at the start of win, if there is one, whether it is
// whole, and its size, or of one that is not how many bytes certainly begin none.
func nextFrame(win []byte) (h *header, whole bool, n int) {
	if len(win) < headerSize {
		return nil, false, len(win)
	}
	if first, err := parseHeader(win); err == nil {
		h, n = &first, headerSize+int(first.stored)
		if n <= len(win) && h.check(win[headerSize:n]) == nil {
			return h, true, n
		}
	}
	if i := bytes.Index(win[1:], []byte(frameMagic)); i >= 0 {
		return h, false, i + 1
	}
	return h, false, len(win) - len(frameMagic) + 1
}
