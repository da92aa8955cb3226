package content

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// readAhead is how many pieces of a NAR are in memory while it is written: a
// chunk, or the small things between two chunks. 48 of 256 KiB are 12 MiB.
const readAhead = 48

// piece is a part of a NAR: bytes, or a part of a chunk to be read.
type piece struct {
	data   []byte
	chunk  flox.Chunk // if data is nil
	lo, hi int        // of the chunk
	buf    *[]byte    // what data is a part of, if it goes back to chunkBuffers
	err    error
	framed bool          // data is a zstd frame
	ready  chan struct{} // closed when data or err is there; nil = is there
}

// WriteNar writes the bytes [off, off+n) of the NAR to w, reading chunks ahead in
// a bounded window. n < 0 means up to the end.
func (m *Manifest) WriteNar(ctx context.Context, w io.Writer, blocks flox.Blocks, off, n int64) error {
	if off < 0 || uint64(off) > m.root.narSize {
		return fmt.Errorf("manifest %s: NAR from byte %d of %d: %w", m.id, off, m.root.narSize, flox.ErrBadInput)
	}
	end := int64(m.root.narSize)
	if n >= 0 && n < end-off {
		end = off + n
	}
	fetch := func(ctx context.Context, p *piece) { p.read(ctx, blocks) }
	return m.stream(ctx, w, off, end, fetch, func(w io.Writer, p *piece) error {
		_, err := w.Write(p.data)
		if p.buf != nil {
			chunkBuffers.Put(p.buf)
		}
		return err
	})
}

// stream writes the NAR's range [off, end) piece by piece with write. fetch
// fills a piece that is a chunk.
func (m *Manifest) stream(ctx context.Context, w io.Writer, off, end int64, fetch func(context.Context, *piece), write func(io.Writer, *piece) error) error {
	group, ctx := errgroup.WithContext(ctx)
	ordered := make(chan *piece, readAhead)
	wanted := make(chan *piece, readAhead)
	group.Go(func() error {
		defer close(ordered)
		defer close(wanted)
		return m.pieces(ctx, off, end, func(p *piece) error {
			if p.data == nil {
				p.ready = make(chan struct{})
				if err := send(ctx, wanted, p); err != nil {
					return err
				}
			}
			return send(ctx, ordered, p)
		})
	})
	// Blocks may come from a disk or over a network: more readers than cores.
	for range 2*runtime.GOMAXPROCS(0) + 4 {
		group.Go(func() error {
			for p := range wanted {
				fetch(ctx, p)
				close(p.ready)
			}
			return nil
		})
	}
	group.Go(func() error {
		out := bufio.NewWriterSize(w, 128<<10)
		if err := writePieces(ctx, ordered, func(p *piece) error { return write(out, p) }); err != nil {
			return err
		}
		return out.Flush()
	})
	if err := group.Wait(); err != nil {
		return fmt.Errorf("manifest %s: NAR: %w", m.id, err)
	}
	return nil
}

