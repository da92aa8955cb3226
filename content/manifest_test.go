package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/floxctl/flox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Every way to an entry leads to what the tree holds there.
func TestLookups(t *testing.T) {
	ctx := context.Background()
	for name, nodes := range map[string][]node{"small": smallTree(), "pages": bigTree(3000), "wide": wideTree()} {
		t.Run(name, func(t *testing.T) {
			mem := &Memory{}
			m, _, _ := ingestNodes(t, mem, nodes)
			if int(m.Entries()) != len(nodes) || m.RootKind() != flox.Directory {
				t.Fatalf("%d entries, root %s", m.Entries(), m.RootKind())
			}
			index := make(map[string]uint32)
			children := make(map[string][]string)
			for i, n := range nodes {
				index[n.Path] = uint32(i)
				if n.Path != "" {
					dir := n.Path[:max(strings.LastIndexByte(n.Path, '/'), 0)]
					children[dir] = append(children[dir], n.Path)
				}
			}
			walked := uint32(0)
			err := m.Walk(ctx, 0, func(i uint32, path string, e flox.Entry) bool {
				walked++
				return i == walked-1 && index[path] == i && e.Name == path[strings.LastIndexByte(path, '/')+1:]
			})
			if err != nil || int(walked) != len(nodes) {
				t.Fatalf("walked %d of %d: %v", walked, len(nodes), err)
			}
			for i, n := range nodes {
				e, err := m.Entry(ctx, uint32(i))
				if err != nil {
					t.Fatal(err)
				}
				if e.Kind != n.Kind || e.Size != uint64(len(n.data)) || e.Target != n.Target || e.Executable != n.Executable {
					t.Fatalf("entry %d is %+v, want %+v", i, e, n.NarEntry)
				}
				if n.Kind == flox.Regular && e.File != Hash(n.data) {
					t.Fatalf("entry %d: file %s, want %s", i, e.File, Hash(n.data))
				}
				if path, err := m.Path(ctx, uint32(i)); err != nil || path != n.Path {
					t.Fatalf("entry %d: path %q, want %q: %v", i, path, n.Path, err)
				}
				if at, found, err := m.Find(ctx, n.Path); err != nil || at != uint32(i) || found != e {
					t.Fatalf("find %q: %d, want %d: %v", n.Path, at, i, err)
				}
				if n.Path != "" {
					dir := n.Path[:max(strings.LastIndexByte(n.Path, '/'), 0)]
					if at, _, err := m.Child(ctx, index[dir], e.Name); err != nil || at != uint32(i) {
						t.Fatalf("child %q of %q: %d, want %d: %v", e.Name, dir, at, i, err)
					}
				}
				if n.Kind == flox.Directory {
					checkChildren(t, m, uint32(i), e, children[n.Path], index)
				}
			}
			for _, missing := range []string{"nothing", "lib/a/x", "lib/a0/y", "zzz", "\x01", "lib/", "/", ".", "lib/..", "lib//a"} {
				if _, _, err := m.Find(ctx, missing); !errors.Is(err, flox.ErrNotFound) {
					t.Errorf("find %q: %v", missing, err)
				}
				if _, _, err := m.Child(ctx, 0, missing); !errors.Is(err, flox.ErrNotFound) {
					t.Errorf("child %q: %v", missing, err)
				}
			}
			if _, err := m.Entry(ctx, m.Entries()); !errors.Is(err, flox.ErrNotFound) {
				t.Errorf("behind the last entry: %v", err)
			}
			file := index[children[children[""][0]][0]]
			if _, _, err := m.Child(ctx, file, "x"); nodes[file].Kind != flox.Directory && !errors.Is(err, flox.ErrBadInput) {
				t.Errorf("child of a file: %v", err)
			}
		})
	}
}

func checkChildren(t *testing.T, m *Manifest, dir uint32, e flox.Entry, paths []string, index map[string]uint32) {
	t.Helper()
	ctx := context.Background()
	dirs := uint32(0)
	var want []uint32
	for _, p := range paths {
		want = append(want, index[p])
		child, err := m.Entry(ctx, index[p])
		if err != nil {
			t.Fatal(err)
		}
		if child.Kind == flox.Directory {
			dirs++
		}
	}
	if e.Dirs != dirs {
		t.Fatalf("directory %d: %d directories, want %d", dir, e.Dirs, dirs)
	}
	rng := rand.New(rand.NewPCG(uint64(dir), 1))
	from := []uint32{0, dir + 1, dir + 1 + e.Span, dir + 2 + e.Span}
	for range 5 {
		from = append(from, dir+rng.Uint32N(e.Span+2))
	}
	for _, from := range from {
		var got, rest []uint32
		err := m.Children(ctx, dir, from, func(i uint32, _ flox.Entry) bool {
			got = append(got, i)
			return true
		})
		for _, i := range want {
			if i >= from {
				rest = append(rest, i)
			}
		}
		if diff := cmp.Diff(rest, got); err != nil || diff != "" {
			t.Fatalf("children of %d from %d: %v\n%s", dir, from, err, diff)
		}
	}
}

