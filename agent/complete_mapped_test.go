package agent

import (
	"context"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	flox "github.com/floxctl/flox"
)

// scans makes a completer that notes when it asks what is mapped, and whose
// answers are told to it by saw.
func scans(t *testing.T, cfg Config, saw func(r *ran, n int)) (c *completer, times func() []time.Duration) {
	t.Helper()
	began := time.Now()
	var mu sync.Mutex
	var at []time.Duration
	c = &completer{a: &Agent{cfg: cfg, log: slog.New(slog.DiscardHandler)}, ran: loadRan(filepath.Join(t.TempDir(), "ran.json"))}
	c.mapped = func(context.Context) ([]uint64, error) {
		mu.Lock()
		defer mu.Unlock()
		at = append(at, time.Since(began))
		saw(c.ran, len(at))
		return nil, nil
	}
	return c, func() []time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(at)
	}
}

// TestMappedIsAskedLessOften: as long as nothing new is found the pauses grow, up
// to two minutes; with something new it is looked often again.
func TestMappedIsAskedLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const e = mappedEvery
		c, times := scans(t, Config{}, func(r *ran, n int) {
			if n <= 2 {
				r.mapped(numbered("mapped", n), 1, true)
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		var done sync.WaitGroup
		done.Go(func() { c.watchMapped(ctx) })
		time.Sleep(35 * e)
		quiet := times()
		if want := []time.Duration{0, e, 2 * e, 4 * e, 8 * e, 16 * e, 24 * e, 32 * e}; !slices.Equal(quiet, want) {
			t.Errorf("asked at %v, want %v", quiet, want)
		}
		c.ran.saw(numbered("ran", 0), 1, true) // 35.0: the tick may have been just before
		time.Sleep(5*e + e/2)
		after := times()[len(quiet):]
		if len(after) < 3 || after[0] > 36*e || after[1] != after[0]+e || after[2] != after[1]+2*e {
			t.Errorf("after something ran at %v asked at %v", 35*e, after)
		}
		cancel()
		done.Wait()
	})
}

// TestMappedIsNotAskedInVain: with completion switched off nobody is asked.
func TestMappedIsNotAskedInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, times := scans(t, Config{NoPrefetch: true}, func(*ran, int) {})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		c.watchMapped(ctx)
		if n := len(times()); n != 0 {
			t.Errorf("asked %d times", n)
		}
	})
}

// TestMappedFilesAreNoted: what the kernel names is noted with what it is, once.
func TestMappedFilesAreNoted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog, lib := someProgram(t, h, "prog", 10), someLibrary(t, h, "lib", 80)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.NoPrefetch = true }, nil)
	ctx := within(t, time.Minute)
	see := func(info *flox.PathInfo, names ...string) {
		tr := treeOf(ctx, t, a, info.Path)
		until(t, "its manifest is on the disk", func() bool { _, err := a.complete.manifestHere(ctx, info); return err == nil })
		for _, name := range names {
			a.complete.sawMapped(ctx, info.Manifest, entryOf(ctx, t, tr, name))
		}
	}
	for range 3 {
		see(lib, "lib/lib.so", "lib")
		see(prog, "share/data", "bin/tool")
	}
	list, changes := a.ran.list()
	if changes != 3 || len(list) != 2 || list[0].Path != prog.Path || !list[0].Program || len(list[0].Files) != 2 || list[1].Program || len(list[1].Files) != 1 {
		t.Errorf("%d changes: %+v", changes, list)
	}
}

// TestTopsOfCompletion: a library in a used program's closure needs none of its own.
func TestTopsOfCompletion(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	lib := someLibrary(t, h, "lib", 80)
	alone := someLibrary(t, h, "alone", 90)
	prog := someProgram(t, h, "prog", 10, lib.Path)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.Offline = policyClosure }, func(a *Agent) {
		quick(a)
		a.ran.saw(lib.Path, 2, false)
		a.ran.saw(alone.Path, 2, false)
		a.ran.saw(prog.Path, 3, true)
	})
	ready(t, a, 3, 0)
	for _, info := range []*flox.PathInfo{prog, lib, alone} {
		if n := lacking(t, a, info); n != 0 {
			t.Errorf("of %s %d bytes are missing", info.Path, n)
		}
	}
	w, err := a.complete.wishes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var tops []flox.StorePath
	for _, g := range a.complete.goalsOf(t.Context(), w, phaseNames, a.complete.linksKnown) {
		tops = append(tops, g.path)
	}
	if !slices.Equal(tops, []flox.StorePath{prog.Path, alone.Path}) {
		t.Errorf("closures of %v are wanted, want the program's and the one in none", tops)
	}
}
