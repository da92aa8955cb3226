package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// reached lets a test say who can be reached.
type reached struct{ now atomic.Pointer[reach] }

func (r *reached) set(peers int, storehouse bool) { r.now.Store(&reach{peers, storehouse}) }

// TestCompletionOfflineFetchesNothing: with nobody to be reached a round tries
// nothing, says why, and all comes when somebody can be.
func TestCompletionOfflineFetchesNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	who := &reached{}
	who.set(0, false)
	a, _ := runAgent(t, h, nil, func(a *Agent) {
		quick(a)
		a.complete.every = time.Hour // only somebody who returns begins another round
		a.complete.reach = func() reach { return *who.now.Load() }
		a.ran.saw(prog.Path, 3, true)
	})
	following(t, a) // they could be asked, if anybody tried
	h.set(func() { h.asked, h.given = 0, 0 })
	a.complete.poke()
	lacks(t, a, prog, "nobody can be reached")
	time.Sleep(2 * time.Second)
	h.mu.Lock()
	asked, given := h.asked, h.given
	h.mu.Unlock()
	if asked != 0 || given != 0 || a.ahead.message().GetCompleteBytes() != 0 {
		t.Errorf("%d questions and %d blocks although nobody can be reached", asked, given)
	}
	a.complete.mu.Lock()
	for key, s := range a.complete.standings {
		if s.pause != 0 {
			t.Errorf("%v of %s counts as tried: %s", key.scope, key.path, s.why)
		}
	}
	a.complete.mu.Unlock()
	who.set(1, false)
	ready(t, a, 1, 0)
}

// TestCompletionForgivesWhoReturns: what failed is tried again at once when the
// first machine can be reached again, or the storehouse; not for one more peer.
func TestCompletionForgivesWhoReturns(t *testing.T) {
	for name, test := range map[string]struct {
		before, now reach
		forgives    bool
	}{
		"the first peer":                  {reach{0, false}, reach{1, false}, true},
		"the storehouse alone":            {reach{0, false}, reach{0, true}, true},
		"the storehouse, others are here": {reach{3, false}, reach{3, true}, true},
		"one more peer":                   {reach{1, true}, reach{2, true}, false},
		"one more without the storehouse": {reach{1, false}, reach{2, false}, false},
		"one less":                        {reach{2, true}, reach{1, true}, false},
		"the storehouse goes":             {reach{2, true}, reach{1, false}, false},
		"all go":                          {reach{1, false}, reach{0, false}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := &completer{
					ran: loadRan(filepath.Join(t.TempDir(), "ran.json")), every: time.Hour, settle: time.Second,
					standings: make(map[goalKey]*standing), reach: func() reach { return test.now },
				}
				g := goal{path: "a"}
				for range 10 {
					c.failed(g, errors.New("it failed"))
				}
				began := time.Now()
				// Also when all that failed waits, so that the round itself did not fail.
				c.rest(t.Context(), false, test.before)
				took := time.Since(began)
				if forgiven := !c.waiting(g); forgiven != test.forgives && took < goalRetryMax {
					t.Errorf("after %s: tried again %v, want %v", took, forgiven, test.forgives)
				}
				if test.forgives != (took < 2*onlineEvery) {
					t.Errorf("rested %s", took)
				}
			})
		})
	}
}

// TestCompletionOfflineRests: while nobody can be reached the pauses of what
// failed begin no round.
func TestCompletionOfflineRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &completer{
			ran: loadRan(filepath.Join(t.TempDir(), "ran.json")), every: completeEvery, settle: time.Second,
			standings: make(map[goalKey]*standing), reach: func() reach { return reach{} },
		}
		c.failed(goal{path: "a"}, errors.New("it failed"))
		began := time.Now()
		c.rest(t.Context(), true, reach{})
		if took := time.Since(began); took < completeEvery {
			t.Errorf("rested %s only, with nobody to ask", took)
		}
	})
}

// warnings collects what is warned of.
type warnings struct {
	slog.Handler
	mu    sync.Mutex
	lines []string
}

// Handle implements slog.Handler.
func (w *warnings) Handle(_ context.Context, r slog.Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	r.Attrs(func(a slog.Attr) bool { w.lines = append(w.lines, r.Message+": "+a.Value.String()); return true })
	return nil
}

// WithAttrs implements slog.Handler.
func (w *warnings) WithAttrs([]slog.Attr) slog.Handler { return w }

func (w *warnings) of(what string) (out []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, line := range w.lines {
		if strings.Contains(line, what) {
			out = append(out, line)
		}
	}
	return out
}

// TestRanNotSavedIsSaidOnce: a disk that is full stays full for long, and once is
// enough; another reason is told.
func TestRanNotSavedIsSaidOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	dir := filepath.Join(t.TempDir(), "gone")
	told := &warnings{Handler: slog.NewTextHandler(os.Stderr, nil)}
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.Log, cfg.NoPrefetch = slog.New(told), true }, func(a *Agent) {
		quick(a)
		a.complete.every = 20 * time.Millisecond
		a.ran.file = filepath.Join(dir, "ran.json")
		a.ran.saw(numbered("program", 1), 1, true)
	})
	const what = "list of what ran not saved"
	until(t, "the first failure is told", func() bool { return len(told.of(what)) == 1 })
	time.Sleep(time.Second)
	if lines := told.of(what); len(lines) != 1 {
		t.Errorf("told %d times: %q", len(lines), lines[:2])
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil { // no directory: another error
		t.Fatal(err)
	}
	until(t, "the new reason is told", func() bool { return len(told.of(what)) == 2 })
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	until(t, "it is saved at last", func() bool { _, err := os.Stat(a.ran.file); return err == nil })
}
