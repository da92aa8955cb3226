package environment

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/floxctl/flox"
)

// checkPackages gives a copy in order of names, with outputs sorted.
func checkPackages(packages []Package) ([]Package, error) {
	packages = slices.Clone(packages)
	slices.SortFunc(packages, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	for i := range packages {
		p := &packages[i]
		bad := func(why string) ([]Package, error) {
			return nil, fmt.Errorf("package %q: %s: %w", p.Name, why, flox.ErrBadInput)
		}
		switch {
		case p.Name == "" || !utf8.ValidString(p.Name):
			return bad("want a name in UTF-8")
		case i > 0 && packages[i-1].Name == p.Name:
			return bad("the name stands for two packages: rename or uninstall one")
		case len(p.Paths) == 0:
			return bad("it has no store path: want at least one output")
		case p.Priority < math.MinInt32 || p.Priority > math.MaxInt32:
			return bad(fmt.Sprintf("priority %d is no 32-bit number", p.Priority))
		}
		p.Paths = slices.Clone(p.Paths)
		slices.Sort(p.Paths)
		p.Paths = slices.Compact(p.Paths)
		for _, out := range p.Paths {
			if _, err := flox.ParseStorePath(string(out)); err != nil {
				return nil, fmt.Errorf("package %q: %w", p.Name, err)
			}
		}
	}
	return packages, nil
}

// element is one of manifest.json, its fields in the order of their names, as
// Nix writes them (src/nix/profile.cc, toJSON).
type element struct {
	Active   bool   `json:"active"`
	AttrPath string `json:"attrPath"`
	// OriginalURL is where the user found it.
	OriginalURL string   `json:"originalUrl"`
	Outputs     []string `json:"outputs"`  // null = the default ones
	Priority    *int     `json:"priority"` // nil = Nix before 2.9 writes none
	StorePaths  []string `json:"storePaths"`
	URL         string   `json:"url"`
}

// plain is an element that is from no flake.
type plain struct {
	Active     bool     `json:"active"`
	Priority   int      `json:"priority"`
	StorePaths []string `json:"storePaths"`
}

// encodeManifest gives version 2 of manifest.json, which every Nix with `nix profile` reads:
// Nix before 2.20 refuses version 3, whose elements have names.
func encodeManifest(dir flox.StoreDir, packages []Package) ([]byte, error) {
	elements := make([]any, len(packages))
	for i, p := range packages {
		paths := make([]string, len(p.Paths))
		for i, out := range p.Paths {
			paths[i] = dir.Join(out)
		}
		elements[i] = plain{p.Active, p.Priority, paths}
		if s := p.Source; s != nil {
			outputs := slices.Clone(s.Outputs)
			slices.Sort(outputs)
			elements[i] = element{p.Active, s.AttrPath, s.OriginalURL, outputs, &p.Priority, paths, s.URL}
		}
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	err := enc.Encode(struct {
		Elements []any `json:"elements"`
		Version  int   `json:"version"`
	}{elements, 2})
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), err
}
