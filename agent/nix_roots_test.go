package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/nix/worker"
)

// What connections keep is bounded for all of them together, and free again when
// they end; a path that is kept already costs nothing.
func TestTempRootsOfAllAreBounded(t *testing.T) {
	t.Parallel()
	r := openNixRoots(&Agent{cfg: Config{StateDir: t.TempDir(), StoreDir: flox.DefaultStoreDir}})
	path := func(i int) flox.StorePath { return flox.StorePath(fmt.Sprintf("%032d-p", i)) }
	first := r.session(1)
	if err := first.AddTemp(t.Context(), path(0)); err != nil {
		t.Fatal(err)
	}
	r.temps = maxAllTempRoots // as if others had them
	second := r.session(2)
	if err := second.AddTemp(t.Context(), path(1)); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one more than all may keep: %v", err)
	}
	if err := first.AddTemp(t.Context(), path(0)); err != nil {
		t.Errorf("a path that is kept already: %v", err)
	}
	first.release()
	if err := second.AddTemp(t.Context(), path(1)); err != nil {
		t.Errorf("after another connection ended: %v", err)
	}
}

// A symlink that is gone is forgotten, one that stays is not, also after a restart.
func TestIndirectRootsThatAreGoneAreForgotten(t *testing.T) {
	t.Parallel()
	a := &Agent{cfg: Config{StateDir: t.TempDir(), StoreDir: flox.DefaultStoreDir}}
	r := openNixRoots(a)
	dir := t.TempDir()
	stays, goes := filepath.Join(dir, "stays"), filepath.Join(dir, "goes")
	for i, link := range []string{stays, goes} {
		if err := errors.Join(os.Symlink(flox.DefaultStoreDir.Join(flox.StorePath(fmt.Sprintf("%032d-p", i))), link), r.add(link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(goes); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		roots, err := r.find(t.Context())
		if err != nil || len(roots) != 1 || roots[0].Link != stays {
			t.Errorf("%v, %v, want %s only", roots, err, stays)
		}
		if len(r.links) != 1 {
			t.Errorf("remembered: %v", r.links)
		}
		r = openNixRoots(a)
	}
}

// What lies in a file system that does not answer keeps what it kept, also over a
// restart of everything; what is read again, or gone, does not.
func TestRootsThatHangKeepOverRestarts(t *testing.T) {
	t.Parallel()
	a, _ := runAgent(t, newHouse(t), nil, func(a *Agent) { a.roots.wait = time.Hour }) // its own roots use the same files
	path := func(i int) flox.StorePath { return flox.StorePath(fmt.Sprintf("%032d-p", i)) }
	root := func(i int, unit string) warden.Root {
		return warden.Root{Link: fmt.Sprintf("%s/%d", unit, i), Name: string(path(i)), Unit: unit}
	}
	const link = "/home/u/result"
	var found []warden.Root
	var unread []string
	hangs := false
	agent := func() *nixRoots {
		r := openNixRoots(a)
		r.search = func(context.Context) ([]warden.Root, []string, error) { return found, unread, nil }
		r.read = func(context.Context, string) (string, bool, error) {
			if hangs {
				return "", false, warden.ErrUnread
			}
			return testStore.Join(path(1)), false, nil
		}
		return r
	}
	want := func(r *nixRoots, numbers ...int) {
		t.Helper()
		roots, err := r.find(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got, paths []string
		for _, r := range roots {
			got = append(got, string(r.Target))
		}
		for _, i := range numbers {
			paths = append(paths, string(path(i)))
		}
		slices.Sort(got)
		if !slices.Equal(got, paths) {
			t.Errorf("roots of %q, want %q", got, paths)
		}
	}
	r := agent()
	if err := r.add(link); err != nil {
		t.Fatal(err)
	}
	found = []warden.Root{root(2, "/profiles/home"), root(3, "/profiles/home/deep"), root(4, "/profiles/homely"), root(5, "/proc/17")}
	want(r, 1, 2, 3, 4)

	// A restart later home hangs; a process that ended and a profile that is gone
	// keep nothing, and what moved keeps what it is now.
	hangs, found, unread = true, []warden.Root{root(6, "/profiles/homely")}, []string{"/proc/17", "/profiles/home"}
	for range 2 {
		r = agent()
		want(r, 1, 2, 3, 6)
		if said := r.notRead(); !strings.Contains(said, link) || !strings.Contains(said, "/profiles/home") {
			t.Errorf("said of it: %q", said)
		}
	}
	hangs, found, unread = false, []warden.Root{root(7, "/profiles/home")}, nil
	want(agent(), 1, 7)
	hangs, unread = true, []string{"/profiles/home"}
	found = nil
	want(agent(), 1, 7)
	if err := os.WriteFile(filepath.Join(a.cfg.StateDir, "nix-targets.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(agent())
}

// TestPermanentRoots: the agent's own user gets the link and what it keeps, nothing that
// is there already is replaced, and root is told to make it.
func TestPermanentRoots(t *testing.T) {
	t.Parallel()
	r := openNixRoots(&Agent{cfg: Config{StateDir: t.TempDir(), StoreDir: flox.DefaultStoreDir}, roots: newRootKeeper(nil)})
	dir := t.TempDir()
	p, other := flox.StorePath(fmt.Sprintf("%032d-p", 1)), flox.StorePath(fmt.Sprintf("%032d-p", 2))
	s := r.session(1)
	defer s.release()
	link := filepath.Join(dir, "sub", "result")
	if err := s.AddPermanent(t.Context(), p, link); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "root's rights") {
		t.Errorf("another user than the agent's: %v", err)
	}
	s.own = true
	for _, to := range []flox.StorePath{p, other} {
		if err := s.AddPermanent(t.Context(), to, link); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(link); err != nil || got != flox.DefaultStoreDir.Join(to) {
			t.Errorf("it leads to %q (%v), want %s", got, err, to)
		}
	}
	if roots, err := r.find(t.Context()); err != nil || !slices.Contains(roots, worker.Root{Link: link, Target: other}) {
		t.Errorf("roots are %v (%v), want %s among them", roots, err, link)
	}
	left, err := os.ReadDir(filepath.Dir(link))
	if err != nil || len(left) != 1 {
		t.Errorf("beside it is left %v (%v)", left, err)
	}
	file, away := filepath.Join(dir, "file"), filepath.Join(dir, "away")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink("/etc", away)); err != nil {
		t.Fatal(err)
	}
	for link, want := range map[string]string{
		file: "already exists", away: "already exists", "/nix/store/x/result": "in the Nix store is forbidden", file + "/result": "not a directory",
	} {
		if err := s.AddPermanent(t.Context(), p, link); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", link, err, want)
		}
	}
}
