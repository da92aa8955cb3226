package content

import (
	"context"
	"errors"
	"fmt"

	"github.com/floxctl/flox"
)

// ReadText reads a path that is one file of at most most bytes, such as a .drv.
// Errors: ErrBadInput if it is something else, those of blocks.
func ReadText(ctx context.Context, manifest flox.CID, blocks flox.Blocks, most int) ([]byte, error) {
	m, err := OpenManifest(ctx, manifest, blocks)
	if err != nil {
		return nil, err
	}
	e, err := m.Entry(ctx, 0)
	if err == nil && (e.Kind != flox.Regular || e.Size > uint64(most)) {
		err = fmt.Errorf("a %s of %d bytes, want a file of at most %d: %w", e.Kind, e.Size, most, flox.ErrBadInput)
	}
	if err != nil {
		return nil, err
	}
	if b, inline, err := m.Inline(ctx, 0); inline || err != nil {
		return b, err
	}
	b := make([]byte, 0, e.Size)
	var failed error
	err = m.Chunks(ctx, 0, 0, -1, func(_ int64, c flox.Chunk) bool {
		var part []byte
		part, failed = blocks.Get(ctx, c.ID)
		b = append(b, part...)
		return failed == nil
	})
	return b, errors.Join(failed, err)
}
