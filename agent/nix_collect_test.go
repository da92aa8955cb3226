package agent

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/worker"
)

// A collection frees what is cached of paths that nothing on the machine keeps, not
// what roots lead to, and stops when as much is free as was asked for.
func TestCollectionFreesTheCache(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	dep := h.make(t, "dep", nil, testFile{name: "f", data: randomBytes(1, 200_000)})
	live := h.make(t, "live", []flox.StorePath{dep.Path}, testFile{name: "f", data: randomBytes(2, 200_000)})
	dead := h.make(t, "dead", nil, testFile{name: "f", data: randomBytes(3, 200_000)})
	h.publish(dep, live, dead)
	a := runNixAgent(t, h)
	n := newNixClient(t, a)
	n.run("nix-store", "-r", testStore.Join(live.Path), "--add-root", filepath.Join(n.tmp, "result"), "--indirect")
	files := map[flox.StorePath]flox.CID{}
	for _, info := range []*flox.PathInfo{dep, live, dead} {
		readWhole(t, a, info.Path, 1)
		tree, err := a.open(t.Context(), info)
		if err != nil {
			t.Fatal(err)
		}
		err = tree.files(t.Context(), func(i uint32, _ string, _ flox.Entry) error {
			return tree.Chunks(t.Context(), i, 0, 1, func(_ int64, c flox.Chunk) bool { files[info.Path] = c.ID; return true })
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	cached := func(p flox.StorePath) bool { return a.cache.Has([]flox.CID{files[p]})[0] }
	for p := range files {
		until(t, "it is cached", func() bool { return cached(p) })
	}
	var staged []string
	for _, name := range []string{"one", "two"} {
		if err := os.WriteFile(filepath.Join(n.tmp, name), []byte(strings.Repeat(name, 1000)), 0o644); err != nil {
			t.Fatal(err)
		}
		staged = append(staged, n.run("nix-store", "--add", filepath.Join(n.tmp, name)))
	}
	left := func() (left int) {
		for _, s := range staged {
			if _, err := a.staged.Path(flox.StorePath(filepath.Base(s))); err == nil {
				left++
			}
		}
		return left
	}

	n.run("nix-store", "--gc", "--max-freed", "0")
	if left() != 2 || !cached(dead.Path) {
		t.Errorf("of nothing to be freed %d paths are left, the cache is collected: %v", left(), !cached(dead.Path))
	}
	if _, said, err := n.try("nix-store", "--gc", "--max-freed", "1"); err != nil || !strings.Contains(said, "deleted more than 1 bytes; stopping") {
		t.Errorf("%v, it said %s", err, said)
	}
	if left() != 1 || !cached(dead.Path) {
		t.Errorf("of a byte to be freed %d paths are left, the cache is collected: %v", left(), !cached(dead.Path))
	}
	n.run("nix-collect-garbage")
	if left() != 0 || cached(dead.Path) || !cached(live.Path) || !cached(dep.Path) {
		t.Errorf("%d staged paths are left; cached: dead %v, live %v, what it needs %v", left(), cached(dead.Path), cached(live.Path), cached(dep.Path))
	}
	readWhole(t, a, dead.Path, 1) // it comes again
}

// A connection keeps what it adds while it lasts, as with Nix.
func TestConnectionsKeepWhatTheyAdd(t *testing.T) {
	t.Parallel()
	a := runNixAgent(t, newHouse(t))
	n := newNixClient(t, a)
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", a.cfg.NixSocket)
	if err != nil {
		t.Fatal(err)
	}
	c, err := worker.NewClient(t.Context(), conn, worker.ClientConfig{Dir: testStore})
	if err != nil {
		t.Fatal(err)
	}
	sent := inputAddressed(t, "a")
	if err := sendAll(within(t, time.Minute), c, true, sent); err != nil {
		t.Fatal(err)
	}
	there := func() bool { _, err := a.staged.Path(sent.Path); return err == nil }
	n.run("nix-collect-garbage")
	if !there() {
		t.Error("it is gone while who added it is connected")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	until(t, "it goes", func() bool { n.run("nix-collect-garbage"); return !there() })
}
