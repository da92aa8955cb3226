package pack

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// lookup finds where a block lies. ErrNotFound.
func (s *Store) lookup(id flox.CID) (loc, error) {
	s.mu.RLock()
	l, ok := s.pending[id]
	closed := s.closed
	s.mu.RUnlock()
	switch {
	case closed:
		return loc{}, fmt.Errorf("block store %s: %w", s.cfg.Dir, flox.ErrClosed)
	case ok:
		return l, nil
	}
	// A block leaves pending only after it came into the index.
	l, err := s.index.find(id)
	if err != nil {
		return loc{}, fmt.Errorf("block %s: %w", id, err)
	}
	return l, nil
}

// Get returns a block's plain bytes, checked against id. Errors: ErrNotFound,
// ErrCorrupt.
func (s *Store) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	return s.Append(ctx, nil, id)
}

// Append is Get, appending to dst, so that a caller can use memory again.
func (s *Store) Append(ctx context.Context, dst []byte, id flox.CID) ([]byte, error) {
	return s.read(ctx, dst, id, s.decode)
}

func (s *Store) read(ctx context.Context, dst []byte, id flox.CID, decode func([]byte, header, []byte) ([]byte, error)) ([]byte, error) {
	buf := frameBuffers.Get().(*[]byte)
	defer frameBuffers.Put(buf)
	h, stored, l, err := s.frame(ctx, buf, id)
	if err != nil {
		return nil, err
	}
	if dst, err = decode(dst, h, stored); err != nil {
		return nil, s.damaged(id, l, err)
	}
	return dst, nil
}

// Checksummed are the same blocks, checked by their frames' checksums only: for
// a stream whose reader checks the whole, as the hash of a NAR does. Hashing
// every chunk again costs a fifth of rebuilding a NAR.
func (s *Store) Checksummed() flox.Blocks { return checksummed{s} }

type checksummed struct{ s *Store }

func (c checksummed) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	return c.Append(ctx, nil, id)
}

func (c checksummed) Append(ctx context.Context, dst []byte, id flox.CID) ([]byte, error) {
	return c.s.read(ctx, dst, id, func(dst []byte, h header, stored []byte) ([]byte, error) {
		if err := h.check(stored); err != nil {
			return nil, err
		}
		start := len(dst)
		dst, err := c.s.unpack(dst, h, stored)
		if err == nil && len(dst)-start != int(h.plain) {
			err = fmt.Errorf("%d bytes, its header says %d: %w", len(dst)-start, h.plain, flox.ErrCorrupt)
		}
		return dst, err
	})
}

// decode appends a frame's plain bytes to dst and checks them.
func (s *Store) decode(dst []byte, h header, stored []byte) ([]byte, error) {
	start := len(dst)
	dst, err := s.unpack(dst, h, stored)
	if err != nil {
		return nil, err
	}
	if got := content.Hash(dst[start:]); got != h.id {
		return nil, fmt.Errorf("its %d bytes hash to %s: %w", len(dst)-start, got, flox.ErrCorrupt)
	}
	return dst, nil
}

// unpack appends a frame's plain bytes to dst.
func (s *Store) unpack(dst []byte, h header, stored []byte) ([]byte, error) {
	if h.enc == encodingRaw {
		dst = append(dst, stored...)
	} else {
		var err error
		if dst, err = s.dec.DecodeAll(stored, slices.Grow(dst, int(h.plain))); err != nil {
			return nil, fmt.Errorf("decompress: %w: %w", err, flox.ErrCorrupt)
		}
	}
	return dst, nil
}

