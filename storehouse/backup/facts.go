package backup

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/floxctl/flox"
)

// The facts are one zstd stream, cut into parts of partSize. Plain it is
//
//	"flxfact1"
//	for each record: length of the key (uvarint, not 0), key, length of the value, value
//	0 (uvarint)  number of records (uvarint)
const (
	factsMagic = "flxfact1"
	partSize   = 16 << 20
	maxKey     = 1 << 16
	maxValue   = 64 << 20
)

// FactsWriter writes the records of the facts.
type FactsWriter struct {
	ctx   context.Context //nolint:containedctx // of one backup; io.Writer takes none
	place *Place
	m     *Manifest
	part  bytes.Buffer
	enc   *zstd.Encoder
	head  []byte
}

// Facts begins to write the facts of a backup. Close must be called.
func (p *Place) Facts(ctx context.Context, m *Manifest) (*FactsWriter, error) {
	w := &FactsWriter{ctx: ctx, place: p, m: m}
	var err error
	if w.enc, err = zstd.NewWriter(w, zstd.WithEncoderConcurrency(1)); err != nil {
		return nil, err
	}
	_, err = io.WriteString(w.enc, factsMagic)
	return w, err
}

// Write is io.Writer: it takes compressed bytes.
func (w *FactsWriter) Write(b []byte) (int, error) {
	for n := 0; n < len(b); {
		room := min(partSize-w.part.Len(), len(b)-n)
		w.part.Write(b[n : n+room])
		if n += room; w.part.Len() < partSize {
			break
		}
		if err := w.flush(); err != nil {
			return n, err
		}
	}
	return len(b), nil
}

// flush stores a part.
func (w *FactsWriter) flush() error {
	part, err := w.place.putPart(w.ctx, w.m, fmt.Sprintf("facts-%05d", len(w.m.Facts)), w.part.Bytes())
	w.m.Facts = append(w.m.Facts, part)
	w.part.Reset()
	return err
}

// Add writes a record.
func (w *FactsWriter) Add(key, value []byte) error {
	if len(key) == 0 || len(key) > maxKey || len(value) > maxValue {
		return fmt.Errorf("facts: a record of %d and %d bytes: %w", len(key), len(value), flox.ErrCorrupt)
	}
	w.m.Records++
	w.m.FactsBytes += uint64(len(key) + len(value))
	w.head = append(binary.AppendUvarint(w.head[:0], uint64(len(key))), key...)
	w.head = binary.AppendUvarint(w.head, uint64(len(value)))
	if _, err := w.enc.Write(w.head); err != nil {
		return err
	}
	_, err := w.enc.Write(value)
	return err
}

// Close ends the facts and notes their parts in the manifest. What is not whole
// should be left by ending the context first.
func (w *FactsWriter) Close() error {
	_, err := w.enc.Write(binary.AppendUvarint([]byte{0}, w.m.Records))
	if err = errors.Join(err, w.enc.Close()); err == nil && w.part.Len() > 0 {
		err = w.flush()
	}
	return err
}

// ReadFacts calls f with every record of a backup's facts, all parts checked. Key
// and value are f's only until it returns. ErrCorrupt when they are damaged.
func (p *Place) ReadFacts(ctx context.Context, m *Manifest, f func(key, value []byte) error) error {
	dec, err := zstd.NewReader(&factsParts{ctx: ctx, place: p, m: m, left: m.Facts}, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer dec.Close()
	in := bufio.NewReaderSize(dec, 256<<10)
	if err := readRecords(in, m.Records, f); err != nil {
		return fmt.Errorf("%s: facts of %s: %w", p, m.Name, err)
	}
	return nil
}

// errFacts is what is wrong with facts that end early.
var errFacts = fmt.Errorf("they are cut off: %w", flox.ErrCorrupt)

func readRecords(in *bufio.Reader, want uint64, f func(key, value []byte) error) error {
	magic := make([]byte, len(factsMagic))
	if _, err := io.ReadFull(in, magic); err != nil {
		return cutOff(err)
	}
	if string(magic) != factsMagic {
		return fmt.Errorf("they begin with %q: %w", magic, flox.ErrCorrupt)
	}
	var key, value []byte
	for n := uint64(0); ; n++ {
		var err error
		if key, err = readField(in, key, maxKey); err != nil {
			return err
		}
		if len(key) == 0 {
			return readEnd(in, n, want)
		}
		if value, err = readField(in, value, maxValue); err != nil {
			return err
		}
		if err := f(key, value); err != nil {
			return err
		}
	}
}

// readEnd checks what stands behind the last record.
func readEnd(in *bufio.Reader, n, want uint64) error {
	said, err := binary.ReadUvarint(in)
	if err != nil {
		return cutOff(err)
	}
	if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		return errors.Join(fmt.Errorf("something follows them: %w", flox.ErrCorrupt), err)
	}
	if said != n || want != n {
		return fmt.Errorf("%d records, the end says %d, the manifest %d: %w", n, said, want, flox.ErrCorrupt)
	}
	return nil
}

// readField reads a length and so many bytes into buf.
func readField(in *bufio.Reader, buf []byte, most uint64) ([]byte, error) {
	n, err := binary.ReadUvarint(in)
	if err != nil {
		return nil, cutOff(err)
	}
	if n > most {
		return nil, fmt.Errorf("a field of %d bytes, want at most %d: %w", n, most, flox.ErrCorrupt)
	}
	if uint64(cap(buf)) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(in, buf); err != nil {
		return nil, cutOff(err)
	}
	return buf, nil
}

// cutOff says that facts end early, or why they cannot be read.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errFacts
	}
	if errors.Is(err, flox.ErrCorrupt) || errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrUnreachable) {
		return err
	}
	return fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
}

// factsParts reads the parts one behind the other.
type factsParts struct {
	ctx   context.Context //nolint:containedctx // of one ReadFacts
	place *Place
	m     *Manifest
	left  []Part
	now   []byte
}

// Read implements io.Reader.
func (r *factsParts) Read(b []byte) (int, error) {
	for len(r.now) == 0 {
		if len(r.left) == 0 {
			return 0, io.EOF
		}
		if r.left[0].Size > partSize {
			return 0, fmt.Errorf("part %s of %d bytes, want at most %d: %w", r.left[0].Name, r.left[0].Size, partSize, flox.ErrCorrupt)
		}
		var err error
		if r.now, err = r.place.readPart(r.ctx, r.m, r.left[0]); err != nil {
			return 0, err
		}
		r.left = r.left[1:]
	}
	n := copy(b, r.now)
	r.now = r.now[n:]
	return n, nil
}
