package agent

import (
	"context"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

// linkedPaths publishes a program that is linked to two libraries, one of them
// through another, and a dynamic loader.
func linkedPaths(t *testing.T, h *house) (app, lib *flox.PathInfo, files map[string][]byte) {
	t.Helper()
	files = map[string][]byte{"lib/ld.so": madeELF(1, "", nil, ""), "lib/libb.so.1.2": madeELF(2, "", nil, "")}
	base := h.make(t, "base", nil,
		testFile{name: "lib/ld.so", data: files["lib/ld.so"], exec: true}, testFile{name: "lib/libb.so.1.2", data: files["lib/libb.so.1.2"]})
	baseLib := testStore.Join(base.Path) + "/lib"
	files["lib/liba.so"] = madeELF(3, "", []string{"libb.so.1.2"}, baseLib)
	lib = h.make(t, "lib", []flox.StorePath{base.Path}, testFile{name: "lib/liba.so", data: files["lib/liba.so"]})
	files["bin/app"] = madeELF(4, baseLib+"/ld.so", []string{"liba.so"}, baseLib+":"+testStore.Join(lib.Path)+"/lib")
	app = h.make(t, "app", []flox.StorePath{base.Path, lib.Path}, testFile{name: "bin/app", data: files["bin/app"], exec: true})
	h.publish(base, lib, app)
	return app, lib, files
}

// loaderNeeds are places of a file of madeELF that the loader reads whatever it does.
var loaderNeeds = []int64{0, madeTables, madeTables + 0x2000, madeText + madeEntry, madeText + madeInit, madeText + madeFini, madeData, madeData + madeChanged, madeData + madeRelr - 0x1000}

// A program's first read brings what its loader will read of it and of everything
// it is linked to, and nothing of what it will not; where round trips are short, once
// it is seen to run: it may be a copy that is made.
func TestWhatALoaderReadsComesAhead(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	appInfo, libInfo, _ := linkedPaths(t, h)
	program := testStore.Join(appInfo.Path) + "/bin/app"
	for name, c := range map[string]struct {
		off bool
		far func() bool
		exe []string // what the reader runs, each time it is asked
	}{
		"far": {false, always, nil}, "near": {false, never, []string{"/bin/sh", program}}, "switched off": {true, always, nil},
		"copied near": {true, never, []string{testStore.Join(libInfo.Path) + "/bin/cp"}},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := runAgent(t, h, func(cfg *Config) { cfg.NoPrefetch = name == "switched off" }, nil)
			following(t, a)
			a.readers.far = c.far
			if a.starts.loads != nil {
				a.starts.loads.exe = func(context.Context, uint32) (string, error) {
					exe := c.exe[0]
					if len(c.exe) > 1 {
						c.exe = c.exe[1:]
					}
					return exe, nil
				}
			}
			ctx := within(t, time.Minute)
			app := treeOf(ctx, t, a, appInfo.Path)
			if _, err := app.ReadAt(ctx, entryOf(ctx, t, app, "bin/app"), make([]byte, 16<<10), 0, flox.Reader{PID: 7, Node: 2}); err != nil {
				t.Fatal(err)
			}
			if a.starts.loads != nil {
				a.starts.loads.work.Wait()
			}
			kept(t, a.fetcher)
			brought := a.traffic.total()
			here := func(p flox.StorePath, name string, off int64) bool {
				tr := treeOf(ctx, t, a, p).(*tree)
				return tr.here(ctx, entryOf(ctx, t, tr, name), make([]byte, 1), off) > 0
			}
			base := libInfo.References[0]
			for name, p := range map[string]flox.StorePath{"bin/app": appInfo.Path, "lib/liba.so": libInfo.Path, "lib/libb.so.1.2": base} {
				for _, at := range loaderNeeds {
					if at == madeText+madeFini {
						continue
					}
					if want := !c.off || name == "bin/app" && at == 0; here(p, name, at) != want {
						t.Errorf("%s at %#x is here: %v", name, at, !want)
					}
				}
				for _, at := range []int64{madeCold, madeText + madeFini} { // the latter only once the program ends
					if here(p, name, at) {
						t.Errorf("%s at %#x is here, and no start reads it", name, at)
					}
				}
			}
			if most := uint64(4 * 8 * 2 * 128 << 10); brought > most {
				t.Errorf("%d bytes brought, want at most %d", brought, most)
			}
			if m := a.ahead.message(); c.off != (m.GetLoaderBytes() == 0) {
				t.Errorf("%d bytes counted as the loader's", m.GetLoaderBytes())
			}
		})
	}
}

// A start of which everything but the program was warm, and that was over before
// anybody asked what it has mapped, is told with what its loader read.
func TestAShortStartIsCompleted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	appInfo, libInfo, files := linkedPaths(t, h)
	a, _ := runAgent(t, h, func(c *Config) { c.NoPrefetch = true }, nil)
	following(t, a)
	ctx := within(t, time.Minute)
	base := libInfo.References[0]
	warm := map[string]flox.StorePath{"lib/liba.so": libInfo.Path, "lib/libb.so.1.2": base, "lib/ld.so": base}
	for name, p := range warm {
		tr := treeOf(ctx, t, a, p)
		readIn(ctx, t, tr, entryOf(ctx, t, tr, name), files[name], 0, madeSize)
	}
	app := treeOf(ctx, t, a, appInfo.Path).(*tree)
	entry := entryOf(ctx, t, app, "bin/app")
	readIn(ctx, t, app, entry, files["bin/app"], 0, madeSize)
	kept(t, a.fetcher)
	before := a.traffic.total()

	closure := a.localClosure(appInfo.Path)
	rec := &recording{path: appInfo.Path, closure: closure, manifests: map[flox.CID]flox.StorePath{}, files: map[fileKey]*seenFile{}}
	for of, info := range closure {
		rec.manifests[info.Manifest] = of
	}
	rec.note(touch{tree: app, entry: entry, n: 65536, exec: true}, time.Now())
	a.linked(ctx, rec)
	got := map[string][]int64{} // places that are told
	for key, f := range rec.files {
		tr := treeOf(ctx, t, a, f.path).(*tree)
		name, err := tr.Path(ctx, key.entry)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range append(loaderNeeds, madeCold) {
			if slices.ContainsFunc(f.runs, func(r seenRun) bool { return r.off <= at && at < r.end }) {
				got[name] = append(got[name], at)
			}
		}
	}
	want := map[string][]int64{"bin/app": loaderNeeds}
	for name := range maps.Keys(warm) {
		want[name] = loaderNeeds
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if a.traffic.total() != before {
		t.Error("something was fetched to complete what is told")
	}
}
