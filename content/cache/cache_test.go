package cache

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// Content of every shape comes back byte for byte: tiny, packed with several
// chunks, one segment, several segments with chunks across their border.
func TestReadBack(t *testing.T) {
	c := open(t, small(t.TempDir()))
	for i, size := range []int{1, 100, 4096, 30 << 10, 32 << 10, 33 << 10, 256 << 10, 256<<10 + 1, 1 << 20, 3<<20 + 17} {
		s := newSample(uint64(i), size, 20<<10)
		if st := s.readAll(t, c, 1); st != Miss {
			t.Fatalf("size %d: state %d before the put", size, st)
		}
		s.putAll(t, c)
		for _, r := range [][2]int64{{0, s.Size}, {0, 1}, {s.Size - 1, 1}, {s.Size / 2, 4096}, {s.Size / 3, s.Size}} {
			if st := s.read(t, c, r[0], r[1], 1); st != Hit {
				t.Errorf("size %d: read %v: state %d, want hit", size, r, st)
			}
		}
		if n, st := c.ReadAt(s.File, make([]byte, 10), s.Size, 0); n != 0 || st != Hit {
			t.Errorf("size %d: read at the end: %d, %d", size, n, st)
		}
		if got := c.Missing(s.File, 0, s.Size); len(got) != 0 {
			t.Errorf("size %d: missing %v", size, got)
		}
	}
}

// A read that touches one byte that is not here is a miss, and Missing says which.
func TestPartial(t *testing.T) {
	c := open(t, small(t.TempDir()))
	s := newSample(1, 600<<10, 64<<10)
	for i := 0; i < len(s.chunks); i += 2 {
		if err := s.put(c, i); err != nil {
			t.Fatal(err)
		}
	}
	var want []Range
	for i := range s.chunks {
		st := Hit
		if i%2 == 1 {
			st = Miss
			want = append(want, Range{s.offs[i], int64(s.chunks[i].Size)})
		}
		if got := s.read(t, c, s.offs[i], int64(s.chunks[i].Size), 0); got != st {
			t.Errorf("chunk %d: state %d, want %d", i, got, st)
		}
		if got := c.State(s.File, s.offs[i], 1); got != st {
			t.Errorf("chunk %d: State %d, want %d", i, got, st)
		}
	}
	if d := cmp.Diff(want, c.Missing(s.File, 0, s.Size)); d != "" {
		t.Errorf("missing: %s", d)
	}
	if got := s.read(t, c, 0, int64(s.chunks[0].Size)+1, 0); got != Miss {
		t.Errorf("read one byte too far: state %d, want miss", got)
	}
}

// Puts that contradict themselves are refused.
func TestBadPuts(t *testing.T) {
	c := open(t, small(t.TempDir()))
	s := newSample(1, 100<<10, 16<<10)
	ctx, ch := context.Background(), s.chunks[0]
	for name, err := range map[string]error{
		"short data":    c.PutChunk(ctx, s.File, 0, ch, s.data[:ch.Size-1]),
		"behind end":    c.PutChunk(ctx, s.File, s.Size-1, ch, s.chunk(0)),
		"negative":      c.PutChunk(ctx, s.File, -1, ch, s.chunk(0)),
		"overflow":      c.PutChunk(ctx, s.File, 1<<63-1, ch, s.chunk(0)),
		"empty":         c.PutChunk(ctx, s.File, 0, flox.Chunk{}, nil),
		"whole, name":   c.PutChunk(ctx, File{s.ID, int64(ch.Size)}, 0, ch, s.chunk(0)),
		"empty block":   c.PutBlock(ctx, s.ID, nil),
		"block, size":   c.PutBlock(ctx, s.ID, make([]byte, maxBlock+1)),
		"keep, NUL":     c.Keep(ctx, "a\x00b", slices.Values([]flox.CID{s.ID})),
		"keep, nothing": c.Keep(ctx, "", slices.Values([]flox.CID{s.ID})),
	} {
		t.Run(name, func(t *testing.T) { is(t, err, flox.ErrBadInput) })
	}
	if err := s.put(c, 0); err != nil {
		t.Fatal(err)
	}
	other := File{s.ID, s.Size + 5}
	is(t, c.PutChunk(ctx, other, s.offs[1], s.chunks[1], s.chunk(1)), flox.ErrBadInput)
	if _, st := c.ReadAt(other, make([]byte, 10), 0, 0); st != Miss {
		t.Errorf("another size: state %d, want miss", st)
	}
}

