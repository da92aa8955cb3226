package agent

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content/cache"
)

// A program's path is rarely all that the program needs: its other subcommands
// link to libraries that never were mapped, a wrapper names directories of
// modules, an environment is made of symlinks. What its files lead to, in these
// three ways and at any distance, is found out from what is here and completed.

const (
	// maxLinked bounds the files that one store path leads to.
	maxLinked = 32768
	// maxScript is the largest script that is looked through for names, in bytes.
	maxScript = 64 << 10
	// maxHops bounds the symlinks on the way to one file, as in the kernel.
	maxHops = 40
	// maxLinkers bounds the store paths of which is remembered where they lead.
	maxLinkers = 2 * maxRan
)

// linked are the files of other store paths that one leads to.
type linked struct {
	files map[flox.StorePath][]uint32
	bytes map[flox.StorePath]uint64
	whole bool      // nothing on the way was missing
	after uint64    // goals reached when it was found out
	at    time.Time // and when
}

// links gives where the files of p lead, as far as they are here. What was found
// out stays right; there may be more once more is here.
func (c *completer) links(ctx context.Context, p flox.StorePath) *linked {
	c.mu.Lock()
	known, after := c.linked[p], c.reachedGoals
	c.mu.Unlock()
	if known != nil && (known.whole || known.after == after && time.Since(known.at) < lookAgain) {
		return known
	}
	l := &linker{c: c, root: p, found: make(map[flox.StorePath]map[uint32]uint64), trees: make(map[flox.StorePath]*tree)}
	l.all(ctx)
	out := &linked{
		files: make(map[flox.StorePath][]uint32), bytes: make(map[flox.StorePath]uint64),
		whole: !l.lacks && ctx.Err() == nil, after: after, at: time.Now(),
	}
	for sp, files := range l.found {
		for i, size := range files {
			out.files[sp] = append(out.files[sp], i)
			out.bytes[sp] += size
		}
		slices.Sort(out.files[sp])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.linked) >= maxLinkers {
		clear(c.linked)
	}
	c.linked[p] = out
	return out
}

// linksKnown gives what links found out last.
func (c *completer) linksKnown(_ context.Context, p flox.StorePath) *linked {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.linked[p]; l != nil {
		return l
	}
	return &linked{}
}

// linker follows the files of one store path.
type linker struct {
	c     *completer
	root  flox.StorePath
	found map[flox.StorePath]map[uint32]uint64 // sizes by entry
	count int
	trees map[flox.StorePath]*tree // nil = not here
	queue []linkedFile
	lacks bool // something on the way is not here
}

type linkedFile struct {
	t *tree
	i uint32
	e flox.Entry
}

// all follows everything in the root path, and then what that leads to.
func (l *linker) all(ctx context.Context) {
	t := l.tree(ctx, l.root)
	if t == nil {
		return
	}
	err := t.Walk(ctx, 0, func(i uint32, _ string, e flox.Entry) bool {
		l.entry(ctx, t, i, e)
		return ctx.Err() == nil
	})
	l.lacks = l.lacks || err != nil
	for len(l.queue) > 0 && l.count < maxLinked && ctx.Err() == nil {
		f := l.queue[0]
		l.queue = l.queue[1:]
		l.file(ctx, f)
	}
}

// tree opens the tree of a store path if its manifest is here.
func (l *linker) tree(ctx context.Context, p flox.StorePath) *tree {
	if t, ok := l.trees[p]; ok {
		return t
	}
	var t *tree
	if info, ok := l.c.a.facts.get(p.HashPart()); ok && info.Path == p {
		if m, err := l.c.manifestHere(ctx, info); err == nil {
			t = &tree{Manifest: m, path: p, a: l.c.a}
		}
	}
	l.lacks = l.lacks || t == nil
	l.trees[p] = t
	return t
}

// entry follows one entry of a tree that is wanted whole.
func (l *linker) entry(ctx context.Context, t *tree, i uint32, e flox.Entry) {
	switch e.Kind {
	case flox.Symlink:
		if at, err := t.Path(ctx, i); err == nil {
			l.name(ctx, path.Join(l.c.a.cfg.StoreDir.Join(t.path), path.Dir(at)), e.Target)
		}
	case flox.Regular:
		if isCode(e) {
			l.queue = append(l.queue, linkedFile{t, i, e})
		}
	case flox.Directory:
	}
}

// name follows a name relative to dir, through symlinks, to a file or to all in a
// directory. What is no name in the store is nothing to us.
func (l *linker) name(ctx context.Context, dir, name string) {
	for range maxHops {
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		sp, rest, err := l.c.a.cfg.StoreDir.Split(path.Clean(name))
		if err != nil {
			return
		}
		t := l.tree(ctx, sp)
		if t == nil {
			return
		}
		d, err := t.descend(ctx, strings.Trim(rest, "/"))
		if err != nil {
			l.lacks = l.lacks || !errors.Is(err, flox.ErrNotFound)
			return
		}
		if d.target == "" {
			l.reach(ctx, t, d.entry, d.e)
			return
		}
		dir, name = d.from, d.target
	}
}

