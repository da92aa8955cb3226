package cache

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"strings"

	"github.com/floxctl/flox"
)

// Keep adds ids (of files and of blocks, here or not yet) to what owner keeps:
// they are never evicted until Unkeep. It is durable when Keep returns.
func (c *Cache) Keep(ctx context.Context, owner string, ids iter.Seq[flox.CID]) error {
	if owner == "" || len(owner) > 1024 || strings.ContainsRune(owner, 0) {
		return fmt.Errorf("keep: owner %.40q: want 1 to 1024 bytes without NUL: %w", owner, flox.ErrBadInput)
	}
	var list []flox.CID
	flush := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := c.keep(owner, list)
		list = list[:0]
		return err
	}
	for id := range ids {
		if list = append(list, id); len(list) == 256 {
			if err := flush(); err != nil {
				return fmt.Errorf("keep for %s: %w", owner, err)
			}
		}
	}
	if err := flush(); err != nil {
		return fmt.Errorf("keep for %s: %w", owner, err)
	}
	return nil
}

func (c *Cache) keep(owner string, ids []flox.CID) error {
	c.keeping.Lock() // a segment put meanwhile would not see the keep
	defer c.keeping.Unlock()
	b := c.index.batch()
	for _, id := range ids {
		b.set(groupKey(owner, id), nil)
		b.set(keepKey(id, owner), nil)
	}
	if err := b.commit(durable); err != nil {
		return err
	}
	for _, id := range ids {
		if err := c.setKept(id, true); err != nil {
			return err
		}
	}
	return nil
}

// setKept marks all segments of id that are here.
func (c *Cache) setKept(id flox.CID, kept bool) error {
	var keys []key
	prefix := append([]byte{'f'}, id[:]...)
	err := c.index.scan(context.Background(), prefix, prefix, func(k, _ []byte) error {
		if k, ok := readKey(k[1:]); ok {
			keys = append(keys, k)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, k := range keys {
		if err := c.setKeptSegment(k, kept); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cache) setKeptSegment(k key, kept bool) error {
	r, err := c.memory.acquire(k)
	if err != nil {
		return err
	}
	defer c.memory.release(r)
	r.mu.Lock()
	defer r.mu.Unlock()
	ct := r.cur.Load()
	if ct.object == 0 || ct.kept == kept {
		return nil
	}
	next := *ct
	next.kept = kept
	return c.change(c.index.batch(), r, ct, &next, lazy)
}

// Unkeep lets go of all that owner keeps. ErrNotFound: owner keeps nothing.
func (c *Cache) Unkeep(ctx context.Context, owner string) error {
	found := false
	err := c.index.pages(ctx, groupKey(owner, flox.CID{})[:len(owner)+2], func(list []entry) error {
		found = true
		return c.unkeep(owner, list)
	})
	if err == nil && !found {
		err = flox.ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("unkeep %s: %w", owner, err)
	}
	return nil
}

func (c *Cache) unkeep(owner string, list []entry) error {
	c.keeping.Lock()
	defer c.keeping.Unlock()
	b := c.index.batch()
	var ids []flox.CID
	for _, e := range list {
		if len(e.key) != len(owner)+2+flox.CIDSize {
			continue
		}
		id := flox.CID(e.key[len(owner)+2:])
		ids = append(ids, id)
		b.del(e.key)
		b.del(keepKey(id, owner))
	}
	if err := b.commit(durable); err != nil {
		return err
	}
	for _, id := range ids {
		others, err := c.index.has(keepKey(id, ""))
		if err == nil && !others {
			err = c.setKept(id, false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Owners lists the names of the owners in order. Unlike Keeps it does not look
// at what they keep.
func (c *Cache) Owners(ctx context.Context) (out []string, err error) {
	for from := []byte{'g'}; ; {
		list, err := c.index.page(ctx, []byte{'g'}, from, 1)
		if err != nil {
			return nil, fmt.Errorf("list owners: %w", err)
		}
		if len(list) == 0 {
			return out, nil
		}
		owner, _, ok := bytes.Cut(list[0].key[1:], []byte{0})
		if ok {
			out = append(out, string(owner))
		}
		from = append(append([]byte{'g'}, owner...), 1) // behind all that it keeps
	}
}

// Keeps lists the owners in order.
func (c *Cache) Keeps(ctx context.Context) (out []Kept, err error) {
	err = c.index.pages(ctx, []byte{'g'}, func(list []entry) error {
		for _, e := range list {
			i := bytes.IndexByte(e.key, 0)
			if i < 0 || len(e.key) != i+1+flox.CIDSize {
				continue
			}
			owner := string(e.key[1:i])
			if len(out) == 0 || out[len(out)-1].Owner != owner {
				out = append(out, Kept{Owner: owner})
			}
			n, err := c.present(ctx, flox.CID(e.key[i+1:]))
			if err != nil {
				return err
			}
			out[len(out)-1].Files++
			out[len(out)-1].Bytes += n
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list keeps: %w", err)
	}
	return out, nil
}

// present is how many bytes of id are here.
func (c *Cache) present(ctx context.Context, id flox.CID) (n int64, err error) {
	prefix := append([]byte{'f'}, id[:]...)
	err = c.index.scan(ctx, prefix, prefix, func(_, v []byte) error {
		if ct, _, _, err := decode(v); err == nil {
			n += length(ct.ext)
		}
		return nil
	})
	return n, err
}
