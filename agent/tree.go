package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/cache"
	"github.com/floxctl/flox/p2p"
)

// maxHintPaths bounds the store paths handed on as hints: the path, then referrers.
const maxHintPaths = 8

// While a path is read, its manifest is marked used every so many seconds, at
// most so many blocks of it.
const (
	manifestUseSeconds = 2
	maxUsedBlocks      = 16
)

// tree is the file tree of one store path: its manifest's entries, and bytes from
// the cache or the swarm.
type tree struct {
	*content.Manifest
	path flox.StorePath
	a    *Agent
	// staged says that the content lies in the staging store, as far as is known.
	staged atomic.Bool
	used   atomic.Int64 // Unix seconds at which the cache was last told that the manifest is in use
}

var _ flox.Tree = (*tree)(nil)

// ReadAt implements flox.Tree. It returns short of len(p) at the end of the file
// only; what is not here is fetched, however often that must be tried, until ctx ends.
func (t *tree) ReadAt(ctx context.Context, index uint32, p []byte, off int64, who flox.Reader) (int, error) {
	e, err := t.Entry(ctx, index)
	if err != nil {
		return 0, err
	}
	if e.Kind != flox.Regular {
		return 0, fmt.Errorf("read of %s entry %d: it is a %s: %w", t.path, index, e.Kind, flox.ErrBadInput)
	}
	if off < 0 {
		return 0, fmt.Errorf("read of %s entry %d at %d: %w", t.path, index, off, flox.ErrBadInput)
	}
	if off >= int64(e.Size) {
		return 0, nil
	}
	p = p[:min(int64(len(p)), int64(e.Size)-off)]
	if t.staged.Load() {
		// Nothing is told to anybody of what is staged: no trace, no use.
		n, err := t.readStaged(ctx, index, p, off)
		if !errors.Is(err, flox.ErrNotFound) {
			return n, err
		}
		t.staged.Store(false) // the storehouse has it meanwhile
	}
	if off == 0 && isCode(e) {
		t.a.executed.touch(t.path)
		t.a.ran.saw(t.path, index, isProgram(e))
	}
	t.a.readers.read(t, index, &e, off, int64(len(p)))
	t.a.starts.read(t, index, e, off, p, who)
	if e.Size <= uint64(t.Params().InlineLimit) {
		if data, ok, err := t.Inline(ctx, index); err != nil || ok {
			if err != nil {
				return 0, err
			}
			return copy(p, data[off:]), nil
		}
	}
	file := cache.File{ID: e.File, Size: int64(e.Size)}
	if n, st := t.a.cache.ReadAt(file, p, off, who.Node); st == cache.Hit {
		t.use(ctx)
		return n, nil
	}
	if isCode(e) {
		t.a.ran.saw(t.path, index, isProgram(e))
	}
	return t.fill(ctx, index, e, p, off, who)
}

// use tells the cache that the manifest is in use, now and then: this process has
// it in memory and does not read it again, but the next one could not read the
// path's content without it.
func (t *tree) use(ctx context.Context) {
	now := time.Now().Unix()
	was := t.used.Load()
	if now-was < manifestUseSeconds || !t.used.CompareAndSwap(was, now) {
		return
	}
	ids := append([]flox.CID{t.ID()}, t.Pages()...)
	for _, id := range ids[:min(len(ids), maxUsedBlocks)] {
		_, _ = t.a.cache.Get(ctx, id) // only to be seen reading it
	}
}

// fill reads p from chunks that are verified or fetched first.
func (t *tree) fill(ctx context.Context, index uint32, e flox.Entry, p []byte, off int64, who flox.Reader) (int, error) {
	file, end := cache.File{ID: e.File, Size: int64(e.Size)}, off+int64(len(p))
	watch := t.a.waits.begin(who.PID, opRead, t.name(ctx, index), uint64(len(p)))
	defer watch.end()
	missing, err := t.missing(ctx, index, &e, off, int64(len(p)), nil)
	if err != nil {
		return 0, err
	}
	if len(missing) > 0 {
		watch.expect(sizeOf(missing))
		last := missing[len(missing)-1]
		t.a.readers.behind(t, index, &e, last.off+int64(last.chunk.Size))
		began := time.Now()
		err = t.a.fetcher.fetch(ctx, missing, t.a.hints(t.path), watch, func(one piece, data []byte) error {
			overlay(p, off, data, one.off)
			return nil
		})
		if err != nil {
			return 0, fmt.Errorf("%s: %w", t.path, err)
		}
		t.a.readers.waited(time.Since(began))
		t.a.cache.Used(file, off, int64(len(p)), who.Node)
	}
	// What was not fetched just now lies in the cache; it may have been evicted in
	// between, then it is fetched by itself.
	for at := off; at < end; {
		n, covered := fetchedUpTo(missing, at, end)
		if covered {
			at = n
			continue
		}
		got, st := t.a.cache.ReadAt(file, p[at-off:n-off], at, who.Node)
		if st == cache.Hit && got > 0 {
			at += int64(got)
			continue
		}
		return t.direct(ctx, index, file, p, off, who, watch)
	}
	return len(p), nil
}