// A tree of 100,000 files shows one of them, and says of a name that it is not
// there, without reading all of its manifest.
func TestBigTreeReadsFewPages(t *testing.T) {
	ctx := context.Background()
	mem := &Memory{}
	nodes := bigTree(100_000)
	first, in, _ := ingestNodes(t, mem, nodes)
	if len(first.Pages()) < 100 {
		t.Fatalf("only %d pages: the test proves nothing", len(first.Pages()))
	}
	for _, path := range []string{"d00000/file-00", "d00999/file-99", "d00500/file-50", "d00500/missing", "zzz"} {
		read := &counting{Blocks: mem}
		m, err := NewPageCache(0).Open(ctx, in.Manifest, read)
		if err != nil {
			t.Fatal(err)
		}
		dir, name, found := strings.Cut(path, "/")
		at, _, err := m.Child(ctx, 0, dir)
		if found && err == nil {
			_, _, err = m.Child(ctx, at, name)
		}
		if want := strings.Contains(path, "file"); (err == nil) != want || err != nil && !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("%s: %v", path, err)
		}
		if n, bytes := read.gets.Load(), read.bytes.Load(); n > 4 || bytes > 400<<10 {
			t.Errorf("%s: read %d blocks of %d bytes, want at most 4", path, n, bytes)
		}
	}
}

// Pages of many manifests take a bounded amount of memory.
func TestPageCacheIsBounded(t *testing.T) {
	ctx := context.Background()
	mem := &Memory{}
	cache := NewPageCache(300 << 10)
	_, in, _ := ingestNodes(t, mem, bigTree(20_000))
	m, err := cache.Open(ctx, in.Manifest, mem)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Walk(ctx, 0, func(uint32, string, flox.Entry) bool { return true }); err != nil {
			t.Fatal(err)
		}
		if n := cache.Bytes(); n == 0 || n > 300<<10 {
			t.Fatalf("%d bytes of pages, want at most %d", n, 300<<10)
		}
	}
	// A page that lay in the root block comes back after it had to leave.
	_, in, _ = ingestNodes(t, mem, smallTree())
	small, err := cache.Open(ctx, in.Manifest, mem)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Walk(ctx, 0, func(uint32, string, flox.Entry) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if _, _, err := small.Find(ctx, "bin/tool"); err != nil {
		t.Fatal(err)
	}
}

