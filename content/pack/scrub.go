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

	"github.com/floxctl/flox"
)

// Scrub reads everything and reports every block that cannot be read back and
// every damage of the index and of a pack's first bytes (the zero CID), until
// ctx ends. It repairs nothing: a reported block can be put anew after Delete, and
// a damaged index is made anew by the next Open. The error is only of the scrub
// itself.
func (s *Store) Scrub(ctx context.Context, report func(bad flox.CID, err error)) error {
	if err := s.Sync(ctx); err != nil {
		return err
	}
	for _, step := range []func(context.Context, func(flox.CID, error)) error{s.scrubTables, s.scrubPlaces, s.scrubPacks} {
		err := step(ctx, report)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			report(flox.CID{}, err)
		}
	}
	return nil
}

// scrubTables checks the checksums of the index's files.
func (s *Store) scrubTables(ctx context.Context, report func(flox.CID, error)) error {
	done, err := s.index.db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	select {
	case <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	dir := filepath.Join(s.cfg.Dir, "index")
	levels, err := s.index.db.SSTables()
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	for _, t := range slices.Concat(levels...) {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(dir, t.BackingSSTNum.String()+".sst")
		err := checkTable(ctx, path)
		// Pebble removes tables whenever it likes.
		if err == nil || errors.Is(err, iofs.ErrNotExist) {
			continue
		}
		report(flox.CID{}, fmt.Errorf("index %s: %w: %w; restart to make it anew", path, err, flox.ErrCorrupt))
		if err := os.WriteFile(dir+rebuildNote, nil, 0o644); err != nil {
			return fmt.Errorf("index: %w", err)
		}
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

// scrubPlaces checks that both directions of the index agree.
func (s *Store) scrubPlaces(ctx context.Context, report func(flox.CID, error)) error {
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
			report(id, fmt.Errorf("block %s: %w", id, err))
			return nil
		}
		back, err := s.index.get(frameKey(l.pack, l.off))
		if err == nil && string(back) != string(id[:]) {
			err = fmt.Errorf("its place is that of another block: %w", flox.ErrCorrupt)
		}
		if now, findErr := s.index.find(id); err != nil && findErr == nil && now == l {
			report(id, s.damaged(id, l, err))
		}
		return nil
	})
}

// scrubPacks reads every frame the index knows.
func (s *Store) scrubPacks(ctx context.Context, report func(flox.CID, error)) error {
	s.index.mu.Lock()
	packs := make([]uint32, 0, len(s.index.packs))
	for id := range s.index.packs {
		packs = append(packs, id)
	}
	s.index.mu.Unlock()
	var frame, plain []byte
	for _, pack := range packs {
		if err := s.scrubMagic(pack); err != nil {
			report(flox.CID{}, err)
		}
		err := s.index.frames(pack, func(id flox.CID, off uint32) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			l, err := s.lookup(id)
			if err != nil || l.pack != pack || l.off != off {
				if err != nil && !errors.Is(err, flox.ErrNotFound) {
					report(id, err)
				}
				return nil // deleted or moved meanwhile
			}
			h, stored, err := s.readFrame(&frame, id, l)
			if err == nil {
				err = h.check(stored)
			}
			if err == nil {
				plain, err = s.decode(plain[:0], h, stored)
			}
			if err != nil {
				if now, findErr := s.lookup(id); findErr == nil && now == l {
					report(id, s.damaged(id, l, err))
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// scrubMagic checks the bytes before a pack's first frame.
func (s *Store) scrubMagic(pack uint32) error {
	p, err := s.files.acquire(pack)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil // every block of it is reported
	}
	if err != nil {
		return err
	}
	defer s.files.release(p)
	b := make([]byte, len(fileMagic))
	if _, err := p.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", s.packPath(pack), err)
	}
	if string(b) != fileMagic {
		return fmt.Errorf("%s begins with %q: %w", s.packPath(pack), b, flox.ErrCorrupt)
	}
	return nil
}
