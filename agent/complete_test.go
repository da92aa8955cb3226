package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// quick makes completion try again soon.
func quick(a *Agent) {
	a.ahead.life = 700 * time.Millisecond
	a.complete.every, a.complete.settle, a.complete.surveyFor = 200*time.Millisecond, 100*time.Millisecond, 50*time.Millisecond
}

// someProgram publishes a path with two programs and data, that refers to refs.
func someProgram(t *testing.T, h *house, name string, seed byte, refs ...flox.StorePath) *flox.PathInfo {
	t.Helper()
	info := h.make(t, name, refs,
		testFile{name: "bin/tool", data: randomBytes(seed, 600_000), exec: true},
		testFile{name: "bin/other", data: randomBytes(seed+1, 500_000), exec: true},
		testFile{name: "share/data", data: randomBytes(seed+2, 700_000)},
		testFile{name: "share/small", data: []byte("hello")})
	h.publish(info)
	return info
}

// someLibrary publishes a path with a library, that refers to refs.
func someLibrary(t *testing.T, h *house, name string, seed byte, refs ...flox.StorePath) *flox.PathInfo {
	t.Helper()
	info := h.make(t, name, refs, testFile{name: "lib/lib.so", data: randomBytes(seed, 400_000)}, testFile{name: "lib/plugin.so", data: randomBytes(seed+1, 300_000)})
	h.publish(info)
	return info
}

// start reads the beginning of a file, as the kernel does when it runs it.
func start(ctx context.Context, t *testing.T, a *Agent, info *flox.PathInfo, name string) {
	t.Helper()
	tr := treeOf(ctx, t, a, info.Path)
	if n, err := tr.ReadAt(ctx, entryOf(ctx, t, tr, name), make([]byte, 4096), 0, flox.Reader{}); err != nil || n != 4096 {
		t.Fatal(n, err)
	}
}

