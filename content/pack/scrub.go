package pack

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/time/rate"

	"github.com/floxctl/flox"
)

// ScrubOptions of ScrubWith. The zero value reads everything as fast as it can and
// repairs nothing.
type ScrubOptions struct {
	// Rate bounds what is read of the packs, in bytes per second; 0 = no bound.
	Rate int64
	// After is where to go on: the Cursor of an earlier scrub.
	After Cursor
	// Progress, if set, is told now and then how far the scrub is, and at the end.
	Progress func(Scrubbed)
	// Repair, if set, gives the plain bytes of a damaged block from elsewhere; they
	// are checked and replace it.
	Repair func(ctx context.Context, id flox.CID) ([]byte, error)
}

// Scrubbed is how far a scrub is.
type Scrubbed struct {
	Cursor   Cursor // ScrubOptions.After of a scrub that goes on from here
	Blocks   uint64 // read
	Bytes    int64  // of their frames
	Bad      uint64 // found damaged, the index and packs' first bytes included
	Repaired uint64 // of those
}

// Scrub is ScrubWith without options.
func (s *Store) Scrub(ctx context.Context, report func(bad flox.CID, err error)) error {
	_, err := s.ScrubWith(ctx, ScrubOptions{}, report)
	return err
}

// ScrubWith reads everything behind opts.After and reports every block that cannot
// be read back and every damage of the index and of a pack's first bytes (the zero
// CID), until ctx ends; but nothing that it could repair. A damaged index is made
// anew by the next Open. The error is only of the scrub itself.
func (s *Store) ScrubWith(ctx context.Context, opts ScrubOptions, report func(bad flox.CID, err error)) (Scrubbed, error) {
	b := &scrub{s: s, ScrubOptions: opts, report: report, done: Scrubbed{Cursor: opts.After}}
	if opts.Rate > 0 {
		b.limit = rate.NewLimiter(rate.Limit(opts.Rate), maxFrame)
	}
	if err := s.Sync(ctx); err != nil {
		return b.done, err
	}
	steps := []func(context.Context) error{b.tables, b.places, b.packs}
	if opts.After != (Cursor{}) {
		steps = steps[2:] // the index was seen
	}
	for _, step := range steps {
		err := step(ctx)
		if ctx.Err() != nil {
			return b.done, ctx.Err()
		}
		if err != nil {
			b.bad(flox.CID{}, err)
		}
	}
	if b.Progress != nil {
		b.Progress(b.done)
	}
	return b.done, nil
}

// scrub is one that runs.
type scrub struct {
	s *Store
	ScrubOptions
	report func(flox.CID, error)
	limit  *rate.Limiter // nil = none
	done   Scrubbed
	told   int64 // bytes when Progress was called last
}

// bad notes a damage that stays.
func (b *scrub) bad(id flox.CID, err error) {
	b.done.Bad++
	b.report(id, err)
}

// repair replaces a damaged block, or reports it. The error is that of ctx.
func (b *scrub) repair(ctx context.Context, id flox.CID, damage error) error {
	if b.Repair == nil {
		b.bad(id, damage)
		return nil
	}
	plain, err := b.Repair(ctx, id)
	if err == nil {
		err = b.s.Replace(ctx, id, plain)
	}
	if ctx.Err() != nil {
		return ctx.Err() // the next scrub finds it again
	}
	if err != nil {
		b.bad(id, fmt.Errorf("%w; not repaired: %w", damage, err))
		return nil
	}
	b.done.Bad++
	b.done.Repaired++
	b.s.log.Warn("damaged block repaired", "block", id.String(), "damage", damage)
	return nil
}

