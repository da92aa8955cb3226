package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
)

// What was added goes when it is old and nothing keeps it, and not before.
func TestStagedPathsThatNothingNeedsGo(t *testing.T) {
	a := runNixAgent(t, newHouse(t))
	var paths []flox.StorePath
	for _, name := range []string{"rooted", "idle"} {
		p, err := a.staged.AddText(t.Context(), name, []byte(name), nil)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p.Info.Path)
	}
	link := filepath.Join(t.TempDir(), "result")
	if err := errors.Join(os.Symlink(testStore.Join(paths[0]), link), a.nix.roots.add(link)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		in   time.Duration
		left int
	}{{stagedAge - time.Hour, 2}, {stagedAge + time.Hour, 1}} {
		if err := a.ageStaged(t.Context(), time.Now().Add(c.in)); err != nil {
			t.Fatal(err)
		}
		if got := a.staged.Stat().Paths; got != uint64(c.left) {
			t.Errorf("%s later %d paths are left, want %d", c.in, got, c.left)
		}
	}
	if _, err := a.staged.Path(paths[0]); err != nil {
		t.Errorf("what a root keeps went: %v", err)
	}
}

// While what is staged cannot be read, no name is said to be nothing.
func TestNothingIsDeniedWhileStagedIsShut(t *testing.T) {
	a := runNixAgent(t, newHouse(t))
	const p = flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-added")
	if _, err := a.lookup(t.Context(), p); !errors.Is(err, flox.ErrNotFound) {
		t.Fatalf("a path that is nowhere: %v", err)
	}
	a.resolver.shut = func() error { return flox.ErrFull }
	if _, _, err := a.store.Lookup(t.Context(), string(p), flox.Reader{}); !errors.Is(err, flox.ErrFull) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("while it is shut: %v", err)
	}
}