// lacking is how many bytes of a path are not on the agent's disk; those of its
// manifest count as 1.
func lacking(t *testing.T, a *Agent, info *flox.PathInfo) (n uint64) {
	t.Helper()
	m, err := a.complete.manifestHere(t.Context(), info)
	if err != nil {
		return 1
	}
	tr := &tree{Manifest: m, path: info.Path, a: a}
	err = tr.files(t.Context(), func(_ uint32, _ string, e flox.Entry) error {
		n += e.Size - a.localBytes(tr, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// ready waits until so many used and kept paths are complete, and no others are.
func ready(t *testing.T, a *Agent, used, kept uint32) {
	t.Helper()
	s := a.complete.state(t.Context())
	defer func() {
		if t.Failed() {
			t.Logf("state: %v", s)
		}
	}()
	until(t, fmt.Sprintf("%d used and %d kept paths are ready", used, kept), func() bool {
		s = a.complete.state(t.Context())
		return s.GetUsed() == used && s.GetUsedComplete() == used && s.GetKept() == kept && s.GetKeptComplete() == kept && s.GetMissingBytes() == 0
	})
}

// lacks waits until the state names a path with a reason.
func lacks(t *testing.T, a *Agent, info *flox.PathInfo, reason string) *floxv1.OfflinePath {
	t.Helper()
	var found *floxv1.OfflinePath
	until(t, fmt.Sprintf("%s is not complete: %s", info.Path, reason), func() bool {
		for _, p := range a.complete.state(t.Context()).GetMissing() {
			if strings.HasSuffix(p.GetPath(), string(info.Path)) && strings.Contains(p.GetReason(), reason) {
				found = p
			}
		}
		return found != nil
	})
	return found
}

func TestWhatRanIsCompleted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	far := someLibrary(t, h, "far", 90)
	lib := someLibrary(t, h, "lib", 80, far.Path)
	prog := someProgram(t, h, "prog", 10, lib.Path)
	idle := someProgram(t, h, "idle", 40)
	a, _ := runAgent(t, h, nil, quick)
	ctx := within(t, time.Minute)
	start(ctx, t, a, prog, "bin/tool")
	if n := lacking(t, a, prog); n == 0 {
		t.Fatal("all of it came with the first read: the test tests nothing")
	}
	ready(t, a, 1, 0)
	if n := lacking(t, a, prog); n != 0 {
		t.Errorf("%d bytes of the program's path are missing", n)
	}
	// Of its closure only what looking up names needs.
	for _, info := range []*flox.PathInfo{lib, far} {
		if n := lacking(t, a, info); n <= 1 || n < 690_000 {
			t.Errorf("of %s %d bytes are missing, want the manifest here and the content not", info.Path, n)
		}
	}
	if _, ok := a.facts.get(idle.Path.HashPart()); ok {
		t.Error("something was fetched of a path nobody used")
	}
	if n := a.ahead.message().GetCompleteBytes(); n < 1_000_000 {
		t.Errorf("%d bytes counted as completed", n)
	}

	// Cut off: other parts of it, and the names of its libraries.
	h.set(func() { clear(h.blocks); h.broken = errors.New("cut off") })
	start(ctx, t, a, prog, "bin/other")
	tr := treeOf(ctx, t, a, far.Path)
	if _, _, err := tr.Child(ctx, 0, "lib"); err != nil {
		t.Error(err)
	}
}

// TestCompletionOrder: first what ran, of everything; then the rest of programs,
// then of libraries.
func TestCompletionOrder(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	lib, one, two := someLibrary(t, h, "lib", 80), someProgram(t, h, "one", 10), someProgram(t, h, "two", 40)
	order := make(map[flox.CID]int) // when a block was served
	h.set(func() {
		h.served = func(id flox.CID) {
			if _, ok := order[id]; !ok {
				order[id] = len(order)
			}
		}
	})
	a, _ := runAgent(t, h, nil, func(a *Agent) {
		quick(a)
		a.ran.saw(lib.Path, 2, false)
		a.ran.saw(one.Path, 3, true) // bin/tool, behind bin/other
		a.ran.saw(two.Path, 3, true)
	})
	ready(t, a, 3, 0)
	ctx := within(t, time.Minute)
	when := func(info *flox.PathInfo, name string) (first, last int) {
		tr := treeOf(ctx, t, a, info.Path).(*tree)
		first = len(order)
		err := tr.Chunks(ctx, entryOf(ctx, t, tr, name), 0, -1, func(_ int64, c flox.Chunk) bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			at, ok := order[c.ID]
			if !ok {
				t.Errorf("a chunk of %s of %s was never served", name, info.Path)
			}
			first, last = min(first, at), max(last, at)
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		return first, last
	}
	ran, rest := 0, len(order)
	for _, info := range []*flox.PathInfo{one, two} {
		_, last := when(info, "bin/tool")
		ran = max(ran, last)
		first, _ := when(info, "bin/other")
		rest = min(rest, first)
	}
	_, libRan := when(lib, "lib/lib.so")
	if max(ran, libRan) > rest {
		t.Errorf("the rest of a path was begun (%d) before all that ran was here (%d)", rest, max(ran, libRan))
	}
	plugin, _ := when(lib, "lib/plugin.so")
	for _, info := range []*flox.PathInfo{one, two} {
		if _, last := when(info, "share/data"); last > plugin {
			t.Errorf("a library's rest (%d) came before that of program %s (%d)", plugin, info.Path, last)
		}
	}
}

func TestCompletionYieldsToReaders(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	a, _ := runAgent(t, h, nil, quick)
	ctx := within(t, time.Minute)
	reader := a.waits.begin(1, opRead, "somebody else's file", 1)
	start(ctx, t, a, prog, "bin/tool")
	time.Sleep(2 * time.Second)
	if n := a.ahead.message().GetCompleteBytes(); n != 0 {
		t.Errorf("%d bytes were completed while a reader waited", n)
	}
	reader.end()
	ready(t, a, 1, 0)
}

// TestCompletionGoesOnAfterAnOutage: what nobody holds is named, does not keep
// the rest from coming, and comes when somebody has it.
func TestCompletionGoesOnAfterAnOutage(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	lost, other := someProgram(t, h, "lost", 10), someProgram(t, h, "other", 40)
	a, _ := runAgent(t, h, nil, quick)
	ctx := within(t, time.Minute)
	gone := make(map[flox.CID][]byte)
	tr := treeOf(ctx, t, a, lost.Path).(*tree)
	err := tr.Chunks(ctx, entryOf(ctx, t, tr, "share/data"), 0, -1, func(_ int64, c flox.Chunk) bool {
		h.set(func() { gone[c.ID] = h.blocks[c.ID]; delete(h.blocks, c.ID) })
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	start(ctx, t, a, other, "bin/tool")
	start(ctx, t, a, lost, "bin/tool")
	p := lacks(t, a, lost, "nobody delivered in time")
	if p.GetMissingBytes() != 700_000 {
		t.Errorf("%d bytes are said to be missing, want the 700,000 nobody has", p.GetMissingBytes())
	}
	until(t, "the other program is complete", func() bool { return lacking(t, a, other) == 0 })
	until(t, "the state says so", func() bool { // it is looked at now and then
		s := a.complete.state(ctx)
		return s.GetUsed() == 2 && s.GetUsedComplete() == 1
	})
	h.set(func() {
		for id, b := range gone {
			h.blocks[id] = b
		}
	})
	ready(t, a, 2, 0)
}

// TestCompletionSurvivesARestart: the next process knows what ran, and completes
// it without anybody reading it again.
func TestCompletionSurvivesARestart(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	dir := t.TempDir()
	off := func(cfg *Config) { cfg.StateDir, cfg.NoPrefetch = dir, true }
	a, stop := runAgent(t, h, off, quick)
	start(within(t, time.Minute), t, a, prog, "bin/tool")
	if p := lacks(t, a, prog, "switched off"); p.GetPolicy() != policyUsed {
		t.Errorf("policy %q", p.GetPolicy())
	}
	time.Sleep(time.Second)
	if n := lacking(t, a, prog); n == 0 || a.ahead.message().GetCompleteBytes() != 0 {
		t.Errorf("%d bytes missing: completion goes on although it is switched off", n)
	}
	stop()
	b, stop := runAgent(t, h, func(cfg *Config) { cfg.StateDir = dir }, quick)
	ready(t, b, 1, 0)
	if n := lacking(t, b, prog); n != 0 {
		t.Errorf("%d bytes are missing", n)
	}
	stop()
	// And what is whole is known as such with the network cut.
	h.set(func() { clear(h.blocks); h.broken = errors.New("cut off") })
	c, _ := runAgent(t, h, func(cfg *Config) { cfg.StateDir = dir }, quick)
	ready(t, c, 1, 0)
}

// TestEvictedIsNotComplete: what is here is what the cache has, and what somebody
// used comes back.
func TestEvictedIsNotComplete(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	a, _ := runAgent(t, h, nil, func(a *Agent) { quick(a); a.complete.every = time.Hour })
	ctx := within(t, time.Minute)
	start(ctx, t, a, prog, "bin/tool")
	ready(t, a, 1, 0)
	if _, err := a.cache.GC(ctx, 0); err != nil {
		t.Fatal(err)
	}
	lacks(t, a, prog, reasonFetching)
	a.complete.poke()
	ready(t, a, 1, 0)
}

func TestNothingLargeIsCompleted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.CacheBudget = 8 << 20 }, quick)
	ctx := within(t, time.Minute)
	start(ctx, t, a, prog, "bin/tool")
	p := lacks(t, a, prog, "it is large")
	until(t, "the program that ran is here", func() bool {
		s := a.complete.state(ctx)
		return len(s.GetMissing()) == 1 && s.GetMissing()[0].GetMissingBytes() == 1_200_000 && s.GetMissingBytes() == 0
	})
	if p.GetPolicy() != policyUsed {
		t.Errorf("policy %q", p.GetPolicy())
	}
}

// TestCompletionEvictsNothing: with a full cache it stops, and says so.
func TestCompletionEvictsNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const budget = 40 << 20
	prog := someProgram(t, h, "prog", 10)
	big := h.make(t, "big", nil, testFile{name: "data", data: randomBytes(77, budget*96/100)})
	h.publish(big)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.CacheBudget = budget }, quick)
	ctx := within(t, time.Minute)
	tr := treeOf(ctx, t, a, big.Path)
	i := entryOf(ctx, t, tr, "data")
	buf := make([]byte, 64<<10)
	for off := int64(0); a.complete.room() == nil; off += int64(len(buf)) {
		if n, err := tr.ReadAt(ctx, i, buf, off, flox.Reader{}); err != nil || n == 0 {
			t.Fatalf("%d bytes at %d: %v; the cache is not full: %+v", n, off, err, a.cache.Usage())
		}
	}
	start(ctx, t, a, prog, "bin/tool")
	lacks(t, a, prog, "the cache is full")
	time.Sleep(2 * time.Second)
	if u := a.cache.Usage(); u.Evicted != 0 {
		t.Errorf("%d bytes were evicted", u.Evicted)
	}
}

