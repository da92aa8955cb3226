package fuse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// wideTree is a store path of so many files in directories of wideDir, none of
// which takes memory: what a server holds after somebody walked through it is
// what it keeps of inodes.
type wideTree int

const wideDir = 1000

func (w wideTree) dirs() uint32 { return (uint32(w) + wideDir - 1) / wideDir }

// files is how many files directory d, from 0, has.
func (w wideTree) files(d uint32) uint32 { return min(wideDir, uint32(w)-d*wideDir) }

func (m *memStore) addMade(name string, tree flox.Tree) {
	id := flox.CID(sha256.Sum256([]byte(name)))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[name], m.made[id] = id, tree
}

// Entry is flox.Tree: 0 the root, then each directory followed by its files.
func (w wideTree) Entry(_ context.Context, i uint32) (flox.Entry, error) {
	d, f := (i-1)/(wideDir+1), (i-1)%(wideDir+1)
	switch {
	case i == 0:
		return flox.Entry{Kind: flox.Directory, Dirs: w.dirs(), Span: uint32(w) + w.dirs()}, nil
	case i > uint32(w)+w.dirs():
		return flox.Entry{}, flox.ErrNotFound
	case f == 0:
		return flox.Entry{Name: fmt.Sprintf("d%05d", d), Kind: flox.Directory, Span: w.files(d)}, nil
	}
	return flox.Entry{Name: fmt.Sprintf("f%03d", f-1), Kind: flox.Regular, Size: uint64(f)}, nil
}

// Child is flox.Tree.
func (w wideTree) Child(ctx context.Context, dir uint32, name string) (uint32, flox.Entry, error) {
	k, err := strconv.Atoi(name[min(1, len(name)):])
	if err == nil {
		i := dir + 1 + uint32(k)
		if dir == 0 {
			i = 1 + uint32(k)*(wideDir+1)
		}
		if e, err := w.Entry(ctx, i); err == nil && e.Name == name {
			return i, e, nil
		}
	}
	return 0, flox.Entry{}, flox.ErrNotFound
}

// Children is flox.Tree.
func (w wideTree) Children(ctx context.Context, dir, from uint32, yield func(uint32, flox.Entry) bool) error {
	e, err := w.Entry(ctx, dir)
	if err != nil {
		return err
	}
	step := uint32(1)
	if dir == 0 {
		step = wideDir + 1
	}
	i := dir + 1
	if from > i {
		i += (from - i + step - 1) / step * step
	}
	for ; i <= dir+e.Span; i += step {
		c, err := w.Entry(ctx, i)
		if err != nil {
			return err
		}
		if !yield(i, c) {
			return nil
		}
	}
	return nil
}

// ReadAt is flox.Tree.
func (wideTree) ReadAt(_ context.Context, _ uint32, p []byte, _ int64, _ flox.Reader) (int, error) {
	return len(p), nil
}

// walk looks at everything below a directory, as find(1) with a test of size does.
func (o *op) walk(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for buf := make([]byte, 32<<10); ; {
		n, err := unix.Getdents(fd, buf)
		if n <= 0 || err != nil {
			return err
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return err
			}
			o.Count++
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				if err := o.walk(path + "/" + name); err != nil {
					return err
				}
			}
		}
	}
}

const widePath = "6c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-wide"

// wideFiles is how many files the tests of memory walk through: a million in
// `make soak`.
func wideFiles() int {
	switch {
	case testing.Short():
		return 20_000
	case os.Getenv("FLOX_SOAK") != "":
		return 1_000_000
	}
	return 100_000
}

// An inode in the kernel's cache costs the serving process nothing worth counting.
func TestCachedInodesCostNoMemory(t *testing.T) {
	const most = 64 // bytes an inode
	m, n := newMount(t, serveOptions{}), wideFiles()
	m.ask(t, command{Cmd: "wide", Arg: widePath, N: n})
	m.touch(t, op{Do: "readdir", Path: toolsPath + "/share"}, op{Do: "stat", Path: widePath})
	before, asked := m.ask(t, command{Cmd: "heap"}), m.total(t)
	walk := op{Do: "walk", Path: widePath}
	began := time.Now()
	got := m.begin(t, walk).wait(t, 5*time.Minute)[0]
	if want := n + int(wideTree(n).dirs()); got.Errno != "" || got.Count != want {
		t.Fatalf("%d entries, want %d: %s", got.Count, want, got.Errno)
	}
	cold, after := m.total(t)-asked, m.ask(t, command{Cmd: "heap"})
	t.Logf("%d inodes in %s, %d requests; heap %d to %d bytes, %.2f an inode; the most it had %d to %d KiB",
		got.Count, time.Since(began).Round(time.Millisecond), cold, before.Live, after.Live,
		float64(after.Live-before.Live)/float64(got.Count), before.Heap, after.Heap)
	if grew := after.Live - before.Live; grew > most*got.Count {
		t.Errorf("%d bytes of heap for %d inodes: %d each, want at most %d", grew, got.Count, grew/got.Count, most)
	}
	// The kernel has them indeed: nearly nothing is asked for again. (Not zero:
	// this machine may be short of memory.)
	asked = m.total(t)
	if again := m.begin(t, walk).wait(t, 5*time.Minute)[0]; again.Count != got.Count || again.Errno != "" {
		t.Errorf("the second walk: %d entries, %s", again.Count, again.Errno)
	}
	if warm := m.total(t) - asked; warm > uint64(n)/10 {
		t.Errorf("%d requests in the second walk of %d inodes: they were not cached, so this shows nothing", warm, n)
	}
}

