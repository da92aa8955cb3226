package nix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// RestorePath unpacks a NAR to dest, which must not exist while its parent
// directory must. It makes what Nix would have in its store: modes 0444 and
// 0555, times 1. Nothing outside dest is touched whatever the NAR says, and on
// an error what was made is removed again. It takes not a byte behind the
// NAR's end from r and does not sync to disk.
func RestorePath(ctx context.Context, r io.Reader, dest string) (err error) {
	dest = filepath.Clean(dest)
	parent, err := os.OpenRoot(filepath.Dir(dest))
	if err != nil {
		return fmt.Errorf("unpack to %s: %w", dest, err)
	}
	defer closeRoot(parent)
	base := filepath.Base(dest)
	if _, err := parent.Lstat(base); err == nil {
		return fmt.Errorf("unpack to %s: it exists already, want a new path: %w", dest, flox.ErrBadInput)
	}
	u := &unpacker{dest: dest, base: base}
	defer u.close()
	if err := u.enter(parent, "", ""); err != nil {
		return fmt.Errorf("unpack to %s: %w", dest, err)
	}
	err = u.run(ctx, NewNarReader(r))
	if err != nil && u.made {
		u.close()
		return errors.Join(err, removeTree(parent, base))
	}
	return err
}

type unpacker struct {
	dest, base string
	made       bool // dest is ours
	dirs       []unpackDir
}

// unpackDir is an open directory; the first is dest's parent. Everything is
// made relative to its descriptor and with O_EXCL, so neither a symlink of the
// NAR nor one that somebody else puts there is ever followed.
type unpackDir struct {
	root *os.Root
	file *os.File // the same directory, for calls os.Root lacks
	path string
}

func (u *unpacker) run(ctx context.Context, nr *NarReader) error {
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("unpack to %s: %w", u.dest, err)
		}
		e, err := nr.Next()
		if errors.Is(err, io.EOF) {
			return u.leave(1)
		}
		if err != nil {
			return err
		}
		if err := u.leave(1 + e.Depth()); err != nil {
			return err
		}
		if err := u.entry(ctx, nr, &e); err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Join(u.dest, e.Path), err)
		}
	}
}

func (u *unpacker) entry(ctx context.Context, nr *NarReader, e *NarEntry) error {
	dir := &u.dirs[len(u.dirs)-1]
	name := e.Path[strings.LastIndexByte(e.Path, '/')+1:]
	if e.Path == "" {
		name = u.base
	}
	switch e.Kind {
	case flox.Directory:
		if err := dir.root.Mkdir(name, 0o700); err != nil {
			return err
		}
		u.made = true
		return u.enter(dir.root, name, e.Path)
	case flox.Symlink:
		if err := dir.root.Symlink(e.Target, name); err != nil {
			return err
		}
		u.made = true
		ts := []unix.Timespec{{Sec: 1}, {Sec: 1}}
		return unix.UtimesNanoAt(int(dir.file.Fd()), name, ts, unix.AT_SYMLINK_NOFOLLOW)
	}
	f, err := dir.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	u.made = true
	mode := fs.FileMode(0o444)
	if e.Executable {
		mode = 0o555
	}
	if err := unpackFile(ctx, nr, f, mode); err != nil {
		return errors.Join(err, f.Close())
	}
	return f.Close()
}

func unpackFile(ctx context.Context, nr *NarReader, f *os.File, mode fs.FileMode) error {
	for nr.left > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := nr.writeSome(f); err != nil {
			return err
		}
	}
	return seal(f, mode)
}

// seal gives a finished file or directory its mode and times.
func seal(f *os.File, mode fs.FileMode) error {
	if err := f.Chmod(mode); err != nil {
		return err
	}
	return unix.Futimes(int(f.Fd()), []unix.Timeval{{Sec: 1}, {Sec: 1}})
}

// enter opens the directory name in root and makes it the innermost; with no
// name, root itself.
func (u *unpacker) enter(root *os.Root, name, path string) (err error) {
	sub := root
	if name == "" {
		name = "."
	}
	if sub, err = root.OpenRoot(name); err != nil {
		return err
	}
	file, err := sub.Open(".")
	if err != nil {
		return errors.Join(err, sub.Close())
	}
	u.dirs = append(u.dirs, unpackDir{root: sub, file: file, path: path})
	return nil
}

// leave seals the innermost directories until keep are open.
func (u *unpacker) leave(keep int) error {
	for len(u.dirs) > keep {
		dir := u.dirs[len(u.dirs)-1]
		u.dirs = u.dirs[:len(u.dirs)-1]
		err := seal(dir.file, 0o555)
		if err = errors.Join(err, dir.file.Close(), dir.root.Close()); err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Join(u.dest, dir.path), err)
		}
	}
	return nil
}

func (u *unpacker) close() {
	for _, dir := range u.dirs {
		dir.file.Close()
		closeRoot(dir.root)
	}
	u.dirs = nil
}

// removeTree removes name, also where a sealed directory would refuse its owner.
func removeTree(dir *os.Root, name string) error {
	if err := dir.RemoveAll(name); err == nil {
		return nil
	}
	// Root.FS would refuse names that are not UTF-8.
	err := filepath.WalkDir(filepath.Join(dir.Name(), name), func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir.Name(), p)
		if err != nil {
			return err
		}
		return dir.Chmod(rel, 0o700)
	})
	return errors.Join(err, dir.RemoveAll(name))
}

// closeRoot closes a directory nobody needs any more.
func closeRoot(r *os.Root) { _ = r.Close() }
