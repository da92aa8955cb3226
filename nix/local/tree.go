package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
)

const (
	// maxEntries bounds the entries kept in memory of all trees, about 150 bytes each;
	// one tree may have more.
	maxEntries = 1 << 18
	// maxTrees bounds the trees kept.
	maxTrees = 4096
	// maxDepth bounds how deep directories lie in each other.
	maxDepth = 1024
	// maxWalks bounds the trees that are walked at once.
	maxWalks = 2
)

// trees are those that were opened.
type trees struct {
	walks chan struct{}

	mu      sync.Mutex
	byID    map[flox.CID]*Tree
	entries int // in byID
}

func (t *trees) init() {
	t.walks, t.byID = make(chan struct{}, maxWalks), make(map[flox.CID]*Tree)
}

// Tree is the file tree of one local path. Its entries are found by walking through
// it, in an order that is always the same, when more than the path itself is
// asked for: so their numbers hold in another process, too.
type Tree struct {
	s    *Store
	path *Path
	top  flox.Entry

	mu      sync.Mutex
	entries []flox.Entry // nil = not walked
	parents []uint32
}

var _ flox.Tree = (*Tree)(nil)

// Tree opens the tree of a path by its ID, in this process or in one before it.
func (s *Store) Tree(ctx context.Context, id flox.CID) (*Tree, error) {
	s.trees.mu.Lock()
	t, ok := s.trees.byID[id]
	s.trees.mu.Unlock()
	if ok {
		return t, nil
	}
	p, err := s.byID(ctx, id)
	if err != nil {
		return nil, err
	}
	return s.Open(p)
}

// Open opens the tree of a path.
func (s *Store) Open(p *Path) (*Tree, error) {
	s.trees.mu.Lock()
	t, ok := s.trees.byID[p.ID]
	s.trees.mu.Unlock()
	if ok {
		return t, nil
	}
	w := walker{}
	if err := w.entry(int(s.root.Fd()), string(p.Info.Path), 0, 0, 1); err != nil {
		return nil, fmt.Errorf("local store: %w", err)
	}
	w.entries[0].Name = ""
	t = &Tree{s: s, path: p, top: w.entries[0]}
	s.trees.keep(t, 1)
	return t, nil
}

// keep makes room for a tree and n more entries.
func (t *trees) keep(one *Tree, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.byID[one.path.ID]; !ok {
		t.byID[one.path.ID] = one
	}
	t.entries += n
	for id, other := range t.byID { // any: they are walked again
		if t.entries <= maxEntries && len(t.byID) <= maxTrees {
			return
		}
		if other != one {
			delete(t.byID, id)
			t.entries -= 1 + other.size()
		}
	}
}

func (t *Tree) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.entries)
}

// walked gives the entries.
func (t *Tree) walked(ctx context.Context) ([]flox.Entry, []uint32, error) {
	t.mu.Lock()
	entries, parents := t.entries, t.parents
	t.mu.Unlock()
	if entries != nil {
		return entries, parents, nil
	}
	select {
	case t.s.trees.walks <- struct{}{}:
		defer func() { <-t.s.trees.walks }()
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("%s: other local paths are being looked through: %w", t.path.Info.Path, flox.ErrUnreachable)
	}
	t.mu.Lock()
	entries, parents = t.entries, t.parents
	t.mu.Unlock()
	if entries != nil { // somebody else did meanwhile
		return entries, parents, nil
	}
	w := walker{ctx: ctx}
	if err := w.entry(int(t.s.root.Fd()), string(t.path.Info.Path), 0, 0, maxDepth); err != nil {
		return nil, nil, fmt.Errorf("local store: %s (%08x): %w", t.path.Info.Path, digest(t.path.ID), err)
	}
	w.entries[0].Name = ""
	t.mu.Lock()
	t.entries, t.parents = slices.Clip(w.entries), slices.Clip(w.parents)
	t.mu.Unlock()
	t.s.trees.keep(t, len(w.entries))
	return w.entries, w.parents, nil
}

// Entry implements flox.Tree.
func (t *Tree) Entry(ctx context.Context, index uint32) (flox.Entry, error) {
	if index == 0 {
		return t.top, nil
	}
	entries, _, err := t.walked(ctx)
	if err != nil {
		return flox.Entry{}, err
	}
	if uint64(index) >= uint64(len(entries)) {
		return flox.Entry{}, fmt.Errorf("%s has no entry %d: %w", t.path.Info.Path, index, flox.ErrNotFound)
	}
	return entries[index], nil
}

// Child implements flox.Tree.
func (t *Tree) Child(ctx context.Context, dir uint32, name string) (index uint32, e flox.Entry, err error) {
	found := false
	err = t.Children(ctx, dir, 0, func(i uint32, one flox.Entry) bool {
		if one.Name == name {
			index, e, found = i, one, true
		}
		return one.Name < name
	})
	if err == nil && !found {
		err = fmt.Errorf("%s: entry %d has no %q: %w", t.path.Info.Path, dir, name, flox.ErrNotFound)
	}
	return index, e, err
}

