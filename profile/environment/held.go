package environment

import (
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// What lists the packages of an environment at its root: `nix profile` writes the first,
// nix-env the second.
const (
	ManifestName = manifestName
	UserEnvName  = "manifest.nix"
	// MaxManifest bounds what is read of either, in bytes, maxHeld the packages in it.
	MaxManifest = 8 << 20
	maxHeld     = 4096
)

// Names gives each package one of its own.
type Names struct {
	taken map[string]bool
	next  map[string]int
}

// NewNames gives one by which all are free.
func NewNames() *Names { return &Names{make(map[string]bool), make(map[string]int)} }

// Take has a name be taken.
func (n *Names) Take(name string) { n.taken[name] = true }

// Free is name, or the first of name-2, name-3, ... that is not taken yet; it is from then on.
func (n *Names) Free(name string) string {
	free := name
	for n.taken[free] {
		n.next[name] = max(n.next[name], 1) + 1
		free = fmt.Sprintf("%s-%d", name, n.next[name])
	}
	n.taken[free] = true
	return free
}

// fit refuses more packages than a profile may have.
func fit(n int) error {
	if n > maxHeld {
		return fmt.Errorf("it has %d packages, at most %d fit into a profile: %w", n, maxHeld, flox.ErrFull)
	}
	return nil
}

// ParseManifest reads manifest.json (Nix src/nix/profile.cc, versions 1 to 3), in the order
// of names. ErrBadInput: it is none.
func ParseManifest(b []byte, dir flox.StoreDir) ([]Package, error) {
	var m struct {
		Version  int             `json:"version"`
		Elements json.RawMessage `json:"elements"`
	}
	bad := func(err error) ([]Package, error) {
		return nil, fmt.Errorf("%s: %w: %w", manifestName, err, flox.ErrBadInput)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return bad(err)
	}
	named := map[string]*element{}
	switch m.Version {
	case 1, 2:
		var list []*element
		if err := json.Unmarshal(m.Elements, &list); err != nil {
			return bad(err)
		}
		if err := fit(len(list)); err != nil {
			return bad(err)
		}
		names := NewNames()
		for _, e := range list {
			if e != nil {
				named[names.Free(e.name())] = e
			}
		}
	case 3:
		err := json.Unmarshal(m.Elements, &named)
		if err == nil {
			err = fit(len(named))
		}
		if err != nil {
			return bad(err)
		}
	default:
		return bad(fmt.Errorf("version %d, want 1 to 3", m.Version))
	}
	var out []Package
	for name, e := range named {
		if e == nil {
			return bad(fmt.Errorf("element %q is null", name))
		}
		p, err := e.pkg(name, dir)
		if err != nil {
			return bad(err)
		}
		out = append(out, p)
	}
	return checkPackages(out)
}

// name is that of an element of which the manifest says none.
func (e *element) name() string {
	if parts := strings.Split(e.AttrPath, "."); e.AttrPath != "" {
		return parts[len(parts)-1]
	}
	for _, p := range e.StorePaths {
		if sp, err := flox.ParseStorePath(path.Base(p)); err == nil {
			name, _ := nix.NameAndVersion(sp.Name())
			return name
		}
	}
	return "package"
}

func (e *element) pkg(name string, dir flox.StoreDir) (Package, error) {
	p := Package{Name: name, Priority: DefaultPriority, Active: e.Active, NoPriority: e.Priority == nil}
	if e.Priority != nil && *e.Priority != 0 {
		p.Priority = *e.Priority
	}
	if e.URL != "" {
		p.Source = &Source{OriginalURL: e.OriginalURL, URL: e.URL, AttrPath: e.AttrPath, Outputs: e.Outputs}
	}
	for _, text := range e.StorePaths {
		sp, err := inStore(text, dir)
		if err != nil {
			return p, fmt.Errorf("package %q: %w", name, err)
		}
		p.Paths = append(p.Paths, sp)
	}
	return p, nil
}

// inStore reads an absolute store path.
func inStore(text string, dir flox.StoreDir) (flox.StorePath, error) {
	sp, rest, err := dir.Split(text)
	if err == nil && rest != "" {
		err = fmt.Errorf("%s is inside of a store path: %w", text, flox.ErrBadInput)
	}
	return sp, err
}

// ParseUserEnv reads manifest.nix (Nix src/nix-env/user-env.cc), in the order of names.
// ErrBadInput: it is none.
func ParseUserEnv(b []byte, dir flox.StoreDir) ([]Package, error) {
	bad := func(err error) ([]Package, error) {
		return nil, fmt.Errorf("%s: %w: %w", UserEnvName, err, flox.ErrBadInput)
	}
	r := &valueReader{text: string(b)}
	v, err := r.value(0)
	if err != nil {
		return bad(err)
	}
	list, ok := v.([]any)
	if r.blank(); !ok || r.text != "" {
		return bad(fmt.Errorf("want a list of derivations"))
	}
	if err := fit(len(list)); err != nil {
		return bad(err)
	}
	var out []Package
	names := NewNames()
	for _, v := range list {
		p, err := userPackage(v, dir)
		if err != nil {
			return bad(err)
		}
		p.Name = names.Free(p.Name)
		out = append(out, p)
	}
	return checkPackages(out)
}

// userPackage is one derivation of manifest.nix.
func userPackage(v any, dir flox.StoreDir) (p Package, err error) {
	drv, _ := v.(map[string]any)
	full, _ := drv["name"].(string)
	p = Package{Priority: DefaultPriority, Active: true}
	p.Name, _ = nix.NameAndVersion(full)
	meta, _ := drv["meta"].(map[string]any)
	switch n := meta["priority"].(type) {
	case int64:
		p.Priority = int(n)
	case string:
		if i, err := strconv.Atoi(n); err == nil {
			p.Priority = i
		}
	}
	if active, said := meta["active"]; said && (active == false || active == "false") {
		p.Active = false
	}
	outputs, _ := drv["outputs"].([]any)
	texts := []any{drv["outPath"]}
	for i, o := range outputs {
		if i == 0 {
			texts = nil
		}
		name, _ := o.(string)
		out, _ := drv[name].(map[string]any)
		texts = append(texts, out["outPath"])
	}
	for _, t := range texts {
		text, _ := t.(string)
		sp, err := inStore(text, dir)
		if err != nil {
			return p, fmt.Errorf("derivation %q: %w", full, err)
		}
		p.Paths = append(p.Paths, sp)
	}
	return p, nil
}
