package agent

import (
	"context"
	"slices"
	"time"

	flox "github.com/floxctl/flox"
)

const (
	// mappedEvery is how often it is asked what processes have mapped, while there
	// is something new.
	mappedEvery = 15 * time.Second
	// mappedSkips is how many of these times are left out at most when there is
	// not: the warden looks through all processes each time, which wakes the
	// machine. With it two minutes lie between two.
	mappedSkips = 7
)

// watchMapped notes what processes have mapped, now and then: what the kernel had
// cached, or what was read before this process began, is not seen otherwise.
func (c *completer) watchMapped(ctx context.Context) {
	if c.mapped == nil {
		return
	}
	tick := time.NewTicker(mappedEvery)
	defer tick.Stop()
	seen := c.ran.changed()
	for skips, left := 0, 0; ; {
		switch {
		case c.off() != "": // nobody wants to know
		case left > 0 && c.ran.changed() == seen:
			left--
		default:
			c.scanMapped(ctx)
			skips = min(2*skips+1, mappedSkips)
			if now := c.ran.changed(); now != seen {
				seen, skips = now, 0
			}
			left = skips
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// scanMapped asks once, and notes what it is told.
func (c *completer) scanMapped(ctx context.Context) {
	nodes, err := c.mapped(ctx)
	if err != nil && ctx.Err() == nil {
		c.a.log.Debug("not known what is mapped", "error", err)
	}
	slices.Sort(nodes) // so that what is mapped has an order that lasts
	for _, node := range nodes {
		if manifest, index, ok := c.a.mount.Resolve(node); ok {
			c.sawMapped(ctx, manifest, index)
		}
	}
}

// sawMapped notes one mapped file.
func (c *completer) sawMapped(ctx context.Context, manifest flox.CID, index uint32) {
	info, ok := c.a.facts.byManifest(manifest)
	if !ok {
		return
	}
	program := false
	if m, err := c.a.pages.Open(ctx, manifest, hereBlocks{c.a.cache}); err == nil {
		if e, err := m.Entry(ctx, index); err == nil {
			if e.Kind != flox.Regular {
				return
			}
			program = isProgram(e)
		}
	}
	c.ran.mapped(info.Path, index, program)
}
