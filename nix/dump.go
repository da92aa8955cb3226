package nix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/floxctl/flox"
)

// dumpBuffer is how much of a file is read at once.
const dumpBuffer = 256 << 10

// DumpPath writes the NAR of the file, symlink or directory at fsPath. As in
// Nix a file is executable if its owner may execute it; owners, times and other
// permissions are not kept. It never follows a symlink below fsPath. Sockets,
// devices and pipes, names and depths a NAR cannot hold, and files that change
// size meanwhile are ErrBadInput.
func DumpPath(ctx context.Context, w io.Writer, fsPath string) error {
	d := &dumper{fsPath: filepath.Clean(fsPath), nw: NewNarWriter(w)}
	defer d.close()
	parent, err := os.OpenRoot(filepath.Dir(d.fsPath))
	if err != nil {
		return fmt.Errorf("dump %s: %w", fsPath, err)
	}
	defer closeRoot(parent)
	if err := d.run(ctx, parent, filepath.Base(d.fsPath)); err != nil {
		return err
	}
	return d.nw.Close()
}

type dumper struct {
	fsPath string
	nw     *NarWriter
	buf    []byte
	open   []dumpDir // from the outermost in
}

// dumpDir is a directory being dumped.
type dumpDir struct {
	root *os.Root
	path string   // in the NAR
	rest []string // names still to come, sorted
}

// run dumps name in parent and everything below, without recursion.
func (d *dumper) run(ctx context.Context, parent *os.Root, name string) error {
	if err := d.node(ctx, parent, name, ""); err != nil {
		return err
	}
	for len(d.open) > 0 {
		dir := &d.open[len(d.open)-1]
		if len(dir.rest) == 0 {
			err := dir.root.Close()
			d.open = d.open[:len(d.open)-1]
			if err != nil {
				return d.wrap(dir.path, err)
			}
			continue
		}
		name := dir.rest[0]
		dir.rest = dir.rest[1:]
		path := name
		if dir.path != "" {
			path = dir.path + "/" + name
		}
		if err := d.node(ctx, dir.root, name, path); err != nil {
			return err
		}
	}
	return nil
}

// node writes one entry; a directory is left open for run.
func (d *dumper) node(ctx context.Context, dir *os.Root, name, path string) error {
	if err := ctx.Err(); err != nil {
		return d.wrap(path, err)
	}
	info, err := dir.Lstat(name)
	if err != nil {
		return d.wrap(path, err)
	}
	switch info.Mode().Type() {
	case 0:
		err = d.file(ctx, dir, name, path, info)
	case fs.ModeDir:
		err = d.directory(dir, name, path, info)
	case fs.ModeSymlink:
		var target string
		if target, err = dir.Readlink(name); err == nil {
			err = d.nw.Entry(NarEntry{Path: path, Kind: flox.Symlink, Target: target})
		}
	default:
		err = fmt.Errorf("%s: a NAR holds only regular files, directories and symlinks: %w", info.Mode().Type(), flox.ErrBadInput)
	}
	return d.wrap(path, err)
}

func (d *dumper) directory(dir *os.Root, name, path string, info fs.FileInfo) error {
	if err := d.nw.Entry(NarEntry{Path: path, Kind: flox.Directory}); err != nil {
		return err
	}
	sub, err := dir.OpenRoot(name)
	if err != nil {
		return err
	}
	names, err := readNames(sub, info)
	if err != nil {
		return errors.Join(err, sub.Close())
	}
	d.open = append(d.open, dumpDir{root: sub, path: path, rest: names})
	return nil
}

// readNames lists dir, sorted. want is what the directory was when looked at: a
// symlink put in its place since is refused.
func readNames(dir *os.Root, want fs.FileInfo) ([]string, error) {
	f, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := same(f, want); err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func (d *dumper) file(ctx context.Context, dir *os.Root, name, path string, info fs.FileInfo) error {
	// O_NONBLOCK: a pipe put in the file's place must not hang us.
	f, err := dir.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := same(f, info); err != nil {
		return err
	}
	size := uint64(info.Size())
	err = d.nw.Entry(NarEntry{Path: path, Kind: flox.Regular, Executable: info.Mode()&0o100 != 0, Size: size})
	if err != nil {
		return err
	}
	if d.buf == nil {
		d.buf = make([]byte, dumpBuffer)
	}
	for left := size; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		got, err := f.Read(d.buf[:min(left, dumpBuffer)])
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%d bytes shorter than a moment ago: %w", left, flox.ErrBadInput)
		}
		if err != nil {
			return err
		}
		if _, err := d.nw.Write(d.buf[:got]); err != nil {
			return err
		}
		left -= uint64(got)
	}
	return nil
}

// same refuses an open file that is not the one looked at before.
func same(f *os.File, want fs.FileInfo) error {
	got, err := f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(got, want) || got.Mode().Type() != want.Mode().Type() {
		return fmt.Errorf("it was replaced while being read: %w", flox.ErrBadInput)
	}
	return nil
}

func (d *dumper) wrap(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("dump %s: %w", filepath.Join(d.fsPath, path), err)
}

func (d *dumper) close() {
	for _, dir := range d.open {
		closeRoot(dir.root)
	}
}