// reach adds a file, or all in a directory.
func (l *linker) reach(ctx context.Context, t *tree, i uint32, e flox.Entry) {
	if e.Kind != flox.Directory {
		l.add(ctx, t, i, e)
		return
	}
	last := i + e.Span
	err := t.Walk(ctx, i+1, func(k uint32, _ string, e flox.Entry) bool {
		if k > last || l.count >= maxLinked {
			return false
		}
		l.add(ctx, t, k, e)
		return ctx.Err() == nil
	})
	l.lacks = l.lacks || err != nil && !errors.Is(err, flox.ErrNotFound)
}

// add adds one entry of a tree. Those of the root path are wanted anyway.
func (l *linker) add(ctx context.Context, t *tree, i uint32, e flox.Entry) {
	files := l.found[t.path]
	if _, known := files[i]; known || t.path == l.root || e.Kind == flox.Directory || l.count >= maxLinked {
		return
	}
	if files == nil {
		files = make(map[uint32]uint64)
		l.found[t.path] = files
	}
	files[i] = e.Size
	l.count++
	l.entry(ctx, t, i, e)
}

// file follows what one file names.
func (l *linker) file(ctx context.Context, f linkedFile) {
	r := hereReader{ctx, f.t, f.i, f.e}
	var magic [4]byte
	n, err := r.ReadAt(magic[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		l.lacks = true
		return
	}
	switch {
	case n == 4 && string(magic[:]) == elf.ELFMAG:
		err = l.elf(ctx, f, r)
	case n >= 2 && string(magic[:2]) == "#!" && f.e.Size <= maxScript:
		err = l.script(ctx, r, int(f.e.Size)) //nolint:gosec // at most maxScript
	}
	l.lacks = l.lacks || errors.Is(err, flox.ErrUnreachable) // else it is a broken file
}

// elf follows the interpreter and the libraries of a program or library.
func (l *linker) elf(ctx context.Context, f linkedFile, r io.ReaderAt) error {
	at, err := f.t.Path(ctx, f.i)
	if err != nil {
		return err
	}
	file, err := elf.NewFile(r)
	if err != nil {
		return err
	}
	dir := path.Join(l.c.a.cfg.StoreDir.Join(f.t.path), path.Dir(at))
	for _, prog := range file.Progs {
		if prog.Type == elf.PT_INTERP && prog.Filesz < 4096 {
			b := make([]byte, prog.Filesz)
			if _, err := prog.ReadAt(b, 0); err != nil {
				return err
			}
			l.name(ctx, dir, string(bytes.TrimRight(b, "\x00")))
		}
	}
	needed, err := file.DynString(elf.DT_NEEDED)
	if err != nil {
		return err
	}
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		lists, err := file.DynString(tag)
		if err != nil {
			return err
		}
		for _, list := range lists {
			dirs = append(dirs, strings.Split(list, ":")...)
		}
	}
	for _, lib := range needed {
		for _, d := range dirs {
			d = strings.NewReplacer("$ORIGIN", dir, "${ORIGIN}", dir).Replace(d)
			l.name(ctx, d, lib)
		}
	}
	return nil
}

// script follows all names in the store that a script has, its interpreter first.
func (l *linker) script(ctx context.Context, r io.ReaderAt, size int) error {
	text := make([]byte, size)
	if _, err := r.ReadAt(text, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	prefix := []byte(string(l.c.a.cfg.StoreDir) + "/")
	for len(text) > 0 {
		at := bytes.Index(text, prefix)
		if at < 0 {
			return nil
		}
		text = text[at:]
		end := bytes.IndexFunc(text, func(r rune) bool { return strings.ContainsRune(" \t\n\r\"'`:;,()[]{}<>|&$*?!=\\", r) })
		if end < 0 {
			end = len(text)
		}
		name := string(text[:end])
		text = text[end:]
		if _, rest, err := l.c.a.cfg.StoreDir.Split(name); err == nil && strings.Trim(rest, "/") != "" {
			l.name(ctx, string(l.c.a.cfg.StoreDir), name)
		}
	}
	return nil
}

// hereReader reads a file as far as it is on this machine's disk.
type hereReader struct {
	ctx context.Context //nolint:containedctx // lives as long as one call of linker.file
	t   *tree
	i   uint32
	e   flox.Entry
}

// ReadAt implements io.ReaderAt.
func (r hereReader) ReadAt(p []byte, off int64) (int, error) {
	size := int64(r.e.Size) //nolint:gosec // sizes fit
	if off < 0 || off >= size {
		return 0, io.EOF
	}
	want := min(int64(len(p)), size-off)
	n := int(want)
	if r.e.Size <= uint64(r.t.Params().InlineLimit) {
		data, ok, err := r.t.Inline(r.ctx, r.i)
		if err != nil || !ok {
			return 0, errors.Join(err, flox.ErrUnreachable)
		}
		n = copy(p, data[off:])
	} else if _, st := r.t.a.cache.ReadAt(cache.File{ID: r.e.File, Size: size}, p[:n], off, 0); st != cache.Hit {
		return 0, fmt.Errorf("%s of %s is not here: %w", r.e.Name, r.t.path, flox.ErrUnreachable)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
