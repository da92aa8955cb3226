// Package content turns the file tree of a store path into chunks and a
// manifest, and back: it cuts and names content, encodes and reads manifests,
// rebuilds any NAR bit for bit, and holds the signed statements that let a
// reader trust a single chunk. DESIGN.md beside this file is the format.
//
// It must not know where blocks are kept or where they come from: it reads
// them through flox.Blocks and writes them through flox.BlockSink.
package content

import (
	"fmt"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

// MaxBlock is the most bytes one block may have: a chunk, or the root, a page
// or a chunk list of a manifest.
const MaxBlock = 1 << 20

// Hash names bytes: BLAKE3-256.
func Hash(b []byte) flox.CID { return blake3.Sum256(b) }

// Params say how content is cut. They are part of every manifest.
type Params struct {
	// MinChunk, AvgChunk and MaxChunk are FastCDC's sizes in bytes. AvgChunk is
	// a power of two.
	MinChunk, AvgChunk, MaxChunk uint32
	// InlineLimit is the size in bytes up to which a file's content lies in the
	// manifest itself.
	InlineLimit uint32
}

// DefaultParams are the only parameters this version writes.
var DefaultParams = Params{MinChunk: 8 << 10, AvgChunk: 32 << 10, MaxChunk: 128 << 10, InlineLimit: 256}

// Bounds of parameters a manifest may name.
const (
	minMinChunk    = 64
	maxInlineLimit = 4096
)

// check refuses parameters the format does not allow.
func (p Params) check() error {
	switch {
	case p.AvgChunk&(p.AvgChunk-1) != 0 || p.AvgChunk < 256,
		p.MinChunk < minMinChunk || p.MinChunk >= p.AvgChunk,
		p.MaxChunk <= p.AvgChunk || p.MaxChunk > MaxBlock,
		p.InlineLimit > maxInlineLimit || p.InlineLimit >= p.MinChunk:
		return fmt.Errorf("chunk sizes %d/%d/%d with inline limit %d: want inline < min < average (a power of two) < max <= %d: %w",
			p.MinChunk, p.AvgChunk, p.MaxChunk, p.InlineLimit, MaxBlock, flox.ErrBadInput)
	}
	return nil
}
