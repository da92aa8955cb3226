package agent

import (
	"context"
	"errors"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
)

// Reading ahead: who reads a large file from front to back, or the files of a
// tree one after another, is met by what comes next. Nothing is fetched for
// readers that jump about, as programs do when they start: for them a fetch is
// what they touch (and what start traces say).
const (
	// orderAfter is how many bytes must have been read in order before more is
	// fetched; codeAfter the same for programs and libraries, whose parts are
	// often read in order for a while (relocations) and then not.
	orderAfter, codeAfter = 128 << 10, 512 << 10
	// orderSlack is how far from the expected place a read still counts as in
	// order: the kernel's own read-ahead is not exact.
	orderSlack = 128 << 10
	// leastWindow and mostWindow bound what is fetched ahead of a reader.
	leastWindow, mostWindow = 256 << 10, 8 << 20
	// smallFile is the size up to which a file is one of a directory's small
	// ones, in bytes; of a larger one that is next its beginning is fetched.
	smallFile = 128 << 10
	// walkGap is how many entries may lie between two files that are read one
	// after another: directories, links, and files a reader leaves out.
	walkGap = 8
	// walkAfter is how many files must have been read in order.
	walkAfter = 2
	// maxWalked bounds the entries looked at for one batch.
	maxWalked = 2048
	// maxReaders bounds the readers remembered; the one longest silent goes.
	maxReaders = 512
	// maxAhead bounds the fetches ahead of readers under way.
	maxAhead = 32
	// aheadFor bounds one fetch ahead of a reader.
	aheadFor = 20 * time.Second
	// farWait is how long one block must take for its source to count as far
	// away. There the bytes behind it cost less than another round trip.
	farWait  = 5 * time.Millisecond
	farBytes = 64 << 10
	// besideBytes is how many bytes of small files of its directory come with one
	// that is far away, once another one of the tree had to be waited for.
	besideBytes = 512 << 10
)

// readAhead watches what is read and fetches what comes next.
type readAhead struct {
	p     *prefetcher
	life  context.Context //nolint:containedctx // ends with the agent: fetches outlive the read that began them
	slots chan struct{}
	work  sync.WaitGroup // fetches under way; Close waits for them
	wait  atomic.Int64   // average time of a fetch of few blocks, ns
	far   func() bool    // whether round trips are long

	mu      sync.Mutex
	clock   uint64
	streams map[fileKey]*stream
	walks   map[flox.CID]*walk
	missed  map[flox.CID]uint32  // a small file of a tree that was waited for
	beside  map[fileKey]struct{} // directories whose small files were asked for
}

// stream is a file that is being read.
type stream struct {
	next  int64 // where the next read is expected
	run   int64 // bytes read in order
	ahead int64 // asked for up to here
	used  uint64
}

// walk is a tree whose files are being read.
type walk struct {
	last     uint32 // index of the last file read
	streak   int    // files read in order
	from, to uint32 // entries whose files the last batch asked for
	busy     bool   // a batch is being put together
	window   int64  // bytes of the last batch
	used     uint64
}

func newReadAhead(life context.Context, p *prefetcher, rtt func() time.Duration) *readAhead {
	r := &readAhead{
		p: p, life: life, slots: make(chan struct{}, maxAhead),
		streams: make(map[fileKey]*stream), walks: make(map[flox.CID]*walk),
		missed: make(map[flox.CID]uint32), beside: make(map[fileKey]struct{}),
	}
	r.far = func() bool { return r.farBy(rtt) }
	return r
}

// read notes that [off, off+n) of an entry is read. It is called for every
// READ of the kernel and must be quick.
func (r *readAhead) read(t *tree, index uint32, e *flox.Entry, off, n int64) {
	if r.p.off {
		return
	}
	if e.Size > smallFile {
		if from, to := r.stream(t, index, e, off, n); from < to {
			if !r.spawn(func(ctx context.Context) { r.part(ctx, t, index, *e, from, to) }) {
				r.forget(t, index)
			}
		}
	}
	if off == 0 {
		if from, window := r.walk(t, index); window > 0 {
			if !r.spawn(func(ctx context.Context) { r.files(ctx, t, from, window) }) {
				r.walked(t.ID(), 0, 0)
			}
		}
	}
}

