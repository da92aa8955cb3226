package cache

import (
	"context"
	"errors"

	"github.com/floxctl/flox"
)

// compact moves what lives in a pack to a new one and removes the pack, if
// at least a quarter of it is dead.
func (c *Cache) compact(ctx context.Context, object uint64) error {
	size := c.objects.seal(object)
	members, live, err := c.members(ctx, object)
	if err != nil {
		return err
	}
	if live > size/4*3 {
		return nil
	}
	for len(members) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		group := members[:min(groupSize, len(members))]
		members = members[len(group):]
		if err := c.move(object, group); err != nil {
			return err
		}
	}
	if left, err := c.index.has(memberPrefix(object)); err != nil || left {
		return err
	}
	b := c.index.batch()
	b.del(objectKey(object))
	if err := b.commit(lazy); err != nil {
		return err
	}
	return c.objects.remove(object)
}

// members gives the segments in a pack and how many bytes they take of it.
func (c *Cache) members(ctx context.Context, object uint64) (list []key, live int64, err error) {
	err = c.index.pages(ctx, memberPrefix(object), func(page []entry) error {
		for _, e := range page {
			_, k, ok := readMember(e.key)
			if !ok {
				continue
			}
			r, err := c.memory.acquire(k)
			if err != nil {
				return err
			}
			if ct := r.cur.Load(); ct.object == object {
				live += ct.length
				list = append(list, k)
			}
			c.memory.release(r)
		}
		return nil
	})
	return list, live, err
}

// moved is a segment on its way to another pack, its record locked.
type moved struct {
	r         *record
	old, next *content
}

// move copies segments of a pack to the current pack, or gives up on those that
// cannot be copied. Order: copies durable, then the index, then the caller
// removes the pack; so they are as safe as they were before.
func (c *Cache) move(object uint64, keys []key) (err error) {
	var list []moved
	defer func() {
		for _, m := range list {
			m.r.mu.Unlock()
			c.memory.release(m.r)
		}
	}()
	var packs []uint64
	b := c.index.batch()
	for _, k := range keys {
		r, err := c.memory.acquire(k)
		if err != nil {
			return err
		}
		r.mu.Lock() // never more than one segment per small file: no other order exists
		old := r.cur.Load()
		m := moved{r, old, old}
		list = append(list, m)
		if old.object != object {
			continue
		}
		next, err := c.copyOut(old)
		if err != nil {
			if old.kept && errors.Is(err, flox.ErrFull) {
				continue // stays where it is
			}
			c.cfg.Log.Debug("small file dropped while packs are compacted", "file", k.id, "err", err)
			next = &content{}
			if err := c.noteParts(b, k); err != nil {
				return err
			}
			c.evicted.Add(old.length)
		} else {
			packs = append(packs, next.object)
		}
		list[len(list)-1].next = next
		c.note(b, r, old, next)
	}
	if err := c.objects.flush(packs); err != nil {
		return err
	}
	if err := b.commit(durable); err != nil {
		return err
	}
	c.account(b.sum)
	for _, m := range list {
		m.r.cur.Store(m.next)
	}
	return nil
}

// copyOut copies a segment's bytes into the current pack. What was trusted will
// be durable by itself; what was not must still be hashed.
func (c *Cache) copyOut(old *content) (*content, error) {
	next := *old
	var err error
	if next.object, next.base, err = c.objects.alloc(old.length); err != nil {
		return nil, err
	}
	next.ext = nil
	for _, e := range old.ext {
		buf := make([]byte, e.end-e.off)
		if err := c.preadAgain(old, buf, int64(e.off)); err != nil {
			return nil, err
		}
		if err := c.pwrite(&next, buf, int64(e.off)); err != nil {
			return nil, err
		}
		if !c.session.lost(e.gen) {
			e.gen = 0
		}
		next.ext = insert(next.ext, e, c.session.alike)
	}
	return &next, nil
}
