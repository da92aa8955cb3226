package buildfarm

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// expression puts files into the origin's store, as a directory.
func (o origin) expression(t *testing.T, files map[string]string) flox.StorePath {
	t.Helper()
	dir := filepath.Join(o.dir, "home", "expression")
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil { //nolint:gosec // another user reads it
			t.Fatal(err)
		}
	}
	out, err := o.run(t.Context(), program, "--add", ownDir+"/home/expression")
	if err != nil {
		t.Fatal(err)
	}
	return o.parse(t, strings.TrimSpace(out))
}

const expressionText = `{ system ? builtins.currentSystem }:
let tool = name: more: derivation ({ inherit name system; builder = "/bin/sh"; args = [ "-c" "echo >$out" ]; } // more);
in {
  hello = tool "hello-2.3" { src = ./x.txt; } // { meta = { description = "Says hello"; priority = 4; }; };
  multi = tool "multi-1" { outputs = [ "out" "doc" ]; } // { pname = "many"; version = "one"; meta.outputsToInstall = [ "out" "doc" ]; };
  top = tool "top-1" { dep = tool "dep-1" { text = builtins.toFile "text" "refers to ${./x.txt}"; }; };
  tools = { recurseForDerivations = true; jq = tool "jq-1.7" { }; };
  hidden = { x = tool "x-1" { }; };
  thrown = throw "no";
  number = 3;
  unfree = tool "unfree-1" { x = throw "it is unfree"; };
  fetched = tool "fetched-1" { src = builtins.fetchTarball "http://127.0.0.1:1/x"; };
  nosy = tool "nosy-1" { text = builtins.readFile /etc/passwd; };
  secret = builtins.readFile /etc/passwd;
  built = tool "built-1" { text = builtins.readFile (tool "first-1" { }); };
}`

// A catalogue has what an expression has to be installed; what cannot be evaluated is
// in it with the reason, and takes nothing else along.
func TestCatalogue(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	b := newBuilder(t, nil)
	x := &Expression{Source: o.expression(t, map[string]string{"default.nix": expressionText, "x.txt": "x"}), System: "aarch64-linux"}
	far := 0
	all, err := b.Catalogue(t.Context(), x, o, func(done, _ int) { far = done })
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, a := range all {
		names = append(names, a.Attr)
	}
	if want := []string{"built", "fetched", "hello", "multi", "nosy", "secret", "tools.jq", "top", "unfree"}; !slices.Equal(names, want) || far != 15 {
		t.Fatalf("it has %v (%d), want %v", names, far, want)
	}
	for i, words := range map[int]string{0: "first-1", 1: "forbidden in restricted mode", 4: "forbidden in restricted mode", 5: "forbidden in restricted mode", 8: "refuses"} {
		if a := all[i]; !strings.Contains(a.Error, words) || a.Drv != "" {
			t.Errorf("%+v, want no more than that %q", a, words)
		}
	}
	if a := all[2]; a.Name != "hello" || a.Version != "2.3" || a.Description != "Says hello" || a.System != "aarch64-linux" || a.Drv.Name() != "hello-2.3.drv" ||
		a.Paths["out"].Name() != "hello-2.3" || !slices.Equal(a.Install, []string{"out"}) || a.Priority == nil || *a.Priority != 4 {
		t.Errorf("%+v", a)
	}
	if a := all[3]; a.Name != "many" || a.Version != "one" || len(a.Paths) != 2 || !slices.Equal(a.Install, []string{"out", "doc"}) || a.Priority != nil {
		t.Errorf("%+v", a)
	}
	wrong := &Expression{Source: o.expression(t, map[string]string{"default.nix": `{ x = `}), System: "x86_64-linux"}
	if _, err := b.Catalogue(t.Context(), wrong, o, nil); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "syntax error") {
		t.Errorf("no expression: %v", err)
	}
	if _, err := b.Catalogue(t.Context(), &Expression{Source: x.Source, File: "../x"}, o, nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a file outside of it: %v", err)
	}
}

// The derivation of an attribute comes with all it needs, references first, each as its
// address says.
func TestInstantiate(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	b := newBuilder(t, nil)
	x := &Expression{Source: o.expression(t, map[string]string{"default.nix": expressionText, "x.txt": "x"}), System: "x86_64-linux"}
	seen := map[flox.StorePath]bool{x.Source: true}
	var names []string
	take := func(ctx context.Context, info *flox.PathInfo, nar func(io.Writer) error) error {
		hash := nix.SHA256.New()
		if err := nar(hash); err != nil || [32]byte(hash.Sum(nil)) != info.NarHash {
			t.Errorf("the NAR of %s: %v", info.Path, err)
		}
		for _, ref := range info.References {
			if !seen[ref] {
				t.Errorf("%s comes before %s, to which it refers", info.Path, ref)
			}
		}
		seen[info.Path] = true
		names = append(names, info.Path.Name())
		return nil
	}
	a, err := b.Instantiate(t.Context(), x, "top", o, take)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if want := []string{"dep-1.drv", "text", "top-1.drv", "x.txt"}; !slices.Equal(names, want) || !seen[a.Drv] {
		t.Errorf("it needs %v, want %v", names, want)
	}
	for attr, words := range map[string]string{"unfree": "refuses", "tools.jqq": "jqq", "tools": "no derivation", "number": "no derivation", "nosy": "forbidden"} {
		if _, err := b.Instantiate(t.Context(), x, attr, o, take); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", attr, err, words)
		}
	}
	full := errors.New("full")
	if _, err := b.Instantiate(t.Context(), x, "hello", o, func(context.Context, *flox.PathInfo, func(io.Writer) error) error { return full }); !errors.Is(err, full) {
		t.Errorf("who takes refuses: %v", err)
	}
}
