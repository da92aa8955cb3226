package content

import (
	"context"
	"crypto/sha256"
	"io"

	"github.com/floxctl/flox"
)

// tapBuffer is how many bytes go to the hashing goroutine at once, tapBuffers
// how many such buffers exist.
const (
	tapBuffer  = 256 << 10
	tapBuffers = 4
)

// tap passes a stream through and hashes it in a goroutine of its own.
type tap struct {
	ctx  context.Context // of the one Ingest the tap lives in
	r    io.Reader
	buf  []byte // being filled
	full chan []byte
	free chan []byte

	scan *refScanner // nil = none
	// Results, once hash has returned.
	sum  [32]byte
	refs []flox.StorePath
}

func newTap(ctx context.Context, r io.Reader, candidates []flox.StorePath) *tap {
	t := &tap{ctx: ctx, r: r, full: make(chan []byte, tapBuffers), free: make(chan []byte, tapBuffers)}
	for range tapBuffers {
		t.free <- make([]byte, 0, tapBuffer)
	}
	if candidates != nil {
		t.scan = newRefScanner(candidates)
	}
	return t
}

// Read reads from the stream and keeps a copy for the hashes.
func (t *tap) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		if t.buf == nil {
			select {
			case t.buf = <-t.free:
			case <-t.ctx.Done():
				return 0, t.ctx.Err()
			}
		}
		k := copy(t.buf[len(t.buf):cap(t.buf)], rest)
		t.buf = t.buf[:len(t.buf)+k]
		if rest = rest[k:]; len(t.buf) == cap(t.buf) {
			t.flush()
		}
	}
	return n, err
}

// flush never blocks: full has room for every buffer there is.
func (t *tap) flush() {
	if len(t.buf) > 0 {
		t.full <- t.buf
		t.buf = nil
	}
}

// close says that nothing more is read.
func (t *tap) close() {
	t.flush()
	close(t.full)
}

// hash takes what was read until close.
func (t *tap) hash() error {
	h := sha256.New()
	for b := range t.full {
		h.Write(b)
		if t.scan != nil {
			t.scan.Write(b)
		}
		t.free <- b[:0]
	}
	h.Sum(t.sum[:0])
	if t.scan != nil {
		t.refs = t.scan.References()
	}
	return nil
}
