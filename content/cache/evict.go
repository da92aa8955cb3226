package cache

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/floxctl/flox"
)

// Eviction is CLOCK over objects in the order they were made, with a hand that
// goes round. A segment that was read since the hand last passed is spared
// once. But warm reads never reach us: so a candidate's pages are first
// dropped from the kernel, and it goes only if no read comes back within the
// grace and no process has it open or mapped.

const (
	maxVictims = 4096 // records pinned at a time
	maxLaps    = 5    // more than the chances of a block
	groupSize  = 256  // records changed by one durable commit
)

// victim is a candidate; its record is pinned.
type victim struct {
	r  *record
	ct *content
}

// round is one look for candidates.
type round struct {
	victims []victim
	bytes   int64
	packs   []uint64 // passed wholly
	wrapped bool     // the hand came to the end
	// live says which files and blocks stay though they could go; all others may,
	// however lately they were read. Nil: CLOCK decides.
	live func(flox.CID) bool
}

// GC evicts until at most target bytes are used, or nothing evictable is left
// (kept and in use content stays). It gives the bytes freed on disk.
func (c *Cache) GC(ctx context.Context, target int64) (freed int64, err error) {
	select {
	case c.evicting <- struct{}{}:
		defer func() { <-c.evicting }()
	case <-ctx.Done():
		return 0, fmt.Errorf("cache gc: %w", ctx.Err())
	}
	c.indexSize.Store(c.index.size(c.indexSize.Load()))
	before := c.used()
	for laps := 0; c.used() > target && laps < maxLaps; {
		wrapped, err := c.evict(ctx, c.used()-target, nil)
		if err != nil {
			return max(before-c.used(), 0), fmt.Errorf("cache gc: %w", err)
		}
		if wrapped {
			laps++
		}
		c.indexSize.Store(c.index.size(c.indexSize.Load()))
	}
	return max(before-c.used(), 0), nil
}

// Collect evicts every file and block that live does not want, until about most bytes
// are free. Kept content stays, and what is in use. It gives the bytes freed on disk.
func (c *Cache) Collect(ctx context.Context, most int64, live func(flox.CID) bool) (freed int64, err error) {
	select {
	case c.evicting <- struct{}{}:
		defer func() { <-c.evicting }()
	case <-ctx.Done():
		return 0, fmt.Errorf("cache gc: %w", ctx.Err())
	}
	before := c.used()
	c.hand = hand{} // one lap sees everything
	for wrapped := false; !wrapped && before-c.used() < most; {
		if wrapped, err = c.evict(ctx, most-(before-c.used()), live); err != nil {
			return max(before-c.used(), 0), fmt.Errorf("cache gc: %w", err)
		}
	}
	c.indexSize.Store(c.index.size(c.indexSize.Load()))
	return max(before-c.used(), 0), nil
}

// evict tries to free need bytes, in one round.
func (c *Cache) evict(ctx context.Context, need int64, live func(flox.CID) bool) (wrapped bool, err error) {
	rd := round{live: live}
	defer func() {
		for _, v := range rd.victims {
			c.memory.release(v.r)
		}
	}()
	if err := c.sweep(ctx, &rd, need); err != nil {
		return false, err
	}
	if err := c.secondChance(ctx, &rd); err != nil {
		return false, err
	}
	for len(rd.victims) > 0 {
		group := rd.victims[:min(groupSize, len(rd.victims))]
		rd.victims = rd.victims[len(group):]
		err := c.take(group)
		for _, v := range group {
			c.memory.release(v.r)
		}
		if err != nil {
			return false, err
		}
	}
	for _, object := range rd.packs {
		if err := c.compact(ctx, object); err != nil {
			return false, err
		}
	}
	return rd.wrapped, nil
}

