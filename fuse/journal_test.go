package fuse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// asked is a request as the kernel writes it.
func asked(op uint32, unique uint64, rest string) []byte {
	b := append(make([]byte, inHeaderSize), rest...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], op)
	binary.NativeEndian.PutUint64(b[8:], unique)
	return b
}

// again opens the journal as the next server does.
func again(t *testing.T, path string) *journal {
	t.Helper()
	j, why, err := openJournal(path, 7, 3)
	if err != nil || why != nil {
		t.Fatal(err, why)
	}
	t.Cleanup(j.close)
	return j
}

func TestJournalKeepsWhatWasNotAnswered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j := again(t, path)
	if len(j.left) != 0 {
		t.Errorf("a new journal has %d requests", len(j.left))
	}
	kept, cleared, forget := j.take(), j.take(), j.take()
	copy(kept.b, asked(opLookup, 10, "name\x00"))
	copy(cleared.b, asked(opRead, 12, strings.Repeat("x", 40)))
	copy(forget.b, asked(opForget, 14, strings.Repeat("x", 8)))
	cleared.clear()
	if over := j.take(); over.j != nil || len(over.b) != requestSize {
		t.Errorf("a fourth place of three: %+v", over)
	}
	next := again(t, path)
	if len(next.left) != 1 || !bytes.Equal(next.left[0].request(), asked(opLookup, 10, "name\x00")) {
		t.Fatalf("left: %v", next.left)
	}
	// Its place is nobody's until it is answered.
	for range 3 {
		if p := next.take(); p.j != nil && p.n == next.left[0].n {
			t.Error("the place of an unanswered request was given away")
		}
	}
	next.left[0].clear()
	next.left[0].give()
	if last := again(t, path); len(last.left) != 0 {
		t.Errorf("left after it was answered: %v", last.left)
	}
}

// inMemory reports whether every page of b is in this process's page tables, so
// that to write there takes no page fault.
func inMemory(t *testing.T, b []byte) bool {
	t.Helper()
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := os.Getpagesize()
	first, last := uintptr(unsafe.Pointer(&b[0]))/uintptr(page), uintptr(unsafe.Pointer(&b[len(b)-1]))/uintptr(page)
	for ; first <= last; first++ {
		var entry [8]byte
		if _, err := f.ReadAt(entry[:], int64(first)*8); err != nil {
			t.Fatal(err)
		}
		if binary.NativeEndian.Uint64(entry[:])>>63 == 0 {
			return false
		}
	}
	return true
}

// The kernel fails a request it has no page for when SIGKILL is pending.
func TestTouchedIsInMemory(t *testing.T) {
	// As large memory of the heap is that nobody used yet.
	b, err := unix.Mmap(-1, 0, requestSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	if inMemory(t, b) {
		t.Error("nobody used it, and its pages are there")
	}
	touch(b)
	if !inMemory(t, b) {
		t.Error("touched, and pages are missing")
	}
	copy(b, "request")
	touch(b)
	if want := append([]byte("request"), make([]byte, len(b)-7)...); !bytes.Equal(b, want) {
		t.Errorf("touched, it is %q", b[:8])
	}
}

// The device is read only to memory that is there.
func TestDeviceIsReadToMemory(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	d, err := openDevice(r)
	if err != nil {
		t.Fatal(err)
	}
	defer d.file.Close()
	b, err := unix.Mmap(-1, 0, requestSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	if _, err := w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	if n, err := d.read(b); n != 1 || err != nil || !inMemory(t, b) {
		t.Errorf("read %d bytes, %v; all pages there: %v", n, err, inMemory(t, b))
	}
}

// What makes no sense is not served, whatever wrote it.
func TestJournalIgnoresTornSlots(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j := again(t, path)
	whole := asked(opRead, 10, strings.Repeat("x", 40))
	for name, slot := range map[string][]byte{
		"no number":         asked(opRead, 0, "x"),
		"only a length":     whole[:4],
		"shorter than that": append([]byte{8, 0, 0, 0}, whole[4:]...),
		"longer than a slot": func() []byte {
			b := bytes.Clone(whole)
			binary.NativeEndian.PutUint32(b, requestSize+1)
			return b
		}(),
		"no such operation": asked(opCount+5, 10, "x"),
		"INIT":              asked(opInit, 10, "x"),
	} {
		p := j.take()
		copy(p.b, slot)
		if next := again(t, path); len(next.left) != 0 {
			t.Errorf("%s: %v", name, next.left)
		}
		clear(p.b)
		p.give()
	}
}

func TestJournalThatIsNotUnderstoodIsReplaced(t *testing.T) {
	damage := func(at int64, b ...byte) func(*os.File) error {
		return func(f *os.File) error { _, err := f.WriteAt(b, at); return err }
	}
	for name, c := range map[string]struct {
		do   func(*os.File) error
		want error
	}{
		"another mount":  {damage(16, 8), flox.ErrCorrupt},
		"junk":           {damage(0, 'x'), flox.ErrCorrupt},
		"newer":          {damage(7, '2'), flox.ErrBadInput},
		"damaged header": {damage(12, 99), flox.ErrCorrupt},
		"cut short":      {func(f *os.File) error { return f.Truncate(journalHeader + 100) }, flox.ErrCorrupt},
		"empty":          {func(f *os.File) error { return f.Truncate(0) }, flox.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "journal")
			copy(again(t, path).take().b, asked(opRead, 10, strings.Repeat("x", 40)))
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := c.do(f); err != nil {
				t.Fatal(err)
			}
			j, why, err := openJournal(path, 7, 3)
			if err != nil {
				t.Fatal(err)
			}
			defer j.close()
			if !errors.Is(why, c.want) || len(j.left) != 0 {
				t.Errorf("%v, %d requests; want %v", why, len(j.left), c.want)
			}
			if len(again(t, path).left) != 0 {
				t.Error("it is not empty the next time either")
			}
		})
	}
	// A journal that cannot be at all is said, and there is none.
	if j, _, err := openJournal(filepath.Join(t.TempDir(), "no", "journal"), 7, 3); err == nil || j != nil {
		t.Errorf("in no directory: %v, %v", j, err)
	}
}

