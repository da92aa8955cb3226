package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// MaxSmallNar is the largest NAR for IngestSmall, in bytes.
const MaxSmallNar = 256 << 10

// narReaders keeps the buffers of IngestSmall from one NAR to the next.
var narReaders = sync.Pool{New: func() any { return nix.NewNarReader(nil) }}

// IngestSmall is Ingest of a NAR in memory, with the same result, for callers who
// take in thousands of small ones: it starts no goroutines and takes little more
// memory than the NAR. It does not call sink.Sync. ErrBadInput: it is malformed,
// or larger than MaxSmallNar.
func IngestSmall(ctx context.Context, nar []byte, sink flox.BlockSink) (*Ingested, error) {
	if len(nar) > MaxSmallNar {
		return nil, fmt.Errorf("ingest a NAR: %d bytes, want at most %d: %w", len(nar), MaxSmallNar, flox.ErrBadInput)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := bytes.NewReader(nar)
	reader := narReaders.Get().(*nix.NarReader)
	defer narReaders.Put(reader)
	reader.Reset(r)
	t := &treeReader{
		ctx: ctx, cancel: cancel, nar: reader, sink: sink, p: DefaultParams, file: blake3.New(),
		free: make(chan *batch, 1),
	}
	// All chunks together are no larger than the NAR.
	t.free <- &batch{data: make([]byte, 0, len(nar))}
	err := t.read()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err == nil {
		err = expectEnd(r)
	}
	got := t.got
	if err == nil {
		got.NarHash = sha256.Sum256(nar)
		err = t.finish(ctx, &got)
	}
	if err != nil {
		return nil, fmt.Errorf("ingest a NAR: %w", err)
	}
	return &got, nil
}
