package content

import (
	"context"
	"fmt"
	"math"

	"github.com/floxctl/flox"
)

// file gives the record of regular file i.
func (m *Manifest) file(ctx context.Context, i uint32) (*rec, error) {
	g, k, err := m.at(ctx, i)
	if err != nil {
		return nil, err
	}
	r := g.rec(k)
	if r.kind != flox.Regular {
		return nil, fmt.Errorf("manifest %s: entry %d is a %s, want a regular file: %w", m.id, i, r.kind, flox.ErrBadInput)
	}
	return r, nil
}

// Inline gives the content of a regular file that lies in the manifest; false
// if it is in chunks.
func (m *Manifest) Inline(ctx context.Context, i uint32) ([]byte, bool, error) {
	r, err := m.file(ctx, i)
	if err != nil || r.file != nil {
		return nil, false, err
	}
	return []byte(r.data), true, nil
}

// Chunks calls yield with the chunks that cover the bytes [off, off+n) of
// regular file i, and each chunk's offset in the file, until yield returns false.
// n < 0 means up to the end. An inline file has none.
func (m *Manifest) Chunks(ctx context.Context, i uint32, off, n int64, yield func(off int64, c flox.Chunk) bool) error {
	r, err := m.file(ctx, i)
	if err != nil {
		return err
	}
	if off < 0 {
		return fmt.Errorf("manifest %s: chunks of entry %d from %d: %w", m.id, i, off, flox.ErrBadInput)
	}
	_, err = m.chunks(ctx, r, off, n, yield)
	return err
}

// chunks is Chunks of r. It reports whether yield wants to go on.
func (m *Manifest) chunks(ctx context.Context, r *rec, off, n int64, yield func(off int64, c flox.Chunk) bool) (bool, error) {
	end := int64(r.size)
	if n >= 0 && off < end && n < end-off {
		end = off + n
	}
	switch {
	case off >= end || r.file == nil:
		return true, nil
	case len(r.file.lists) > 0:
		return m.listed(ctx, r, off, end, yield)
	case len(r.file.chunks) > 0:
		return cover(r.file.chunks, 0, off, end, yield), nil
	}
	return yield(0, flox.Chunk{ID: r.file.id, Size: uint32(r.size)}), nil
}

// cover yields those of chunks, the first of which lies at the given offset, that
// hold bytes of [off, end).
func cover(chunks []flox.Chunk, at, off, end int64, yield func(off int64, c flox.Chunk) bool) bool {
	for _, c := range chunks {
		next := at + int64(c.Size)
		if at >= end {
			break
		}
		if next > off && !yield(at, c) {
			return false
		}
		at = next
	}
	return true
}

// listed is chunks of a file whose chunks are in lists: it reads only those that
// cover the range.
func (m *Manifest) listed(ctx context.Context, r *rec, off, end int64, yield func(off int64, c flox.Chunk) bool) (bool, error) {
	at := int64(0)
	for k, l := range r.file.lists {
		next := at + int64(l.bytes)
		if at >= end {
			break
		}
		if next > off {
			_, chunks, err := m.list(ctx, r, k)
			if err != nil {
				return false, err
			}
			if !cover(chunks, at, off, end, yield) {
				return false, nil
			}
		}
		at = next
	}
	return true, nil
}

// Lists calls yield with the chunk lists, which are blocks of their own, that
// Chunks of the same range reads, until yield returns false. Most files have none.
func (m *Manifest) Lists(ctx context.Context, i uint32, off, n int64, yield func(id flox.CID) bool) error {
	r, err := m.file(ctx, i)
	if err != nil || r.file == nil {
		return err
	}
	end := int64(r.size)
	if n >= 0 && off < end && n < end-off {
		end = off + n
	}
	at := int64(0)
	for _, l := range r.file.lists {
		next := at + int64(l.bytes)
		if at < end && next > off && !yield(l.id) {
			break
		}
		at = next
	}
	return nil
}

// Blocks calls yield with every block the path consists of and its size in
// bytes, manifest blocks included, repeats possible, until yield returns false.
func (m *Manifest) Blocks(ctx context.Context, yield func(id flox.CID, size uint32) bool) error {
	more := yield(m.id, m.size)
	for n := 0; n < len(m.root.pages) && more; n++ {
		if !m.embedded() {
			more = yield(m.root.pages[n].id, m.root.pages[n].bytes)
		}
		g, err := m.page(ctx, n)
		if err != nil {
			return err
		}
		for k := 0; k < g.len() && more; k++ {
			if more, err = m.fileBlocks(ctx, g.rec(k), yield); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Manifest) fileBlocks(ctx context.Context, r *rec, yield func(id flox.CID, size uint32) bool) (more bool, err error) {
	if r.file == nil {
		return true, nil
	}
	more = true
	for k := 0; k < len(r.file.lists) && more; k++ {
		b, chunks, err := m.list(ctx, r, k)
		if err != nil {
			return false, err
		}
		more = yield(r.file.lists[k].id, uint32(len(b)))
		more = more && cover(chunks, 0, 0, math.MaxInt64, func(_ int64, c flox.Chunk) bool { return yield(c.ID, c.Size) })
	}
	if !more || len(r.file.lists) > 0 {
		return more, nil
	}
	return m.chunks(ctx, r, 0, -1, func(_ int64, c flox.Chunk) bool { return yield(c.ID, c.Size) })
}

// list reads chunk list k of a file.
func (m *Manifest) list(ctx context.Context, r *rec, k int) ([]byte, []flox.Chunk, error) {
	l := r.file.lists[k]
	b, err := m.blocks.Get(ctx, l.id)
	if err != nil {
		return nil, nil, fmt.Errorf("manifest %s: chunk list %d of %q: %w", m.id, k, r.name, err)
	}
	chunks, err := decodeList(b, m.root.params, l.bytes, k == len(r.file.lists)-1)
	if err != nil {
		return nil, nil, fmt.Errorf("manifest %s: chunk list %d of %q: %w", m.id, k, r.name, err)
	}
	return b, chunks, nil
}