// spawn runs fetch if there is a place for it: reading ahead is never waited for,
// and what does not come soon is not ahead any more.
func (r *readAhead) spawn(fetch func(context.Context)) bool {
	select {
	case r.slots <- struct{}{}:
	default:
		return false
	}
	r.work.Go(func() { // bounded by r.slots
		defer func() { <-r.slots }()
		ctx, cancel := context.WithTimeout(r.life, aheadFor)
		defer cancel()
		fetch(ctx)
	})
	return true
}

// forget lets a stream whose fetch found no place ask again.
func (r *readAhead) forget(t *tree, index uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.streams[fileKey{t.ID(), index}]; s != nil {
		s.ahead = 0
	}
}

// stream says what to fetch ahead of a reader of a large file: [from, to), or
// nothing.
func (r *readAhead) stream(t *tree, index uint32, e *flox.Entry, off, n int64) (from, to int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := fileKey{t.ID(), index}
	s := r.streams[key]
	if s == nil {
		if len(r.streams) >= maxReaders {
			dropSilent(r.streams, func(s *stream) uint64 { return s.used })
		}
		s = &stream{next: off}
		r.streams[key] = s
	}
	r.clock++
	s.used = r.clock
	if off < s.next-orderSlack || off > s.next+orderSlack {
		*s = stream{next: off, used: s.used}
	}
	if end := off + n; end > s.next {
		s.run += end - s.next
		s.next = end
	}
	least := int64(orderAfter)
	if isCode(*e) {
		least = codeAfter
	}
	if s.run < least {
		return 0, 0
	}
	window := min(max(2*s.run, leastWindow), mostWindow)
	if s.ahead >= min(s.next+window/2, int64(e.Size)) {
		return 0, 0
	}
	from = max(s.ahead, s.next)
	to = min(s.next+window, int64(e.Size))
	s.ahead = to
	return from, to
}

// walk says from which entry on to fetch how many bytes of files, ahead of a
// reader of one file after another; 0 bytes: nothing.
func (r *readAhead) walk(t *tree, index uint32) (from uint32, window int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.walks[t.ID()]
	if w == nil {
		if len(r.walks) >= maxReaders {
			dropSilent(r.walks, func(w *walk) uint64 { return w.used })
		}
		w = &walk{last: index}
		r.walks[t.ID()] = w
	}
	r.clock++
	w.used = r.clock
	switch {
	case index == w.last:
		return 0, 0
	case index < w.last || index > max(w.last, w.to)+walkGap:
		*w = walk{last: index, used: w.used}
		return 0, 0
	}
	w.last = index
	w.streak++
	if w.streak < walkAfter || w.busy || index < w.from+(w.to-w.from)/2 {
		return 0, 0
	}
	w.busy = true
	w.window = min(max(2*w.window, leastWindow), mostWindow)
	return max(index+1, w.to), w.window
}

// walked notes what the batch that walk asked for reaches over: [from, to).
func (r *readAhead) walked(manifest flox.CID, from, to uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.walks[manifest]; w != nil && w.busy {
		w.busy, w.from, w.to = false, from, to
	}
}

// dropSilent removes the entry that was not used for the longest time.
func dropSilent[K comparable, V any](m map[K]V, used func(V) uint64) {
	var oldest K
	least := ^uint64(0)
	for k, v := range m {
		if u := used(v); u < least {
			oldest, least = k, u
		}
	}
	delete(m, oldest)
}

// part fetches what is missing of [from, to) of a file.
func (r *readAhead) part(ctx context.Context, t *tree, index uint32, e flox.Entry, from, to int64) {
	pieces, err := t.missing(ctx, index, &e, from, to-from, nil)
	if err == nil {
		err = r.p.fetch(ctx, aheadSequential, pieces, t.a.hints(t.path), nil)
	}
	r.failed(t, err)
}

