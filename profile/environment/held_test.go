package environment

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

const (
	heldHello = "00000000000000000000000000000000-hello-2.12"
	heldMan   = "11111111111111111111111111111111-hello-2.12-man"
)

// What nix profile and nix-env write at the root of an environment is read, as what is
// written here.
func TestManifestsAreRead(t *testing.T) {
	dir := flox.DefaultStoreDir
	in := func(p string) string { return `"` + dir.Join(flox.StorePath(p)) + `"` }
	hello := Package{Name: "hello", Priority: 5, Active: true, Paths: []flox.StorePath{heldHello, heldMan}}
	ours, err := encodeManifest(dir, []Package{hello})
	if err != nil {
		t.Fatal(err)
	}
	flake := hello
	flake.Source = &Source{OriginalURL: "flake:nixpkgs", URL: "github:NixOS/nixpkgs/1", AttrPath: "legacyPackages.x86_64-linux.hello"}
	second := Package{Name: "hello-2", Priority: 7, Active: true, Paths: []flox.StorePath{heldMan}}
	for name, c := range map[string]struct {
		text string
		want []Package
	}{
		"ours": {string(ours), []Package{hello}},
		"two": {
			`{"version":2,"elements":[{"active":true,"attrPath":"legacyPackages.x86_64-linux.hello","originalUrl":"flake:nixpkgs","url":"github:NixOS/nixpkgs/1","priority":5,"storePaths":[` + in(heldHello) + "," + in(heldMan) + `]},
			{"active":true,"priority":7,"storePaths":[` + in(heldMan) + `]}]}`, []Package{flake, second},
		},
	} {
		got, err := ParseManifest([]byte(c.text), dir)
		if d := cmp.Diff(c.want, got); err != nil || d != "" {
			t.Errorf("%s: %v, -want +got\n%s", name, err, d)
		}
	}
	text := `[ { meta = { active = "true"; description = "says \"\${hello}\"\n"; platforms = [ "x86_64-linux" «repeated» <CODE> ]; priority = 5; }; man = { outPath = ` + in(heldMan) + `; }; name = "hello-2.12"; out = { outPath = ` + in(heldHello) +
		`; }; outPath = ` + in(heldHello) + `; outputs = [ "out" "man" ]; "system" = "x86_64-linux"; type = "derivation"; } { meta = { priority = "7"; }; name = "hello-2.10"; outPath = ` + in(heldMan) + `; } ]`
	got, err := ParseUserEnv([]byte(text), dir)
	if d := cmp.Diff([]Package{hello, second}, got); err != nil || d != "" {
		t.Errorf("manifest.nix: %v, -want +got\n%s", err, d)
	}
}

// Of a priority that is not told that is known; more packages than a profile has are refused,
// before they are named.
func TestLargeManifests(t *testing.T) {
	dir := flox.DefaultStoreDir
	element := `{"active":true,"storePaths":["` + dir.Join(heldHello) + `"]}`
	got, err := ParseManifest([]byte(`{"version":2,"elements":[`+element+`,`+element+`,`+element+`]}`), dir)
	if err != nil || len(got) != 3 || !got[0].NoPriority || got[0].Priority != DefaultPriority || got[1].Name != "hello-2" || got[2].Name != "hello-3" {
		t.Errorf("three of one name: %+v, %v", got, err)
	}
	many := strings.Repeat(element+",", maxHeld) + element
	if _, err := ParseManifest([]byte(`{"version":2,"elements":[`+many+`]}`), dir); !errors.Is(err, flox.ErrFull) {
		t.Errorf("manifest.json: %v, want ErrFull", err)
	}
	many = strings.Repeat(`{ name = "x"; outPath = "`+dir.Join(heldHello)+`"; } `, maxHeld+1)
	if _, err := ParseUserEnv([]byte("[ "+many+"]"), dir); !errors.Is(err, flox.ErrFull) {
		t.Errorf("manifest.nix: %v, want ErrFull", err)
	}
}

// What is none is refused.
func TestOtherManifestsAreRefused(t *testing.T) {
	for _, text := range []string{"", "{}", `{"version":4,"elements":{}}`, `{"version":3,"elements":{"x":null}}`, `{"version":3,"elements":{"x":{"active":true,"storePaths":["/etc/passwd"]}}}`} {
		if got, err := ParseManifest([]byte(text), flox.DefaultStoreDir); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s gives %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "{ }", "[ { name = \"x\"; } ]", "[ \"x", "[ { a b } ]", "[ ] x", "[ ; ]", `[ { name = "x"; outPath = "/etc"; } ]`, strings.Repeat("[", 1000)} {
		if got, err := ParseUserEnv([]byte(text), flox.DefaultStoreDir); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s gives %v, %v", text, got, err)
		}
	}
}
