// Package environment computes the environment of a profile's generation: the
// forest of symlinks Nix's builtin:buildenv makes of the same packages (Nix
// src/libstore/builtins/buildenv.cc), with the manifest.json of `nix profile`
// at its root. The result is a tree in memory and everything a caller needs to
// make a content-addressed store path of it.
//
// It reads file trees through an interface and must not know where they lie,
// who installs, or what a profile is.
package environment

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"iter"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// DefaultPriority is what Nix gives a package that says nothing.
const DefaultPriority = 5

// Bounds of an environment; beyond them Build fails with flox.ErrFull.
const (
	MaxEntries      = 2_000_000       // links and directories
	MaxVisited      = 10 * MaxEntries // entries of packages that are looked at
	MaxSupportBytes = 1 << 20         // of nix-support/propagated-user-env-packages
	MaxDepth        = nix.MaxNarDepth // directories inside each other, the root counted
	MaxReported     = 100             // collisions and skipped entries that are kept; all are counted
)

// manifestName is the file at the root that `nix profile` reads.
const manifestName = "manifest.json"

// Package is an element of a profile.
type Package struct {
	Name string // unique in an environment
	// Priority decides who has a file that several packages have: the lower one.
	Priority int
	// NoPriority says of a package of a manifest that the manifest tells none.
	NoPriority bool
	Paths      []flox.StorePath // the outputs to install, at least one
	// Active packages are linked; others are only kept in manifest.json.
	Active bool
	Source *Source // nil = not from a flake
}

// Source says where `nix profile upgrade` finds newer versions of a package.
type Source struct {
	OriginalURL string   // flake reference as the user gave it
	URL         string   // locked flake reference
	AttrPath    string   // attribute within the flake
	Outputs     []string // nil = the package's default ones
}

// Trees opens file trees of store paths.
type Trees interface {
	// Open gives the tree of a valid store path. ErrNotFound says that it is not
	// valid: links to it dangle. All other errors end Build.
	Open(ctx context.Context, p flox.StorePath) (flox.Tree, error)
}

// Environment is a computed forest. It is immutable and may be used by many
// goroutines.
type Environment struct {
	dir      flox.StoreDir
	root     *node
	manifest []byte
	links    int
	refs     []flox.StorePath
	skipped  []Skipped
	skips    int
}

// Skipped is an entry of a package that the environment leaves out.
type Skipped struct {
	Path string // absolute, within the package
	Why  string
}

// Links is the number of symlinks.
func (e *Environment) Links() int { return e.links }

// Manifest is the content of manifest.json; the caller must not change it.
func (e *Environment) Manifest() []byte { return e.manifest }

// References are the store paths the environment names: those it links to and
// those in manifest.json, sorted. It never refers to itself.
func (e *Environment) References() []flox.StorePath { return slices.Clone(e.refs) }

// Skipped gives entries that were left out because they lead nowhere, at most
// MaxReported, and how many there are. What buildenv always leaves out is not
// among them.
func (e *Environment) Skipped() (first []Skipped, total int) {
	return slices.Clone(e.skipped), e.skips
}

// Entries yields the tree in NAR order. The only regular file is manifest.json,
// whose content is Manifest.
func (e *Environment) Entries() iter.Seq[nix.NarEntry] {
	return func(yield func(nix.NarEntry) bool) {
		if yield(nix.NarEntry{Kind: flox.Directory}) {
			e.entries(e.root, "", yield)
		}
	}
}

func (e *Environment) entries(dir *node, prefix string, yield func(nix.NarEntry) bool) bool {
	names := make([]string, 0, len(dir.children)+1)
	for name := range dir.children {
		names = append(names, name)
	}
	if dir == e.root {
		names = append(names, manifestName)
	}
	slices.Sort(names)
	for _, name := range names {
		n, entry := dir.children[name], nix.NarEntry{Path: prefix + name}
		switch {
		case n == nil:
			entry.Kind, entry.Size = flox.Regular, uint64(len(e.manifest))
		case n.children != nil:
			entry.Kind = flox.Directory
		default:
			entry.Kind, entry.Target = flox.Symlink, n.src.path+"/"+name
		}
		if !yield(entry) {
			return false
		}
		if entry.Kind == flox.Directory && !e.entries(n, entry.Path+"/", yield) {
			return false
		}
	}
	return true
}

// WriteNAR streams the environment as a NAR. Errors are the writer's, and
// flox.ErrBadInput if a target is longer than a NAR may hold.
func (e *Environment) WriteNAR(w io.Writer) error {
	_, err := e.writeNAR(w)
	return err
}

func (e *Environment) writeNAR(w io.Writer) (size uint64, err error) {
	nar := nix.NewNarWriter(w)
	for entry := range e.Entries() {
		if err := nar.Entry(entry); err != nil {
			return 0, fmt.Errorf("environment: %w", err)
		}
		if entry.Kind == flox.Regular {
			if _, err := nar.Write(e.manifest); err != nil {
				return 0, fmt.Errorf("environment: %w", err)
			}
		}
	}
	if err := nar.Close(); err != nil {
		return 0, fmt.Errorf("environment: %w", err)
	}
	return nar.Offset(), nil
}

// Info computes the content-addressed store path of the environment, as `nix
// profile` does, with the given name (Nix: "profile"): Path, NarHash, NarSize,
// References and CA are set. The error is flox.ErrBadInput.
func (e *Environment) Info(name string) (flox.PathInfo, error) {
	sum := sha256.New()
	size, err := e.writeNAR(sum)
	if err != nil {
		return flox.PathInfo{}, err
	}
	info := flox.PathInfo{NarHash: [32]byte(sum.Sum(nil)), NarSize: size, References: e.References()}
	ca := nix.ContentAddress{Method: nix.CANar, Hash: nix.SHA256Hash(info.NarHash)}
	info.CA = ca.String()
	info.Path, err = ca.Path(e.dir, name, info.References, false)
	return info, err
}
