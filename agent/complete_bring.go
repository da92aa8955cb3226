package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/cache"
)

// completeStep is how many bytes are completed at a time: readers who come
// meanwhile share the line with no more than this.
const completeStep = 2 << 20

// hereBlocks gives blocks of manifests that are on this machine's disk.
type hereBlocks struct{ cache *cache.Cache }

// Get implements flox.Blocks.
func (b hereBlocks) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	data, err := b.cache.Get(ctx, id)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, &unreachable{err}
	}
	return data, err
}

// quietBlocks gives blocks of manifests from the cache, else fetches them as
// background work.
type quietBlocks struct {
	a    *Agent
	path flox.StorePath
}

// Get implements flox.Blocks.
func (b quietBlocks) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	if data, err := b.a.cache.Get(ctx, id); err == nil {
		return data, nil
	}
	var out []byte
	err := b.a.ahead.fetch(ctx, aheadComplete, []piece{{chunk: flox.Chunk{ID: id}}}, b.a.hints(b.path), func(_ piece, data []byte) error {
		out = data
		return nil
	})
	if err == nil && out == nil {
		err = fmt.Errorf("block %s is not fetched ahead: %w", id, flox.ErrUnreachable)
	}
	return out, err
}

// look says what of a goal is not here. It asks the disk only.
func (c *completer) look(ctx context.Context, g goal) (missing uint64, whole bool) {
	if g.scope == scopeNames {
		for _, p := range c.closure(g.path) {
			if c.a.onlyStaged(p) {
				continue
			}
			info, ok := c.a.facts.get(p.HashPart())
			if !ok || ctx.Err() != nil {
				return 0, false
			}
			if _, err := c.manifestHere(ctx, info); err != nil {
				return 0, false
			}
		}
		return 0, true
	}
	info, ok := c.a.facts.get(g.path.HashPart())
	if !ok { // what is staged is on this disk, and stays in its place there
		return 0, c.a.onlyStaged(g.path)
	}
	m, err := c.manifestHere(ctx, info)
	if err != nil {
		if g.scope == scopeTree {
			missing = info.NarSize
		}
		return missing, false
	}
	t := &tree{Manifest: m, path: g.path, a: c.a}
	err = t.eachOf(ctx, g, func(_ uint32, e flox.Entry) error {
		missing += e.Size - c.a.localBytes(t, e)
		return ctx.Err()
	})
	return missing, err == nil && missing == 0
}

// manifestHere opens a manifest that is on the disk whole. What is only in memory
// does not count: the next process needs it too.
func (c *completer) manifestHere(ctx context.Context, info *flox.PathInfo) (*content.Manifest, error) {
	m, err := c.a.pages.Open(ctx, info.Manifest, hereBlocks{c.a.cache})
	if err != nil {
		return nil, err
	}
	for i, here := range c.a.cache.Has(m.Pages()) {
		if !here {
			return nil, fmt.Errorf("page %d of the manifest of %s is not here: %w", i, info.Path, flox.ErrUnreachable)
		}
	}
	return m, nil
}

