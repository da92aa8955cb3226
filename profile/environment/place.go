package environment

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/floxctl/flox"
)

// maxLinks is how many symlinks Linux follows in one path.
const maxLinks = 40

// errDangling says that a path leads nowhere (ENOENT, ENOTDIR).
var errDangling = errors.New("dangling")

// place is an entry of a store path.
type place struct {
	tree   flox.Tree
	index  uint32
	kind   flox.Kind
	target string // of a symlink
	name   string // of the root entry the store path
	parent *place // nil = the store directory
}

func (p *place) path(dir flox.StoreDir) string {
	if p.parent == nil {
		return string(dir) + "/" + p.name
	}
	return p.parent.path(dir) + "/" + p.name
}

// list gives the entries of a directory.
func (p *place) list(ctx context.Context) ([]place, error) {
	var all []place
	err := p.tree.Children(ctx, p.index, 0, func(i uint32, e flox.Entry) bool {
		all = append(all, place{tree: p.tree, index: i, kind: e.Kind, target: e.Target, name: e.Name, parent: p})
		return len(all) <= MaxEntries
	})
	if len(all) > MaxEntries {
		return nil, fmt.Errorf("the directory has more than %d entries: %w", MaxEntries, flox.ErrFull)
	}
	return all, err
}

// trees opens each store path once.
type trees struct {
	dir  flox.StoreDir
	from Trees
	open map[flox.StorePath]*place // nil = not valid
}

// top gives the root entry of a store path; errDangling: it is not valid.
func (t *trees) top(ctx context.Context, name string) (*place, error) {
	p, err := flox.ParseStorePath(name)
	if err != nil {
		return nil, errDangling
	}
	at, known := t.open[p]
	if !known {
		at, err = t.openTop(ctx, p)
		if err != nil {
			return nil, err
		}
		t.open[p] = at
	}
	if at == nil {
		return nil, errDangling
	}
	return at, nil
}

func (t *trees) openTop(ctx context.Context, p flox.StorePath) (*place, error) {
	tree, err := t.from.Open(ctx, p)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p, err)
	}
	e, err := tree.Entry(ctx, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p, err)
	}
	return &place{tree: tree, kind: e.Kind, target: e.Target, name: string(p)}, nil
}

// follow resolves p as stat does, where the path to p took used symlinks, and
// gives how many it took with p.
func (t *trees) follow(ctx context.Context, p *place, used int) (*place, int, error) {
	if p.kind == flox.Symlink {
		if used++; used > maxLinks {
			return nil, used, fmt.Errorf("it leads through more than %d symlinks: %w", maxLinks, flox.ErrBadInput)
		}
		return t.resolve(ctx, p.parent, p.target, used)
	}
	return p, used, nil
}

// resolve walks a path from a directory (nil: the store directory), following
// all symlinks. What lies outside of the store is as if it were not there: an
// environment must not depend on the machine.
func (t *trees) resolve(ctx context.Context, at *place, rel string, used int) (*place, int, error) {
	outside, err := "", error(nil) // the directory above the store directory, "" = in the store
	if strings.HasPrefix(rel, "/") {
		at, outside = nil, "/"
	}
	for name := range strings.SplitSeq(rel, "/") {
		switch {
		case outside != "":
			if outside = t.outside(outside, name); outside == "" {
				at = nil
			}
			continue
		case at != nil && at.kind != flox.Directory:
			return nil, used, errDangling
		case name == "" || name == ".":
			continue
		case name == ".." && at != nil:
			at = at.parent
			continue
		case name == "..":
			outside = t.outside(string(t.dir), "..")
			continue
		case at == nil:
			at, err = t.top(ctx, name)
		default:
			at, err = at.child(ctx, name)
		}
		if err == nil {
			at, used, err = t.follow(ctx, at, used)
		}
		if err != nil {
			return nil, used, err
		}
	}
	if at == nil || outside != "" {
		return nil, used, errDangling
	}
	return at, used, nil
}

// outside steps from a directory above the store; "" is the store itself. A
// directory that leads to no store stays one that does not.
func (t *trees) outside(dir, name string) string {
	switch name {
	case "", ".":
	case "..":
		dir = dir[:max(strings.LastIndexByte(dir, '/'), 1)]
	default:
		dir = strings.TrimSuffix(dir, "/") + "/" + name
	}
	if dir == string(t.dir) {
		return ""
	}
	return dir
}

func (p *place) child(ctx context.Context, name string) (*place, error) {
	i, e, err := p.tree.Child(ctx, p.index, name)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, errDangling
	}
	if err != nil {
		return nil, err
	}
	return &place{tree: p.tree, index: i, kind: e.Kind, target: e.Target, name: e.Name, parent: p}, nil
}
