package content

import (
	"context"
	"io"

	"github.com/floxctl/flox"
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
	NarHash  [32]byte // SHA-256 of the NAR
	NarSize  uint64   // bytes
	Root     flox.Kind

	Entries   uint32
	Files     uint32 // regular files
	Bytes     uint64 // content of regular files
	Chunks    uint64 // chunks handed to the sink, repeats counted
	Manifests uint32 // blocks of the manifest: root, pages, chunk lists

	// Scanned says that candidates were given; References are those found,
	// sorted.
	Scanned    bool
	References []flox.StorePath
}

// Ingest reads a NAR to its end and puts its chunks and its manifest into sink,
// which must allow concurrent Puts; it calls sink.Sync before it returns. Memory
// does not grow with the size of files, only with their number. Errors:
// ErrBadInput for a malformed NAR, what sink returned.
func Ingest(ctx context.Context, nar io.Reader, sink flox.BlockSink, opt IngestOptions) (*Ingested, error) {
	return nil, flox.ErrClosed
}

// IngestPath is Ingest of the file, directory or symlink at fsPath.
func IngestPath(ctx context.Context, fsPath string, sink flox.BlockSink, opt IngestOptions) (*Ingested, error) {
	return nil, flox.ErrClosed
}

// Check compares what was claimed of a path with what its NAR turned out to be:
// hash, size and, if candidates were looked for, that every reference found was
// declared. ErrBadInput names both values.
func Check(info *flox.PathInfo, got *Ingested) error { return flox.ErrClosed }
