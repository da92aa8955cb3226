package agent

import (
	"context"
	"time"

	flox "github.com/floxctl/flox"
)

// blocks serves the blocks of one path's manifest: from the cache, else from
// the swarm.
type blocks struct {
	a        *Agent
	path     flox.StorePath
	patience time.Duration // how long one block may take; 0 = until the caller gives up
}

// Get implements flox.Blocks.
func (b blocks) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	if data, err := b.a.cache.Get(ctx, id); err == nil {
		return data, nil
	}
	if data, err := b.a.staged.Get(ctx, id); err == nil {
		return data, nil
	}
	if b.patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, b.patience)
		defer cancel()
	}
	watch := b.a.waits.begin(0, opManifest, b.a.cfg.StoreDir.Join(b.path), 0)
	defer watch.end()
	var out []byte
	err := b.a.fetcher.fetch(ctx, []piece{{chunk: flox.Chunk{ID: id}}}, b.a.hints(b.path), watch, func(_ piece, data []byte) error {
		out = data
		return nil
	})
	return out, err
}
