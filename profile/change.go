package profile

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

func byName(packages []*floxv1.Package) map[string]*floxv1.Package {
	m := make(map[string]*floxv1.Package, len(packages))
	for _, p := range packages {
		m[p.GetName()] = p
	}
	return m
}

// Apply gives what a profile's packages are after a change, in the order of their names.
// ErrBadInput for a package that is none, or lacks paths for one of the profile's systems;
// ErrNotFound for one to drop that is not there; ErrFull.
func Apply(p *floxv1.Profile, packages, set []*floxv1.Package, drop []string) ([]*floxv1.Package, error) {
	now := byName(packages)
	for _, name := range drop {
		if now[name] == nil {
			return nil, fmt.Errorf("profile %s has no package %q%s: %w", p.GetName(), short(name), instead(name, slices.Collect(maps.Keys(now))), flox.ErrNotFound)
		}
		delete(now, name)
	}
	for _, pkg := range set {
		if err := check(p, pkg); err != nil {
			return nil, err
		}
		now[pkg.GetName()] = pkg
	}
	if len(now) > maxPackages {
		return nil, fmt.Errorf("profile %s would have %d packages, at most %d fit: %w", p.GetName(), len(now), maxPackages, flox.ErrFull)
	}
	after := make([]*floxv1.Package, 0, len(now))
	for _, name := range slices.Sorted(maps.Keys(now)) {
		after = append(after, now[name])
	}
	return after, nil
}

// instead proposes names like one that is not there.
func instead(name string, there []string) string {
	slices.Sort(there)
	var near []string
	for _, t := range there {
		if strings.HasPrefix(t, name) || strings.HasPrefix(name, t) || Folded(t) == Folded(name) {
			near = append(near, t)
		}
	}
	if len(near) == 0 || len(near) > 8 {
		return ""
	}
	return "; it has " + strings.Join(near, ", ")
}

// check refuses what is no package of a profile.
func check(p *floxv1.Profile, pkg *floxv1.Package) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("profile %s: package %q: %s: %w", p.GetName(), short(pkg.GetName()), fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	switch {
	case !packageName(pkg.GetName()):
		return bad("want a name of 1 to 128 letters, digits, and -._+?=")
	case len(pkg.GetVersion()) > maxText || len(pkg.GetSource()) > maxText:
		return bad("version or source of more than %d bytes", maxText)
	}
	have := map[string]bool{}
	for _, paths := range pkg.GetPaths() {
		switch {
		case have[paths.GetSystem()]:
			return bad("system %s twice", short(paths.GetSystem()))
		case !slices.Contains(p.GetSystems(), paths.GetSystem()):
			return bad("for system %s, and the profile is for %s", short(paths.GetSystem()), strings.Join(p.GetSystems(), ", "))
		case len(paths.GetPaths()) == 0 || len(paths.GetPaths()) > maxPaths:
			return bad("%d paths for %s, want 1 to %d", len(paths.GetPaths()), paths.GetSystem(), maxPaths)
		}
		for _, path := range paths.GetPaths() {
			if _, err := flox.ParseStorePath(path); err != nil {
				return bad("%v", err)
			}
		}
		have[paths.GetSystem()] = true
	}
	for _, s := range p.GetSystems() {
		if !have[s] {
			return bad("it has nothing for %s, for which the profile is as well: nothing was changed for any system", s)
		}
	}
	return nil
}

// Conflict is a package that two changes made on one generation make different.
type Conflict struct {
	Name         string
	Theirs, Ours *floxv1.Package // nil = dropped
}

// Conflicts gives what a change made on the packages base cannot do to those that live
// now, since somebody changed the same meanwhile, to something else.
func Conflicts(base, live, set []*floxv1.Package, drop []string) []Conflict {
	was, is, ours := byName(base), byName(live), byName(set)
	touched := map[string]bool{}
	for _, name := range drop {
		touched[name] = true
	}
	for name := range ours {
		touched[name] = true
	}
	var out []Conflict
	for _, name := range slices.Sorted(maps.Keys(touched)) {
		theirs := is[name]
		if !same(was[name], theirs) && !same(theirs, ours[name]) {
			out = append(out, Conflict{name, theirs, ours[name]})
		}
	}
	return out
}

// same compares packages; nil is none.
func same(x, y *floxv1.Package) bool {
	if x == nil || y == nil {
		return x == nil && y == nil
	}
	return proto.Equal(x, y)
}

// Difference is a package that two generations do not have alike.
type Difference struct {
	Name          string
	Before, After *floxv1.Package // nil = not there
}

// Differences gives what is different between two sets of packages, by name.
func Differences(before, after []*floxv1.Package) []Difference {
	was, is := byName(before), byName(after)
	names := map[string]bool{}
	for name := range was {
		names[name] = true
	}
	for name := range is {
		names[name] = true
	}
	var out []Difference
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !same(was[name], is[name]) {
			out = append(out, Difference{name, was[name], is[name]})
		}
	}
	return out
}

// maxDescribed is how many packages Describe names.
const maxDescribed = 16

// Describe says in words what is different: "+git 2.50", "-curl", "hello 2.10 -> 2.12".
func Describe(before, after []*floxv1.Package) string {
	all := Differences(before, after)
	var words []string
	for _, d := range all[:min(len(all), maxDescribed)] {
		words = append(words, d.String())
	}
	if more := len(all) - len(words); more > 0 {
		words = append(words, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, ", ")
}

// String says it in words.
func (d Difference) String() string {
	named := func(p *floxv1.Package) string { return strings.TrimSpace(d.Name + " " + p.GetVersion()) }
	switch {
	case d.Before == nil:
		return "+" + named(d.After)
	case d.After == nil:
		return "-" + named(d.Before)
	case d.Before.GetVersion() != d.After.GetVersion():
		return named(d.Before) + " -> " + nameOr(d.After.GetVersion(), "another")
	}
	return named(d.After) + " changed"
}