// A second opener is told who holds the directory.
func TestBusy(t *testing.T) {
	dir := t.TempDir()
	open(t, small(dir))
	_, err := Open(small(dir))
	is(t, err, flox.ErrBusy)
	if !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("error %q does not name the directory and the process", err)
	}
}

// Chunks and blocks are found by their own names, wherever they lie, and
// are not when their bytes are gone.
func TestByChunk(t *testing.T) {
	ctx := context.Background()
	c := open(t, small(t.TempDir()))
	tiny, packed, large := newSample(1, 900, 16<<10), newSample(2, 30<<10, 8<<10), newSample(3, 1<<20, 64<<10)
	block := newSample(4, 60<<10, 1<<20)
	want := map[flox.CID][]byte{tiny.ID: tiny.data, block.ID: block.data}
	for _, s := range []*sample{tiny, packed, large} {
		s.putAll(t, c)
		for i := range s.chunks {
			want[s.chunks[i].ID] = s.chunk(i)
		}
	}
	if err := c.PutBlock(ctx, block.ID, block.data); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		found := map[flox.CID]bool{}
		c.Chunks(func(id flox.CID) bool { found[id] = true; return true })
		for id, data := range want {
			got, err := c.Get(ctx, id)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("get %s: %d bytes, %v; want %d", id, len(got), err, len(data))
			}
			if !found[id] || !c.Has([]flox.CID{id})[0] {
				t.Errorf("%s: listed %v, had %v", id, found[id], c.Has([]flox.CID{id}))
			}
		}
	}
	check()
	calls := 0
	c.Chunks(func(flox.CID) bool { calls++; return false })
	if calls != 1 {
		t.Errorf("yield was called %d times after it wanted no more", calls-1)
	}
	if u := c.Usage(); u.Blocks != 1 {
		t.Errorf("%d blocks, want 1", u.Blocks)
	}
	for range 4 { // a used block is spared three times
		if _, err := c.GC(ctx, 0); err != nil {
			t.Fatal(err)
		}
	}
	for id := range want {
		_, err := c.Get(ctx, id)
		is(t, err, flox.ErrNotFound)
	}
	c.Chunks(func(id flox.CID) bool { t.Errorf("%s is listed after everything was evicted", id); return true })
	if u := c.Usage(); u.Files != 0 || u.Blocks != 0 || u.Kept != 0 || c.sum.own != 0 || c.objects.total.Load() != 0 {
		t.Errorf("empty cache: %+v, own %d, packs %d", u, c.sum.own, c.objects.total.Load())
	}
}

// Bytes that rot on disk never reach a peer: they are dropped and can be put again.
func TestRot(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	c := open(t, small(dir))
	s, tiny := newSample(1, 200<<10, 16<<10), newSample(2, 5000, 16<<10)
	s.putAll(t, c)
	tiny.putAll(t, c)
	files, err := filepath.Glob(filepath.Join(dir, "data", "*", "*"))
	if err != nil || len(files) != 2 {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, f := range files {
		flip(t, f, 4321)
	}
	for _, s := range []*sample{s, tiny} {
		_, err := c.Get(ctx, s.chunks[0].ID)
		is(t, err, flox.ErrNotFound)
		if st := c.State(s.File, 0, 10); st != Miss {
			t.Errorf("state %d after the rot was seen, want miss", st)
		}
		if err := s.put(c, 0); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Get(ctx, s.chunks[0].ID); err != nil || !bytes.Equal(got, s.chunk(0)) {
			t.Errorf("after another put: %v", err)
		}
		s.readAll(t, c, 0)
	}
}

func flip(t *testing.T, file string, off int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := []byte{0}
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{b[0] ^ 8}, off); err != nil {
		t.Fatal(err)
	}
}