// sweep moves the hand until enough candidates are found or it comes to the end.
func (c *Cache) sweep(ctx context.Context, rd *round, need int64) error {
	for rd.bytes < need && len(rd.victims) < maxVictims {
		list, err := c.index.page(ctx, []byte{'o'}, objectKey(c.hand.object), 64)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			c.hand = hand{}
			rd.wrapped = true
			return nil
		}
		for _, e := range list {
			if rd.bytes >= need || len(rd.victims) >= maxVictims {
				break
			}
			object := binary.BigEndian.Uint64(e.key[1:])
			if c.hand.object != object {
				c.hand = hand{object: object}
			}
			if k, ok := readKey(e.value); ok {
				c.hand = hand{object: object + 1}
				err = c.consider(rd, k, object)
			} else {
				err = c.sweepPack(ctx, rd, object)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// hand is where the clock stands: at an object, and for a pack at a place in it.
type hand struct {
	object uint64
	base   int64
}

// sweepPack considers the members of a pack from the hand on.
func (c *Cache) sweepPack(ctx context.Context, rd *round, object uint64) error {
	c.objects.seal(object)
	prefix := memberPrefix(object)
	from := binary.BigEndian.AppendUint64(memberPrefix(object), uint64(c.hand.base))
	for len(rd.victims) < maxVictims {
		list, err := c.index.page(ctx, prefix, from, groupSize)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			rd.packs = append(rd.packs, object)
			c.hand = hand{object: object + 1}
			return nil
		}
		for _, e := range list {
			base, k, ok := readMember(e.key)
			if !ok {
				continue
			}
			c.hand.base = base + 1
			if err := c.consider(rd, k, object); err != nil {
				return err
			}
		}
		from = append(list[len(list)-1].key, 0)
	}
	return nil
}

// readMember reads an 'l' key.
func readMember(b []byte) (base int64, k key, ok bool) {
	if len(b) < 17 {
		return 0, k, false
	}
	k, ok = readKey(b[17:])
	return int64(binary.BigEndian.Uint64(b[9:])), k, ok
}

// consider makes a segment a candidate if it is not kept and was not used.
func (c *Cache) consider(rd *round, k key, object uint64) error {
	r, err := c.memory.acquire(k)
	if err != nil {
		return err
	}
	ct := r.cur.Load()
	spare := ct.object != object
	if !spare {
		spare, err = c.isKept(r, ct)
	}
	switch {
	case spare || err != nil:
	case rd.live != nil:
		if spare = rd.live(k.id); !spare {
			r.ref.Store(0) // who reads it now keeps it
		}
	case r.ref.Load() > 0:
		r.ref.Add(-1)
		r.dirty.Store(true)
		spare = true
	}
	if spare || err != nil {
		c.memory.release(r)
		return err
	}
	rd.victims = append(rd.victims, victim{r, r.cur.Load()})
	rd.bytes += ct.charge()
	return nil
}

// isKept says whether an owner keeps a segment. The keeps are durable and the
// record's flag is not: after a crash they may differ, and are made equal here.
func (c *Cache) isKept(r *record, ct *content) (bool, error) {
	kept, err := c.index.has(keepKey(r.key.id, ""))
	if err != nil || kept == ct.kept {
		return kept, err
	}
	c.keeping.Lock()
	defer c.keeping.Unlock()
	if kept, err = c.index.has(keepKey(r.key.id, "")); err != nil {
		return kept, err
	}
	return kept, c.setKeptSegment(r.key, kept)
}

// secondChance leaves in rd what nobody uses.
func (c *Cache) secondChance(ctx context.Context, rd *round) error {
	var list []uint64
	seen := map[uint64]bool{}
	for _, v := range rd.victims {
		for _, n := range v.r.readers() {
			if !seen[n] {
				seen[n] = true
				list = append(list, n)
			}
		}
	}
	if len(list) == 0 || c.cfg.Kernel == nil {
		return nil
	}
	busy, err := c.cfg.Kernel.InUse(ctx)
	if err == nil {
		c.spare(rd, func(n uint64) bool { _, ok := busy[n]; return ok })
		var idle []uint64
		for _, n := range list {
			if _, ok := busy[n]; !ok {
				idle = append(idle, n)
			}
		}
		err = c.cfg.Kernel.DropPages(ctx, idle)
	}
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// Nobody can say what is in use: only what was never read may go.
		c.cfg.Log.Warn("the kernel cannot be asked what is in use", "err", err)
		c.spare(rd, func(uint64) bool { return true })
		return nil
	}
	return c.cfg.wait(ctx, c.cfg.Grace)
}

// spare takes the candidates with a reader that is in use off the list.
func (c *Cache) spare(rd *round, inUse func(node uint64) bool) {
	left := rd.victims[:0]
	for _, v := range rd.victims {
		used := false
		for _, n := range v.r.readers() {
			used = used || inUse(n)
		}
		if !used {
			left = append(left, v)
			continue
		}
		v.r.use(0, v.ct.block)
		c.memory.release(v.r)
	}
	rd.victims = left
}

// take evicts those of group that are still unused. Order: that the bytes are
// gone is made durable first, then they go; a crash between them leaves a file
// nobody knows, which Open removes.
func (c *Cache) take(group []victim) error {
	b := c.index.batch()
	var taken []victim
	defer func() {
		for _, v := range taken {
			v.r.mu.Unlock()
		}
	}()
	for _, v := range group {
		if !v.r.mu.TryLock() { // somebody puts into it, or verifies it
			continue
		}
		ct := v.r.cur.Load()
		if !ct.same(v.ct) || ct.kept || v.r.ref.Load() > 0 {
			v.r.mu.Unlock()
			continue
		}
		taken = append(taken, victim{v.r, ct})
		c.note(b, v.r, ct, &content{})
		if err := c.noteParts(b, v.r.key); err != nil {
			return err
		}
	}
	if len(taken) == 0 {
		return nil
	}
	// An index that cannot be written must not keep the disk full: an object that
	// is missing is never taken for content, and Open strikes it off.
	if err := b.commit(durable); err != nil && c.index.Broken() == nil {
		return err
	}
	c.account(b.sum)
	for _, v := range taken {
		v.r.cur.Store(&content{})
		c.evicted.Add(v.ct.charge())
		if v.ct.packed {
			continue
		}
		if err := c.objects.remove(v.ct.object); err != nil {
			c.cfg.Log.Warn("remove evicted content", "err", err) // Open tries again
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
