package agent

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
)

// startWorld is a program, its library, something else, and the honest trace of
// the program's start.
type startWorld struct {
	*house
	app, lib, other *flox.PathInfo
	appFiles        []testFile
	libFiles        []testFile
	trace           *floxv1.StartTrace
}

func newStartWorld(t *testing.T) *startWorld {
	t.Helper()
	w := &startWorld{house: newHouse(t)}
	w.libFiles = []testFile{{name: "lib/libc.so.6", data: randomBytes(1, 1_500_000), exec: true}}
	for i := range 1500 { // a manifest of several pages
		w.libFiles = append(w.libFiles, testFile{name: fmt.Sprintf("share/many/%04d-with-a-rather-long-name-so-that-pages-fill", i), data: fmt.Appendf(nil, "file %d", i)})
	}
	w.libFiles = append(w.libFiles, testFile{name: "zz/last", data: randomBytes(5, 200_000)}, testFile{name: "zz/small", data: randomBytes(6, 10_000)})
	w.appFiles = []testFile{{name: "bin/app", data: randomBytes(2, 900_000), exec: true}, {name: "etc/conf", data: []byte("small")}}
	w.lib = w.make(t, "lib", nil, w.libFiles...)
	w.app = w.make(t, "app", []flox.StorePath{w.lib.Path}, w.appFiles...)
	w.other = w.make(t, "other", nil, testFile{name: "bin/other", data: randomBytes(3, 400_000), exec: true},
		testFile{name: "small", data: randomBytes(7, 10_000)})
	w.publish(w.lib, w.app, w.other)
	w.trace = &floxv1.StartTrace{Path: string(w.app.Path), Trees: []*floxv1.TraceTree{w.tree(t, w.app), w.tree(t, w.lib)}}
	return w
}

// tree is a trace of everything in a path.
func (w *startWorld) tree(t *testing.T, info *flox.PathInfo) *floxv1.TraceTree {
	t.Helper()
	m, err := content.OpenManifest(t.Context(), info.Manifest, w.house)
	if err != nil {
		t.Fatal(err)
	}
	tree := &floxv1.TraceTree{Path: string(info.Path), Manifest: info.Manifest[:]}
	for _, p := range m.Pages() {
		tree.Pages = append(tree.Pages, p[:])
	}
	for i := range m.Entries() {
		_ = m.Chunks(t.Context(), i, 0, -1, func(off int64, c flox.Chunk) bool { // an error: no regular file
			tree.Chunks = append(tree.Chunks, &floxv1.TraceChunk{
				Entry: i, Offset: uint64(off), Size: c.Size, Id: c.ID[:], Rank: uint32(len(tree.GetChunks())),
			})
			return true
		})
	}
	return tree
}

func (w *startWorld) serve(trace *floxv1.StartTrace) {
	w.set(func() { w.traces = map[string]*floxv1.StartTrace{w.app.Path.HashPart(): trace} })
}

// execs looks the program up and reads its beginning, as execve does.
func (w *startWorld) execs(ctx context.Context, t *testing.T, a *Agent) flox.Tree {
	t.Helper()
	tr := treeOf(ctx, t, a, w.app.Path)
	bin, _, err := tr.Child(ctx, 0, "bin")
	if err != nil {
		t.Fatal(err)
	}
	app, _, err := tr.Child(ctx, bin, "app")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.ReadAt(ctx, app, make([]byte, 256), 0, flox.Reader{}); err != nil {
		t.Fatal(err)
	}
	return tr
}

// reads reads files whole and compares them.
func reads(ctx context.Context, t *testing.T, tr flox.Tree, files ...testFile) {
	t.Helper()
	for _, f := range files {
		p := make([]byte, len(f.data)+1)
		n, err := tr.ReadAt(ctx, entryOf(ctx, t, tr, f.name), p, 0, flox.Reader{})
		if err != nil || !bytes.Equal(p[:n], f.data) {
			t.Fatalf("%s: %d bytes, want %d, or others: %v", f.name, n, len(f.data), err)
		}
	}
}

func (w *startWorld) blocksServed() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.house.given
}