// TestLinksAreFollowed: what a program's files name is completed too, at any
// distance, and nothing else of those paths.
func TestLinksAreFollowed(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	deep := someLibrary(t, h, "deep", 90)
	at := func(info *flox.PathInfo, name string) string { return testStore.Join(info.Path) + "/" + name }
	script := h.make(t, "script", []flox.StorePath{deep.Path},
		testFile{name: "bin/run", exec: true, data: []byte("#!" + at(deep, "lib/lib.so") + "\nexec something\n")},
		testFile{name: "mods/a.pm", data: randomBytes(50, 50_000)}, testFile{name: "mods/b/c.pm", data: randomBytes(51, 50_000)},
		testFile{name: "other", data: randomBytes(52, 50_000)})
	h.publish(script)
	wrapper := h.make(t, "wrapper", []flox.StorePath{script.Path},
		testFile{name: "bin/tool", exec: true, data: fmt.Appendf(nil, "#!%s\nLIB=\"%s\" exec x %s%s\n",
			at(script, "bin/run"), at(script, "mods"), strings.Repeat("#", 9000), at(script, "no-such-file"))})
	h.publish(wrapper)
	a, _ := runAgent(t, h, nil, quick)
	ctx := within(t, time.Minute)
	start(ctx, t, a, wrapper, "bin/tool")
	ready(t, a, 1, 0)
	missing := func(info *flox.PathInfo) (names []string) {
		tr := treeOf(ctx, t, a, info.Path).(*tree)
		err := tr.files(ctx, func(_ uint32, name string, e flox.Entry) error {
			if a.localBytes(tr, e) < e.Size {
				names = append(names, name)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	if got := missing(script); !slices.Equal(got, []string{"other"}) {
		t.Errorf("missing of what the wrapper names: %v, want only the file it does not", got)
	}
	if got := missing(deep); !slices.Equal(got, []string{"lib/plugin.so"}) {
		t.Errorf("missing of what the script it runs needs: %v, want only the file it does not", got)
	}
}
