package nix

import (
	"fmt"
	"strings"

	"github.com/floxctl/flox"
)

// narOrder follows a sequence of entries and refuses one that no NAR could
// hold in that order. Its memory is bounded by MaxNarDepth names.
type narOrder struct {
	path []byte // of the last entry
	dirs []int  // length of the path of each directory still open, root first
	// last is where in path the name of the last child of the innermost open
	// directory ends; it has none yet if that is the directory's own length.
	last   int
	begun  bool
	isLeaf bool // the last entry is no directory
}

// next takes the next entry: closed is how many directories end before it,
// name is its last component.
func (o *narOrder) next(path string, kind flox.Kind) (closed int, name string, err error) {
	if !o.begun {
		if path != "" {
			return 0, "", fmt.Errorf("NAR entry %s: the first entry is the root, with an empty path: %w", quote(path), flox.ErrBadInput)
		}
		o.begun, o.isLeaf = true, kind != flox.Directory
		if !o.isLeaf {
			o.dirs = append(o.dirs, 0)
		}
		return 0, "", nil
	}
	bad := func(why string) (int, string, error) {
		return 0, "", fmt.Errorf("NAR entry %s: %s: %w", quote(path), why, flox.ErrBadInput)
	}
	slash := strings.LastIndexByte(path, '/')
	name = path[slash+1:]
	if why := checkNarName(name); why != "" {
		return bad(why)
	}
	parent := path[:max(slash, 0)]
	top := len(o.dirs) - 1
	last := o.last
	for ; top >= 0 && !o.isDir(top, parent, slash >= 0); top-- {
		last = o.dirs[top]
	}
	if top < 0 {
		return bad("its directory is not open: entries come in NAR order")
	}
	if start := o.childStart(top); last > start && name <= string(o.path[start:last]) {
		return bad(fmt.Sprintf("comes after %s: names must be sorted by byte and differ", quote(o.path[start:last])))
	}
	if top+1 >= MaxNarDepth {
		return bad(fmt.Sprintf("lies deeper than %d levels", MaxNarDepth))
	}
	closed = len(o.dirs) - 1 - top
	o.enter(top, name, kind)
	return closed, name, nil
}

// isDir reports whether open directory i is parent.
func (o *narOrder) isDir(i int, parent string, below bool) bool {
	if (i > 0) != below {
		return false
	}
	return string(o.path[:o.dirs[i]]) == parent
}

// childStart is where in path the name of a child of open directory i begins.
func (o *narOrder) childStart(i int) int {
	if i == 0 {
		return 0
	}
	return o.dirs[i] + 1
}

// enter makes name, below open directory i, the last entry.
func (o *narOrder) enter(i int, name string, kind flox.Kind) {
	o.path = o.path[:o.dirs[i]]
	if i > 0 {
		o.path = append(o.path, '/')
	}
	o.path = append(o.path, name...)
	o.dirs = o.dirs[:i+1]
	o.last = len(o.path)
	o.isLeaf = kind != flox.Directory
	if !o.isLeaf {
		o.dirs = append(o.dirs, o.last)
	}
}

// resume makes o what it would be had last been taken just now.
func (o *narOrder) resume(path string, kind flox.Kind) error {
	*o = narOrder{path: o.path[:0], dirs: o.dirs[:0]}
	if path == "" {
		_, _, err := o.next("", kind)
		return err
	}
	o.begun, o.dirs = true, append(o.dirs, 0)
	names := strings.Split(path, "/")
	if len(names) >= MaxNarDepth {
		return fmt.Errorf("NAR entry %s: lies deeper than %d levels: %w", quote(path), MaxNarDepth, flox.ErrBadInput)
	}
	for i, name := range names {
		if why := checkNarName(name); why != "" {
			return fmt.Errorf("NAR entry %s: %s: %w", quote(path), why, flox.ErrBadInput)
		}
		k := flox.Directory
		if i == len(names)-1 {
			k = kind
		}
		o.enter(i, name, k)
	}
	return nil
}
