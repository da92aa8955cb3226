package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

// readIn reads [off, off+n) of a file as the kernel does, 16 KiB at a time.
func readIn(ctx context.Context, t *testing.T, tr flox.Tree, index uint32, data []byte, off, n int) {
	t.Helper()
	p := make([]byte, 16<<10)
	for end := off + n; off < end; off += len(p) {
		got, err := tr.ReadAt(ctx, index, p, int64(off), flox.Reader{Node: 2})
		if err != nil || !bytes.Equal(p[:got], data[off:min(off+len(p), len(data))]) {
			t.Fatalf("16 KiB at %d: %d bytes, %v", off, got, err)
		}
	}
}

// TestALargeFileReadInOrderIsMetByWhatComesNext: and one read here and there is not.
func TestALargeFileReadInOrderIsMetByWhatComesNext(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	inOrder, jumping := randomBytes(1, 6<<20), randomBytes(2, 6<<20)
	info := h.make(t, "large", nil, testFile{name: "in-order", data: inOrder}, testFile{name: "jumping", data: jumping})
	h.publish(info)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	ctx := within(t, time.Minute)
	tr := treeOf(ctx, t, a, info.Path)

	index := entryOf(ctx, t, tr, "jumping")
	for i := range 40 {
		readIn(ctx, t, tr, index, jumping, (i*37%40)*150_000, 16<<10)
	}
	a.readers.work.Wait()
	if n := a.ahead.bytes[aheadSequential].Load(); n != 0 {
		t.Errorf("%d bytes fetched ahead of a reader who jumps about", n)
	}

	before := a.ahead.bytes[aheadSequential].Load()
	index = entryOf(ctx, t, tr, "in-order")
	readIn(ctx, t, tr, index, inOrder, 0, 512<<10)
	until(t, "the bytes ahead are here", func() bool { return tr.(*tree).here(ctx, index, make([]byte, 256<<10), 512<<10) == 256<<10 })
	// The further it reads, the more of it finds its bytes here already.
	readIn(ctx, t, tr, index, inOrder, 512<<10, 6<<20-512<<10)
	if n := a.ahead.bytes[aheadSequential].Load() - before; n < 4<<20 {
		t.Errorf("%d of 6 MiB fetched ahead of a reader in order, want most", n)
	}
	if got := a.traffic.total(); got > 13<<20 {
		t.Errorf("%d bytes fetched of 12 MiB: some came twice", got)
	}
}

// What readers waited for says how far the source is; before, its round trip does.
func TestFarIsWhatReadersWaitedFor(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		waited, rtt time.Duration
		far         bool
	}{{0, 0, false}, {0, 50 * time.Millisecond, true}, {time.Millisecond, 50 * time.Millisecond, false}, {9 * time.Millisecond, 0, true}} {
		r := newReadAhead(t.Context(), nil, func() time.Duration { return c.rtt })
		if c.waited > 0 {
			r.waited(c.waited)
		}
		if got := r.far(); got != c.far {
			t.Errorf("waited %v, round trip %v: far %v, want %v", c.waited, c.rtt, got, c.far)
		}
	}
}

func never() bool  { return false }
func always() bool { return true }

// smallFiles are many files of a few KiB in several directories, in the order
// of their names.
func smallFiles(n int) []testFile {
	var files []testFile
	for i := range n {
		files = append(files, testFile{name: fmt.Sprintf("d%02d/f%03d", i/50, i), data: randomBytes(byte(i), 1000+i)})
	}
	return files
}

// TestFilesReadOneAfterAnotherComeInBatches: across directories, and not for a
// reader who picks here and there.
func TestFilesReadOneAfterAnotherComeInBatches(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	files := smallFiles(400)
	walked, picked := h.make(t, "walked", nil, files...), h.make(t, "picked", nil, files...)
	h.publish(walked, picked)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	ctx := within(t, time.Minute)

	read := func(tr flox.Tree, i int) {
		index := entryOf(ctx, t, tr, files[i].name)
		readIn(ctx, t, tr, index, files[i].data, 0, 1)
	}
	tr := treeOf(ctx, t, a, picked.Path)
	for i := range 30 {
		read(tr, i*113%400)
	}
	a.readers.work.Wait()
	if n := a.ahead.bytes[aheadDirectory].Load(); n != 0 {
		t.Errorf("%d bytes fetched beside what was picked", n)
	}
	tr = treeOf(ctx, t, a, walked.Path)
	for i := range 4 {
		read(tr, i)
	}
	until(t, "files of the next directory are here", func() bool {
		return tr.(*tree).here(ctx, entryOf(ctx, t, tr, "d01/f060"), make([]byte, 10_000), 0) > 0
	})
	for i := 4; i < 400; i++ {
		read(tr, i)
	}
	if n := a.ahead.bytes[aheadDirectory].Load(); n < 200_000 {
		t.Errorf("%d bytes came in batches, want a good part of about 480,000", n)
	}
}