// Children implements flox.Tree.
func (t *Tree) Children(ctx context.Context, dir, from uint32, yield func(uint32, flox.Entry) bool) error {
	entries, _, err := t.walked(ctx)
	if err != nil {
		return err
	}
	if uint64(dir) >= uint64(len(entries)) || entries[dir].Kind != flox.Directory {
		return fmt.Errorf("%s: entry %d is no directory: %w", t.path.Info.Path, dir, flox.ErrNotFound)
	}
	end := dir + 1 + entries[dir].Span
	for i := dir + 1; i < end; i += 1 + entries[i].Span {
		if i >= from && !yield(i, entries[i]) {
			break
		}
	}
	return nil
}

// Inside is where an entry lies in its path; "" for the path itself.
func (t *Tree) Inside(ctx context.Context, index uint32) (string, error) {
	if index == 0 {
		return "", nil
	}
	entries, parents, err := t.walked(ctx)
	if err != nil {
		return "", err
	}
	if uint64(index) >= uint64(len(entries)) {
		return "", fmt.Errorf("%s has no entry %d: %w", t.path.Info.Path, index, flox.ErrNotFound)
	}
	var names []string
	for ; index != 0; index = parents[index] {
		names = append(names, entries[index].Name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/"), nil
}

// ReadAt implements flox.Tree. ErrCorrupt: the file is not the one that was found.
func (t *Tree) ReadAt(ctx context.Context, index uint32, p []byte, off int64, _ flox.Reader) (int, error) {
	e, err := t.Entry(ctx, index)
	if err != nil {
		return 0, err
	}
	if e.Kind != flox.Regular || off < 0 {
		return 0, fmt.Errorf("read of %s entry %d at %d, a %s: %w", t.path.Info.Path, index, off, e.Kind, flox.ErrBadInput)
	}
	inside, err := t.Inside(ctx, index)
	if err != nil {
		return 0, err
	}
	f, size, err := t.s.open(t.path.Info.Path, inside)
	if err == nil {
		defer f.Close()
	}
	if errors.Is(err, flox.ErrNotFound) || err == nil && uint64(size) != e.Size { //nolint:gosec // a size is positive
		return 0, fmt.Errorf("%s/%s was changed or removed in the local store: %w", t.path.Info.Path, inside, flox.ErrCorrupt)
	}
	if err != nil {
		return 0, err
	}
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// walker finds the entries of a path in NAR order: a directory before what it
// holds, names sorted by byte.
type walker struct {
	ctx     context.Context //nolint:containedctx // lives as long as one walk
	entries []flox.Entry
	parents []uint32
}

// entry adds what name in the directory dir is, and what lies below. Deep is how
// many directories in each other are looked into.
func (w *walker) entry(dir int, name string, parent uint32, depth, deep int) error {
	if w.ctx != nil && w.ctx.Err() != nil {
		return fmt.Errorf("there was no time to look through it: %w", flox.ErrUnreachable)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return notThere("stat", name, err)
	}
	if uint64(len(w.entries)) >= 1<<32-1 {
		return fmt.Errorf("it has too many files: %w", flox.ErrBadInput)
	}
	at := uint32(len(w.entries)) //nolint:gosec // checked above
	e := flox.Entry{Name: name, Kind: kindOf(&st)}
	w.entries, w.parents = append(w.entries, e), append(w.parents, parent)
	switch e.Kind {
	case flox.Regular:
		w.entries[at].Size, w.entries[at].Executable = uint64(st.Size), st.Mode&0o100 != 0 //nolint:gosec // a size is positive
		return nil
	case flox.Symlink:
		target, err := readlink(dir, name)
		w.entries[at].Target = target
		return err
	case flox.Directory:
		if deep == 0 {
			return nil
		}
		return w.directory(dir, name, at, depth, deep)
	}
	return fmt.Errorf("%s is no file, directory or symlink: %w", name, flox.ErrBadInput)
}

// directory adds what lies in a directory.
func (w *walker) directory(dir int, name string, at uint32, depth, deep int) error {
	if depth >= maxDepth {
		return fmt.Errorf("%s: more than %d directories in each other: %w", name, maxDepth, flox.ErrBadInput)
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return notThere("open", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	list, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(list)
	for _, one := range list {
		next := len(w.entries)
		if err := w.entry(fd, one, at, depth+1, deep-1); err != nil {
			return err
		}
		if w.entries[next].Kind == flox.Directory {
			w.entries[at].Dirs++
		}
	}
	w.entries[at].Span = uint32(len(w.entries)) - at - 1 //nolint:gosec // checked above
	return nil
}

func readlink(dir int, name string) (string, error) {
	b := make([]byte, 4096)
	n, err := unix.Readlinkat(dir, name, b)
	if err != nil {
		return "", notThere("readlink", name, err)
	}
	return string(b[:n]), nil
}

// notThere says that something is gone that was there a moment ago.
func notThere(op, name string, err error) error {
	failed := &os.PathError{Op: op, Path: name, Err: err}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: %w", failed, flox.ErrNotFound)
	}
	return failed
}
