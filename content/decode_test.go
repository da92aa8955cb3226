package content

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/floxctl/flox"
)

// seeds are blocks of real manifests.
func seeds(tb testing.TB) (roots, pages, lists [][]byte) {
	tb.Helper()
	for _, nodes := range [][]node{smallTree(), bigTree(700), wideTree(), {linkNode("", "x")}} {
		mem := &Memory{}
		ingestNodes(tb, mem, nodes)
		for _, b := range mem.blocks {
			switch {
			case bytes.HasPrefix(b, []byte(magicRoot)):
				roots = append(roots, b)
				if r, err := decodeRoot(b); err == nil && r.embedded != nil {
					pages = append(pages, r.embedded)
				}
			case bytes.HasPrefix(b, []byte(magicPage)):
				pages = append(pages, b)
			}
		}
	}
	chunks := []flox.Chunk{{ID: flox.CID{1}, Size: 20_000}, {ID: flox.CID{2}, Size: 7}}
	return roots, pages, [][]byte{encodeList(chunks), encodeList(chunks[1:])}
}

// encodePage writes the entries of a page anew.
func encodePage(g *page) []byte {
	b := appendText([]byte(magicPage), g.parent)
	level := 0
	for k := range g.len() {
		r := g.rec(k)
		if k == 0 {
			level = int(r.depth)
		}
		b = appendEntry(b, r, level-int(r.depth))
		if level = int(r.depth); r.kind == flox.Directory {
			level++
		}
	}
	return b
}