// Content files that vanish or shrink are misses, and are fetched anew.
func TestVanished(t *testing.T) {
	dir := t.TempDir()
	cfg := small(dir)
	cfg.OpenFiles = 1
	c := open(t, cfg)
	for i, harm := range []func(string) error{os.Remove, func(f string) error { return os.Truncate(f, 10) }} {
		s := newSample(uint64(i), 100<<10, 16<<10)
		s.putAll(t, c)
		object := c.record(key{s.ID, 0}).cur.Load().object
		if err := harm(c.objects.path(object)); err != nil {
			t.Fatal(err)
		}
		newSample(uint64(16+i), 100<<10, 16<<10).putAll(t, c) // its descriptor may be closed now
		s.readAll(t, c, 0)
		s.readAll(t, c, 0)
		s.putAll(t, c)
		if st := s.readAll(t, c, 0); st != Hit {
			t.Errorf("harm %d: state %d after another put, want hit", i, st)
		}
	}
}

// An index that is damaged is begun anew; the agent starts.
func TestDamagedIndex(t *testing.T) {
	dir := t.TempDir()
	c, err := Open(small(dir))
	if err != nil {
		t.Fatal(err)
	}
	s := newSample(1, 100<<10, 16<<10)
	s.putAll(t, c)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	manifests, err := filepath.Glob(filepath.Join(dir, "index", "MANIFEST-*"))
	if err != nil || len(manifests) == 0 {
		t.Fatalf("manifests %v, %v", manifests, err)
	}
	for _, m := range manifests {
		if err := os.WriteFile(m, bytes.Repeat([]byte{0x5a}, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c = open(t, small(dir))
	if st := s.readAll(t, c, 0); st != Miss {
		t.Errorf("state %d, want miss", st)
	}
	s.putAll(t, c)
	if st := s.readAll(t, c, 0); st != Hit {
		t.Errorf("state %d after a put, want hit", st)
	}
}

// After Close reads are misses and the rest says that it is closed.
func TestClosed(t *testing.T) {
	ctx := context.Background()
	c, err := Open(small(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	s := newSample(1, 100<<10, 16<<10)
	s.putAll(t, c)
	for range 2 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.readAll(t, c, 0); st != Miss {
		t.Errorf("state %d, want miss", st)
	}
	is(t, s.put(c, 0), flox.ErrClosed)
	_, err = c.GC(ctx, 0)
	is(t, err, flox.ErrClosed)
	is(t, c.Sync(ctx), flox.ErrClosed)
	_, err = c.Verify(ctx, s.File, s.offs[0], s.chunks[0])
	is(t, err, flox.ErrClosed)
}

// Many readers and writers while everything is evicted under them: a
// hit is always right. (Run with -race too.)
func TestConcurrent(t *testing.T) {
	cfg := small(t.TempDir())
	cfg.OpenFiles, cfg.Memory, cfg.SyncEvery = 16, 1<<20, 1
	c := open(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var all []*sample
	for i := range 24 {
		all = append(all, newSample(uint64(i), []int{700, 20 << 10, 90 << 10, 600 << 10}[i%4], 16<<10))
	}
	var work, behind sync.WaitGroup
	behind.Go(func() { _ = c.Run(ctx) })
	behind.Go(func() {
		for ctx.Err() == nil {
			if _, err := c.GC(ctx, 0); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for w := range 4 {
		work.Go(func() {
			for round := range 60 {
				s := all[(w*7+round*5)%len(all)]
				i := (round * 3) % len(s.chunks)
				if err := s.put(c, i); err != nil {
					t.Error(err)
				}
				s.read(t, c, s.offs[i], int64(s.chunks[i].Size), uint64(w+1))
				if _, err := c.Verify(ctx, s.File, s.offs[i], s.chunks[i]); err != nil {
					t.Error(err)
				}
				if data, err := c.Get(ctx, s.chunks[i].ID); err == nil && !bytes.Equal(data, s.chunk(i)) {
					t.Error("get gave wrong bytes")
				}
				for i := range s.chunks {
					s.read(t, c, s.offs[i], int64(s.chunks[i].Size), uint64(w+1))
				}
			}
		})
	}
	work.Wait()
	cancel()
	behind.Wait()
}

// A restart after Close leaves nothing in doubt, also in another session, and
// does not add to what must be remembered of lost ones.
func TestCleanRestart(t *testing.T) {
	dir := t.TempDir()
	s, tiny := newSample(1, 600<<10, 64<<10), newSample(2, 700, 64<<10)
	for i := range 4 {
		cfg := small(dir)
		cfg.BootID = strconv.Itoa(i)
		c, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []*sample{s, tiny} {
			if st := c.State(s.File, 0, s.Size); i > 0 && st != Hit {
				t.Errorf("start %d: state %d, want hit", i, st)
			}
			s.putAll(t, c)
			s.readAll(t, c, 1)
		}
		if lost := c.session.marks.Load().Lost; len(lost) != 0 {
			t.Errorf("start %d: lost generations %v", i, lost)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// An index that cannot be written any more costs the cache, not the reader:
// puts say ErrFull, what is here goes on being read, and eviction gives room.
func TestBrokenIndex(t *testing.T) {
	if private(t) {
		return
	}
	c, err := Open(small(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	s := newSample(1, 100<<10, 16<<10)
	if err := s.put(c, 0); err != nil {
		t.Fatal(err)
	}
	c.index.Break(fmt.Errorf("write: %w", flox.ErrFull))
	is(t, s.put(c, 1), flox.ErrFull)
	if st := s.read(t, c, 0, 10, 1); st != Hit {
		t.Errorf("state %d, want hit", st)
	}
	gc(t, c)
	gc(t, c)
	if st := s.read(t, c, 0, 10, 1); st != Miss {
		t.Errorf("state %d after eviction, want miss", st)
	}
	_ = c.Close()
	os.Exit(exitCode(t)) // the index's goroutines cannot be ended
}

// What is here is read while the index is opened for writing, but nothing is put in a
// generation that is not noted: the next process would use it again.
func TestNothingIsPutBeforeTheGenerationIsNoted(t *testing.T) {
	c := open(t, small(t.TempDir()))
	here, next := newSample(1, 100<<10, 16<<10), newSample(2, 100, 100)
	here.putAll(t, c)
	begun := make(chan struct{})
	c.session.begun = begun
	done := make(chan error, 1)
	go func() { done <- next.put(c, 0) }()
	for c.pending.Load() == 0 {
		select {
		case err := <-done:
			close(begun)
			t.Fatalf("it was put before the generation was noted: %v", err)
		default:
			runtime.Gosched()
		}
	}
	for range 1000 {
		if st := here.readAll(t, c, 0); st != Hit {
			t.Fatalf("state %d, want hit", st)
		}
	}
	if c.State(next.File, 0, next.Size) == Hit {
		t.Error("it was put before the generation was noted")
	}
	close(begun)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// An index that cannot be written any more, which is heard of while the cache opens, does
// not keep it closed: content that is missing is a miss.
func TestMissingContentOfABrokenIndex(t *testing.T) {
	if private(t) {
		return
	}
	c, err := Open(small(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	here, gone := newSample(1, 100, 100), newSample(2, 300<<10, 16<<10)
	here.putAll(t, c)
	gone.putAll(t, c)
	if err := os.Remove(c.objects.path(c.record(key{id: gone.ID}).cur.Load().object)); err != nil {
		t.Fatal(err)
	}
	c.index.Break(fmt.Errorf("write: %w", flox.ErrFull))
	if err := c.adopt(); err != nil {
		t.Error(err)
	}
	if st := here.readAll(t, c, 0); st != Hit {
		t.Errorf("state %d, want hit", st)
	}
	_ = c.Close()
	os.Exit(exitCode(t)) // the index's goroutines cannot be ended
}
