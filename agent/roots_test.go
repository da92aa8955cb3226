package agent

import (
	"bytes"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
)

// The root block of a path's manifest comes with its facts: opening the tree asks
// for nothing more. One that is not what was signed is no harm.
func TestRootsComeWithFacts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer func(h *house)
		far    func() bool
		served int
	}{
		"sent":         {func(*house) {}, always, 0},
		"near":         {func(*house) {}, never, 1}, // it comes from who is nearest
		"an older one": {func(h *house) { h.rootless = true }, always, 1},
		"a wrong one":  {func(h *house) { h.lie = [][]byte{[]byte("not the root")} }, always, 1},
		"with a page":  {func(h *house) { h.lie = [][]byte{nil, []byte("no page of it")} }, always, 0},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			lib := h.make(t, "lib", nil, testFile{name: "lib/x", data: randomBytes(1, 100_000)})
			app := h.make(t, "app", []flox.StorePath{lib.Path}, testFile{name: "bin/app", data: randomBytes(2, 100_000)})
			h.publish(lib, app)
			h.set(func() { c.answer(h) })
			a, _ := runAgent(t, h, func(c *Config) { c.NoPrefetch = true }, nil)
			following(t, a)
			a.readers.far = c.far
			ctx := within(t, time.Minute)
			treeOf(ctx, t, a, app.Path)
			kept(t, a.fetcher)
			h.mu.Lock()
			served, root := h.given, h.blocks[app.Manifest]
			h.mu.Unlock()
			if served != c.served {
				t.Errorf("%d blocks were asked for, want %d", served, c.served)
			}
			if got, err := a.cache.Get(ctx, app.Manifest); err != nil || !bytes.Equal(got, root) {
				t.Errorf("the root block in the cache: %d bytes of %d, %v", len(got), len(root), err)
			}
			if here := a.cache.Has([]flox.CID{lib.Manifest})[0]; here {
				t.Error("the root block of what it refers to came as well")
			}
			if m := a.traffic.message(0); m.GetManifestBytes() != uint64(len(root)) {
				t.Errorf("%d bytes of manifests counted, want %d", m.GetManifestBytes(), len(root))
			}
		})
	}
}

// Pages of the manifest that come with its root are kept as well.
func TestPagesComeWithRoots(t *testing.T) {
	t.Parallel()
	w := newStartWorld(t)
	pages := w.tree(t, w.lib).GetPages()
	w.set(func() {
		w.lie = [][]byte{nil}
		for _, p := range pages {
			w.lie = append(w.lie, w.blocks[flox.CID(p)])
		}
	})
	a, _ := runAgent(t, w.house, func(c *Config) { c.NoPrefetch = true }, nil)
	following(t, a)
	a.readers.far = always
	ctx := within(t, time.Minute)
	served := w.blocksServed()
	tr := treeOf(ctx, t, a, w.lib.Path)
	entryOf(ctx, t, tr, "zz/small")
	if n := w.blocksServed() - served; n != 0 || len(pages) < 2 {
		t.Errorf("%d blocks were asked for besides %d pages that came", n, len(pages))
	}
}