// tables checks the checksums of the index's files.
func (b *scrub) tables(ctx context.Context) error {
	s := b.s
	db := s.index.acquire()
	defer s.index.release(db)
	done, err := db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	select {
	case <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	levels, err := db.SSTables()
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	for _, t := range slices.Concat(levels...) {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(db.dir, t.BackingSSTNum.String()+".sst")
		err := checkTable(ctx, path)
		// Pebble removes tables whenever it likes.
		if err == nil || errors.Is(err, iofs.ErrNotExist) {
			continue
		}
		err = fmt.Errorf("index %s: %w: %w; it is made anew from the packs", path, err, flox.ErrCorrupt)
		b.bad(flox.CID{}, err)
		db.rot(err)
	}
	return nil
}

func checkTable(ctx context.Context, path string) error {
	f, err := vfs.Default.Open(path)
	if err != nil {
		return err
	}
	// The Reader may have closed it already.
	defer f.Close() //nolint:errcheck // read only
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return err
	}
	r, err := sstable.NewReader(ctx, readable, sstable.ReaderOptions{})
	if err != nil {
		return err
	}
	return errors.Join(r.ValidateBlockChecksums(), r.Close())
}

// places checks that both directions of the index agree.
func (b *scrub) places(ctx context.Context) error {
	s := b.s
	return s.index.each(keyBlock, nil, func(k, v []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(k) != 1+flox.CIDSize {
			return fmt.Errorf("an index key of %d bytes: %w", len(k), flox.ErrCorrupt)
		}
		id := flox.CID(k[1:])
		l, err := parseLoc(v)
		if err != nil {
			b.bad(id, fmt.Errorf("block %s: %w", id, err))
			return nil
		}
		back, err := s.index.get(frameKey(l.pack, l.off))
		if err == nil && string(back) != string(id[:]) {
			err = fmt.Errorf("its place is that of another block: %w", flox.ErrCorrupt)
		}
		if now, findErr := s.index.find(id); err != nil && findErr == nil && now == l {
			b.bad(id, s.damaged(id, l, err))
		}
		return nil
	})
}

// packs reads every frame the index knows.
func (b *scrub) packs(ctx context.Context) error {
	var frame, plain []byte
	return b.s.eachFrame(ctx, b.After, func(pack uint32) error {
		if err := b.magic(pack); err != nil {
			b.bad(flox.CID{}, err)
		}
		return nil
	}, func(c Cursor, id flox.CID, l loc) error {
		if b.limit != nil {
			if err := b.limit.WaitN(ctx, int(l.frameSize())); err != nil {
				return err
			}
		}
		h, stored, err := b.s.readFrame(ctx, &frame, id, l)
		if err == nil {
			err = h.check(stored)
		}
		if err == nil {
			plain, err = b.s.decode(plain[:0], h, stored)
		}
		if err != nil && b.s.stillAt(id, l) {
			if err := b.repair(ctx, id, b.s.damaged(id, l, err)); err != nil {
				return err
			}
		}
		b.done.Cursor = c
		b.done.Blocks++
		b.done.Bytes += l.frameSize()
		if b.Progress != nil && b.done.Bytes-b.told >= progressBytes {
			b.told = b.done.Bytes
			b.Progress(b.done)
		}
		return ctx.Err()
	})
}

// progressBytes is how much is read between two calls of Progress.
const progressBytes = 16 << 20

// magic checks the bytes before a pack's first frame; what they should be is known.
func (b *scrub) magic(pack uint32) error {
	err := b.s.checkMagic(pack)
	if !errors.Is(err, flox.ErrCorrupt) || b.Repair == nil {
		return err
	}
	f, openErr := os.OpenFile(b.s.packPath(pack), os.O_WRONLY, 0)
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	defer f.Close()
	if _, writeErr := f.WriteAt([]byte(fileMagic), 0); writeErr != nil {
		return errors.Join(err, writeErr)
	}
	if syncErr := f.Sync(); syncErr != nil {
		return errors.Join(err, syncErr)
	}
	b.done.Bad++
	b.done.Repaired++
	b.s.log.Warn("damaged start of a pack repaired", "pack", b.s.packPath(pack), "damage", err)
	return nil
}

func (s *Store) checkMagic(pack uint32) error {
	p, err := s.files.acquire(pack)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil // every block of it is reported
	}
	if err != nil {
		return err
	}
	defer s.files.release(p)
	got := make([]byte, len(fileMagic))
	if _, err := p.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", s.packPath(pack), err)
	}
	if string(got) != fileMagic {
		return fmt.Errorf("%s begins with %q: %w", s.packPath(pack), got, flox.ErrCorrupt)
	}
	return nil
}
