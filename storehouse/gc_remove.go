package storehouse

import (
	"context"
	"errors"
	"fmt"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// maxBlockers bounds what is remembered of why paths cannot go yet; what is
// forgotten is looked for again.
const maxBlockers = 1 << 18

// remover removes condemned paths, referrers first.
type remover struct {
	*collection
	last     uint64            // log index up to which marks count
	blockers map[string]string // by hash part: a referrer that was there
	stack    []string          // hash parts to look at
	batch    []string          // base names, in the order in which they may go
	going    map[string]bool   // hash parts of batch
	removed  uint64
	bytes    uint64 // NARs of what is removed or in batch
}

// remove removes what is condemned and has no referrer, from the leaves on. What a
// mark came back from, or a valid path refers to, stays; the state machine decides.
func (c *collection) remove(ctx context.Context, last uint64) error {
	if last == 0 {
		return nil
	}
	c.begin(phaseRemove, c.now.GetDeadPaths())
	if err := c.reviveRoots(ctx); err != nil {
		return err
	}
	r := &remover{collection: c, last: last, blockers: map[string]string{}, going: map[string]bool{}}
	err := c.pages(ctx, condemnedKey, func(page [][2][]byte) error {
		for _, kv := range page {
			r.stack = append(r.stack, string(kv[0]))
		}
		return r.drain(ctx)
	})
	if err != nil {
		return err
	}
	c.now.DeadPaths = r.removed
	if c.opts.Machine != nil {
		c.now.DeadBytes = r.bytes
	}
	return r.reviveRest(ctx)
}

// drain looks at everything on the stack.
func (r *remover) drain(ctx context.Context) error {
	for len(r.stack) > 0 {
		err := r.read(ctx, cluster.Local, func(view *cluster.Reader) error {
			for len(r.stack) > 0 && len(r.batch) < collectBatch {
				hashPart := r.stack[len(r.stack)-1]
				r.stack = r.stack[:len(r.stack)-1]
				if err := r.look(view, hashPart); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
		if err == nil {
			err = r.flush(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// look puts a path into the batch if it may go, and its references on the stack.
func (r *remover) look(view *cluster.Reader, hashPart string) error {
	if r.going[hashPart] || !r.opts.Machine.may(hashPart) || r.opts.Machine.enough(r.bytes) {
		return nil
	}
	mark, err := readCondemned(view, hashPart)
	if errors.Is(err, flox.ErrNotFound) || err == nil && mark.index > r.last {
		return nil
	}
	if err != nil {
		return err
	}
	info, err := readInfo(view, hashPart)
	if err != nil {
		return fmt.Errorf("facts: a mark on %s: %w", hashPart, err)
	}
	path := flox.StorePath(info.GetPath())
	blocked, err := r.blocked(view, path)
	if err != nil || blocked {
		return err
	}
	r.batch = append(r.batch, info.GetPath())
	r.going[hashPart] = true
	r.bytes += info.GetNarSize()
	for _, ref := range info.GetReferences() {
		if h := flox.StorePath(ref).HashPart(); h != hashPart {
			r.stack = append(r.stack, h)
		}
	}
	return nil
}

// blocked says whether something refers to a path that is not going. Many may
// refer to it: the search goes on where it ended last time.
func (r *remover) blocked(view *cluster.Reader, p flox.StorePath) (bool, error) {
	hashPart := p.HashPart()
	from := referrer(p, flox.StorePath(r.blockers[hashPart]+"-"))[:1+flox.HashPartLen+len(r.blockers[hashPart])]
	first := hashKey(referrerKey, hashPart)
	blocker := ""
	err := view.Iterate(first, from, func(key, _ []byte) bool {
		if by := string(key[len(first):]); !r.going[by] && by != hashPart {
			blocker = by
		}
		return blocker == ""
	})
	if err != nil || blocker == "" {
		delete(r.blockers, hashPart)
		return false, err
	}
	if len(r.blockers) >= maxBlockers {
		clear(r.blockers)
	}
	r.blockers[hashPart] = blocker
	return true, nil
}

// flush removes the batch.
func (r *remover) flush(ctx context.Context) error {
	if len(r.batch) == 0 {
		return nil
	}
	reply, err := propose(freeing(ctx), r.session, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Remove{Remove: &floxv1.RemovePaths{
		Paths:     r.batch,
		Condemned: &floxv1.RemoveCondemned{Index: r.last, GraceMs: uint64(r.grace.Milliseconds())}, //nolint:gosec // not negative
	}}})
	if err != nil {
		return err
	}
	r.removed += uint64(len(reply.GetDone()))
	if r.opts.Machine != nil {
		for _, i := range reply.GetDone() {
			r.now.Paths = append(r.now.Paths, r.batch[i])
		}
	}
	r.batch = nil
	clear(r.going)
	r.step(r.removed, r.now.GetTotal())
	return nil
}

// reviveRest takes the marks off what stays because something valid refers to it.
func (r *remover) reviveRest(ctx context.Context) error {
	return r.pages(ctx, condemnedKey, func(page [][2][]byte) error {
		var rest []string
		for _, kv := range page {
			mark, err := parseCondemnation(kv[1])
			if err != nil {
				return err
			}
			if mark.index <= r.last {
				rest = append(rest, string(kv[0]))
			}
		}
		return r.reviveUsed(ctx, rest)
	})
}
