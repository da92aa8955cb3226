package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// The first byte of every connection between servers says what it carries.
const (
	tagLog   = 'r' // hashicorp/raft's stream
	tagCalls = 'c' // frames with calls one way and answers the other
)

// A frame is its length behind this field (4 bytes), a number the caller chose
// (8), both big endian, and a ClusterCall or ClusterAnswer.
const (
	frameHead = 12
	frameMax  = MaxCommand + 64<<10
)

// frame is one message on its way.
type frame struct {
	id   uint64
	body []byte
}

// newFrame encodes m.
func newFrame(id uint64, m proto.Message) (frame, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return frame{}, fmt.Errorf("encode message: %w: %w", err, flox.ErrBadInput)
	}
	if len(b) > frameMax {
		return frame{}, fmt.Errorf("message of %d bytes, want at most %d: %w", len(b), frameMax, flox.ErrBadInput)
	}
	return frame{id, b}, nil
}

// write puts the frame out.
func (f frame) write(w io.Writer) error {
	var head [frameHead]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(f.body)+frameHead-4))
	binary.BigEndian.PutUint64(head[4:], f.id)
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(f.body)
	return err
}

// readHead reads the start of a frame and gives the length of its body.
func readHead(r io.Reader) (id uint64, size int, err error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < frameHead-4 || n > frameMax+frameHead-4 {
		return 0, 0, fmt.Errorf("frame of %d bytes, want %d to %d: %w", n, frameHead-4, frameMax+frameHead-4, flox.ErrBadInput)
	}
	return binary.BigEndian.Uint64(head[4:]), int(n) - (frameHead - 4), nil
}

// failureKinds numbers the errors that mean something to the caller beside the
// refusals: refusalKinds first, then these from firstFailure on. Never renumbered.
const firstFailure = 64

var failureKinds = []error{ErrUnknownOutcome, ErrNotLeader, ErrUnknownCommand, ErrLevel} // in the order in which they are looked for

// encodeFailure gives what another server needs to know of err.
func encodeFailure(err error) *floxv1.ClusterFailure {
	f := &floxv1.ClusterFailure{Refused: errors.Is(err, ErrRefused), Message: err.Error()}
	if len(f.Message) > 4096 {
		f.Message = f.Message[:4096]
	}
	for i, kind := range failureKinds {
		if errors.Is(err, kind) {
			f.Kind = uint32(firstFailure + i)
			return f
		}
	}
	if errors.Is(err, ErrSessionExpired) {
		f.Kind = expiredKind
		return f
	}
	for i, kind := range refusalKinds {
		if kind != nil && errors.Is(err, kind) {
			f.Kind = uint32(i)
			return f
		}
	}
	return f
}

// decodeFailure undoes encodeFailure. A number of a newer program is an error
// without a sentinel, and so is final.
func decodeFailure(f *floxv1.ClusterFailure) error {
	r := &refusal{message: f.Message}
	switch k := int(f.Kind); {
	case k >= firstFailure && k < firstFailure+len(failureKinds):
		r.kind = failureKinds[k-firstFailure]
	case k < len(refusalKinds):
		r.kind = refusalKinds[k]
	}
	if f.Refused {
		return r
	}
	if r.kind == nil {
		return errors.New(f.Message) //nolint:err113 // the other server's words
	}
	return &remoteError{r.kind, f.Message}
}

// remoteError is an error of another server.
type remoteError struct {
	kind    error
	message string
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.kind }

// encodeTimeout rounds up: 0 would mean none.
func encodeTimeout(d time.Duration) uint32 {
	return uint32(max(1, min(d, callTimeout).Milliseconds()))
}
