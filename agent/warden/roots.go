package warden

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/floxctl/flox"
)

const (
	// maxRoots bounds the roots that are told, maxRootDirs how deep profiles lie.
	maxRoots    = 100_000
	maxRootDirs = 16
	// rootsAtOnce is how many names of a directory are read at once.
	rootsAtOnce = 1024
	// maxRootsPart is about how many bytes of links one part of an answer holds.
	maxRootsPart = 32 << 10
	// maxEnviron is how much of a process's environment is looked at.
	maxEnviron = 1 << 20
)

// Root is a garbage collector root of this machine, as Nix finds them (Nix 2.8
// src/libstore/gc.cc findRootsNoTemp, findRuntimeRoots).
type Root struct {
	// Link is the symlink, or the file below /proc that names the path.
	Link string
	// Name is the base name of the store path.
	Name string
	// Unit is what the root was read from at once, as Roots names what it cannot
	// read: a directory, a link of one that leads elsewhere, a process. "" = an
	// older parent, or a file of the kernel's.
	Unit string `json:",omitempty"`
}

// rootFinder looks for roots; one search at a time.
type rootFinder struct {
	storeDir, stateDir, proc string
	reads                    reads
	memory                   *reads // of processes

	mu   sync.Mutex // held by a search
	last rootUnits  // of the last search
	rootSearch
}

// rootUnits are roots by what they are read from at once: a directory, a link of
// one that leads elsewhere, a process. What cannot be read keeps what it had.
type rootUnits map[string][]Root

// rootSearch is the search under way.
type rootSearch struct {
	found  map[Root]string // their units
	units  rootUnits
	unread []string
	round  round
}

// find gives all profiles, links below gcroots, and what processes run, have open
// or mapped, stand in, or name in their environment. It asks nothing of the mount.
// What lies in file systems that do not answer is in unread, and found has what
// was there when they did.
func (f *rootFinder) find() (found map[Root]string, unread []string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rootSearch = rootSearch{found: make(map[Root]string), units: make(rootUnits)}
	defer func() { f.rootSearch = rootSearch{} }()
	for _, name := range []string{"gcroots", "profiles"} {
		f.links(filepath.Join(f.stateDir, name), maxRootDirs)
	}
	for _, name := range []string{"modprobe", "fbsplash", "poweroff_cmd"} {
		f.note("", f.text(filepath.Join(f.proc, "sys/kernel", name)))
	}
	procs, err := os.ReadDir(f.proc)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range procs {
		if _, err := strconv.ParseUint(p.Name(), 10, 32); err == nil {
			f.process(filepath.Join(f.proc, p.Name()))
		}
		if len(f.found) > maxRoots {
			return nil, nil, fmt.Errorf("more than %d roots: %w", maxRoots, flox.ErrFull)
		}
	}
	f.last = f.units
	return f.found, f.unread, nil
}

// note adds roots of a unit.
func (f *rootFinder) note(unit string, roots []Root) {
	for _, r := range roots {
		if len(f.found) <= maxRoots {
			f.found[r] = unit
		}
	}
}

// has adds what a unit has.
func (f *rootFinder) has(unit string, roots []Root) {
	f.note(unit, roots)
	if len(roots) > 0 {
		f.units[unit] = append(f.units[unit], roots...)
	}
}

// missed adds what a unit and those below it had, as it cannot be read.
func (f *rootFinder) missed(unit string) {
	f.unread = append(f.unread, unit)
	for name, roots := range f.last {
		if name == unit || strings.HasPrefix(name, unit+"/") {
			f.note(name, roots)
			f.units[name] = roots
		}
	}
}

// root gives the root of a link if it points below the store.
func (f *rootFinder) root(link, target string) (r []Root, inside bool) {
	rest, ok := strings.CutPrefix(target, f.storeDir+"/")
	if !ok {
		return nil, false
	}
	name, _, _ := strings.Cut(rest, "/")
	name = strings.TrimSuffix(name, " (deleted)")
	if _, err := flox.ParseStorePath(name); err == nil && len(link) < maxLink {
		r = append(r, Root{Link: link, Name: name})
	}
	return r, true
}

// listing is a part of a directory.
type listing struct {
	roots   []Root
	dirs    []string
	further [][2]string // links, and where those point that point elsewhere
	end     bool
	failed  bool
}

// links adds the symlinks of a directory and those below it. What is gone
// meanwhile is no root.
func (f *rootFinder) links(dir string, depth int) {
	var d *os.File
	owner := rootOwner(dir, dir)
	for len(f.found) <= maxRoots {
		part, ok := patiently(&f.reads, dir, owner, func() (l listing) {
			if d == nil {
				var err error
				if d, err = os.Open(dir); err != nil {
					return listing{end: true, failed: !noLink(err)}
				}
			}
			entries, err := d.ReadDir(rootsAtOnce) // anybody may fill those of users
			for _, e := range entries {
				f.entry(&l, filepath.Join(dir, e.Name()), e)
			}
			if l.end = err != nil; l.end {
				d.Close()
			}
			return l
		})
		if !ok || part.failed {
			f.missed(dir)
			return // whatever comes of d is the reader's that was left behind
		}
		f.has(dir, part.roots)
		for _, l := range part.further {
			f.second(l[0], l[1])
		}
		for _, below := range part.dirs {
			if depth > 0 {
				f.links(below, depth-1)
			}
		}
		if part.end {
			return
		}
	}
	d.Close()
}

