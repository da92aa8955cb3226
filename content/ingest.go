package content

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// IngestOptions say how a NAR is taken in. The zero value is the default.
type IngestOptions struct {
	// Params say how content is cut; zero means DefaultParams.
	Params Params
	// Workers is how many goroutines hash chunks and call Put; 0 means one per core.
	Workers int
	// Candidates are store paths to look for in the NAR: those found are
	// Ingested.References. Nil means no search.
	Candidates []flox.StorePath
	// Embedded says that the NAR lies inside a longer stream: not a byte behind
	// it is read. Otherwise bytes behind the NAR are an error.
	Embedded bool
}

// Ingested is what Ingest found.
type Ingested struct {
	Manifest flox.CID
	NarHash  [32]byte  // SHA-256 of the NAR
	NarSize  uint64    // bytes
	Root     flox.Kind // of the store path's own entry

	Entries        uint32
	Files          uint32 // regular files
	Bytes          uint64 // content of regular files
	Chunks         uint64 // chunks handed to the sink, repeats counted
	ManifestBlocks uint32 // root, pages and chunk lists

	// Scanned says that candidates were given; References are those found,
	// sorted.
	Scanned    bool
	References []flox.StorePath
}

// Ingest reads a NAR to its end and puts its chunks and its manifest into sink,
// which must allow concurrent Puts; it calls sink.Sync before it returns. Memory
// does not grow with the size of files, only with their number. Errors:
// ErrBadInput for a malformed NAR, else what nar and sink returned.
//
// A NAR goes through three stages at once: one goroutine parses it and cuts
// chunks, one takes its SHA-256 and looks for references, and Workers name chunks
// and hand them to the sink (which compresses them).
func Ingest(ctx context.Context, nar io.Reader, sink flox.BlockSink, opt IngestOptions) (*Ingested, error) {
	if opt.Params == (Params{}) {
		opt.Params = DefaultParams
	}
	if err := opt.Params.check(); err != nil {
		return nil, err
	}
	if opt.Workers <= 0 {
		opt.Workers = runtime.GOMAXPROCS(0)
	}
	if !opt.Embedded {
		nar = bufio.NewReaderSize(nar, 256<<10)
	}
	// A worker that fails goes on until the parser has stopped, so it cannot end
	// the context by returning: it cancels.
	gctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	tap := newTap(gctx, nar, opt.Candidates)
	tree, err := newTreeReader(gctx, cancel, tap, sink, opt)
	if err != nil {
		return nil, err
	}
	group := new(errgroup.Group)
	group.Go(tap.hash)
	for range opt.Workers {
		group.Go(tree.work)
	}
	group.Go(func() error {
		defer tap.close()
		defer close(tree.batches)
		if err := tree.read(); err != nil || opt.Embedded {
			return err
		}
		return expectEnd(nar)
	})
	if err := group.Wait(); err != nil {
		if cause := context.Cause(gctx); cause != nil && ctx.Err() == nil {
			err = cause
		}
		return nil, fmt.Errorf("ingest a NAR: %w", err)
	}
	got := tree.got
	got.NarHash, got.References, got.Scanned = tap.sum, tap.refs, opt.Candidates != nil
	if err := tree.finish(ctx, &got); err != nil {
		return nil, fmt.Errorf("ingest a NAR: %w", err)
	}
	if err := sink.Sync(ctx); err != nil {
		return nil, fmt.Errorf("ingest a NAR: sync: %w", err)
	}
	return &got, nil
}

// expectEnd checks that r has nothing more.
func expectEnd(r io.Reader) error {
	var b [1]byte
	switch _, err := io.ReadFull(r, b[:]); {
	case err == nil:
		return fmt.Errorf("bytes follow the end of the NAR: %w", flox.ErrBadInput)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// IngestPath is Ingest of the file, directory or symlink at fsPath.
func IngestPath(ctx context.Context, fsPath string, sink flox.BlockSink, opt IngestOptions) (*Ingested, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	dumped := make(chan error, 1)
	go func() {
		buf := bufio.NewWriterSize(w, 256<<10)
		err := nix.DumpPath(ctx, buf, fsPath)
		if err == nil {
			err = buf.Flush()
		}
		w.CloseWithError(err)
		dumped <- err
	}()
	got, err := Ingest(ctx, r, sink, opt)
	// A failed Ingest stops reading: release the dump, and prefer its reason
	// unless it is only that.
	r.CloseWithError(io.ErrClosedPipe)
	if dumpErr := <-dumped; dumpErr != nil && !errors.Is(dumpErr, io.ErrClosedPipe) {
		return nil, fmt.Errorf("ingest %s: %w", fsPath, dumpErr)
	}
	return got, err
}

// Check compares what was claimed of a path with what its NAR turned out to be:
// hash, size and, if candidates were looked for, that every reference found was
// declared. ErrBadInput names both values.
func Check(info *flox.PathInfo, got *Ingested) error {
	if info.NarSize != got.NarSize {
		return fmt.Errorf("path %s: the NAR has %d bytes, its path info says %d: %w", info.Path, got.NarSize, info.NarSize, flox.ErrBadInput)
	}
	if info.NarHash != got.NarHash {
		return fmt.Errorf("path %s: the NAR has hash %s, its path info says %s: %w",
			info.Path, nix.SHA256Hash(got.NarHash), nix.SHA256Hash(info.NarHash), flox.ErrBadInput)
	}
	for _, ref := range got.References {
		if !slices.Contains(info.References, ref) {
			return fmt.Errorf("path %s: its content refers to %s, its path info does not: %w", info.Path, ref, flox.ErrBadInput)
		}
	}
	return nil
}

// maxEntries is the most entries of one tree.
const maxEntries = math.MaxUint32 - 1