// TestNothingIsFetchedAheadWhenThatIsSwitchedOff is the control of both above.
func TestNothingIsFetchedAheadWhenThatIsSwitchedOff(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	data := randomBytes(1, 3<<20)
	files := smallFiles(60)
	info := h.make(t, "off", nil, append(files, testFile{name: "z-large", data: data})...)
	h.publish(info)
	a, _ := runAgent(t, h, func(c *Config) { c.NoPrefetch = true }, nil)
	following(t, a)
	ctx := within(t, time.Minute)
	tr := treeOf(ctx, t, a, info.Path)
	readIn(ctx, t, tr, entryOf(ctx, t, tr, "z-large"), data, 0, 1<<20)
	for i := range 20 {
		readIn(ctx, t, tr, entryOf(ctx, t, tr, files[i].name), files[i].data, 0, 1)
	}
	a.readers.work.Wait()
	if got := a.traffic.total(); got > 1<<20+400_000 {
		t.Errorf("%d bytes fetched, 1 MiB and 20 small files were read", got)
	}
	for why := range a.ahead.bytes {
		if n := a.ahead.bytes[why].Load(); n > 0 {
			t.Errorf("%d bytes fetched ahead (%d)", n, why)
		}
	}
}

// TestReadersRememberedAreBounded: each file and tree ever read would be too many.
func TestReadersRememberedAreBounded(t *testing.T) {
	t.Parallel()
	m := make(map[int]uint64)
	for i := range 3 * maxReaders {
		if len(m) >= maxReaders {
			dropSilent(m, func(used uint64) uint64 { return used })
		}
		m[i] = uint64(i)
	}
	if _, old := m[maxReaders]; len(m) != maxReaders || old {
		t.Errorf("%d remembered, the oldest among them: %v", len(m), old)
	}
}

// TestSomebodyWhoWaitsOvertakesTheBackground: a block under way for nobody is
// put in front, once.
func TestSomebodyWhoWaitsOvertakesTheBackground(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<20, 3)
	gate := make(chan struct{})
	r.swarm.set(func() { r.swarm.gate = gate })
	ctx := within(t, time.Minute)
	background := make(chan error, 1)
	go func() {
		background <- r.fetch(ctx, r.pieces, p2p.Hints{Background: true}, nil, func(piece, []byte) error { return nil })
	}()
	asked := func(i int) int {
		r.swarm.mu.Lock()
		defer r.swarm.mu.Unlock()
		return r.swarm.asked[r.pieces[i].chunk.ID]
	}
	until(t, "the background fetch is under way", func() bool { return asked(1) == 1 })
	got := make(chan []byte, 2)
	for range 2 { // two who wait push it once
		go func() {
			var b []byte
			_ = r.fetch(ctx, r.pieces[1:2], p2p.Hints{}, nil, func(_ piece, data []byte) error { b = data; return nil })
			got <- b
		}()
	}
	hurried := func() int {
		r.swarm.mu.Lock()
		defer r.swarm.mu.Unlock()
		return len(r.swarm.hurried)
	}
	until(t, "it is put in front", func() bool { return hurried() > 0 })
	close(gate)
	for range 2 {
		if b := <-got; !bytes.Equal(b, r.whole[20_000:40_000]) {
			t.Errorf("got %d bytes", len(b))
		}
	}
	if err := <-background; err != nil {
		t.Error(err)
	}
	r.work.Wait()
	if hurried() != 1 || r.swarm.hurried[0] != r.pieces[1].chunk.ID || asked(0) != 1 || asked(1) != 1 || asked(2) != 1 {
		t.Errorf("put in front: %v; asked %d, %d, %d times, want once each", r.swarm.hurried, asked(0), asked(1), asked(2))
	}
}

