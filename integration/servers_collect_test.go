package integration

import (
	"slices"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/ledger"
)

// collected: a collection removes what no root keeps on all three servers and gives its
// room back to their disks; what is kept is whole everywhere, until its root goes, too.
func (h *house) collected() {
	// Some MiB that no root keeps, unless it is there already.
	must(h.t, h.copyTo(h.t.Context(), h.servers[0], h.world.Ripgrep.Path, h.world.Unused.Path))
	h.notedAtOnce()
	stop := h.writing(4)
	from := h.ledger.Len()
	// The first path of a writer refers to no other.
	h.eventually("three writers wrote", func() bool {
		return len(slices.DeleteFunc(h.ledger.Acked(from), func(p ledger.Path) bool { return len(p.Info.References) > 0 })) > 2
	})
	stop()
	all := h.ledger.Acked(0)
	// A path that is kept keeps those that it refers to.
	closures := func(of ...ledger.Path) []ledger.Path {
		reached := map[flox.StorePath]bool{}
		for _, p := range of {
			reached[p.Info.Path] = true
		}
		var paths []ledger.Path
		for _, p := range slices.Backward(all) { // references are older
			if !reached[p.Info.Path] {
				continue
			}
			for _, ref := range p.Info.References {
				reached[ref] = true
			}
			paths = append(paths, p)
		}
		return paths
	}
	kept := all[len(all)-1]
	others := slices.DeleteFunc(slices.Clone(all[from:]), func(p ledger.Path) bool { return among(closures(kept), p) })
	undone := others[len(others)-1] // of another writer
	for _, p := range []ledger.Path{kept, undone} {
		h.told(0, "storehouse", "keep", h.world.StoreDir.Join(p.Info.Path)).want(h.t, 0, "1 path is kept")
	}
	room := func() (bytes []int64) {
		for _, s := range h.servers {
			bytes = append(bytes, dirSize(h.t, s.State()+"/packs/packs"))
		}
		return bytes
	}
	before := room()
	h.collect(0)
	after := room()
	for i, s := range h.servers {
		if after[i] > before[i]/2 {
			h.t.Errorf("%s has %d bytes in packs after the collection, %d before", s.Host.Name, after[i], before[i])
		}
	}
	lives := closures(kept, undone)
	h.holds(slices.Clone(lives))
	h.gone(slices.DeleteFunc(slices.Clone(all[from:]), func(p ledger.Path) bool { return among(lives, p) }))

	h.told(1, "storehouse", "keep", h.world.StoreDir.Join(undone.Info.Path), "--undo").want(h.t, 0, "no longer kept")
	h.collect(2)
	lives = closures(kept)
	h.holds(slices.Clone(lives))
	h.gone(slices.DeleteFunc(closures(undone), func(p ledger.Path) bool { return among(lives, p) }))
	h.t.Logf("%d paths; bytes in packs before %v, after %v", len(all), before, after)
	h.checked = h.ledger.Len()
}

// notedAtOnce starts the servers anew with a program that notes every use of a path, so
// that not all that was used within the last hour stays, and with a short grace.
func (h *house) notedAtOnce() {
	h.t.Setenv("FLOXD_TEST_TOUCH_EVERY", "1ms")
	program := newer(h.t, h.t.TempDir())
	for _, s := range h.servers {
		must(h.t, s.Stop())
		h.t.Cleanup(s.Change(program, "--collect-grace", "500ms"))
	}
	for _, s := range h.servers {
		must(h.t, s.Launch())
	}
	h.up()
}

// told runs floxctl on the host of a server.
func (h *house) told(server int, args ...string) result {
	h.t.Helper()
	return do(h.t, h.servers[server].Host, h.programs.Floxctl, args...)
}

// collect has a server collect what was not used for a second, until that is all that
// was used before the call.
func (h *house) collect(server int) {
	h.t.Helper()
	type progress struct {
		DeadPaths uint64
		Finished  bool
	}
	begun, dead := time.Now(), uint64(0)
	h.eventually("a collection removes something", func() bool {
		age := time.Since(begun)
		r := h.told(server, "storehouse", "gc", "--keep-recent", "1s", "--json")
		r.want(h.t, 0)
		all := lines[progress](h.t, r.out)
		if len(all) == 0 || !all[len(all)-1].Finished {
			h.t.Fatalf("a collection that does not end: %s", r.out)
		}
		dead += all[len(all)-1].DeadPaths
		return dead > 0 && age > 2*time.Second
	})
}

// among says whether a path is one of others.
func among(paths []ledger.Path, p ledger.Path) bool {
	return slices.ContainsFunc(paths, func(q ledger.Path) bool { return q.Info.Path == p.Info.Path })
}

// gone checks that no server knows paths any more.
func (h *house) gone(paths []ledger.Path) {
	h.t.Helper()
	missing, err := h.ledger.Check(h.t.Context(), paths)
	must(h.t, err)
	if len(paths) == 0 || len(missing) != len(paths)*len(h.servers) {
		h.t.Errorf("of %d paths that were collected on %d servers %d are gone", len(paths), len(h.servers), len(missing))
	}
}