// A trace is replayed when its program is about to be executed: all of it is here
// before anybody reads, manifests included, so that nothing more is asked for.
func TestReplay(t *testing.T) {
	t.Parallel()
	w := newStartWorld(t)
	w.serve(w.trace)
	a, _ := runAgent(t, w.house, nil, nil)
	following(t, a)
	a.resolver.far = always
	ctx := within(t, 40*time.Second)
	looked := treeOf(ctx, t, a, w.app.Path)
	if bin, _, err := looked.Child(ctx, 0, "bin"); err != nil {
		t.Error(err)
	} else if _, _, err := looked.Child(ctx, bin, "app"); err != nil { // ls and find do so too
		t.Error(err)
	}
	until(t, "the manifest is here", func() bool { return len(a.starts.book.places) == 0 })
	if a.starts.replayed.Load() != 0 {
		t.Error("replayed before anybody was about to run the program")
	}
	tr := w.execs(ctx, t, a)
	until(t, "the start was replayed", func() bool { return a.starts.replayed.Load() == 1 })
	served := w.blocksServed()
	reads(ctx, t, tr, w.appFiles...)
	reads(ctx, t, treeOf(ctx, t, a, w.lib.Path), w.libFiles...)
	if more := w.blocksServed() - served; more != 0 {
		t.Errorf("%d more blocks were asked for after the replay", more)
	}
	m := a.starts.message(a.ahead.message())
	if m.GetTraceBytes() < 2_600_000 || m.GetStartsReplayed() != 1 || !m.GetTraces() {
		t.Errorf("%v", m)
	}
	// Facts with the program's root block, the bundle.
	if trips := a.traffic.trips.done.Load(); trips > 2 {
		t.Errorf("readers waited for %d round trips one after the other", trips)
	}
	// What is here costs nothing, even when it is due again.
	for range 3 {
		a.starts.book.mu.Lock()
		a.starts.book.traces[w.app.Path].next = time.Time{}
		a.starts.book.mu.Unlock()
		w.execs(ctx, t, a)
		until(t, "it is due later", func() bool { return len(a.starts.book.places) == 0 })
	}
	if w.blocksServed() != served || a.starts.replayed.Load() != 1 {
		t.Error("a replay of what is here asked for something")
	}
}

// A path whose facts came from elsewhere is asked about when its program starts.
func TestTraceIsAskedForLater(t *testing.T) {
	t.Parallel()
	w := newStartWorld(t)
	w.serve(w.trace)
	a, _ := runAgent(t, w.house, nil, func(a *Agent) {
		if err := a.facts.accept(w.lists); err != nil {
			t.Fatal(err)
		}
		if err := a.facts.put(w.app, w.lib); err != nil {
			t.Fatal(err)
		}
	})
	following(t, a)
	ctx := within(t, 40*time.Second)
	w.execs(ctx, t, a)
	until(t, "the start was replayed", func() bool { return a.starts.replayed.Load() == 1 })
	w.set(func() { w.traces = nil })
	for range 5 { // of this one there is no trace, which is asked once
		other := treeOf(ctx, t, a, w.other.Path)
		bin, _, _ := other.Child(ctx, 0, "bin")
		i, _, _ := other.Child(ctx, bin, "other")
		_, _ = other.ReadAt(ctx, i, make([]byte, 256), 0, flox.Reader{})
	}
	until(t, "nothing is under way", func() bool { return len(a.starts.book.places) == 0 })
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wanted != 2 {
		t.Errorf("asked %d times for two traces", w.wanted)
	}
}