// eachOf calls visit with the regular files a goal is about.
func (t *tree) eachOf(ctx context.Context, g goal, visit func(i uint32, e flox.Entry) error) error {
	if g.scope == scopeTree {
		return t.files(ctx, func(i uint32, _ string, e flox.Entry) error { return visit(i, e) })
	}
	for _, i := range g.files {
		e, err := t.Entry(ctx, i)
		if errors.Is(err, flox.ErrNotFound) {
			continue // a number from a damaged list
		}
		if err == nil && e.Kind == flox.Regular {
			err = visit(i, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bring fetches what is missing of a goal. Got says whether anything came at all.
// It ends with errNews when something new ran and this is not as urgent.
func (c *completer) bring(ctx context.Context, g goal, news func() bool) (got bool, err error) {
	if g.scope == scopeFiles {
		news = func() bool { return false }
	}
	b := &bringing{c: c, hints: g.path, news: news}
	if err := c.room(); err != nil {
		return false, err
	}
	info, err := c.a.lookup(ctx, g.path)
	if errors.Is(err, flox.ErrNotFound) && !g.kept {
		c.ran.forget(g.path)
		return false, err
	}
	if err != nil {
		return false, err
	}
	if g.scope == scopeNames {
		err = b.names(ctx, info)
	} else {
		err = b.content(ctx, g, info)
	}
	if err == nil {
		err = b.flush(ctx)
	}
	if err == nil {
		err = b.failed
	}
	if err == nil {
		if _, whole := c.missing(ctx, g); !whole {
			err = errNoRoom
		}
	}
	return b.got, err
}

// bringing collects pieces and fetches them, a step at a time.
type bringing struct {
	c      *completer
	hints  flox.StorePath
	news   func() bool
	pieces []piece
	size   uint64
	got    bool
	failed error // of a step of which a part came: the others may do better
}

// names brings the facts and the manifests of a closure: all root blocks in one
// step, then all pages.
func (b *bringing) names(ctx context.Context, info *flox.PathInfo) error {
	infos, err := b.c.a.closure(ctx, []*flox.PathInfo{info})
	if err != nil {
		return err
	}
	infos = slices.DeleteFunc(infos, func(one *flox.PathInfo) bool { return b.c.a.onlyStaged(one.Path) })
	for _, one := range infos {
		if err := b.block(ctx, one.Manifest); err != nil {
			return err
		}
	}
	if err := b.flush(ctx); err != nil {
		return err
	}
	for _, one := range infos {
		m, err := b.c.a.pages.Open(ctx, one.Manifest, quietBlocks{b.c.a, one.Path})
		if err != nil {
			return fmt.Errorf("manifest of %s: %w", one.Path, err)
		}
		if err := b.pages(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// content brings files of one path, its manifest first.
func (b *bringing) content(ctx context.Context, g goal, info *flox.PathInfo) error {
	m, err := b.c.a.pages.Open(ctx, info.Manifest, quietBlocks{b.c.a, info.Path})
	if err != nil {
		return fmt.Errorf("manifest of %s: %w", info.Path, err)
	}
	if err := b.pages(ctx, m); err != nil {
		return err
	}
	if err := b.flush(ctx); err != nil {
		return err
	}
	t := &tree{Manifest: m, path: g.path, a: b.c.a}
	return t.eachOf(ctx, g, func(i uint32, e flox.Entry) error { return b.file(ctx, t, i, e) })
}

// pages adds the pages of a manifest that are not on the disk.
func (b *bringing) pages(ctx context.Context, m *content.Manifest) error {
	for _, id := range m.Pages() {
		if err := b.block(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (b *bringing) block(ctx context.Context, id flox.CID) error {
	if b.c.a.cache.Has([]flox.CID{id})[0] {
		return nil
	}
	return b.add(ctx, piece{chunk: flox.Chunk{ID: id}})
}

// file adds the chunks of a file that are not here, or not what they should be.
func (b *bringing) file(ctx context.Context, t *tree, i uint32, e flox.Entry) error {
	file := cache.File{ID: e.File, Size: int64(e.Size)} //nolint:gosec // sizes fit
	if e.Size <= uint64(t.Params().InlineLimit) || b.c.a.cache.State(file, 0, file.Size) == cache.Hit {
		return nil
	}
	t.remember(ctx, i, &e)
	var failed error
	err := t.Chunks(ctx, i, 0, -1, func(off int64, chunk flox.Chunk) bool {
		switch b.c.a.cache.State(file, off, int64(chunk.Size)) {
		case cache.Hit:
			return true
		case cache.Unverified:
			if ok, err := b.c.a.cache.Verify(ctx, file, off, chunk); err == nil && ok {
				return true
			}
		case cache.Miss:
		}
		failed = b.add(ctx, piece{file: file, off: off, chunk: chunk})
		return failed == nil
	})
	return errors.Join(failed, err)
}

// add adds one piece, and fetches when there are enough for a step.
func (b *bringing) add(ctx context.Context, p piece) error {
	b.pieces = append(b.pieces, p)
	if b.size += uint64(p.chunk.Size); b.size < completeStep && len(b.pieces) < completeStep>>14 {
		return nil
	}
	return b.flush(ctx)
}

// flush fetches what was collected. An error is one to stop at: when a part of
// the step came, the others may do better.
func (b *bringing) flush(ctx context.Context) error {
	if len(b.pieces) == 0 {
		return ctx.Err()
	}
	if b.news() {
		return errNews
	}
	if err := b.c.room(); err != nil {
		return err
	}
	refused, came := b.c.a.cache.Usage().Refused, 0
	err := b.c.a.ahead.fetch(ctx, aheadComplete, b.pieces, b.c.a.hints(b.hints), func(piece, []byte) error {
		came++
		return nil
	})
	b.pieces, b.size = b.pieces[:0], 0
	b.got = b.got || came > 0
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case b.c.a.cache.Usage().Refused > refused:
		return errNoRoom
	case err != nil && came == 0:
		return err
	case err != nil:
		b.failed = err
	}
	return nil
}
