package nix

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

const drvDir = "testdata/drv"

// drvFeatures lets Nix make derivations of every kind.
const drvFeatures = "nix-command ca-derivations impure-derivations"

// readDrvs reads every .drv file in dir.
func readDrvs(t *testing.T, dir string) map[flox.StorePath][]byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+DrvExtension))
	if err != nil || len(names) == 0 {
		t.Fatal(len(names), err)
	}
	out := make(map[flox.StorePath][]byte)
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		out[flox.StorePath(filepath.Base(name))] = b
	}
	return out
}

func drvName(p flox.StorePath) string { return strings.TrimSuffix(p.Name(), DrvExtension) }

// hasher hashes what is in files, and counts how often each is read.
func hasher(dir flox.StoreDir, files map[flox.StorePath][]byte, reads map[flox.StorePath]int) *DrvHasher {
	return &DrvHasher{Dir: dir, Read: func(_ context.Context, p flox.StorePath) (*Derivation, error) {
		reads[p]++
		b, ok := files[p]
		if !ok {
			return nil, flox.ErrNotFound
		}
		return ParseDerivation(dir, drvName(p), b)
	}}
}

// checkDrvs holds every derivation against what Nix made of it.
func checkDrvs(t *testing.T, dir flox.StoreDir, files map[flox.StorePath][]byte) {
	t.Helper()
	reads := make(map[flox.StorePath]int)
	h := hasher(dir, files, reads)
	kinds := make(map[OutputKind]int)
	for p, b := range files {
		d, err := ParseDerivation(dir, drvName(p), b)
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		kind, _ := d.Kind()
		kinds[kind]++
		if path, text, err := d.DrvPath(dir); path != p || !bytes.Equal(text, b) || err != nil {
			t.Errorf("%s: we write it as %s, %v: %s", p, path, err, cmp.Diff(string(b), string(text)))
		}
		if err := d.CheckOutputs(dir, h.Resolver(t.Context())); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		if kind != OutputInputAddressed && kind != OutputDeferred {
			continue
		}
		// As the evaluator has it before it knows the paths.
		blank := *d
		blank.Outputs, blank.Env = maps.Clone(d.Outputs), maps.Clone(d.Env)
		for name := range d.Outputs {
			blank.Outputs[name] = DrvOutput{Kind: OutputDeferred}
			if kind == OutputInputAddressed {
				blank.Env[name] = ""
			}
		}
		if err := blank.FillOutputs(dir, h.Resolver(t.Context())); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		if diff := cmp.Diff(d, &blank); diff != "" {
			t.Errorf("%s (-Nix +filled): %s", p, diff)
		}
	}
	for k := OutputInputAddressed; k <= OutputImpure; k++ {
		if kinds[k] == 0 {
			t.Errorf("no %s derivation among them", k)
		}
	}
	for p, n := range reads {
		if n > 1 {
			t.Errorf("%s was read %d times to be hashed", p, n)
		}
	}
}

// The .drv files in testdata/drv are Nix's, of testdata/drvs.nix:
//
//	go test ./nix -run TestDrvVectorsAreNixs -update
func TestDrvVectors(t *testing.T) {
	checkDrvs(t, flox.DefaultStoreDir, readDrvs(t, drvDir))
}