// Whatever a trace says, only what signed manifests say gets into the cache, under
// the names they give, and readers get the right bytes from an unsuspected storehouse.
func TestHostileTraces(t *testing.T) {
	t.Parallel()
	w := newStartWorld(t)
	garbage := randomBytes(77, 50_000)
	garbageID := content.Hash(garbage)
	w.set(func() { w.blocks[garbageID] = garbage })
	stranger := w.tree(t, w.other)
	strangerID := flox.CID(stranger.GetChunks()[0].GetId())
	smallID := flox.CID(stranger.GetChunks()[len(stranger.GetChunks())-1].GetId())
	lib := func(m *floxv1.StartTrace) *floxv1.TraceTree { return m.GetTrees()[1] }
	for name, change := range map[string]func(*floxv1.StartTrace){
		"sizes too small": func(m *floxv1.StartTrace) {
			for _, c := range lib(m).GetChunks() {
				c.Size = 1
			}
		},
		"sizes too large": func(m *floxv1.StartTrace) {
			for _, c := range lib(m).GetChunks() {
				c.Size = 1 << 20
			}
		},
		"impossible sizes": func(m *floxv1.StartTrace) {
			for i, c := range lib(m).GetChunks() {
				c.Size = []uint32{0, 1<<32 - 1}[i%2]
			}
		},
		"offsets": func(m *floxv1.StartTrace) {
			for i, c := range lib(m).GetChunks() {
				c.Offset += []uint64{1, 1 << 63, 1 << 40}[i%3]
			}
		},
		"entries": func(m *floxv1.StartTrace) {
			for i, c := range lib(m).GetChunks() {
				c.Entry = []uint32{0, 1 << 31, c.GetEntry() + 1}[i%3]
			}
		},
		"a chunk of another path": func(m *floxv1.StartTrace) {
			c := lib(m).GetChunks()[0]
			c.Id, c.Size = stranger.GetChunks()[0].GetId(), stranger.GetChunks()[0].GetSize()
		},
		"a chunk of another path of the same size": func(m *floxv1.StartTrace) {
			last := len(lib(m).GetChunks()) - 1
			lib(m).Chunks[last].Id = stranger.GetChunks()[len(stranger.GetChunks())-1].GetId()
		},
		"another path": func(m *floxv1.StartTrace) { m.Trees = append(m.Trees, stranger) },
		"another manifest": func(m *floxv1.StartTrace) {
			lib(m).Manifest, lib(m).Pages, lib(m).Chunks = stranger.GetManifest(), stranger.GetPages(), stranger.GetChunks()
		},
		"garbage as a chunk": func(m *floxv1.StartTrace) {
			lib(m).Chunks[0].Id, lib(m).Chunks[0].Size = garbageID[:], uint32(len(garbage))
		},
		"garbage as a page": func(m *floxv1.StartTrace) { lib(m).Pages = append([][]byte{garbageID[:]}, lib(m).GetPages()...) },
		"what nobody has": func(m *floxv1.StartTrace) {
			none := content.Hash([]byte("none"))
			lib(m).Chunks[0].Id = none[:]
			lib(m).Pages = append(lib(m).GetPages(), none[:])
		},
		"no CIDs": func(m *floxv1.StartTrace) {
			lib(m).Chunks[0].Id, lib(m).Chunks[1].Id = nil, []byte("x")
			lib(m).Pages = append(lib(m).GetPages(), []byte("y"))
		},
		"everything twice": func(m *floxv1.StartTrace) { m.Trees = append(m.Trees, m.GetTrees()...) },
	} {
		t.Run(name, func(t *testing.T) {
			trace := proto.CloneOf(w.trace)
			change(trace)
			w.serve(trace)
			a, _ := runAgent(t, w.house, nil, nil)
			following(t, a)
			ctx := within(t, 40*time.Second)
			tr := w.execs(ctx, t, a)
			until(t, "the replay is over", func() bool { return len(a.starts.book.places) == 0 && a.traffic.total() > 0 })
			reads(ctx, t, tr, w.appFiles...)
			reads(ctx, t, treeOf(ctx, t, a, w.lib.Path), w.libFiles[0], w.libFiles[700], w.libFiles[len(w.libFiles)-2], w.libFiles[len(w.libFiles)-1])
			a.fetcher.work.Wait()
			if here := a.cache.Has([]flox.CID{garbageID, strangerID, smallID, w.other.Manifest}); slices.Contains(here, true) {
				t.Errorf("in the cache: garbage %v, chunks of another path %v %v, its manifest %v", here[0], here[1], here[2], here[3])
			}
			for _, p := range a.host.Peers() {
				if p.Role == p2p.Storehouse && p.Why != "" && bytes.Contains([]byte(p.Why), []byte("ban")) {
					t.Errorf("the storehouse pays for it: %s", p.Why)
				}
			}
		})
	}
}