// With a broken journal only what was in flight is lost: it hangs until the
// mount goes, as without one, and everybody else is served.
func TestBrokenJournal(t *testing.T) {
	m := newMount(t, serveOptions{WithoutResend: true})
	hung := toolsPath + "/share/hung"
	m.touch(t, op{Do: "read", Path: toolsPath + "/etc/conf"})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	lost := m.begin(t, op{Do: "read", Path: hung})
	m.awaitWait(t, "READ")
	m.srv.kill()
	if err := os.WriteFile(m.table+".journal", []byte("what?"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.start(t)
	if o := m.touch(t, op{Do: "read", Path: toolsPath + "/share/big"})[0]; o.Text != bigSum {
		t.Errorf("a new read: %+v", o)
	}
	took := m.ask(t, command{Cmd: "takeover"}).Took
	if !took.Journal || took.Resumed != 0 || !strings.Contains(took.Problem, "journal") {
		t.Errorf("taken over by %+v", took)
	}
	select {
	case err := <-lost.done:
		t.Fatalf("the lost request was answered (%v): nothing is shown here", err)
	case <-time.After(300 * time.Millisecond):
	}
	// Nothing else frees it; this is what unmounting by force does.
	if err := unix.Unmount(m.Dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if o := lost.wait(t, 10*time.Second)[0]; o.Errno == "" {
		t.Errorf("%+v", o)
	}
}

func FuzzJournal(f *testing.F) {
	f.Add(asked(opRead, 10, "x"))
	f.Add([]byte{40, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		slot := make([]byte, requestSize)
		copy(slot, b)
		if unanswered(slot) {
			if h, err := parseHeader(place{b: slot}.request()); err != nil || h.unique == 0 {
				t.Errorf("%+v, %v", h, err)
			}
		}
	})
}

// The files of version 1, as they were written by the program that had them
// first, are read by this one: an agent that is updated under its mount has them.
func TestFilesOfVersion1(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"nodes-1", "journal-1"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "journal-1" { // the zeros of a slot are not kept
			b = append(b, make([]byte, int(journalSize(2))-len(b))...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nodes, err := openNodeTable(filepath.Join(dir, "nodes-1"))
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range []flox.CID{{1}, {2, 3}, {255}} {
		want := uint64(0x12345678+i)<<32 | 9
		if node, ok := nodes.node(id, 9); !ok || node != want {
			t.Errorf("%v has the node %x, want %x", id, node, want)
		}
	}
	j, why, err := openJournal(filepath.Join(dir, "journal-1"), nodes.first, 5)
	if err != nil || why != nil {
		t.Fatal(err, why)
	}
	defer j.close()
	if len(j.left) != 1 || !bytes.Equal(j.left[0].request(), asked(opLookup, 42, "name\x00")) {
		t.Errorf("left in the journal: %v", j.left)
	}
	// And what a later one writes is refused with what to do.
	b, _ := os.ReadFile(filepath.Join(dir, "nodes-1"))
	b[len(tableMagic)-1]++
	newer := filepath.Join(dir, "nodes-2")
	if err := os.WriteFile(newer, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openNodeTable(newer); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "version 2") || !strings.Contains(err.Error(), newer) {
		t.Errorf("a newer table: %v", err)
	}
}