func (f *rootFinder) entry(l *listing, name string, e iofs.DirEntry) {
	switch {
	case e.IsDir():
		l.dirs = append(l.dirs, name)
	case e.Type().IsRegular(): // named like a path, as Nix has it
		r, _ := f.root(name, filepath.Join(f.storeDir, e.Name()))
		l.roots = append(l.roots, r...)
	case e.Type()&iofs.ModeSymlink != 0:
		target, err := os.Readlink(name)
		if err != nil {
			return
		}
		r, inside := f.root(name, target)
		l.roots = append(l.roots, r...)
		if inside {
			return
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(name), target)
		}
		if target = filepath.Clean(target); target != f.storeDir { // would be asked of the mount
			l.further = append(l.further, [2]string{name, target})
		}
	}
}

// second adds what the link points to that a link of a directory points to. It
// may lie anywhere.
func (f *rootFinder) second(link, target string) {
	second, ok := patiently(&f.reads, link, rootOwner(link, target), func() linkRead { return readLink(target) })
	if !ok || second.failed {
		f.missed(link)
		return
	}
	roots, _ := f.root(target, second.target)
	f.has(link, roots)
}

// linkRead is what a link points to, "" = there is none; failed: that is not known.
type linkRead struct {
	target string
	failed bool
}

func readLink(name string) linkRead {
	target, err := os.Readlink(name)
	return linkRead{target, err != nil && !noLink(err)}
}

// noLink reports whether an error says that there is no such link or directory,
// and not only that its file system cannot tell.
func noLink(err error) bool {
	for _, is := range []error{syscall.ENOENT, syscall.ENOTDIR, syscall.EINVAL, syscall.ELOOP, syscall.ENAMETOOLONG} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

// rootOwner is whose fault it is when what a link points to cannot be read: the
// user's whose link it is, or of who is in the directory of the target.
func rootOwner(link, target string) string {
	if _, user, ok := strings.Cut(link, "/per-user/"); ok {
		user, _, _ = strings.Cut(user, "/")
		return "per-user/" + user
	}
	return filepath.Dir(target)
}

// process adds what one process uses or names. The links are the kernel's and
// always answer. What it has mapped waits for the lock of its memory, which it may
// hold while it waits for bytes, ours too; its environment lies in its memory, which
// may be anybody's file.
func (f *rootFinder) process(dir string) {
	for _, name := range []string{"exe", "cwd"} {
		f.note(dir, f.procLink(filepath.Join(dir, name)))
	}
	fds := filepath.Join(dir, "fd")
	if open, err := os.Open(fds); err == nil {
		names, _ := open.Readdirnames(-1) // as many as the process may have open
		open.Close()
		for _, name := range names {
			f.note(dir, f.procLink(filepath.Join(fds, name)))
		}
	}
	roots, ok := inRound(&f.round, f.memory, dir, processOwner(dir), func() []Root {
		return append(f.maps(filepath.Join(dir, "maps")), f.text(filepath.Join(dir, "environ"))...)
	})
	if !ok {
		f.missed(dir)
		return
	}
	f.has(dir, roots)
}

// processOwner is whose fault it is when a process's memory cannot be looked at.
func processOwner(dir string) string {
	if info, err := os.Lstat(dir); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			return fmt.Sprintf("user %d", st.Uid)
		}
	}
	return dir
}

// procLink gives the root of a link of /proc: the kernel writes the name, nobody is asked.
func (f *rootFinder) procLink(link string) []Root {
	target, err := os.Readlink(link)
	if err != nil {
		return nil
	}
	r, _ := f.root(link, target)
	return r
}

// maps gives the files of a /proc/PID/maps.
func (f *rootFinder) maps(name string) (roots []Root) {
	file, err := os.Open(name)
	if err != nil {
		return nil
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if at := strings.IndexByte(lines.Text(), '/'); at >= 0 {
			if r, _ := f.root(name, lines.Text()[at:]); !endsWith(roots, r) {
				roots = append(roots, r...)
			}
		}
	}
	return roots
}

// endsWith reports whether the last of roots is the one of r: a file is mapped in
// several pieces.
func endsWith(roots, r []Root) bool {
	return len(r) == 0 || len(roots) > 0 && roots[len(roots)-1] == r[0]
}

// text gives every store path that a file names.
func (f *rootFinder) text(name string) (roots []Root) {
	file, err := os.Open(name)
	if err != nil {
		return nil
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxEnviron))
	if err != nil && len(b) == 0 {
		return nil
	}
	prefix := []byte(f.storeDir + "/")
	for {
		at := bytes.Index(b, prefix)
		if at < 0 {
			return roots
		}
		b = b[at+len(prefix):]
		end := bytes.IndexFunc(b, func(r rune) bool { return !nameRune(r) })
		if end < 0 {
			end = len(b)
		}
		r, _ := f.root(name, f.storeDir+"/"+string(b[:end]))
		roots = append(roots, r...)
	}
}

// nameRune reports whether a store path's name may hold r.
func nameRune(r rune) bool {
	return r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("+-._?=", r)
}

// sendRoots answers in as many parts as it takes.
func (k *clerk) sendRoots(send func(answer), id uint64) error {
	found, unread, err := k.roots.find()
	if err != nil {
		return err
	}
	var part []Root
	size := 0
	for r, unit := range found {
		r.Unit = unit
		part = append(part, r)
		if size += len(r.Link) + len(r.Name) + len(unit); size > maxRootsPart {
			send(answer{ID: id, Roots: part, More: true})
			part, size = nil, 0
		}
	}
	send(answer{ID: id, Roots: part, More: true})
	for rest := unread[:min(len(unread), maxRoots)]; ; {
		some := rest[:min(len(rest), maxRootsPart/maxLink)]
		rest = rest[len(some):]
		if send(answer{ID: id, Unread: some, More: len(rest) > 0}); len(rest) == 0 {
			return nil
		}
	}
}
