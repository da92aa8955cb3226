package environment

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// propagatedName is the file that names packages to install with a package.
const propagatedName = "nix-support/propagated-user-env-packages"

// firstPropagated is the priority of the first propagated package; each later
// one has the next.
const firstPropagated = 1000

// node is an entry of the environment: a link, or with children a directory.
type node struct {
	src      *source // where the link, or the first part of the directory, comes from
	to       *place  // the directory a link leads to, nil = no directory
	children map[string]*node
}

// source is a directory whose entries are linked.
type source struct {
	path     string // absolute, not resolved
	ref      flox.StorePath
	who      string // the package, for messages
	priority int
}

type builder struct {
	trees
	root       *node
	nodes      int
	visited    int
	done       map[string]bool
	postponed  map[string]string // absolute path to who propagates it
	collisions CollisionError
	skipped    []Skipped
	skips      int
}

// Build computes the environment of packages, whose order does not matter.
// Errors are *CollisionError (a flox.ErrBadInput), flox.ErrBadInput,
// flox.ErrNotFound (a package is not in the store), flox.ErrFull (a bound is
// exceeded), those of trees and of ctx. What dangles depends on which store
// paths trees finds: it must find the closure of all packages.
func Build(ctx context.Context, dir flox.StoreDir, from Trees, packages []Package) (*Environment, error) {
	packages, err := checkPackages(packages)
	if err != nil {
		return nil, err
	}
	manifest, err := encodeManifest(dir, packages)
	if err != nil {
		return nil, err
	}
	b := &builder{
		trees: trees{dir: dir, from: from, open: map[flox.StorePath]*place{}},
		root:  &node{children: map[string]*node{}},
		done:  map[string]bool{}, postponed: map[string]string{},
	}
	if err := b.addAll(ctx, packages); err != nil {
		return nil, err
	}
	if b.collisions.Total > 0 {
		return nil, &b.collisions
	}
	e := &Environment{dir: dir, root: b.root, manifest: manifest, skipped: b.skipped, skips: b.skips}
	refs := map[flox.StorePath]bool{}
	for _, p := range packages {
		for _, out := range p.Paths {
			refs[out] = true
		}
	}
	e.collect(b.root, refs)
	for ref := range refs {
		e.refs = append(e.refs, ref)
	}
	slices.Sort(e.refs)
	return e, nil
}

// collect counts the links below dir and gathers what they refer to.
func (e *Environment) collect(dir *node, refs map[flox.StorePath]bool) {
	var last *source
	for _, n := range dir.children {
		if n.children != nil {
			e.collect(n, refs)
			continue
		}
		e.links++
		if n.src != last {
			last, refs[n.src.ref] = n.src, true
		}
	}
}

// addAll links what was installed, and then what that propagates, in the order
// of buildProfile in buildenv.cc.
func (b *builder) addAll(ctx context.Context, packages []Package) error {
	type output struct {
		path     string
		who      string
		priority int
	}
	var outputs []output
	for _, p := range packages {
		if p.Active {
			for _, out := range p.Paths {
				outputs = append(outputs, output{b.dir.Join(out), p.Name, p.Priority})
			}
		}
	}
	slices.SortFunc(outputs, func(x, y output) int {
		return cmp.Or(cmp.Compare(x.priority, y.priority), cmp.Compare(x.path, y.path), cmp.Compare(x.who, y.who))
	})
	for _, o := range outputs {
		if err := b.add(ctx, o.path, o.who, o.priority); err != nil {
			return err
		}
	}
	next := firstPropagated
	for len(b.postponed) > 0 {
		round := b.postponed
		b.postponed = map[string]string{}
		names := make([]string, 0, len(round))
		for name := range round {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			if err := b.add(ctx, name, round[name], next); err != nil {
				return err
			}
			next++
		}
	}
	return nil
}

// add links one output, or directory of one, unless it was linked before.
func (b *builder) add(ctx context.Context, abs, who string, priority int) error {
	if err := b.visit(ctx); err != nil {
		return err
	}
	if b.done[abs] {
		return nil
	}
	b.done[abs] = true
	ref, _, err := b.dir.Split(abs)
	if err != nil {
		return err
	}
	at, used, err := b.resolve(ctx, nil, abs, 0)
	switch {
	case errors.Is(err, errDangling):
		return fmt.Errorf("package %s: %s is not in the store: fetch or build it first: %w", who, abs, flox.ErrNotFound)
	case err != nil:
		return fmt.Errorf("package %s: %s: %w", who, abs, err)
	case at.kind != flox.Directory:
		b.skip(abs, "it is no directory")
		return nil
	}
	if err := b.link(ctx, &source{path: abs, ref: ref, who: who, priority: priority}, at, used, b.root, 1); err != nil {
		return err
	}
	return b.propagate(ctx, at, abs, who)
}