// The kernel drops all it can while readers walk and read: no reader notices, and
// the storm of FORGETs takes no memory.
func TestForgetStorms(t *testing.T) {
	m, n := newMount(t, serveOptions{}), wideFiles()
	m.ask(t, command{Cmd: "wide", Arg: widePath, N: n})
	walk := op{Do: "walk", Path: widePath}
	m.begin(t, walk).wait(t, 5*time.Minute)
	before := m.ask(t, command{Cmd: "heap"})
	var readers []*toucher
	for range 2 {
		readers = append(readers, m.begin(t, repeat(walk, 2)...))
	}
	readers = append(readers, m.begin(t, repeat(op{Do: "read", Path: toolsPath + "/etc/conf"}, 5000)...),
		m.begin(t, repeat(op{Do: "exec", Path: toolsPath + "/bin/prog"}, 10)...))
	for range 4 {
		time.Sleep(100 * time.Millisecond)
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2\n"), 0o200); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range readers {
		for _, o := range p.wait(t, 5*time.Minute) {
			if o.Errno != "" || (o.Do == "walk" && o.Count != n+int(wideTree(n).dirs())) || (o.Do == "read" && o.Text != sum([]byte("hello\n"))) {
				t.Fatalf("%+v", o)
			}
		}
	}
	st, after := m.ask(t, command{Cmd: "stats"}).Stats, m.ask(t, command{Cmd: "heap"})
	forgets := st.Requests["FORGET"] + st.Requests["BATCH_FORGET"]
	t.Logf("%d FORGETs and %d BATCH_FORGETs; heap in use %d to %d bytes, the most it had %d to %d KiB",
		st.Requests["FORGET"], st.Requests["BATCH_FORGET"], before.Live, after.Live, before.Heap, after.Heap)
	if forgets == 0 {
		t.Error("nothing was forgotten: the test tests nothing")
	}
	if after.Live-before.Live > 8<<20 || after.Heap-before.Heap > 64<<10 {
		t.Errorf("the heap grew from %d to %d bytes in use, the most it had from %d to %d KiB", before.Live, after.Live, before.Heap, after.Heap)
	}
}

// hugeFile is a store path that is one file of so many bytes: at every offset
// that is a multiple of 8 it holds that offset.
type hugeFile int64

// Entry is flox.Tree.
func (h hugeFile) Entry(_ context.Context, i uint32) (flox.Entry, error) {
	if i > 0 {
		return flox.Entry{}, flox.ErrNotFound
	}
	return flox.Entry{Kind: flox.Regular, Size: uint64(h)}, nil
}

// Child is flox.Tree.
func (hugeFile) Child(context.Context, uint32, string) (uint32, flox.Entry, error) {
	return 0, flox.Entry{}, flox.ErrNotFound
}

// Children is flox.Tree.
func (hugeFile) Children(context.Context, uint32, uint32, func(uint32, flox.Entry) bool) error {
	return nil
}

// ReadAt is flox.Tree.
func (h hugeFile) ReadAt(_ context.Context, _ uint32, p []byte, off int64, _ flox.Reader) (int, error) {
	return copy(p, h.bytes(off, len(p))), nil
}

// bytes are what the file holds in a range, as far as it goes.
func (h hugeFile) bytes(off int64, n int) []byte {
	if n = int(min(int64(n), int64(h)-off)); n <= 0 {
		return nil
	}
	var b bytes.Buffer
	for at := off &^ 7; at < off+int64(n); at += 8 {
		_ = binary.Write(&b, binary.LittleEndian, at)
	}
	return b.Bytes()[off&7:][:n]
}

// peek maps the page at Off and reads Len bytes of it.
func (o *op) peek(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	page := o.Off &^ 4095
	b, err := unix.Mmap(fd, page, 8192, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	o.Text = sum(b[o.Off-page:][:o.Len])
	return nil
}

// A file of 20 GB has its size, and every byte at its place, through read and
// through a mapping, on both sides of what 32 bits count and at its end.
func TestHugeFile(t *testing.T) {
	const path, size = "7c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-huge", hugeFile(20<<30 + 4321)
	m := newMount(t, serveOptions{})
	m.ask(t, command{Cmd: "huge", Arg: path, N: int(size)})
	ops := []op{{Do: "stat", Path: path}}
	for _, off := range []int64{0, 1<<31 - 100, 1<<32 - 100, 1<<32 + 5, 1<<32 + 1<<31 - 3, 5<<32 - 9, int64(size) - 300} {
		ops = append(ops, op{Do: "read", Path: path, Off: off, Len: 300}, op{Do: "peek", Path: path, Off: off, Len: 300})
	}
	ops = append(ops, op{Do: "read", Path: path, Off: int64(size) - 10, Len: 300}, op{Do: "read", Path: path, Off: int64(size), Len: 300})
	for i, o := range m.touch(t, ops...) {
		switch {
		case o.Errno != "":
			t.Errorf("%+v", o)
		case i == 0 && (o.Size != int64(size) || o.Blocks != (int64(size)+511)/512):
			t.Errorf("size %d, %d blocks, want size %d", o.Size, o.Blocks, size)
		case i > 0 && o.Text != sum(size.bytes(o.Off, o.Len)):
			t.Errorf("%s of %d bytes at %d: wrong bytes (got %d)", o.Do, o.Len, o.Off, o.Count)
		}
	}
}