// TestTheCapHoldsFetchesBack: what nobody waits for keeps within its rate, whatever it
// is fetched for.
func TestTheCapHoldsFetchesBack(t *testing.T) {
	t.Parallel()
	for why := range aheadKinds {
		r := newRig(t, 8<<20, 3)
		asked := func() (n int) {
			r.work.Wait()
			r.swarm.mu.Lock()
			defer r.swarm.mu.Unlock()
			for _, times := range r.swarm.asked {
				n += times
			}
			return n
		}
		// Behind the burst a byte takes a second, and a chunk hours.
		p := &prefetcher{fetcher: r.fetcher, waits: newWaits(), rate: 1, life: time.Minute}
		if err := p.fetch(t.Context(), why, r.pieces[:1], p2p.Hints{}, nil); err != nil || asked() != 1 || p.bytes[why].Load() != 20_000 {
			t.Errorf("kind %d within the burst: %v, %d blocks asked for", why, err, asked())
		}
		if err := p.capped(t.Context(), aheadBurst-40_000); err != nil {
			t.Errorf("kind %d: the rest of the burst but one block: %v", why, err)
		}
		if err := p.fetch(t.Context(), why, r.pieces[1:2], p2p.Hints{}, nil); err != nil || asked() != 2 {
			t.Errorf("kind %d at the end of the burst: %v, %d blocks asked for", why, err, asked())
		}
		ctx, cancel := context.WithCancel(t.Context())
		held := make(chan error, 1)
		go func() { held <- p.fetch(ctx, why, r.pieces[2:], p2p.Hints{}, nil) }()
		until(t, "the fetch waits for the cap", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return time.Until(p.due) > time.Hour
		})
		cancel()
		if err := <-held; !errors.Is(err, context.Canceled) || asked() != 2 {
			t.Errorf("kind %d above the rate: %v, %d blocks asked for, want 2", why, err, asked())
		}
	}
	r := newRig(t, 8<<20, 3)
	p := &prefetcher{fetcher: r.fetcher, waits: newWaits(), rate: 4 << 20}
	full := &prefetcher{fetcher: newRig(t, 50_000, 3).fetcher, waits: newWaits()}
	if err := full.fetch(t.Context(), aheadSequential, r.pieces, p2p.Hints{}, nil); !errors.Is(err, flox.ErrFull) {
		t.Errorf("more than the cache holds is fetched ahead: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.capped(ctx, 1<<30); err == nil {
		t.Error("a wait for the cap does not end with its context")
	}
	// Somebody waits: completion does not begin.
	watch := p.waits.begin(1, opRead, "/x", 1)
	ctx, cancel = context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := p.quiet(ctx); err == nil {
		t.Error("completion goes on while a reader waits")
	}
	watch.end()
	if err := p.quiet(within(t, time.Minute)); err != nil {
		t.Error(err)
	}
}

// TestSmallFilesFarAwayComeWithTheirDirectory: who reads a second small file of a
// tree over a long line gets its neighbours with it, in whatever order they are
// read; over a short one nothing comes that was not asked for.
func TestSmallFilesFarAwayComeWithTheirDirectory(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	files := smallFiles(150) // three directories of fifty
	info := h.make(t, "far", nil, files...)
	h.publish(info)
	for _, far := range []bool{true, false} {
		a, _ := runAgent(t, h, nil, nil)
		following(t, a)
		ctx := within(t, time.Minute)
		tr := treeOf(ctx, t, a, info.Path).(*tree)
		here := func() (out [3]int) {
			for i, f := range files {
				if tr.here(ctx, entryOf(ctx, t, tr, f.name), make([]byte, 1), 0) > 0 {
					out[i/50]++
				}
			}
			return out
		}
		read := func(i int) {
			a.readers.far = func() bool { return far }
			readIn(ctx, t, tr, entryOf(ctx, t, tr, files[i].name), files[i].data, 0, 1)
			a.readers.work.Wait()
			kept(t, a.fetcher)
		}
		read(20)
		if got := here(); got != [3]int{1, 0, 0} {
			t.Errorf("far %v: one file was read, %v are here", far, got)
		}
		read(70)
		want := [3]int{1, 1, 0}
		if far {
			want = [3]int{1, 50, 0}
		}
		if got := here(); got != want {
			t.Errorf("far %v: two were read, %v are here, want %v", far, got, want)
		}
	}
}