// files fetches what is missing of small files, and of the beginnings of others,
// from an entry on, until it has window bytes.
func (r *readAhead) files(ctx context.Context, t *tree, from uint32, window int64) {
	var pieces []piece
	size, to := int64(0), from
	var failed error
	err := t.Walk(ctx, from, func(i uint32, _ string, e flox.Entry) bool {
		to = i + 1
		if e.Kind == flox.Regular && e.Size > uint64(t.Params().InlineLimit) {
			had := len(pieces)
			pieces, failed = t.missing(ctx, i, &e, 0, min(int64(e.Size), smallFile), pieces)
			size += int64(sizeOf(pieces[had:])) //nolint:gosec // some MiB
		}
		return failed == nil && size < window && i-from < maxWalked
	})
	r.walked(t.ID(), from, to)
	if err = errors.Join(err, failed); err == nil {
		err = r.p.fetch(ctx, aheadDirectory, pieces, t.a.hints(t.path), nil)
	}
	r.failed(t, err)
}

// failed says why nothing came. Nobody waits for it: who does will try again.
func (r *readAhead) failed(t *tree, err error) {
	if err != nil && r.life.Err() == nil {
		t.a.log.Debug("nothing fetched ahead", "path", string(t.path), "error", err)
	}
}

// waited notes how long a fetch of a few blocks took that a reader waited for.
func (r *readAhead) waited(d time.Duration) {
	was := r.wait.Load()
	if was == 0 {
		r.wait.Store(int64(d))
		return
	}
	r.wait.Store(was + (int64(d)-was)/8) // of two at once one may be lost: it is an average
}

// farBy says whether round trips are long: by what readers waited lately, and
// before any did by rtt.
func (r *readAhead) farBy(rtt func() time.Duration) bool {
	if wait := time.Duration(r.wait.Load()); wait > 0 {
		return wait >= farWait
	}
	return rtt() >= farWait
}

// behind fetches the bytes behind a read that had to wait, if round trips are long;
// where the file ends there, small files of its directory.
func (r *readAhead) behind(t *tree, index uint32, e *flox.Entry, end int64) {
	if r.p.off || !r.far() {
		return
	}
	entry := *e
	if end >= int64(e.Size) {
		if e.Size <= smallFile && r.another(t.ID(), index) {
			r.spawn(func(ctx context.Context) { r.besides(ctx, t, index) })
		}
		return
	}
	r.spawn(func(ctx context.Context) { r.part(ctx, t, index, entry, end, min(end+farBytes, int64(entry.Size))) })
}

// another reports whether a file other than this one was waited for in a tree before.
func (r *readAhead) another(manifest flox.CID, index uint32) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	first, ok := r.missed[manifest]
	if !ok {
		if len(r.missed) >= maxReaders {
			clear(r.missed)
		}
		r.missed[manifest] = index
	}
	return ok && first != index
}

// besides fetches small files of the directory an entry lies in, from that entry
// on and around; once, as long as the directory is remembered.
func (r *readAhead) besides(ctx context.Context, t *tree, index uint32) {
	at, err := t.Path(ctx, index)
	if err != nil {
		return
	}
	dir, _, err := t.Find(ctx, strings.TrimPrefix(path.Dir("/"+at), "/"))
	if err != nil || !r.fresh(fileKey{t.ID(), dir}) {
		return
	}
	var pieces []piece
	size, seen := int64(0), 0
	take := func(i uint32, e flox.Entry) bool {
		if e.Kind == flox.Regular && e.Size > uint64(t.Params().InlineLimit) && e.Size <= smallFile {
			had := len(pieces)
			pieces, err = t.missing(ctx, i, &e, 0, int64(e.Size), pieces)
			size += int64(sizeOf(pieces[had:])) //nolint:gosec // some MiB
		}
		seen++
		return err == nil && size < besideBytes && seen < maxWalked
	}
	failed := t.Children(ctx, dir, index+1, take)
	if failed == nil && err == nil {
		failed = t.Children(ctx, dir, 0, func(i uint32, e flox.Entry) bool { return i < index && take(i, e) })
	}
	if err = errors.Join(err, failed); err == nil {
		err = r.p.fetch(ctx, aheadDirectory, pieces, t.a.hints(t.path), nil)
	}
	r.failed(t, err)
}

// fresh reports whether a directory's small files were not asked for yet.
func (r *readAhead) fresh(dir fileKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.beside[dir]; ok {
		return false
	}
	if len(r.beside) >= maxReaders {
		clear(r.beside)
	}
	r.beside[dir] = struct{}{}
	return true
}
