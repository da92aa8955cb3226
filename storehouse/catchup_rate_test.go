package storehouse

import (
	"context"
	"errors"
	"testing"
	"time"
)

// The rate of catching up spaces what comes, and counts nothing else: uploads that
// reached this server as well hold nobody up.
func TestRateCountsWhatCame(t *testing.T) {
	t.Parallel()
	c := newCatchUp(&Server{cfg: Config{CatchUpRate: 1 << 20}})
	first := c.brought(1 << 20)
	if second := c.brought(3 << 20); second.Sub(first) != 3*time.Second {
		t.Errorf("3 MiB at 1 MiB/s are paid in %s, want 3 s", second.Sub(first))
	}

	h := newHouse(t, 2, func(c *Config) { c.CatchUpRate = 1 << 10 })
	p := makePath(t, "upload", 4<<20)
	publish(t, h.servers[0], p)
	upTo := h.servers[0].node.Applied()
	eventually(t, "the second server has looked at what it was sent", func() bool {
		var mark placedMark
		return readNote(h.servers[1].catchUp.file, &mark) == nil && mark.Index >= upTo
	})
	if !whole(h.servers[1], p) {
		t.Error("the upload is not on the second server")
	}
}

// A server that was not let in yet waits: it knows nothing that it could go through.
func TestNothingIsGoneThroughBeforeTheFirstEntry(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1)
	cfg := clusterConfig(t.TempDir())
	h.tell(cfg)
	h.configs, h.servers, h.stops = append(h.configs, cfg), append(h.servers, nil), append(h.stops, nil)
	s, _ := h.run(1)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	c := newCatchUp(s)
	if err := c.step(ctx); !errors.Is(err, context.DeadlineExceeded) || !c.passed.IsZero() {
		t.Errorf("a step ended with %v and went through everything at %v, want that it waits", err, c.passed)
	}
}