// frame reads a block's frame into buf; stored is a part of it.
func (s *Store) frame(ctx context.Context, buf *[]byte, id flox.CID) (h header, stored []byte, l loc, err error) {
	for again := true; ; again = false {
		if err := ctx.Err(); err != nil {
			return h, nil, l, err
		}
		if l, err = s.lookup(id); err != nil {
			if s.remote == nil || !again || !errors.Is(err, flox.ErrNotFound) {
				return h, nil, l, err
			}
			if lookErr := s.lookAgain(ctx, id); lookErr != nil { // another server may have put it there just now
				return h, nil, l, errors.Join(err, lookErr)
			}
			continue
		}
		h, stored, err = s.readFrame(ctx, buf, id, l)
		if s.remote != nil && again && errors.Is(err, flox.ErrNotFound) {
			// Another server removed the pack: the block is elsewhere by now.
			if refreshErr := s.Refresh(ctx); refreshErr != nil {
				return h, nil, l, errors.Join(err, refreshErr)
			}
			continue
		}
		// A sweep may have moved the block and removed the pack in between.
		if err == nil || !again || !errors.Is(err, iofs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		err = s.damaged(id, l, err)
	}
	return h, stored, l, err
}

// readFrame reads the frame at l and checks that its header is the one meant.
func (s *Store) readFrame(ctx context.Context, buf *[]byte, id flox.CID, l loc) (h header, stored []byte, err error) {
	if s.remote == nil {
		return s.readLocal(buf, id, l)
	}
	p, placed := s.index.remotePack(l.pack)
	if !placed || s.hasLocal(l.pack) {
		s.remote.cache.use(packCacheKey(l.pack))
		if h, stored, err = s.readLocal(buf, id, l); err == nil {
			err = h.check(stored)
		}
		if err == nil {
			return h, stored, nil
		}
		// The local copy may have been written to the bucket just now, or be gone.
		if p, placed = s.index.remotePack(l.pack); !placed {
			return h, nil, err
		}
		if !errors.Is(err, iofs.ErrNotExist) {
			s.log.Error("local copy of a pack is damaged, using the bucket's", "pack", s.packPath(l.pack), "error", err)
			s.remote.cache.forgetPack(l.pack)
			s.dropLocal(l.pack)
		}
	}
	return s.readRemote(ctx, buf, id, l, p)
}

// readLocal is readFrame for a pack that is here.
func (s *Store) readLocal(buf *[]byte, id flox.CID, l loc) (h header, stored []byte, err error) {
	p, err := s.files.acquire(l.pack)
	if err != nil {
		return h, nil, fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
	}
	defer s.files.release(p)
	b := slices.Grow((*buf)[:0], int(l.frameSize()))[:l.frameSize()]
	*buf = b
	if _, err := p.ReadAt(b, int64(l.off)); errors.Is(err, io.EOF) {
		return h, nil, fmt.Errorf("the pack ends within it: %w", flox.ErrCorrupt)
	} else if err != nil {
		return h, nil, fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
	}
	if h, err = parseHeader(b); err != nil {
		return h, nil, err
	}
	if !l.matches(h, id) {
		return h, nil, fmt.Errorf("the frame there is of block %s, %d bytes in %d: %w", h.id, h.plain, h.stored, flox.ErrCorrupt)
	}
	return h, b[headerSize:], nil
}

// Stored returns a block as it is kept, its checksum checked: one zstd frame, or
// the plain bytes if zstd is false. Errors: ErrNotFound, ErrCorrupt.
func (s *Store) Stored(ctx context.Context, id flox.CID) (data []byte, zstd bool, err error) {
	data, _, zstd, err = s.Packed(ctx, id)
	return data, zstd, err
}

// Packed is Stored with the size of the plain bytes.
func (s *Store) Packed(ctx context.Context, id flox.CID) (data []byte, size int, zstd bool, err error) {
	var buf []byte
	h, stored, l, err := s.frame(ctx, &buf, id)
	if err != nil {
		return nil, 0, false, err
	}
	if err := h.check(stored); err != nil {
		return nil, 0, false, s.damaged(id, l, err)
	}
	return stored, int(h.plain), h.enc == encodingZstd, nil
}

// Has says which blocks are there, synced or not. What a damaged index has lost is
// not, until Run made it anew.
func (s *Store) Has(ctx context.Context, ids []flox.CID) ([]bool, error) {
	there := make([]bool, len(ids))
	for i, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		switch _, err := s.lookup(id); {
		case err == nil:
			there[i] = true
		case !errors.Is(err, flox.ErrNotFound) && !errors.Is(err, flox.ErrCorrupt):
			return nil, err
		}
	}
	return there, nil
}

// Size gives the plain and the stored size of a block in bytes. ErrNotFound.
func (s *Store) Size(_ context.Context, id flox.CID) (plain, stored uint32, err error) {
	l, err := s.lookup(id)
	return l.plain, l.stored, err
}