// Chunks of a range are those that hold it, also in a file of several lists, and
// reading one place of it reads one list.
func TestChunks(t *testing.T) {
	ctx := context.Background()
	mem := &Memory{}
	nodes := append(hugeFileTree(), fileNode("zz", random(4, 1<<20)))
	_, in, _ := ingestNodes(t, mem, nodes)
	read := &counting{Blocks: mem}
	m, err := NewPageCache(0).Open(ctx, in.Manifest, read)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(2, 2))
	for i, n := range nodes {
		if n.Kind != flox.Regular {
			if err := m.Chunks(ctx, uint32(i), 0, 1, nil); !errors.Is(err, flox.ErrBadInput) {
				t.Errorf("chunks of a directory: %v", err)
			}
			continue
		}
		if data, inline, err := m.Inline(ctx, uint32(i)); err != nil || inline != (len(n.data) <= 256) || inline && !bytes.Equal(data, n.data) {
			t.Fatalf("entry %d: inline %v: %v", i, inline, err)
		}
		if len(n.data) <= 256 {
			continue
		}
		for range 30 {
			off := rng.Int64N(int64(len(n.data)))
			size := 1 + rng.Int64N(min(300<<10, int64(len(n.data))-off))
			got, at := []byte(nil), int64(-1)
			before := read.gets.Load()
			err := m.Chunks(ctx, uint32(i), off, size, func(pos int64, c flox.Chunk) bool {
				if at < 0 {
					at = pos
				}
				b, err := mem.Get(ctx, c.ID)
				if err != nil || len(b) != int(c.Size) || pos != at+int64(len(got)) {
					t.Fatalf("chunk at %d: %v", pos, err)
				}
				got = append(got, b...)
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
			if at > off || off-at >= 256<<10 || int64(len(got)) < off-at+size || int64(len(got)) >= off-at+size+256<<10 ||
				!bytes.Equal(got[off-at:off-at+size], n.data[off:off+size]) {
				t.Fatalf("entry %d, %d bytes at %d: chunks of %d bytes from %d", i, size, off, len(got), at)
			}
			if lists := read.gets.Load() - before; lists > 2 {
				t.Fatalf("%d bytes at %d: %d lists read", size, off, lists)
			}
		}
	}
}

// A manifest whose blocks are not what they should be is refused, wherever the
// lie stands.
func TestLyingBlocks(t *testing.T) {
	ctx := context.Background()
	mem := &Memory{}
	m, in, _ := ingestNodes(t, mem, bigTree(3000))
	other, _, _ := ingestNodes(t, mem, bigTree(2900))
	lies := map[string]func(id flox.CID, b []byte) []byte{
		"page of another tree": func(id flox.CID, b []byte) []byte {
			if id == m.Pages()[2] {
				return mem.blocks[other.Pages()[3]]
			}
			return b
		},
		"page cut short": func(id flox.CID, b []byte) []byte {
			if id == m.Pages()[2] {
				return b[:len(b)-5]
			}
			return b
		},
		"page empty": func(id flox.CID, b []byte) []byte {
			if id == m.Pages()[2] {
				return nil
			}
			return b
		},
		"root longer": func(id flox.CID, b []byte) []byte {
			if id == m.ID() {
				return append(bytes.Clone(b), 0)
			}
			return b
		},
	}
	for name, lie := range lies {
		lying := blocksFunc(func(id flox.CID) ([]byte, error) {
			b, err := mem.Get(ctx, id)
			return lie(id, b), err
		})
		got, err := NewPageCache(0).Open(ctx, in.Manifest, lying)
		if err == nil {
			err = got.Walk(ctx, 0, func(uint32, string, flox.Entry) bool { return true })
		}
		if !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkChild(b *testing.B) {
	ctx := context.Background()
	m, _, _ := ingestNodes(b, &Memory{}, bigTree(20_000))
	for i := 0; b.Loop(); i++ {
		at, _, err := m.Child(ctx, 0, fmt.Sprintf("d%05d", i%200))
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := m.Child(ctx, at, "missing"); err == nil {
			b.Fatal("found")
		}
	}
}

func BenchmarkDecodePage(b *testing.B) {
	mem := &Memory{}
	m, _, _ := ingestNodes(b, mem, bigTree(20_000))
	raw := mem.blocks[m.Pages()[3]]
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if _, err := decodePage(raw, m.Params()); err != nil {
			b.Fatal(err)
		}
	}
}

// onlySome gives no blocks but those listed.
type onlySome struct {
	flox.Blocks
	ids map[flox.CID]bool
}

func (o onlySome) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	if !o.ids[id] {
		return nil, fmt.Errorf("block %s: %w", id, flox.ErrNotFound)
	}
	return o.Blocks.Get(ctx, id)
}

// With its page and its chunk lists, and without any other block, an entry and its
// chunks can be read; each of them is needed.
func TestPageAndListsOfAnEntry(t *testing.T) {
	ctx := context.Background()
	for name, nodes := range map[string][]node{"pages": bigTree(3000), "lists": hugeFileTree(), "embedded": smallTree()} {
		t.Run(name, func(t *testing.T) {
			mem := &Memory{}
			m, in, _ := ingestNodes(t, mem, nodes)
			if _, ok := m.PageOf(m.Entries()); ok {
				t.Error("an entry that is not there has a page")
			}
			pages, lists := map[flox.CID]bool{}, 0
			read := func(i uint32, off int64, ids ...flox.CID) error {
				some := onlySome{mem, map[flox.CID]bool{in.Manifest: true}}
				for _, id := range ids {
					some.ids[id] = true
				}
				one, err := NewPageCache(0).Open(ctx, in.Manifest, some)
				if err != nil {
					t.Fatal(err)
				}
				return one.Chunks(ctx, i, off, 1, func(int64, flox.Chunk) bool { return true })
			}
			for i := uint32(0); i < m.Entries(); i += 1 + m.Entries()/97 {
				if nodes[i].Kind != flox.Regular {
					continue
				}
				var ids []flox.CID
				if page, ok := m.PageOf(i); ok {
					ids, pages[page] = append(ids, page), true
				}
				off := int64(len(nodes[i].data)) / 2
				if err := m.Lists(ctx, i, off, 1, func(id flox.CID) bool { ids, lists = append(ids, id), lists+1; return true }); err != nil {
					t.Fatal(err)
				}
				if err := read(i, off, ids...); err != nil {
					t.Fatalf("entry %d: %v", i, err)
				}
				if len(ids) > 0 && read(i, off, ids[1:]...) == nil {
					t.Errorf("entry %d was read without its page", i)
				}
			}
			if name == "pages" && len(pages) < 2 || name == "lists" && lists == 0 {
				t.Errorf("%d pages and %d lists: nothing was tested", len(pages), lists)
			}
		})
	}
}
