// Package probe does to a file tree what programs do, with as little of its own
// in between as possible, so that two file systems with the same tree can be
// compared. It must not know what they are.
package probe

import (
	"bytes"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// SmallFile is the most bytes of a file that is read whole and at once.
const SmallFile = 32 << 10

// Tree is what there is below some top, as names that system calls take: absolute,
// with a zero byte at the end.
type Tree struct {
	All   [][]byte // everything
	Files [][]byte // regular files
	Small [][]byte // those of SmallFile bytes at most
	Large [][]byte // the others
	Links [][]byte
	Dirs  [][]byte
	// Missing are names below the paths that are not there.
	Missing [][]byte
	Bytes   int64 // of the files

	buf []byte
}

// Walk lists paths, which may be files, below top.
func Walk(top string, paths ...string) (*Tree, error) {
	t := &Tree{buf: make([]byte, 1<<20)}
	for _, p := range paths {
		err := filepath.WalkDir(filepath.Join(top, p), func(path string, d iofs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name := append([]byte(path), 0)
			t.All = append(t.All, name)
			switch {
			case d.IsDir():
				t.Dirs = append(t.Dirs, name)
				t.Missing = append(t.Missing, append([]byte(path+"/not-here"), 0))
			case d.Type() == iofs.ModeSymlink:
				t.Links = append(t.Links, name)
			case d.Type().IsRegular():
				info, err := d.Info()
				if err != nil {
					return err
				}
				t.Bytes += info.Size()
				t.Files = append(t.Files, name)
				if info.Size() <= SmallFile {
					t.Small = append(t.Small, name)
				} else {
					t.Large = append(t.Large, name)
				}
			}
			if path != filepath.Join(top, p) {
				t.Missing = append(t.Missing, append([]byte(path+".not-here"), 0))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// At is the same tree below another top.
func (t *Tree) At(from, to string) *Tree {
	move := func(names [][]byte) (moved [][]byte) {
		for _, n := range names {
			moved = append(moved, append([]byte(to), bytes.TrimPrefix(n, []byte(from))...))
		}
		return moved
	}
	return &Tree{
		All: move(t.All), Files: move(t.Files), Small: move(t.Small), Large: move(t.Large), Links: move(t.Links),
		Dirs: move(t.Dirs), Missing: move(t.Missing), Bytes: t.Bytes, buf: make([]byte, 1<<20),
	}
}

// Thin keeps about n names, spread evenly.
func Thin(names [][]byte, n int) [][]byte {
	if len(names) <= n {
		return names
	}
	var kept [][]byte
	for i := range n {
		kept = append(kept, names[i*len(names)/n])
	}
	return kept
}

// Lstat asks for the attributes of names.
func (t *Tree) Lstat(names [][]byte) error {
	var st unix.Stat_t
	for _, name := range names {
		if errno := lstat(name, &st); errno != 0 {
			return failed("lstat", name, errno)
		}
	}
	return nil
}

// NotThere asks for names that must not be there.
func (t *Tree) NotThere(names [][]byte) error {
	var st unix.Stat_t
	for _, name := range names {
		if errno := lstat(name, &st); errno != unix.ENOENT {
			return failed("lstat of what is not there", name, errno)
		}
	}
	return nil
}

// Readlink reads links.
func (t *Tree) Readlink(names [][]byte) error {
	for _, name := range names {
		if errno := readlink(name, t.buf); errno != 0 {
			return failed("readlink", name, errno)
		}
	}
	return nil
}

// ReadDir lists directories to their ends.
func (t *Tree) ReadDir(names [][]byte) error {
	for _, name := range names {
		fd, errno := open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
		if errno != 0 {
			return failed("open", name, errno)
		}
		for n := 1; n > 0; {
			var err error
			if n, err = unix.Getdents(fd, t.buf[:32<<10]); err != nil {
				_ = unix.Close(fd)
				return fmt.Errorf("list %s: %w", name, err)
			}
		}
		_ = unix.Close(fd)
	}
	return nil
}

// Read opens, reads and closes files, a megabyte at a time.
func (t *Tree) Read(names [][]byte) error {
	for _, name := range names {
		fd, errno := open(name, unix.O_RDONLY|unix.O_CLOEXEC)
		if errno != 0 {
			return failed("open", name, errno)
		}
		for n := len(t.buf); n == len(t.buf); {
			var err error
			if n, err = unix.Read(fd, t.buf); err != nil {
				_ = unix.Close(fd)
				return fmt.Errorf("read %s: %w", name, err)
			}
		}
		_ = unix.Close(fd)
	}
	return nil
}

// Map maps files and touches each page.
func (t *Tree) Map(names [][]byte) (sum byte, err error) {
	for _, name := range names {
		f, err := os.Open(strings.TrimRight(string(name), "\x00"))
		if err != nil {
			return 0, err
		}
		info, err := f.Stat()
		if err == nil && info.Size() > 0 {
			var m []byte
			if m, err = unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE); err == nil {
				for at := 0; at < len(m); at += os.Getpagesize() {
					sum += m[at]
				}
				err = unix.Munmap(m)
			}
		}
		_ = f.Close()
		if err != nil {
			return 0, fmt.Errorf("map %s: %w", name, err)
		}
	}
	return sum, nil
}

// BlocksRead is how many blocks this thread has had to wait for from a disk.
func BlocksRead() int64 {
	var usage unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &usage) != nil {
		return 0
	}
	return usage.Inblock
}

func failed(what string, name []byte, errno unix.Errno) error {
	if errno == 0 {
		return fmt.Errorf("%s: %s: no error", what, name)
	}
	return fmt.Errorf("%s: %s: %w", what, bytes.TrimRight(name, "\x00"), errno)
}
