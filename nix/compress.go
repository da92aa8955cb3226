package nix

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"github.com/floxctl/flox"
)

// MaxDecoderWindow is the most memory a decoder's window may take, in bytes:
// what xz -9 (64 MiB) and zstd --ultra -22 (128 MiB) need.
const MaxDecoderWindow = 128 << 20

// sniffBuffer is how much of the compressed stream is read at once.
const sniffBuffer = 64 << 10

// knownCompressions is shown to whoever sends something else.
const knownCompressions = "none, xz, zstd, bzip2, gzip, br, lz4"

// Decompressor undoes the compression a narinfo names. As in Nix "none" (or
// "") is taken as it is, "br" is brotli, and under any other name the bytes
// tell the format: caches exist whose names lie. It gives at most maxOut bytes
// and then, if there is more, an error instead of a bomb; memory is bounded by
// MaxDecoderWindow and small change. What cannot be decoded is ErrBadInput, here
// or when reading; r's own errors come through as they are.
//
// Close releases memory and leaves r open.
func Decompressor(compression string, r io.Reader, maxOut uint64) (io.ReadCloser, error) {
	d := &decompressor{name: compression, left: maxOut, most: maxOut, src: source{r: r}}
	var err error
	switch compression {
	case "none", "":
		d.r = &d.src
	case "br":
		d.r = brotli.NewReader(&d.src)
	default:
		err = d.sniff(bufio.NewReaderSize(&d.src, sniffBuffer))
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // a header cut short is no empty file
	}
	if err != nil {
		return nil, d.wrap(err)
	}
	return d, nil
}

type decompressor struct {
	name       string
	src        source
	r          io.Reader
	close      func()
	left, most uint64
	err        error
}

// formats are told apart by how they begin.
var formats = []struct {
	magic string
	open  func(d *decompressor, r *bufio.Reader) error
}{
	{"\xfd7zXZ\x00", (*decompressor).openXZ},
	{"\x28\xb5\x2f\xfd", (*decompressor).openZstd},
	{"BZh", (*decompressor).openBzip2},
	{"\x1f\x8b", (*decompressor).openGzip},
	{"\x04\x22\x4d\x18", (*decompressor).openLZ4},
}

func (d *decompressor) sniff(r *bufio.Reader) error {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, f := range formats {
		if bytes.HasPrefix(head, []byte(f.magic)) {
			return f.open(d, r)
		}
	}
	return errors.New("the bytes are in no format that is known: " + knownCompressions)
}

func (d *decompressor) openXZ(r *bufio.Reader) (err error) {
	// The guard sees a block's header before the decoder does.
	guarded := bufio.NewReaderSize(newXZGuard(r, MaxDecoderWindow), sniffBuffer)
	d.r, err = xz.ReaderConfig{DictCap: xzLeastDict}.NewReader(guarded)
	return err
}

func (d *decompressor) openZstd(r *bufio.Reader) error {
	z, err := zstd.NewReader(r,
		zstd.WithDecoderConcurrency(1), // no goroutines
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(MaxDecoderWindow))
	if err != nil {
		return err
	}
	d.r, d.close = z, z.Close
	return nil
}

func (d *decompressor) openBzip2(r *bufio.Reader) error {
	d.r = bzip2.NewReader(r)
	return nil
}

func (d *decompressor) openGzip(r *bufio.Reader) (err error) {
	d.r, err = gzip.NewReader(r)
	return err
}

func (d *decompressor) openLZ4(r *bufio.Reader) error {
	d.r = lz4.NewReader(r)
	return nil
}

// Read gives decoded bytes; see Decompressor.
func (d *decompressor) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	// One byte more than allowed shows whether there is more.
	if uint64(len(p)) > d.left {
		p = p[:d.left+1]
	}
	n, err := d.r.Read(p)
	if uint64(n) > d.left {
		n, err = int(d.left), fmt.Errorf("it unpacks to more than the %d bytes announced", d.most)
	}
	d.left -= uint64(n)
	if err != nil {
		d.err = d.wrap(err)
	}
	return n, d.err
}

// Close releases the decoder.
func (d *decompressor) Close() error {
	if d.close != nil {
		d.close()
		d.close = nil
	}
	d.err = flox.ErrClosed
	return nil
}

// wrap tells a source's error from that of a decoder.
func (d *decompressor) wrap(err error) error {
	switch {
	case d.src.err != nil:
		return fmt.Errorf("read compressed (%s): %w", quote(d.name), d.src.err)
	case errors.Is(err, io.EOF):
		return io.EOF
	}
	return fmt.Errorf("compression %s: %w: %w", quote(d.name), err, flox.ErrBadInput)
}

// source remembers how the stream below failed.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}
