package content

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/floxctl/flox"
)

// StoredBlock gives a block as it is kept: one zstd frame, or the plain bytes if
// zstd is false.
type StoredBlock func(ctx context.Context, id flox.CID) (data []byte, zstd bool, err error)

// WriteNarZstd writes the whole NAR as zstd frames, one behind the other (RFC
// 8878 3.1). Chunks are sent as they are stored: nothing is compressed again but
// the little that lies between them.
func (m *Manifest) WriteNarZstd(ctx context.Context, w io.Writer, stored StoredBlock) error {
	fetch := func(ctx context.Context, p *piece) {
		if p.data, p.framed, p.err = stored(ctx, p.chunk.ID); p.err != nil {
			p.err = fmt.Errorf("chunk %s: %w", p.chunk.ID, p.err)
		} else if !p.framed && len(p.data) != int(p.chunk.Size) {
			p.err = fmt.Errorf("chunk %s of %d bytes, the manifest says %d: %w", p.chunk.ID, len(p.data), p.chunk.Size, flox.ErrCorrupt)
		}
	}
	var buf []byte
	return m.stream(ctx, w, 0, int64(m.root.narSize), fetch, func(w io.Writer, p *piece) error {
		switch {
		case p.framed:
			_, err := w.Write(p.data)
			return err
		case p.ready != nil: // a chunk that did not get smaller
			return writeRawFrame(w, p.data)
		}
		enc, err := frameEncoder()
		if err != nil {
			return err
		}
		buf = enc.EncodeAll(p.data, buf[:0])
		_, err = w.Write(buf)
		return err
	})
}

// frameEncoder compresses what lies between chunks.
var frameEncoder = sync.OnceValues(func() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false), zstd.WithWindowSize(128<<10))
})

// A zstd frame made of raw blocks (RFC 8878 3.1.1).
const (
	zstdMagic    = 0xFD2FB528
	zstdRawBlock = 128 << 10 // most bytes in one block
	// zstdHeader: one segment, content size in 4 bytes, no checksum.
	zstdHeader = 0b10<<6 | 1<<5
)

// writeRawFrame writes b, not empty, as one zstd frame without compressing it.
func writeRawFrame(w io.Writer, b []byte) error {
	head := binary.LittleEndian.AppendUint32(nil, zstdMagic)
	head = append(head, zstdHeader)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(b)))
	for len(b) > 0 {
		n := min(len(b), zstdRawBlock)
		// Three bytes: is it the last, type 0 (raw) in two bits, size.
		block := uint32(n) << 3
		if n == len(b) {
			block |= 1
		}
		head = append(head, byte(block), byte(block>>8), byte(block>>16))
		if _, err := w.Write(head); err != nil {
			return err
		}
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		head, b = head[:0], b[n:]
	}
	return nil
}