func send(ctx context.Context, to chan<- *piece, p *piece) error {
	select {
	case to <- p:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// appender is flox.Blocks that can use memory again.
type appender interface {
	// Append is Get, appending to dst.
	Append(ctx context.Context, dst []byte, id flox.CID) ([]byte, error)
}

// chunkBuffers holds memory for the chunks of an appender.
var chunkBuffers = sync.Pool{New: func() any { return new([]byte) }}

func (p *piece) read(ctx context.Context, blocks flox.Blocks) {
	var b []byte
	var err error
	if a, ok := blocks.(appender); ok {
		p.buf = chunkBuffers.Get().(*[]byte)
		if b, err = a.Append(ctx, (*p.buf)[:0], p.chunk.ID); err == nil {
			*p.buf = b
		}
	} else {
		b, err = blocks.Get(ctx, p.chunk.ID)
	}
	switch {
	case err != nil:
		p.err = fmt.Errorf("chunk %s: %w", p.chunk.ID, err)
	case len(b) != int(p.chunk.Size):
		p.err = fmt.Errorf("chunk %s of %d bytes, the manifest says %d: %w", p.chunk.ID, len(b), p.chunk.Size, flox.ErrCorrupt)
	default:
		p.data = b[p.lo:p.hi]
	}
}

// writePieces writes each piece once it is there.
func writePieces(ctx context.Context, ordered <-chan *piece, write func(*piece) error) error {
	for p := range ordered {
		if p.ready != nil {
			select {
			case <-p.ready:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if p.err != nil {
			return p.err
		}
		if err := write(p); err != nil {
			return err
		}
	}
	// The producer ends early only with an error, which the group returns.
	return ctx.Err()
}

// smallPiece is how many bytes between chunks are gathered at most.
const smallPiece = 64 << 10

// pieceMaker cuts a range out of a NAR, given from front to back.
type pieceMaker struct {
	at, off, end int64 // position of what comes next; the range
	small        []byte
	emit         func(*piece) error
}

// bytes adds bytes that are here.
func (s *pieceMaker) bytes(b []byte) error {
	lo, hi := s.cut(int64(len(b)))
	if s.small = append(s.small, b[lo:hi]...); len(s.small) >= smallPiece {
		return s.flush()
	}
	return nil
}

// cut moves on by n bytes and gives the part of them that lies in the range.
func (s *pieceMaker) cut(n int64) (lo, hi int64) {
	lo, hi = min(max(s.off-s.at, 0), n), min(max(s.end-s.at, 0), n)
	s.at += n
	return lo, max(lo, hi)
}

func (s *pieceMaker) flush() error {
	if len(s.small) == 0 {
		return nil
	}
	p := &piece{data: s.small}
	s.small = nil
	return s.emit(p)
}

func (s *pieceMaker) chunk(c flox.Chunk) error {
	lo, hi := s.cut(int64(c.Size))
	if lo == hi {
		return nil
	}
	if err := s.flush(); err != nil {
		return err
	}
	return s.emit(&piece{chunk: c, lo: int(lo), hi: int(hi)})
}

// pieces gives the parts of the NAR's range [off, end) in order. It begins at the
// page the range begins in.
func (m *Manifest) pieces(ctx context.Context, off, end int64, emit func(*piece) error) error {
	s := &pieceMaker{off: off, end: end, emit: emit}
	var f nix.NarFramer
	n := len(m.root.pages) - 1
	for n > 0 && int64(m.root.pages[n].offset) > off {
		n--
	}
	for first := n; n < len(m.root.pages) && s.at < end; n++ {
		g, err := m.page(ctx, n)
		if err != nil {
			return err
		}
		for k := 0; k < g.len() && s.at < end; k++ {
			at := pageStart{resume: n == first && n > 0 && k == 0}
			if k == 0 {
				at.offset = m.root.pages[n].offset
			}
			if err := m.entryPieces(ctx, s, &f, g.rec(k), g.path(k), at); err != nil {
				return err
			}
		}
	}
	if s.at < end {
		b, err := f.End()
		if err != nil {
			return err
		}
		if err := s.bytes(b); err != nil {
			return err
		}
		if s.at != int64(m.root.narSize) {
			return fmt.Errorf("the entries make a NAR of %d bytes, the root says %d: %w", s.at, m.root.narSize, flox.ErrCorrupt)
		}
	}
	return s.flush()
}

// pageStart is where the root says that a page's first entry has its content;
// offset 0 = the entry is not the first, or is entry 0. With resume the range
// begins behind the entry's header.
type pageStart struct {
	offset uint64
	resume bool
}

// entryPieces gives an entry's header and content.
func (m *Manifest) entryPieces(ctx context.Context, s *pieceMaker, f *nix.NarFramer, r *rec, path string, at pageStart) error {
	e := r.nar(path)
	if at.resume {
		e.Offset = at.offset
		if err := f.Resume(e); err != nil {
			return err
		}
		s.at = int64(at.offset)
	} else {
		frame, err := f.Next(e)
		if err != nil {
			return err
		}
		if at.offset > 0 && f.Offset() != at.offset {
			return fmt.Errorf("%q lies at byte %d of the NAR, the root says %d: %w", path, f.Offset(), at.offset, flox.ErrCorrupt)
		}
		if err := s.bytes(frame); err != nil {
			return err
		}
	}
	if r.kind != flox.Regular {
		return nil
	}
	if r.file == nil {
		return s.bytes([]byte(r.data))
	}
	start := s.at
	from := max(s.off-start, 0)
	s.at = start + int64(r.size)
	if s.at <= s.off || start >= s.end {
		return nil
	}
	var failed error
	_, err := m.chunks(ctx, r, from, s.end-start-from, func(at int64, c flox.Chunk) bool {
		s.at = start + at
		failed = s.chunk(c)
		return failed == nil
	})
	s.at = start + int64(r.size)
	if err == nil {
		err = failed
	}
	return err
}
