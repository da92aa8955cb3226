package backup

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
)

// uploads is how many objects are written at once. With the one being filled each
// takes ObjectSize of memory.
const uploads = 2

// Writer adds blocks to a place. One goroutine uses it.
type Writer struct {
	c      *Contents
	size   int             // of an object
	ctx    context.Context //nolint:containedctx // ends with the first failed upload
	group  *errgroup.Group
	now    *builder // nil = none begun
	number uint32   // of that
	blocks uint64
	bytes  atomic.Uint64
}

// Writer begins to add blocks until Close, in objects of about so many bytes; 0 = ObjectSize.
func (c *Contents) Writer(ctx context.Context, size int) *Writer {
	if size == 0 {
		size = ObjectSize
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(uploads)
	return &Writer{c: c, size: size, ctx: ctx, group: group}
}

// Add adds a block as a pack store keeps it: zstd, or its plain bytes. It counts as
// used. It is durable after Close.
func (w *Writer) Add(id flox.CID, stored []byte, plain uint32, zstd bool) error {
	if err := context.Cause(w.ctx); err != nil {
		return err
	}
	if w.now == nil {
		w.now, w.number = newBuilder(), w.c.number(Object{})
	}
	e := entry{id: id, plain: plain, stored: uint32(len(stored)), zstd: zstd} //nolint:gosec // a block
	l := location{w.number, w.now.add(e, stored), e}
	if err := w.c.db.Set(id[:], l.bytes(), pebble.NoSync); err != nil {
		return fmt.Errorf("index of the backup's content: %w", err)
	}
	w.c.mu.Lock()
	w.c.used[w.number] = true
	w.c.mu.Unlock()
	w.blocks++
	if w.now.full(w.size) {
		w.flush()
	}
	return nil
}

// flush writes the object under way.
func (w *Writer) flush() {
	if w.now == nil {
		return
	}
	b, number := w.now, w.number
	w.now = nil
	w.group.Go(func() error {
		digest, object := b.finish()
		if err := w.c.place.put(w.ctx, objectName(digest), object); err != nil {
			return err
		}
		w.c.mu.Lock()
		w.c.objects[number] = Object{digest, int64(len(object))}
		w.c.mu.Unlock()
		w.bytes.Add(uint64(len(object)))
		return nil
	})
}

// Written is how many bytes of objects are durable.
func (w *Writer) Written() uint64 { return w.bytes.Load() }

// Blocks is how many blocks were added.
func (w *Writer) Blocks() uint64 { return w.blocks }

// Close writes what is left and waits until all is durable.
func (w *Writer) Close() error {
	if context.Cause(w.ctx) == nil {
		w.flush()
	}
	return w.group.Wait()
}
