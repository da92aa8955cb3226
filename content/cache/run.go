package cache

import (
	"context"
	"time"
)

// tick is how often free disk space is looked at.
const tick = time.Second

// Run makes sync marks, watches budget and free disk space, and evicts, until
// ctx ends; then it returns nil. ErrFull: the index could not be written, but
// there is room again now. What is here can be read on; for all else the process
// must start anew, since the broken index is let go of only by its end.
func (c *Cache) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	marking := make(chan struct{})
	go func() { // a mark may take long on a busy disk; shrinking does not wait for it
		defer close(marking)
		c.runMarks(ctx)
	}()
	err := c.runBudget(ctx)
	stop()
	<-marking
	return err
}

func (c *Cache) runMarks(ctx context.Context) {
	for sleep(ctx, c.cfg.SyncEvery) == nil {
		if c.index.Low() || c.index.Broken() != nil {
			continue // what is written now is needed to make room
		}
		if err := c.Sync(ctx); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("sync mark of the cache", "err", err)
		}
	}
}

// Sync makes everything put so far durable and trusted for good.
func (c *Cache) Sync(context.Context) error {
	if err := c.index.usable(); err != nil {
		return err
	}
	if err := c.memory.flush(); err != nil {
		return err
	}
	return c.session.mark()
}

func (c *Cache) runBudget(ctx context.Context) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	var fruitless time.Time // when an eviction last found nothing to take
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-c.poke:
		}
		if err := c.index.Tend(); err != nil {
			return err
		}
		limit := c.limit()
		if time.Since(fruitless) < 15*tick {
			continue
		}
		freed, needed := c.shrink(ctx, limit)
		if needed && freed == 0 {
			fruitless = time.Now()
		}
	}
}

// shrink evicts if the cache is near limit.
func (c *Cache) shrink(ctx context.Context, limit int64) (freed int64, needed bool) {
	if c.used() <= limit-limit/20 {
		return 0, false
	}
	freed, err := c.GC(ctx, limit-limit/10)
	if err != nil && ctx.Err() == nil {
		c.cfg.Log.Warn("shrink the cache", "limit", limit, "err", err)
	}
	return freed, true
}

// limit is how many bytes the cache may use now: the budget, or less if
// others fill the disk.
func (c *Cache) limit() int64 {
	c.indexSize.Store(c.index.size(c.indexSize.Load()))
	_, free, err := c.disk()
	if err != nil {
		return c.budget()
	}
	return max(min(c.budget(), c.used()+free-c.cfg.Reserve), 0)
}

// budget is what of the budget is left for the cache.
func (c *Cache) budget() int64 { return max(c.cfg.Budget-c.cfg.Others(), 0) }

// wake makes Run look at the budget now.
func (c *Cache) wake() {
	select {
	case c.poke <- struct{}{}:
	default:
	}
}

// Usage says what the cache holds now.
func (c *Cache) Usage() Usage {
	c.sum.Lock()
	sum := c.sum.totals
	c.sum.Unlock()
	u := Usage{
		Bytes:   c.used(),
		Budget:  c.cfg.Budget,
		Limit:   c.budget(),
		Kept:    sum.kept,
		Files:   sum.files,
		Blocks:  sum.blocks,
		Reserve: c.cfg.Reserve,
		Evicted: c.evicted.Load(),
		Refused: c.refused.Load(),
		Dropped: c.dropped.Load(),
	}
	if _, free, err := c.disk(); err == nil {
		u.FreeDisk = free
		u.Limit = max(min(u.Limit, u.Bytes+free-u.Reserve), 0)
	}
	return u
}