func TestDrvVectorsAreNixs(t *testing.T) {
	needNix(t)
	tmp := t.TempDir()
	h := newNixHost(t)
	unseal(t, tmp)
	h.run("nix-instantiate", "--option", "experimental-features", drvFeatures, "--option", "system", "x86_64-linux",
		"--store", "local?root="+tmp, "testdata/drvs.nix")
	made := readDrvs(t, filepath.Join(tmp, "nix/store"))
	if *update {
		if err := os.RemoveAll(drvDir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(drvDir, 0o755); err != nil {
			t.Fatal(err)
		}
		for p, b := range made {
			if err := os.WriteFile(filepath.Join(drvDir, string(p)), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if diff := cmp.Diff(made, readDrvs(t, drvDir)); diff != "" {
		t.Errorf("(-Nix +committed): %s", diff)
	}
}

// In a store directory of its own, with builds: what content-addressed outputs
// are called, and how an output that refers to itself is hashed.
func TestDrvsAgreeWithNix(t *testing.T) {
	needNix(t)
	tmp := t.TempDir()
	dir := flox.StoreDir(filepath.Join(tmp, "my", "store"))
	h := newNixHost(t, "NIX_STORE_DIR="+string(dir), "NIX_STATE_DIR="+tmp+"/var", "NIX_LOG_DIR="+tmp+"/log", "NIX_DATA_DIR="+tmp+"/share")
	unseal(t, tmp)
	h.run("nix-instantiate", "--option", "experimental-features", drvFeatures, "testdata/drvs.nix")
	files := readDrvs(t, string(dir))
	checkDrvs(t, dir, files)

	expr := `(import ` + filepath.Join(mustAbs(t, "testdata"), "drvs.nix") + `)`
	outs := strings.Fields(h.run("nix-build", "--option", "experimental-features", drvFeatures, "--no-out-link", "-E", expr+".deferredAgain", "-E", expr+".floating.dev"))
	if len(outs) == 0 {
		t.Fatal("nothing was built")
	}
	hash := hasher(dir, files, map[flox.StorePath]int{})
	for p := range files {
		d, err := ParseDerivation(dir, drvName(p), files[p])
		if err != nil {
			t.Fatal(err)
		}
		if d.Name == "floating" {
			checkRealisations(t, h, dir, p, d, hash)
		}
	}
}

func mustAbs(t *testing.T, p string) string {
	t.Helper()
	abs, err := filepath.Abs(p)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

// checkRealisations asks Nix what a built derivation is known as.
func checkRealisations(t *testing.T, h nixHost, dir flox.StoreDir, drv flox.StorePath, d *Derivation, hash *DrvHasher) {
	t.Helper()
	for _, output := range d.OutputNames() {
		var said []json.RawMessage
		text := h.run("nix", "--extra-experimental-features", drvFeatures, "realisation", "info", "--json", "--impure", "-f", "testdata/drvs.nix", "floating."+output)
		if err := json.Unmarshal([]byte(text), &said); err != nil {
			t.Fatal(text, err)
		}
		id, err := hash.Realise(t.Context(), d, output)
		if err != nil {
			t.Fatal(err)
		}
		var r *Realisation
		for _, b := range said {
			one, err := ParseRealisation(b)
			if err != nil {
				t.Fatal(err)
			}
			if one.ID == id {
				r = one
			}
		}
		if r == nil {
			t.Fatalf("%s!%s: we call it %s, Nix knows %s", drv, output, id, text)
		}
		// What it got as a path follows from its content, itself left out.
		var nar bytes.Buffer
		if err := DumpPath(t.Context(), &nar, dir.Join(r.Path)); err != nil {
			t.Fatal(err)
		}
		refs := strings.Fields(h.run("nix-store", "-q", "--references", dir.Join(r.Path)))
		var others []flox.StorePath
		self := false
		for _, ref := range refs {
			p, err := dir.Parse(ref)
			if err != nil {
				t.Fatal(err)
			}
			if self = self || p == r.Path; p != r.Path {
				others = append(others, p)
			}
		}
		m := NewModuloHash(SHA256, r.Path.HashPart())
		if _, err := io.Copy(m, &nar); err != nil {
			t.Fatal(err)
		}
		ca := ContentAddress{Method: CANar, Hash: m.Sum()}
		if p, err := ca.Path(dir, r.Path.Name(), others, self); p != r.Path || err != nil {
			t.Errorf("%s!%s: its content leads to %s, Nix says %s, %v", drv, output, p, r.Path, err)
		}
	}
}

// Both halves of a derivation's name and path are bound to what is in it.
func TestParseDerivationRefuses(t *testing.T) {
	const dir = flox.DefaultStoreDir
	out, err := OutputPath(dir, "x", "out", sha256.Sum256(nil))
	if err != nil {
		t.Fatal(err)
	}
	const dep = "/nix/store/00000000000000000000000000000000-dep.drv"
	const src, src2 = "/nix/store/00000000000000000000000000000000-a", "/nix/store/00000000000000000000000000000000-b"
	good := `Derive([("out","` + dir.Join(out) + `","","")],[("` + dep + `",["dev","out"])],["` + src + `","` + src2 + `"],"sys","/b\n",["-c"],[("a","\t"),("b","")])`
	if d, err := ParseDerivation(dir, "x", []byte(good)); err != nil {
		t.Fatal(err)
	} else if text, err := d.Marshal(dir); string(text) != good || err != nil {
		t.Fatalf("we write it as %s, %v", text, err)
	}
	swap := func(from, to string) string {
		if !strings.Contains(good, from) {
			t.Fatal(from)
		}
		return strings.Replace(good, from, to, 1)
	}
	const fixedPath = "/nix/store/00000000000000000000000000000000-x"
	for what, text := range map[string]string{
		"nothing":                    "",
		"an end too early":           good[:len(good)-1],
		"bytes behind its end":       good + "\n",
		"no output":                  swap(`("out","`+dir.Join(out)+`","","")`, ""),
		"an output without a name":   swap(`("out",`, `("",`),
		"a path of another name":     swap("-x\"", "-y\""),
		"a path in another store":    swap("/nix/store/00000000000000000000000000000000-a", "/gnu/store/00000000000000000000000000000000-a"),
		"a path below a path":        swap(src+`"`, src+`/b"`),
		"an unknown algorithm":       swap(`"",""`, `"sha3",""`),
		"a hash without algorithm":   swap(`"",""`, `"","00"`),
		"a floating path":            swap(`"",""`, `"r:sha256",""`),
		"an impure path":             swap(`"",""`, `"r:sha256","impure"`),
		"another fixed path":         swap(`"`+dir.Join(out)+`","",""`, `"`+fixedPath+`","md5","d41d8cd98f00b204e9800998ecf8427e"`),
		"a fixed hash too short":     swap(`"",""`, `"md5","d41d8cd98f00b204e9800998ecf842"`),
		"an input that is a source":  swap("-dep.drv", "-dep"),
		"outputs of inputs unsorted": swap(`["dev","out"]`, `["out","dev"]`),
		"sources unsorted":           swap(`"`+src+`","`+src2+`"`, `"`+src2+`","`+src+`"`),
		"sources twice":              swap(`"`+src+`","`+src2+`"`, `"`+src+`","`+src+`"`),
		"environment unsorted":       swap(`("a","\t"),("b","")`, `("b",""),("a","\t")`),
		"environment twice":          swap(`("b","")`, `("a","")`),
		"an escape that is not one":  swap(`\t`, `\a`),
		"a tab":                      swap(`\t`, "\t"),
		"a line end":                 swap(`\n`, "\n"),
		"an escape in the platform":  swap(`"sys"`, `"s\\ys"`),
		"a list without an end":      swap(`["-c"]`, `["-c",`),
		"a comma too many":           swap(`["-c"]`, `["-c",]`),
		"space":                      swap(`],"sys"`, `], "sys"`),
		"two kinds of outputs":       swap(`[("out",`, `[("a","","",""),("out",`),
	} {
		if d, err := ParseDerivation(dir, "x", []byte(text)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: got %v, %v", what, d, err)
		}
	}
}

// A derivation that claims an output that is not its own is found out.
func TestCheckOutputsFindsForgery(t *testing.T) {
	const dir = flox.DefaultStoreDir
	files := readDrvs(t, drvDir)
	h := hasher(dir, files, map[flox.StorePath]int{})
	byName := make(map[string]*Derivation)
	for p, b := range files {
		d, err := ParseDerivation(dir, drvName(p), b)
		if err != nil {
			t.Fatal(err)
		}
		byName[d.Name] = d
	}
	forge := func(name string, change func(d *Derivation)) {
		t.Helper()
		d := *byName[name]
		d.Outputs, d.Env, d.Args = maps.Clone(d.Outputs), maps.Clone(d.Env), slices.Clone(d.Args)
		change(&d)
		if err := d.CheckOutputs(dir, h.Resolver(t.Context())); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
	forge("simple", func(d *Derivation) { d.Args[1] = "echo something else > $out" })
	forge("simple", func(d *Derivation) { d.Env["extra"] = "x" })
	forge("simple", func(d *Derivation) { d.Env["out"] = "/nix/store/00000000000000000000000000000000-simple" })
	forge("flat-md5", func(d *Derivation) { delete(d.Env, "out") })
	forge("outputs", func(d *Derivation) { d.Outputs["lib"] = d.Outputs["dev"] })
	forge("user", func(d *Derivation) {
		d.Inputs = maps.Clone(d.Inputs)
		for p := range d.Inputs {
			d.Inputs[p] = append(slices.Clone(d.Inputs[p]), "zzz")
		}
	})
}

func TestDrvHasherWalksDeepGraphs(t *testing.T) {
	const dir, deep = flox.DefaultStoreDir, 20000
	files := make(map[flox.StorePath][]byte)
	var last flox.StorePath
	for i := range deep {
		d := &Derivation{Name: fmt.Sprint("d", i), Outputs: map[string]DrvOutput{"out": {Kind: OutputDeferred}}, Builder: "/b", Env: map[string]string{}}
		if last != "" {
			d.Inputs = map[flox.StorePath][]string{last: {"out"}}
		}
		p, text, err := d.DrvPath(dir)
		if err != nil {
			t.Fatal(err)
		}
		files[p], last = text, p
	}
	reads := make(map[flox.StorePath]int)
	h := hasher(dir, files, reads)
	h.Max = 100 // far fewer than the walk needs
	if _, err := h.Hash(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	for p, n := range reads {
		if n != 1 {
			t.Fatalf("%s was read %d times", p, n)
		}
	}
	if len(reads) != deep || len(h.young)+len(h.old) > 100 {
		t.Errorf("%d read, %d kept", len(reads), len(h.young)+len(h.old))
	}
	delete(files, last)
	h = hasher(dir, files, reads)
	if _, err := h.Hash(t.Context(), last); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a derivation that is not there: %v", err)
	}
}

func TestResolveReplacesPlaceholders(t *testing.T) {
	const dir = flox.DefaultStoreDir
	const drv = flox.StorePath("00000000000000000000000000000000-dep.drv")
	const built = flox.StorePath("11111111111111111111111111111111-dep-dev")
	d := &Derivation{
		Name: "x", Outputs: map[string]DrvOutput{"out": {Kind: OutputDeferred}}, Inputs: map[flox.StorePath][]string{drv: {"dev"}},
		Builder: DownstreamPlaceholder(drv, "dev") + "/bin/sh", Args: []string{"a " + DownstreamPlaceholder(drv, "dev")},
		Env: map[string]string{"out": "", "dep": DownstreamPlaceholder(drv, "dev")},
	}
	r, err := d.Resolve(dir, func(p flox.StorePath, output string) (flox.StorePath, bool) {
		return built, p == drv && output == "dev"
	})
	if err != nil {
		t.Fatal(err)
	}
	abs := dir.Join(built)
	if r.Builder != abs+"/bin/sh" || r.Args[0] != "a "+abs || r.Env["dep"] != abs || !slices.Equal(r.Sources, []flox.StorePath{built}) || len(r.Inputs) != 0 {
		t.Errorf("got %+v", r)
	}
	if o := r.Outputs["out"]; o.Kind != OutputInputAddressed || r.Env["out"] != dir.Join(o.Path) {
		t.Errorf("its output is %+v", o)
	}
	if _, err := d.Resolve(dir, func(flox.StorePath, string) (flox.StorePath, bool) { return "", false }); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("an output nobody knows: %v", err)
	}
}

func FuzzParseDerivation(f *testing.F) {
	names, err := filepath.Glob(filepath.Join(drvDir, "*"))
	if err != nil || len(names) == 0 {
		f.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(drvName(flox.StorePath(filepath.Base(name))), b)
	}
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		d, err := ParseDerivation(flox.DefaultStoreDir, name, b)
		if err != nil {
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatal(err)
			}
			return
		}
		if text, err := d.Marshal(flox.DefaultStoreDir); err != nil || !bytes.Equal(text, b) {
			t.Fatalf("%q is written as %q, %v", b, text, err)
		}
	})
}
