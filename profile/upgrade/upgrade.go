// Package upgrade says what of a profile an upgrade looks at, as what it asks channels for,
// and when a profile's schedule has it upgraded. What people ask for and what a schedule
// does come from here alike.
//
// It knows nothing of the log, of servers and of clocks.
package upgrade

import (
	"regexp"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

var nameWords = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.+'-]*(@[^/#@\s]+)?$`)

// IsName reports whether a word can name a package in a channel: [CHANNEL.]NAME[@VERSION].
func IsName(word string) bool {
	if _, err := flox.ParseStorePath(word); err == nil {
		return false
	}
	return nameWords.MatchString(word) && !strings.HasSuffix(word, ".nix")
}

// Looks reports whether an upgrade looks at a package: it came from a channel, and nobody
// holds it.
func Looks(p *floxv1.Package) bool { return !p.GetHeld() && IsName(p.GetSource()) }

// Systems are those for which a package is there.
func Systems(p *floxv1.Package) []string {
	systems := make([]string, 0, len(p.GetPaths()))
	for _, s := range p.GetPaths() {
		systems = append(systems, s.GetSystem())
	}
	return systems
}

// Package makes a member of a profile of what a channel has for a word, one for each
// system. An output whose path is not known before it is built is left out.
func Package(word string, found []*floxv1.CataloguePackage) *floxv1.Package {
	first := found[0]
	p := &floxv1.Package{Name: first.GetName(), Version: first.GetVersion(), Priority: first.GetPriority(), Source: first.GetChannel() + "." + first.GetAttr()}
	if _, version, pinned := strings.Cut(word, "@"); pinned {
		p.Source += "@" + version
	}
	for _, f := range found {
		paths := &floxv1.PackagePaths{System: f.GetSystem()}
		for _, path := range f.GetPaths() {
			if path != "" {
				paths.Paths = append(paths.Paths, path)
			}
		}
		p.Paths = append(p.Paths, paths)
	}
	return p
}

// InPlaceOf gives a package the name and the priority that whoever installed the one it
// replaces wants.
func InPlaceOf(was, now *floxv1.Package) *floxv1.Package {
	now.Name, now.Priority = was.GetName(), was.GetPriority()
	return now
}
