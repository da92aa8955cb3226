package environment

import (
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// maxShown is how many collisions a message has.
const maxShown = 10

// Collision is a file that two packages have.
type Collision struct {
	// First and Second are the packages; of a propagated one with who propagates it.
	First, Second string
	// FirstFile and SecondFile are absolute paths.
	FirstFile, SecondFile string
	Priority              int  // of both; with Kinds of the second
	Kinds                 bool // one is a directory and the other is none: no priority helps
}

// CollisionError says which packages cannot be installed together. It is a
// flox.ErrBadInput.
type CollisionError struct {
	Collisions []Collision // the first MaxReported
	Total      int
}

// Has reports whether a package is one of those, or propagates one.
func (e *CollisionError) Has(name string) bool {
	return slices.ContainsFunc(e.Collisions, func(c Collision) bool {
		return slices.ContainsFunc([]string{c.First, c.Second}, func(who string) bool {
			return who == name || strings.HasSuffix(who, propagatedBy(name))
		})
	})
}

// propagatedBy ends the name of what a package propagates.
func propagatedBy(who string) string { return " (propagated by " + who + ")" }

// Unwrap makes it a flox.ErrBadInput.
func (*CollisionError) Unwrap() error { return flox.ErrBadInput }

// Error names packages, files and the way out.
func (e *CollisionError) Error() string {
	var b strings.Builder
	files := "files"
	if e.Total == 1 {
		files = "file"
	}
	fmt.Fprintf(&b, "different packages have %d same %s:", e.Total, files)
	for _, c := range e.Collisions[:min(len(e.Collisions), maxShown)] {
		fmt.Fprintf(&b, "\n  %s of %s and %s of %s: %s", c.FirstFile, c.First, c.SecondFile, c.Second, c.wayOut())
	}
	if more := e.Total - min(len(e.Collisions), maxShown); more > 0 {
		fmt.Fprintf(&b, "\n  and %d more", more)
	}
	return b.String()
}

func (c *Collision) wayOut() string {
	switch {
	case c.First == c.Second:
		return "both are of one package: install fewer of its outputs"
	case c.Kinds:
		return fmt.Sprintf("one is a directory and the other is none: floxctl uninstall %s, or %s", c.First, c.Second)
	}
	return fmt.Sprintf("both have priority %d, and the lower wins: floxctl install --priority %d %s, or floxctl uninstall one of them", c.Priority, c.Priority+1, c.Second)
}

func (b *builder) collide(first, second *source, name string, kinds bool) {
	if b.collisions.Total++; len(b.collisions.Collisions) < MaxReported {
		b.collisions.Collisions = append(b.collisions.Collisions, Collision{
			First: first.who, Second: second.who, FirstFile: first.path + "/" + name, SecondFile: second.path + "/" + name,
			Priority: second.priority, Kinds: kinds,
		})
	}
}