// A page that is accepted has one form only, and every entry of it can be asked
// for.
func FuzzPage(f *testing.F) {
	_, pages, _ := seeds(f)
	for _, b := range pages {
		if len(b) < 5_000 {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := decodePage(b, DefaultParams)
		if err != nil {
			if !errors.Is(err, flox.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if again := encodePage(g); !bytes.Equal(again, b) {
			t.Fatalf("encoded again the page differs: %x, was %x", again, b)
		}
		for k := range min(g.len(), 20) {
			path := g.path(k)
			if at, ok := g.find(path); !ok || at != k {
				t.Fatalf("entry %d at %q is found at %d, %v", k, path, at, ok)
			}
			g.entry(k)
		}
	})
}

// A root block that is accepted has one form only.
func FuzzRoot(f *testing.F) {
	roots, _, _ := seeds(f)
	for _, b := range roots {
		if len(b) < 5_000 {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRoot(b)
		if err != nil {
			if !errors.Is(err, flox.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if again := r.encode(); !bytes.Equal(again, b) {
			t.Fatalf("encoded again the root differs: %x, was %x", again, b)
		}
		// Nor does opening it do harm, whatever its page is.
		mem := &Memory{}
		id := Hash(b)
		if err := mem.Put(context.Background(), id, b); err != nil {
			t.Fatal(err)
		}
		if m, err := NewPageCache(0).Open(context.Background(), id, mem); err == nil {
			_ = m.Walk(context.Background(), 0, func(uint32, string, flox.Entry) bool { return true })
			_ = m.WriteNar(context.Background(), &bytes.Buffer{}, mem, 0, 1000)
		}
	})
}

// A chunk list that is accepted has one form only.
func FuzzChunkList(f *testing.F) {
	_, _, lists := seeds(f)
	for _, b := range lists {
		f.Add(b, uint64(20_007), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint64, last bool) {
		chunks, err := decodeList(b, DefaultParams, size, last)
		if err != nil {
			if !errors.Is(err, flox.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if again := encodeList(chunks); !bytes.Equal(again, b) {
			t.Fatalf("encoded again the list differs: %x, was %x", again, b)
		}
	})
}

// Every flipped bit of a block is noticed, or gives another block that is as
// canonical: nothing has two forms.
func TestFlippedBitsNeverAlias(t *testing.T) {
	roots, pages, lists := seeds(t)
	check := func(b []byte, again func([]byte) ([]byte, error)) {
		for i := 0; i < len(b); i += 1 + len(b)/40 {
			for bit := range 8 {
				c := bytes.Clone(b)
				c[i] ^= 1 << bit
				if got, err := again(c); err == nil && !bytes.Equal(got, c) {
					t.Fatalf("byte %d, bit %d: another block is taken for the same", i, bit)
				}
			}
		}
	}
	for _, b := range roots {
		check(b, func(b []byte) ([]byte, error) {
			r, err := decodeRoot(b)
			if err != nil {
				return nil, err
			}
			return r.encode(), nil
		})
	}
	for _, b := range pages {
		check(b, func(b []byte) ([]byte, error) {
			g, err := decodePage(b, DefaultParams)
			if err != nil {
				return nil, err
			}
			return encodePage(g), nil
		})
	}
	for _, b := range lists {
		check(b, func(b []byte) ([]byte, error) {
			chunks, err := decodeList(b, DefaultParams, 20_007, true)
			return encodeList(chunks), err
		})
	}
}

// Pages the encoder cannot have written are refused, each for its own reason.
func TestPageRules(t *testing.T) {
	file := func(name string) *rec { return &rec{name: name, kind: flox.Regular, size: 1, data: "x"} }
	dir := func(name string, span, dirs uint32) *rec {
		return &rec{name: name, kind: flox.Directory, span: span, dirs: dirs}
	}
	type step struct {
		r  *rec
		up int
	}
	build := func(parent string, steps ...step) []byte {
		b := appendText([]byte(magicPage), parent)
		for _, s := range steps {
			b = appendEntry(b, s.r, s.up)
		}
		return b
	}
	deep := "d"
	for range maxDepth - 1 {
		deep += "/d"
	}
	for name, c := range map[string]struct {
		b  []byte
		ok bool
	}{
		"root":                {build("", step{dir("", 2, 1), 0}, step{dir("a", 0, 0), 0}, step{file("b"), 1}), true},
		"middle":              {build("x/y", step{file("b"), 0}, step{file("c"), 0}, step{file("z"), 1}), true},
		"no entry":            {build(""), false},
		"names out of order":  {build("x", step{file("b"), 0}, step{file("a"), 0}), false},
		"name twice":          {build("x", step{file("b"), 0}, step{file("b"), 0}), false},
		"back in its path":    {build("x/y", step{file("b"), 0}, step{file("y"), 1}), false},
		"first goes up":       {build("x/y", step{file("b"), 1}), false},
		"up out of the root":  {build("", step{dir("", 1, 0), 0}, step{file("b"), 1}), false},
		"behind a root file":  {build("", step{file(""), 0}, step{file("b"), 0}), false},
		"second without name": {build("", step{dir("", 1, 0), 0}, step{file(""), 0}), false},
		"root below a path":   {build("x", step{dir("", 0, 0), 0}), false},
		"span too long":       {build("", step{dir("", 3, 1), 0}, step{dir("a", 1, 0), 0}, step{file("b"), 1}), false},
		"span too short":      {build("", step{dir("", 1, 1), 0}, step{dir("a", 0, 0), 0}, step{file("b"), 1}), false},
		"span beyond parent":  {build("", step{dir("", 1, 1), 0}, step{dir("a", 5, 0), 0}), false},
		"dirs too few":        {build("", step{dir("", 1, 0), 0}, step{dir("a", 0, 0), 0}), false},
		"dirs too many":       {build("", step{dir("", 1, 1), 0}, step{file("b"), 0}), false},
		"dot dot":             {build("x", step{file(".."), 0}), false},
		"slash":               {build("x", step{file("a/b"), 0}), false},
		"NUL in path":         {build("x\x00", step{file("a"), 0}), false},
		"path with dot":       {build("x/./y", step{file("a"), 0}), false},
		"too deep":            {build(deep, step{file("a"), 0}), false},
		"span wraps around":   {build("x", step{file("a"), 0}, step{dir("b", 1<<32-2, 0), 0}), false},
		"not inline":          {build("x", step{&rec{name: "a", kind: flox.Regular, size: 257, data: string(make([]byte, 257))}, 0}), false},
		"chunk not inline":    {build("x", step{&rec{name: "a", kind: flox.Regular, size: 256, file: &fileRec{}}, 0}), false},
		"chunk too big":       {build("x", step{&rec{name: "a", kind: flox.Regular, size: 128<<10 + 1, file: &fileRec{}}, 0}), false},
		"chunk too small": {build("x", step{&rec{name: "a", kind: flox.Regular, size: 27_000, file: &fileRec{
			chunks: []flox.Chunk{{Size: 7_000}, {Size: 20_000}},
		}}, 0}), false},
		"chunks not the size": {build("x", step{&rec{name: "a", kind: flox.Regular, size: 40_001, file: &fileRec{
			chunks: []flox.Chunk{{Size: 20_000}, {Size: 20_000}},
		}}, 0}), false},
		"executable link": {build("x", step{&rec{name: "a", kind: flox.Symlink, data: "t", exec: true}, 0}), false},
		"empty target":    {build("x", step{&rec{name: "a", kind: flox.Symlink}, 0}), false},
		"long uvarint":    {append(build("x", step{dir("a", 0, 0), 0})[:10], 0x80, 0x00, 0), false},
	} {
		if _, err := decodePage(c.b, DefaultParams); (err == nil) != c.ok || err != nil && !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
