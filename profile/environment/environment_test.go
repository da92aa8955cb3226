package environment

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

func abs(n, rest string) string { return testDir.Join(name(n)) + "/" + rest }

func TestForest(t *testing.T) {
	tests := []struct {
		name     string
		store    store
		packages []Package
		want     map[string]string
	}{
		{
			"directory of one package is one link",
			store{name("a"): {"bin/x": "", "share/man/x": ""}},
			[]Package{pkg("a", 5)},
			map[string]string{"bin": abs("a", "bin"), "share": abs("a", "share")},
		},
		{
			"directories are merged",
			store{name("a"): {"bin/x": "", "lib/": ""}, name("b"): {"bin/y": ""}},
			[]Package{pkg("a", 5), pkg("b", 5)},
			map[string]string{"bin/": "", "bin/x": abs("a", "bin/x"), "bin/y": abs("b", "bin/y"), "lib": abs("a", "lib")},
		},
		{
			"lower priority wins",
			store{name("a"): {"bin/x": ""}, name("b"): {"bin/x": ""}},
			[]Package{pkg("a", 6), pkg("b", 5)},
			map[string]string{"bin/": "", "bin/x": abs("b", "bin/x")},
		},
		{
			"left out",
			store{name("a"): {"nix-support/x": "", "log": "", "manifest.json": "", "manifest.nix": "", ".hidden": "", "lib/perllocal.pod": "", "x": "", "dir": "", "dangling": "-> nowhere"}},
			[]Package{pkg("a", 5)},
			map[string]string{"x": abs("a", "x"), "dir": abs("a", "dir"), "lib": abs("a", "lib")},
		},
		{
			"left out of merged directories",
			store{name("a"): {"info/dir": "", "info/a": ""}, name("b"): {"info/dir": "", "info/b": "", "info/propagated-build-inputs": ""}},
			[]Package{pkg("a", 5), pkg("b", 5)},
			map[string]string{"info/": "", "info/a": abs("a", "info/a"), "info/b": abs("b", "info/b")},
		},
		{
			"merged symlinks to directories show where they lead for the first only",
			store{name("a"): {"lib64": "-> lib", "lib/a": ""}, name("b"): {"lib64": "-> lib", "lib/b": ""}},
			[]Package{pkg("a", 4), pkg("b", 5)},
			map[string]string{
				"lib/": "", "lib/a": abs("a", "lib/a"), "lib/b": abs("b", "lib/b"),
				"lib64/": "", "lib64/a": abs("a", "lib/a"), "lib64/b": abs("b", "lib64/b"),
			},
		},
		{
			"propagated packages come last",
			store{
				name("a"): {"bin/x": "", "nix-support/propagated-user-env-packages": testDir.Join(name("b")) + "\n"},
				name("b"): {"bin/x": "", "bin/y": "", "nix-support/propagated-user-env-packages": " " + testDir.Join(name("c")) + " " + testDir.Join(name("a"))},
				name("c"): {"bin/y": "", "bin/z": ""},
			},
			[]Package{pkg("a", 999)},
			map[string]string{"bin/": "", "bin/x": abs("a", "bin/x"), "bin/y": abs("b", "bin/y"), "bin/z": abs("c", "bin/z")},
		},
		{
			"inactive packages are not linked",
			store{name("a"): {"x": ""}},
			[]Package{pkg("a", 5), {Name: "b", Paths: []flox.StorePath{name("b")}}},
			map[string]string{"x": abs("a", "x")},
		},
		{
			"links into other store paths",
			store{
				name("a"): {"abs": "-> " + abs("o", "d"), "rel": "-> ../" + string(name("o")) + "/d/f", "up": "-> ../../store/" + string(name("o")), "out": "-> /etc", "gone": "-> ../" + string(name("gone"))},
				name("b"): {"abs/g": ""},
				name("o"): {"d/f": ""},
			},
			[]Package{pkg("a", 4), pkg("b", 5)},
			map[string]string{"abs/": "", "abs/f": abs("o", "d/f"), "abs/g": abs("b", "abs/g"), "rel": abs("a", "rel"), "up": abs("a", "up")},
		},
		{
			"a package that is a file is left out",
			store{name("a"): {"": "text"}},
			[]Package{pkg("a", 5)},
			map[string]string{},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, forest(build(t, tt.store, tt.packages...))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestReferencesAndManifest(t *testing.T) {
	s := store{name("a"): {"d": "-> " + abs("o", "d")}, name("b"): {"d/y": ""}, name("o"): {"d/x": ""}}
	flake := pkg("b", 4)
	flake.Source = &Source{OriginalURL: "flake:nixpkgs", URL: "github:NixOS/nixpkgs/abc?a=<&>", AttrPath: "packages.x86_64-linux.b"}
	e := build(t, s, flake, pkg("a", 3), Package{Name: "c", Priority: 5, Paths: []flox.StorePath{name("c")}})
	want := []flox.StorePath{name("a"), name("b"), name("c"), name("o")}
	slices.Sort(want)
	if diff := cmp.Diff(want, e.References()); diff != "" {
		t.Error(diff)
	}
	wantJSON := fmt.Sprintf(`{"elements":[{"active":true,"priority":3,"storePaths":[%q]},`+
		`{"active":true,"attrPath":"packages.x86_64-linux.b","originalUrl":"flake:nixpkgs","outputs":null,"priority":4,"storePaths":[%q],"url":"github:NixOS/nixpkgs/abc?a=<&>"},`+
		`{"active":false,"priority":5,"storePaths":[%q]}],"version":2}`,
		testDir.Join(name("a")), testDir.Join(name("b")), testDir.Join(name("c")))
	if got := string(e.Manifest()); got != wantJSON {
		t.Errorf("manifest\n%s, want\n%s", got, wantJSON)
	}
	if e.Links() != 2 {
		t.Errorf("%d links, want 2", e.Links())
	}
}

func TestCollisionsNameBothSidesAndTheWayOut(t *testing.T) {
	a, b := map[string]string{"dir": "", "flat/x": ""}, map[string]string{"dir/x": "", "flat/x": ""}
	for i := range 200 {
		a[fmt.Sprintf("bin/%03d", i)], b[fmt.Sprintf("bin/%03d", i)] = "", ""
	}
	_, err := Build(t.Context(), testDir, store{name("a"): a, name("b"): b}, []Package{pkg("a", 5), pkg("b", 5)})
	var c *CollisionError
	if !errors.As(err, &c) || !errors.Is(err, flox.ErrBadInput) {
		t.Fatalf("error %v, want a collision", err)
	}
	if c.Total != 202 || len(c.Collisions) != MaxReported {
		t.Errorf("%d collisions, %d kept", c.Total, len(c.Collisions))
	}
	first, second := "a", "b"
	if name("b") < name("a") {
		first, second = "b", "a"
	}
	for _, want := range []string{abs("a", "bin/000"), abs("b", "bin/000"), "floxctl install --priority 6 " + second, " of " + first + " and ", "and 192 more"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
	if len(err.Error()) > 10_000 {
		t.Errorf("a message of %d bytes", len(err.Error()))
	}
	if !c.Has("a") || !c.Has("b") || c.Has("c") {
		t.Errorf("has a: %v, b: %v, c: %v", c.Has("a"), c.Has("b"), c.Has("c"))
	}
	c = &CollisionError{Collisions: []Collision{{First: "b", Second: string(name("c")) + propagatedBy("a")}}}
	if !c.Has("a") || !c.Has("b") || c.Has("c") || c.Has("xa") {
		t.Errorf("of what a propagates: a: %v, b: %v, c: %v", c.Has("a"), c.Has("b"), c.Has("c"))
	}
}

func TestKindsCollideWhateverThePriority(t *testing.T) {
	s := store{name("a"): {"x": ""}, name("b"): {"x/y": ""}, name("c"): {"x/z": ""}}
	for _, packages := range [][]Package{{pkg("a", 1), pkg("b", 2)}, {pkg("b", 1), pkg("c", 2), pkg("a", 3)}} {
		_, err := Build(t.Context(), testDir, s, packages)
		var c *CollisionError
		if !errors.As(err, &c) || !c.Collisions[0].Kinds || !strings.Contains(err.Error(), "floxctl uninstall") {
			t.Errorf("error %v, want a collision of kinds", err)
		}
	}
	want := map[string]string{"x": abs("b", "x")}
	if diff := cmp.Diff(want, forest(build(t, s, pkg("b", 1), pkg("a", 2)))); diff != "" {
		t.Error("a file behind the link to a directory:", diff)
	}
}

func TestRefused(t *testing.T) {
	deep := strings.Repeat("d/", MaxDepth)
	support := func(text string) store {
		return store{name("a"): {"nix-support/propagated-user-env-packages": text}, name("b"): {}}
	}
	tests := []struct {
		name     string
		store    store
		packages []Package
		want     error
	}{
		{"missing package", store{}, []Package{pkg("a", 5)}, flox.ErrNotFound},
		{"missing propagated package", support(testDir.Join(name("gone"))), []Package{pkg("a", 5)}, flox.ErrNotFound},
		{"propagates what is outside", support("/etc/passwd"), []Package{pkg("a", 5)}, flox.ErrBadInput},
		{"large file of propagated packages", support(strings.Repeat(" ", MaxSupportBytes+1)), []Package{pkg("a", 5)}, flox.ErrFull},
		{"loop", store{name("a"): {"x": "-> y", "y": "-> x"}}, []Package{pkg("a", 5)}, flox.ErrBadInput},
		{"endless merge", store{name("a"): {"d/e": "-> ."}, name("b"): {"d/e": "-> ."}}, []Package{pkg("a", 5), pkg("b", 5)}, flox.ErrBadInput},
		{"deep", store{name("a"): {deep + "x": ""}, name("b"): {deep + "y": ""}}, []Package{pkg("a", 5), pkg("b", 5)}, flox.ErrFull},
		{"same name", support(""), []Package{pkg("a", 5), {Name: "a", Paths: []flox.StorePath{name("b")}}}, flox.ErrBadInput},
		{"no name", support(""), []Package{{Paths: []flox.StorePath{name("a")}}}, flox.ErrBadInput},
		{"no output", support(""), []Package{{Name: "a"}}, flox.ErrBadInput},
		{"no store path", support(""), []Package{{Name: "a", Paths: []flox.StorePath{"x"}}}, flox.ErrBadInput},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Build(t.Context(), testDir, tt.store, tt.packages); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	files := map[string]string{}
	for i := range 2000 {
		files[fmt.Sprint("f", i)] = ""
	}
	if _, err := Build(ctx, testDir, store{name("a"): files}, []Package{pkg("a", 5)}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the context's", err)
	}
}

// randomStore has packages with overlapping trees, in every package some of the
// others are propagated or linked to.
func randomStore(r *rand.Rand, count int, where func(string) string) (names []string, files map[string]map[string]string) {
	files = map[string]map[string]string{}
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	for i := range count {
		own := map[string]string{}
		for range 1 + r.IntN(12) {
			p := pick("bin/", "lib/", "share/man/", "share/info/", "lib/x/y/", "") + pick("a", "b", "c", "dir", "log", ".h", "perllocal.pod", fmt.Sprint("own", i), fmt.Sprint("own", i, r.IntN(9)))
			own[p] = pick("", "text", "-> b", "-> ../lib", "-> nowhere", "-> ../bin/a")
			if i > 0 && r.IntN(6) == 0 {
				own[p] = "-> " + where(pick(names...)) + pick("", "/bin", "/lib", "/bin/a")
			}
		}
		if r.IntN(3) == 0 {
			own["lib64"] = "-> lib"
		}
		if i > 0 && r.IntN(2) == 0 {
			own["nix-support/propagated-user-env-packages"] = where(pick(names...)) + pick("", "\n", " ") + pick("", " "+where(pick(names...)))
		}
		for p, text := range own { // loops are tried elsewhere
			if text == "-> b" && strings.HasSuffix("/"+p, "/b") || text == "-> ../bin/a" && strings.HasSuffix("/"+p, "/a") {
				own[p] = ""
			}
		}
		for p := range own { // a path cannot be both a file and a directory
			for q := range own {
				if strings.HasPrefix(q, p+"/") {
					delete(own, p)
				}
			}
		}
		n := fmt.Sprint("p", i)
		names, files[n] = append(names, n), own
	}
	return names, files
}

func TestOrderOfPackagesDoesNotMatter(t *testing.T) {
	built := 0
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		names, files := randomStore(r, 1+r.IntN(8), func(n string) string { return testDir.Join(name(n)) })
		s, packages := store{}, []Package(nil)
		for i, n := range names {
			s[name(n)] = files[n]
			p := pkg(n, r.IntN(3)+i*r.IntN(2))
			p.Paths = append(p.Paths, name(names[r.IntN(len(names))]))
			packages = append(packages, p)
		}
		type result struct{ nar, err string }
		try := func() result {
			e, err := Build(context.Background(), testDir, s, packages)
			if err != nil {
				return result{err: err.Error()}
			}
			built++
			var out strings.Builder
			if err := e.WriteNAR(&out); err != nil {
				t.Fatal(err)
			}
			return result{nar: out.String()}
		}
		first := try()
		for range 3 {
			r.Shuffle(len(packages), func(i, j int) { packages[i], packages[j] = packages[j], packages[i] })
			for _, p := range packages {
				r.Shuffle(len(p.Paths), func(i, j int) { p.Paths[i], p.Paths[j] = p.Paths[j], p.Paths[i] })
			}
			if got := try(); got != first {
				t.Fatalf("another order gives\n%q, want\n%q", got, first)
			}
		}
	})
	if built == 0 {
		t.Error("all cases collided")
	}
}

func TestInfoIsThePathOfTheNAR(t *testing.T) {
	e := build(t, store{name("a"): {"bin/x": ""}}, pkg("a", 5))
	info, err := e.Info("profile")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := e.Info("profile"); err != nil || !cmp.Equal(info, again) {
		t.Errorf("%v, then %v, %v", info, again, err)
	}
	nar := encode(t, e)
	if got := uint64(len(nar)); got != info.NarSize || info.NarHash != sha256.Sum256([]byte(nar)) {
		t.Errorf("NarSize %d, want %d; or the hash is another", info.NarSize, got)
	}
	// What it refers to is in its name.
	if want, err := nix.SourcePath(testDir, "profile", info.NarHash, e.References(), false); err != nil || info.Path != want || len(e.References()) == 0 {
		t.Errorf("path %s, want %s, %v", info.Path, want, err)
	}
	if !slices.Equal(info.References, e.References()) || !strings.HasPrefix(info.CA, "fixed:r:sha256:") {
		t.Errorf("info %+v", info)
	}
}

// large has 500 packages of 400 files, most of them in directories they share.
func large() (s store, packages []Package) {
	s = store{}
	for i := range 500 {
		files, n := map[string]string{}, fmt.Sprint("package", i)
		for j := range 400 {
			files[fmt.Sprintf("share/d%d/f%d-%d", j%40, i, j)] = ""
		}
		s[name(n)] = files
		packages = append(packages, pkg(n, 5))
	}
	return s, packages
}

// opened are trees in memory that are made before.
type opened map[flox.StorePath]flox.Tree

func (o opened) Open(_ context.Context, p flox.StorePath) (flox.Tree, error) { return o[p], nil }

func BenchmarkEnvironment(b *testing.B) {
	s, packages := large()
	trees := opened{}
	for p := range s {
		trees[p], _ = s.Open(b.Context(), p)
	}
	b.ReportAllocs()
	for b.Loop() {
		e, err := Build(b.Context(), testDir, trees, packages)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := e.Info("profile"); err != nil {
			b.Fatal(err)
		}
		if e.Links() != 200_000 {
			b.Fatalf("%d links", e.Links())
		}
	}
}