// propagate postpones the packages that the one at a place names.
func (b *builder) propagate(ctx context.Context, at *place, abs, who string) error {
	file, _, err := b.resolve(ctx, at, propagatedName, 0)
	if errors.Is(err, errDangling) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", abs, propagatedName, err)
	}
	text, err := readSupport(ctx, file)
	if err != nil {
		return fmt.Errorf("%s/%s: %w", abs, propagatedName, err)
	}
	for _, name := range strings.FieldsFunc(text, func(r rune) bool { return r == ' ' || r == '\n' }) {
		if _, _, err := b.dir.Split(name); err != nil {
			return fmt.Errorf("%s/%s: %w", abs, propagatedName, err)
		}
		name = path.Clean(name)
		by := who
		if !strings.Contains(by, " (") {
			by = name[len(b.dir)+1:] + propagatedBy(who)
		} else {
			by = name[len(b.dir)+1:] + by[strings.Index(by, " ("):]
		}
		if old, ok := b.postponed[name]; !b.done[name] && (!ok || by < old) {
			b.postponed[name] = by
		}
	}
	return nil
}

func readSupport(ctx context.Context, file *place) (string, error) {
	if file.kind != flox.Regular {
		return "", fmt.Errorf("it is a %s, want a file: %w", file.kind, flox.ErrBadInput)
	}
	e, err := file.tree.Entry(ctx, file.index)
	if err != nil {
		return "", err
	}
	if e.Size > MaxSupportBytes {
		return "", fmt.Errorf("it has %d bytes, want at most %d: %w", e.Size, MaxSupportBytes, flox.ErrFull)
	}
	buf := make([]byte, e.Size)
	n, err := file.tree.ReadAt(ctx, file.index, buf, 0, flox.Reader{})
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if n < len(buf) {
		return "", fmt.Errorf("%d bytes where %d were expected: %w", n, len(buf), flox.ErrCorrupt)
	}
	return string(buf), nil
}

// visit counts an entry that is looked at.
func (b *builder) visit(ctx context.Context) error {
	b.visited++
	if b.visited > MaxVisited {
		return fmt.Errorf("environment: the packages have more than %d entries in shared directories: %w", MaxVisited, flox.ErrFull)
	}
	if b.visited%1024 == 0 {
		return ctx.Err()
	}
	return nil
}

// always are the ends of paths that buildenv leaves out.
func always(dir, name string) bool {
	switch name {
	case "propagated-build-inputs", "nix-support", "perllocal.pod", "log", "manifest.nix", manifestName:
		return true
	case "dir":
		return strings.HasSuffix(dir, "/info")
	}
	return false
}

// link is createLinks of buildenv.cc: it links the entries of the directory at
// a place, whose path took used symlinks, into dst, which is depth nodes deep.
func (b *builder) link(ctx context.Context, src *source, at *place, used int, dst *node, depth int) error {
	children, err := at.list(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", src.path, err)
	}
	for i := range children {
		child := &children[i]
		if err := b.visit(ctx); err != nil {
			return err
		}
		if child.name[0] == '.' {
			continue
		}
		to, links, err := b.follow(ctx, child, used)
		if errors.Is(err, errDangling) {
			b.skip(src.path+"/"+child.name, "it is a dangling symlink")
			continue
		}
		if err != nil {
			return fmt.Errorf("%s/%s: %w", src.path, child.name, err)
		}
		if always(src.path, child.name) {
			continue
		}
		if depth >= MaxDepth {
			return fmt.Errorf("%s/%s: it lies deeper than %d levels: %w", src.path, child.name, MaxDepth, flox.ErrFull)
		}
		if err := b.place(ctx, src, child.name, to, links, dst, depth); err != nil {
			return err
		}
	}
	return nil
}

// place puts one entry, which leads to a place, into dst.
func (b *builder) place(ctx context.Context, src *source, name string, to *place, links int, dst *node, depth int) error {
	old := dst.children[name]
	if to.kind != flox.Directory {
		to = nil
	}
	switch {
	case old == nil:
		b.nodes++
		if b.nodes > MaxEntries {
			return fmt.Errorf("environment: more than %d links, at %s/%s: %w", MaxEntries, src.path, name, flox.ErrFull)
		}
		dst.children[name] = &node{src: src, to: to}
	case to != nil && old.children == nil && old.to == nil, to == nil && old.children != nil:
		b.collide(old.src, src, name, true)
	case to != nil:
		if old.children == nil {
			real := old.to
			old.children = map[string]*node{}
			ref, _, err := b.dir.Split(real.path(b.dir))
			if err != nil {
				return err
			}
			first := &source{path: real.path(b.dir), ref: ref, who: old.src.who, priority: old.src.priority}
			if err := b.link(ctx, first, real, 0, old, depth+1); err != nil {
				return err
			}
		}
		next := &source{path: src.path + "/" + name, ref: src.ref, who: src.who, priority: src.priority}
		return b.link(ctx, next, to, links, old, depth+1)
	case old.src.priority == src.priority:
		b.collide(old.src, src, name, false)
	case old.src.priority > src.priority:
		old.src, old.to = src, nil
	}
	return nil
}

func (b *builder) skip(abs, why string) {
	if b.skips++; len(b.skipped) < MaxReported {
		b.skipped = append(b.skipped, Skipped{Path: abs, Why: why})
	}
}
