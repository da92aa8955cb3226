package storehouse

import (
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
