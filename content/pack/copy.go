package pack

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// Cursor is a place between two frames: behind the one at Offset of pack Pack. The
// zero Cursor is before everything. It outlives restarts, and frames are only ever
// added behind every Cursor handed out: what comes after a Cursor is all that came
// since, and what a Sweep moved.
type Cursor struct {
	Pack   uint64 `json:"pack"`
	Offset int64  `json:"offset"`
}

// Replace stores a block's plain bytes anew, whether or not it is there, and is
// for one that was found damaged. The new frame is durable before the index lets
// go of the old one. Errors: as Put.
func (s *Store) Replace(ctx context.Context, id flox.CID, plain []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkPlain("replace", id, plain); err != nil {
		return err
	}
	buf := frameBuffers.Get().(*[]byte)
	defer frameBuffers.Put(buf)
	h := s.encode(buf, id, plain)
	s.mu.Lock()
	err := s.usable()
	if err == nil {
		err = s.room(int64(len(*buf)))
	}
	if err == nil {
		_, err = s.write(h, *buf)
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.Sync(ctx)
}

// PutStored is Put for a block as another store's Stored gave it: it is checked,
// and kept as it is. Errors: as Put; ErrCorrupt also for what is no zstd.
func (s *Store) PutStored(ctx context.Context, id flox.CID, stored []byte, zstd bool) error {
	if !zstd {
		return s.Put(ctx, id, stored)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(stored) > content.MaxBlock {
		return fmt.Errorf("put block %s, %d bytes of zstd, want at most %d: %w", id, len(stored), content.MaxBlock, flox.ErrBadInput)
	}
	plain, err := s.dec.DecodeAll(stored, nil)
	if err != nil {
		return fmt.Errorf("put block %s: decompress: %w: %w", id, err, flox.ErrCorrupt)
	}
	if s.enc == nil || len(stored) >= len(plain) {
		return s.Put(ctx, id, plain)
	}
	if err := checkPlain("put", id, plain); err != nil {
		return err
	}
	return s.putFrame(ctx, id, func(buf *[]byte) header {
		h := header{id: id, plain: uint32(len(plain)), stored: uint32(len(stored)), enc: encodingZstd}
		h.crc = crc32.Checksum(stored, castagnoli)
		*buf = append(append((*buf)[:0], make([]byte, headerSize)...), stored...)
		h.put(*buf)
		return h
	})
}

// PutStored is Store.PutStored; a Sweep leaves the block alone until Close.
func (n *Session) PutStored(ctx context.Context, id flox.CID, stored []byte, zstd bool) error {
	n.pin(id)
	return n.store.PutStored(ctx, id, stored, zstd)
}

// EachStored calls f with every block that is there behind after, as Stored gives
// it, in the order of their place, and with the Cursor behind it; stored is f's
// only until it returns. What comes in meanwhile may or may not be among them; a
// block that a Sweep moves meanwhile may be given twice. An error of f ends it.
// Damaged blocks are passed over, counted and named in an ErrCorrupt at the end.
func (s *Store) EachStored(ctx context.Context, after Cursor, f func(c Cursor, id flox.CID, stored []byte, zstd bool) error) error {
	if err := s.Sync(ctx); err != nil {
		return err
	}
	var buf []byte
	var firstBad error
	bad := 0
	err := s.eachFrame(ctx, after, nil, func(c Cursor, id flox.CID, l loc) error {
		h, stored, err := s.readFrame(ctx, &buf, id, l)
		if err == nil {
			err = h.check(stored)
		}
		switch {
		case err == nil:
			return f(c, id, stored, h.enc == encodingZstd)
		case !errors.Is(err, flox.ErrCorrupt):
			return err
		case !s.stillAt(id, l):
			return nil
		}
		if bad++; firstBad == nil {
			firstBad = s.damaged(id, l, err)
		}
		return nil
	})
	if err == nil && bad > 0 {
		err = fmt.Errorf("%d blocks passed over, the first: %w", bad, firstBad)
	}
	return err
}

// eachFrame calls f with every block of the index behind after, in the order of
// their place. begin, if set, is called with each pack first.
func (s *Store) eachFrame(ctx context.Context, after Cursor, begin func(pack uint32) error, f func(c Cursor, id flox.CID, l loc) error) error {
	if after.Pack > math.MaxUint32 || after.Offset < 0 {
		return fmt.Errorf("block store %s: cursor %+v, want a pack of at most %d and an offset of at least 0: %w", s.cfg.Dir, after, uint32(math.MaxUint32), flox.ErrBadInput)
	}
	from := uint32(after.Pack)
	// One pack after the other is looked up: a sweep adds some and takes others.
	for pack, ok := s.index.packFrom(from); ok; pack, ok = s.index.packFrom(pack + 1) {
		if s.remote != nil && pack >= s.firstUnsynced() {
			return nil // what it gets would be before a Cursor
		}
		if begin != nil {
			if err := begin(pack); err != nil {
				return err
			}
		}
		err := s.index.frames(pack, func(id flox.CID, off uint32) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if pack == from && int64(off) <= after.Offset {
				return nil
			}
			l, err := s.lookup(id)
			if errors.Is(err, flox.ErrNotFound) || err == nil && (l.pack != pack || l.off != off) {
				return nil // deleted or moved meanwhile
			}
			if err != nil {
				return err
			}
			return f(Cursor{Pack: uint64(pack), Offset: int64(off)}, id, l)
		})
		if err != nil {
			return err
		}
		if pack == math.MaxUint32 {
			break
		}
	}
	return nil
}

// firstUnsynced gives the first pack with frames that are not in the index yet.
func (s *Store) firstUnsynced() uint32 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	first := uint32(math.MaxUint32)
	for _, l := range s.pending {
		first = min(first, l.pack)
	}
	return first
}

// stillAt says whether the index still has a block there.
func (s *Store) stillAt(id flox.CID, l loc) bool {
	now, err := s.lookup(id)
	return err == nil && now == l
}

// packFrom gives the first pack from id on.
func (x *index) packFrom(id uint32) (pack uint32, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for p := range x.packs {
		if p >= id && (!ok || p < pack) {
			pack, ok = p, true
		}
	}
	return pack, ok
}

// checkPlain says whether data is what id names.
func checkPlain(what string, id flox.CID, data []byte) error {
	if got := content.Hash(data); got != id {
		return fmt.Errorf("%s block %s: %d bytes hash to %s: %w", what, id, len(data), got, flox.ErrCorrupt)
	}
	if len(data) > content.MaxBlock {
		return fmt.Errorf("%s block %s of %d bytes, want at most %d: %w", what, id, len(data), content.MaxBlock, flox.ErrBadInput)
	}
	return nil
}