// missing adds the chunks of [off, off+n) of a file that are not in the cache to
// pieces. What is there and in doubt is verified first.
func (t *tree) missing(ctx context.Context, index uint32, e *flox.Entry, off, n int64, pieces []piece) ([]piece, error) {
	if t.staged.Load() {
		return pieces, nil // all is here, but not in the cache
	}
	file := cache.File{ID: e.File, Size: int64(e.Size)}
	var verify []piece
	err := t.Chunks(ctx, index, off, n, func(at int64, c flox.Chunk) bool {
		one := piece{file: file, off: at, chunk: c}
		switch t.a.cache.State(file, at, int64(c.Size)) {
		case cache.Miss:
			if len(pieces) == 0 || pieces[len(pieces)-1].file != file {
				t.remember(ctx, index, e)
			}
			pieces = append(pieces, one)
		case cache.Unverified:
			verify = append(verify, one)
		case cache.Hit:
		}
		return true
	})
	if err != nil {
		return pieces, err
	}
	for _, one := range verify {
		ok, err := t.a.cache.Verify(ctx, file, one.off, one.chunk)
		if err != nil || !ok {
			pieces = append(pieces, one)
		}
	}
	return pieces, nil
}

// sizeOf is how many bytes pieces have.
func sizeOf(pieces []piece) (n uint64) {
	for _, one := range pieces {
		n += one.size()
	}
	return n
}

// fetchedUpTo says how far from at the bytes are covered by one of pieces, or, if
// at is not covered, where the next piece (or end) begins.
func fetchedUpTo(pieces []piece, at, end int64) (next int64, covered bool) {
	next = end
	for _, one := range pieces {
		first, last := one.off, one.off+int64(one.chunk.Size)
		if first <= at && at < last {
			return min(last, end), true
		}
		if first > at {
			next = min(next, first)
		}
	}
	return next, false
}

// direct reads p from whole chunks only, never from a file of the cache: for
// a disk that is full or content evicted while it was read.
func (t *tree) direct(ctx context.Context, index uint32, file cache.File, p []byte, off int64, who flox.Reader, watch *wait) (int, error) {
	var all []piece
	err := t.Chunks(ctx, index, off, int64(len(p)), func(at int64, c flox.Chunk) bool {
		all = append(all, piece{file: file, off: at, chunk: c})
		return true
	})
	if err != nil {
		return 0, err
	}
	if e, err := t.Entry(ctx, index); err == nil {
		t.remember(ctx, index, &e)
	}
	watch.expect(sizeOf(all))
	err = t.a.fetcher.fetch(ctx, all, t.a.hints(t.path), watch, func(one piece, data []byte) error {
		overlay(p, off, data, one.off)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", t.path, err)
	}
	t.a.cache.Used(file, off, int64(len(p)), who.Node)
	return len(p), nil
}

// overlay copies the part of data, which lies at at in the file, that falls into
// p, which lies at off.
func overlay(p []byte, off int64, data []byte, at int64) {
	if at >= off {
		if at-off < int64(len(p)) {
			copy(p[at-off:], data)
		}
		return
	}
	if off-at < int64(len(data)) {
		copy(p, data[off-at:])
	}
}

// name gives the full path of an entry, for people.
func (t *tree) name(ctx context.Context, index uint32) string {
	full := t.a.cfg.StoreDir.Join(t.path)
	inside, err := t.Path(ctx, index)
	if err != nil || inside == "" {
		return full
	}
	return full + "/" + inside
}

// hints tells the swarm where to look for blocks of p: under p itself and under
// the paths known to refer to it.
func (a *Agent) hints(p flox.StorePath) p2p.Hints {
	return p2p.Hints{Paths: append([]flox.StorePath{p}, a.facts.referrers(p, maxHintPaths-1)...)}
}

// open opens the tree of a path for somebody at the control socket: what cannot
// be fetched within the read timeout is an error.
func (a *Agent) open(ctx context.Context, info *flox.PathInfo) (*tree, error) {
	return a.openTree(ctx, info, a.cfg.ReadTimeout)
}

// openTree opens the tree of a path whose info is known and verified. Patience
// bounds the fetch of each block of the manifest, now and later; 0 leaves that to
// the contexts given.
func (a *Agent) openTree(ctx context.Context, info *flox.PathInfo, patience time.Duration) (*tree, error) {
	m, err := a.pages.Open(ctx, info.Manifest, blocks{a, info.Path, patience})
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", info.Path, err)
	}
	t := &tree{Manifest: m, path: info.Path, a: a}
	t.staged.Store(a.isStaged(info.Manifest))
	return t, nil
}

// readFile streams a whole file of a tree to w.
func (t *tree) readFile(ctx context.Context, index uint32, size int64, w io.Writer) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		n, err := t.readPart(ctx, index, buf, off)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%s: file ends at %d, want %d bytes: %w", t.path, off, size, flox.ErrCorrupt)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// readPart is ReadAt within the read timeout, again and again while more of p is
// here than the last time: over a slow line all of it may take longer.
func (t *tree) readPart(ctx context.Context, index uint32, p []byte, off int64) (int, error) {
	here := t.here(ctx, index, p, off)
	for {
		one, cancel := context.WithTimeout(ctx, t.a.cfg.ReadTimeout)
		n, err := t.ReadAt(one, index, p, off, flox.Reader{})
		cancel()
		if err == nil || ctx.Err() != nil || !errors.Is(err, flox.ErrUnreachable) {
			return n, err
		}
		before := here
		if here = t.here(ctx, index, p, off); here <= before {
			return 0, err
		}
	}
}

// here is how many of the bytes of p, which lies at off in a file, are in the cache.
func (t *tree) here(ctx context.Context, index uint32, p []byte, off int64) int64 {
	e, err := t.Entry(ctx, index)
	if err != nil || t.staged.Load() {
		return 0
	}
	n := min(int64(len(p)), int64(e.Size)-off)
	for _, gap := range t.a.cache.Missing(cache.File{ID: e.File, Size: int64(e.Size)}, off, n) {
		n -= gap.Len
	}
	return n
}