// Switched off, nothing is asked for, recorded or replayed.
func TestTracesSwitchedOff(t *testing.T) {
	t.Parallel()
	w := newStartWorld(t)
	w.serve(w.trace)
	for name, change := range map[string]func(*Config){
		"traces":   func(c *Config) { c.NoTraces = true },
		"prefetch": func(c *Config) { c.NoPrefetch = true },
	} {
		a, _ := runAgent(t, w.house, change, nil)
		following(t, a)
		ctx := within(t, 40*time.Second)
		reads(ctx, t, w.execs(ctx, t, a), w.appFiles...)
		m := a.starts.message(a.ahead.message())
		if m.GetTraceBytes() != 0 || m.GetStartsReplayed() != 0 || m.GetTraces() {
			t.Errorf("%s: %v", name, m)
		}
		if a.starts.recorder != nil || a.starts.book != nil {
			t.Errorf("%s: a recorder or a book is there", name)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wanted != 0 {
		t.Errorf("traces were asked for %d times", w.wanted)
	}
}

// Traces in memory are bounded.
func TestTracesInMemoryAreBounded(t *testing.T) {
	t.Parallel()
	b := newTraceBook(nil)
	for i := range 2 * maxHeldTraces {
		b.put(storePath(t, i), nil)
	}
	if len(b.traces) > maxHeldTraces {
		t.Errorf("%d traces held", len(b.traces))
	}
	big := &floxv1.StartTrace{Trees: []*floxv1.TraceTree{{Chunks: make([]*floxv1.TraceChunk, maxTraceChunks)}}}
	for i := range 200 {
		b.put(storePath(t, i), big)
	}
	if b.chunks > maxHeldChunks {
		t.Errorf("%d chunks held, want at most %d", b.chunks, maxHeldChunks)
	}
	sum := 0
	for _, held := range b.traces {
		sum += held.chunks
	}
	if sum != b.chunks {
		t.Errorf("%d chunks held, %d counted", sum, b.chunks)
	}
	huge := &floxv1.StartTrace{Trees: []*floxv1.TraceTree{{Chunks: make([]*floxv1.TraceChunk, 10*maxTraceChunks)}}}
	if b.put(storePath(t, 1), huge); b.get(storePath(t, 1)) != nil {
		t.Error("a trace beyond the bounds was kept")
	}
}

// A reader who wants a block that is fetched for nobody joins its flight, and
// makes it one in a hurry; nobody is asked twice.
func TestReadersHurryWhatIsFetchedAhead(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 4)
	gate := make(chan struct{})
	r.swarm.set(func() { r.swarm.gate = gate })
	var arrived atomic.Uint64
	ahead := make(chan error, 1)
	go func() { ahead <- r.once(t.Context(), r.pieces, p2p.Hints{}, &arrived) }()
	until(t, "the background fetch is under way", func() bool {
		r.swarm.mu.Lock()
		defer r.swarm.mu.Unlock()
		return len(r.swarm.asked) == len(r.pieces)
	})
	read := make(chan error, 1)
	var got []byte
	go func() {
		read <- r.fetch(t.Context(), r.pieces[2:3], p2p.Hints{}, nil, func(_ piece, data []byte) error {
			got = data
			return nil
		})
	}()
	until(t, "the reader's block is in a hurry", func() bool {
		r.swarm.mu.Lock()
		defer r.swarm.mu.Unlock()
		return len(r.swarm.hurried) > 0
	})
	close(gate)
	if err := <-read; err != nil || !bytes.Equal(got, r.whole[40_000:60_000]) {
		t.Errorf("read: %d bytes, %v", len(got), err)
	}
	if err := <-ahead; err != nil || arrived.Load() != uint64(len(r.whole)) {
		t.Errorf("ahead: %d bytes arrived, %v", arrived.Load(), err)
	}
	if diff := cmp.Diff([]flox.CID{r.pieces[2].chunk.ID}, r.swarm.hurried); diff != "" {
		t.Errorf("in a hurry (-want +got):\n%s", diff)
	}
	for id, n := range r.swarm.asked {
		if n != 1 {
			t.Errorf("%s asked for %d times", id, n)
		}
	}
}

// Round trips are counted one after the other: what is under way at once is one.
func TestRoundTripsAreCountedInSequence(t *testing.T) {
	t.Parallel()
	var c trips
	first, second := c.next(), c.next()
	c.waited(first)
	c.waited(second)
	if n := c.done.Load(); n != 1 {
		t.Errorf("two at once are %d", n)
	}
	c.waited(c.next())
	c.waited(first)
	if n := c.done.Load(); n != 2 {
		t.Errorf("one more is %d in all, want 2", n)
	}
}

// What was warm where a start was recorded has no chunks in its trace, but its
// manifests come with the bundle: a look-up there waits for nothing. So do root
// blocks of what the trace does not even name.
func TestABundleBringsTheRootsOfItsClosure(t *testing.T) {
	t.Parallel()
	w := newStartWorld(t)
	isApp := func(t *floxv1.TraceTree) bool { return t.GetPath() == string(w.app.Path) }
	for _, named := range []bool{true, false} {
		short := proto.CloneOf(w.trace)
		for _, tree := range short.GetTrees() {
			if !isApp(tree) {
				tree.Chunks = nil
			}
		}
		if !named {
			short.Trees = slices.DeleteFunc(short.GetTrees(), func(t *floxv1.TraceTree) bool { return !isApp(t) })
		}
		w.bundleBrings(t, short, named)
	}
}

func (w *startWorld) bundleBrings(t *testing.T, trace *floxv1.StartTrace, pages bool) {
	t.Helper()
	w.serve(trace)
	a, _ := runAgent(t, w.house, nil, nil)
	following(t, a)
	ctx := within(t, 40*time.Second)
	w.execs(ctx, t, a)
	until(t, "the start was replayed", func() bool { return a.starts.replayed.Load() == 1 })
	if !a.cache.Has([]flox.CID{w.lib.Manifest})[0] {
		t.Error("the root block of a library's manifest is not here")
	}
	for i, page := range w.tree(t, w.lib).GetPages() {
		if a.cache.Has([]flox.CID{flox.CID(page)})[0] != pages {
			t.Errorf("page %d of it is here: %v, want %v", i, !pages, pages)
		}
	}
	if n := a.traffic.total(); n > 1_500_000 {
		t.Errorf("%d bytes came, want the program's and roots only", n)
	}
}
