package p2p

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// A holder that only the tracker knows, by the path's key, is found, met and
// asked; a tracker that fails costs nothing but its answer.
func TestTrackerFindsHolders(t *testing.T) {
	t.Parallel()
	blocks := randomBlocks(77, 20, 10_000)
	path := flox.StorePath("0c5b8vw40dy178xlpddw65q9gf1h2186-tracked")
	peer := start(t, 350, func(c *Config) { c.Blocks = newMemory(blocks...) })
	broken := start(t, 352, func(c *Config) {
		c.Tracker = func(context.Context, flox.CID, int) ([]PeerAddr, error) {
			return nil, fmt.Errorf("tracker: %w", flox.ErrUnreachable)
		}
	})
	me := start(t, 351, func(c *Config) {
		c.Tracker = func(_ context.Context, key flox.CID, most int) ([]PeerAddr, error) {
			if key != PathKey(path) || most < 1 {
				return nil, nil
			}
			return []PeerAddr{{ID: "no peer id"}, addrOf(peer)}, nil
		}
	})
	var g got
	ctx := within(t, time.Minute)
	for {
		err := me.Fetch(ctx, wantsOf(blocks), Hints{Paths: []flox.StorePath{path}}, g.take)
		if err == nil {
			break
		}
		if !errors.Is(err, flox.ErrUnreachable) || ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond) // a busy machine takes longer to say what it holds than a Fetch waits
	}
	g.check(t, blocks)
	if err := broken.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{Paths: []flox.StorePath{path}}, g.take); err == nil {
		t.Error("fetched without anybody who holds it")
	}
}
