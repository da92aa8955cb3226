package nix

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// node is an entry with its content.
type node struct {
	NarEntry
	content string
}

func file(path, content string) node {
	return node{NarEntry{Path: path, Kind: flox.Regular, Size: uint64(len(content))}, content}
}

func dir(path string) node { return node{NarEntry: NarEntry{Path: path, Kind: flox.Directory}} }

func link(path, target string) node {
	return node{NarEntry: NarEntry{Path: path, Kind: flox.Symlink, Target: target}}
}

func executable(n node) node { n.Executable = true; return n }

// sampleTree has every kind, names that sort differently as paths and as names,
// and sizes around a padding.
func sampleTree() []node {
	return []node{
		dir(""), dir("a"), file("a/b", "12345678"), dir("a/empty"), file("a.b", ""), executable(file("a0", "x")),
		dir("bin"), executable(file("bin/git", strings.Repeat("git", 50000))), link("bin/g", "git"),
		dir("lib"), dir("lib/x"), dir("lib/x/y"), file("lib/x/y/z", "1234567"), file("lib/x/z", "123456789"), link("zz", "../out/of/here"),
	}
}

func encode(t testing.TB, nodes []node) []byte {
	t.Helper()
	var out bytes.Buffer
	w := NewNarWriter(&out)
	for _, n := range nodes {
		if err := w.Entry(n.NarEntry); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, n.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if w.Offset() != uint64(out.Len()) {
		t.Fatalf("writer says %d bytes, wrote %d", w.Offset(), out.Len())
	}
	return out.Bytes()
}

func decode(r io.Reader) (nodes []node, size uint64, err error) {
	nr := NewNarReader(r)
	for {
		e, err := nr.Next()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return nodes, nr.Offset(), err
		}
		var content strings.Builder
		if _, err := io.Copy(&content, nr); err != nil {
			return nodes, nr.Offset(), err
		}
		nodes = append(nodes, node{e, content.String()})
	}
}

func sorted(nodes []node) []node {
	slices.SortFunc(nodes, func(a, b node) int {
		return slices.Compare(strings.Split(a.Path, "/"), strings.Split(b.Path, "/"))
	})
	return nodes
}

// randomTree is a tree in NAR order.
func randomTree(r *rand.Rand) []node {
	nodes := []node{dir("")}
	dirs := []string{""}
	for range r.IntN(40) {
		parent := dirs[r.IntN(len(dirs))]
		name := strings.Repeat(string(rune('!'+r.IntN(14))), 1+r.IntN(3)) + string(rune('a'+r.IntN(20)))
		name = strings.ReplaceAll(name, "/", "_")
		path := strings.TrimPrefix(parent+"/"+name, "/")
		if slices.ContainsFunc(nodes, func(n node) bool { return n.Path == path }) {
			continue
		}
		switch r.IntN(4) {
		case 0:
			nodes = append(nodes, dir(path))
			dirs = append(dirs, path)
		case 1:
			nodes = append(nodes, link(path, strings.Repeat("t", 1+r.IntN(20))))
		case 2:
			nodes = append(nodes, executable(file(path, strings.Repeat("c", r.IntN(20)))))
		case 3:
			nodes = append(nodes, file(path, strings.Repeat("d", r.IntN(100_000))))
		}
	}
	return sorted(nodes)
}

func TestNarRoundTrip(t *testing.T) {
	trees := [][]node{{file("", "")}, {executable(file("", "root"))}, {link("", "t")}, {dir("")}, sorted(sampleTree())}
	r := rand.New(rand.NewPCG(1, 2))
	for range 15 {
		trees = append(trees, randomTree(r))
	}
	for i, want := range trees {
		nar := encode(t, want)
		total := uint64(NarMagicSize)
		for _, n := range want {
			total += NarEntrySize(n.NarEntry)
		}
		if total != uint64(len(nar)) {
			t.Errorf("tree %d: the sizes of its entries add up to %d, the NAR has %d bytes", i, total, len(nar))
		}
		sources := map[string]io.Reader{"whole": bytes.NewReader(nar), "bytes": iotest.OneByteReader(bytes.NewReader(nar)), "eof": iotest.DataErrReader(bytes.NewReader(nar))}
		for name, src := range sources {
			got, size, err := decode(src)
			if err != nil || size != uint64(len(nar)) {
				t.Fatalf("tree %d (%s): %v at %d of %d", i, name, err, size, len(nar))
			}
			for j := range got {
				off := got[j].Offset
				if got[j].Kind == flox.Regular && string(nar[off:off+got[j].Size]) != got[j].content {
					t.Errorf("tree %d (%s): %s is not at offset %d", i, name, got[j].Path, off)
				}
				got[j].Offset = 0
			}
			if d := cmp.Diff(want, got, cmp.AllowUnexported(node{})); d != "" {
				t.Errorf("tree %d (%s): %s", i, name, d)
			}
		}
	}
}

// A server that rebuilds a NAR must be able to begin behind any entry.
func TestNarFramerResumesAnywhere(t *testing.T) {
	want := sorted(sampleTree())
	nar := encode(t, want)
	nodes, _, err := decode(bytes.NewReader(nar))
	if err != nil {
		t.Fatal(err)
	}
	for i, last := range nodes {
		var f NarFramer
		if err := f.Resume(last.NarEntry); err != nil {
			t.Fatal(err)
		}
		got := []byte(last.content)
		for _, n := range nodes[i+1:] {
			frame, err := f.Next(n.NarEntry)
			if err != nil {
				t.Fatal(err)
			}
			if f.Offset() != n.Offset {
				t.Errorf("resumed behind %q: %q at %d, want %d", last.Path, n.Path, f.Offset(), n.Offset)
			}
			got = append(append(got, frame...), n.content...)
		}
		end, err := f.End()
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, end...); !bytes.Equal(got, nar[last.Offset:]) || f.Offset() != uint64(len(nar)) {
			t.Errorf("resumed behind %q: the rest differs", last.Path)
		}
	}
}

// Content must be whole whichever way and in whatever pieces it is read.
func TestNarReaderContent(t *testing.T) {
	big := make([]byte, 3*narBuffer+5)
	for i := range big {
		big[i] = byte(i * 7)
	}
	nar := encode(t, []node{dir(""), file("a", string(big)), file("b", "small"), file("c", string(big))})
	for _, piece := range []int{1, 100, narBuffer / 2, narBuffer + 1, len(big) + 100} {
		nr := NewNarReader(bytes.NewReader(nar))
		for _, want := range []string{"", string(big), "small", string(big)} {
			if _, err := nr.Next(); err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			// The structs hide WriteTo and ReadFrom.
			if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{nr}, make([]byte, piece)); err != nil {
				t.Fatal(err)
			}
			if got.String() != want {
				t.Errorf("pieces of %d: got %d bytes, want %d", piece, got.Len(), len(want))
			}
		}
	}
	// A part of one file must not leak into the next.
	nr := NewNarReader(bytes.NewReader(nar))
	nr.Next()
	nr.Next()
	if _, err := io.ReadFull(nr, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if e, err := nr.Next(); err != nil || e.Path != "b" {
		t.Fatalf("behind a file read in part: %v %v", e, err)
	}
	if got, err := io.ReadAll(nr); string(got) != "small" || err != nil {
		t.Errorf("behind a file read in part: %q %v", got, err)
	}
}

// What follows a NAR (another NAR, a protocol's next field) must stay unread.
func TestNarReaderStopsAtTheEnd(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		nar := encode(t, randomTree(r))
		src := bytes.NewReader(append(nar, "what follows"...))
		if _, _, err := decode(src); err != nil {
			t.Fatal(err)
		}
		if rest, _ := io.ReadAll(src); string(rest) != "what follows" {
			t.Fatalf("left %q", rest)
		}
	}
}

func TestNarReaderTruncated(t *testing.T) {
	nar := encode(t, []node{dir(""), executable(file("f", "12345")), link("l", "t"), dir("s"), file("s/x", "")})
	for n := range nar {
		_, _, err := decode(bytes.NewReader(nar[:n]))
		if !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, flox.ErrBadInput) {
			t.Fatalf("%d of %d bytes: %v", n, len(nar), err)
		}
	}
}

// A failing source is not the NAR's fault.
func TestNarReaderPassesSourceErrors(t *testing.T) {
	down := errors.New("network down")
	nar := encode(t, sorted(sampleTree()))
	for n := 0; n < len(nar); n += 1 + len(nar)/200 {
		_, _, err := decode(io.MultiReader(bytes.NewReader(nar[:n]), iotest.ErrReader(down)))
		if !errors.Is(err, down) || errors.Is(err, flox.ErrBadInput) {
			t.Fatalf("after %d bytes: %v", n, err)
		}
	}
}

// raw builds a NAR by hand: strings are encoded, byte slices go in as they are.
func raw(parts ...any) []byte {
	out := []byte(narMagic)
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			for _, w := range strings.Fields(p) {
				out = appendNarString(out, strings.ReplaceAll(w, "EMPTY", ""))
			}
		case []byte:
			out = append(out, p...)
		}
	}
	return out
}

func length(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

func str(s string) []byte { return appendNarString(nil, s) }

func inDir(name string) []byte {
	return raw("( type directory entry ( name", str(name), "node ( type regular contents x ) ) )")
}

func twoInDir(a, b string) []byte {
	const n = "node ( type regular contents x ) )"
	return raw("( type directory entry ( name", str(a), n, "entry ( name", str(b), n, ")")
}

func TestNarReaderRefuses(t *testing.T) {
	deep := func(n int) []byte {
		return raw(strings.Repeat("( type directory entry ( name d node ", n-1), "( type directory ) ", strings.Repeat(") ) ", n-1))
	}
	badPad := func(b []byte, at string) []byte {
		b = slices.Clone(b)
		b[bytes.LastIndex(b, []byte(at))+len(at)] = 1
		return b
	}
	for name, nar := range map[string][]byte{
		"other magic":               bytes.Replace(inDir("a"), []byte("nix-archive-1"), []byte("nix-archive-2"), 1),
		"magic padding":             badPad(inDir("a"), "nix-archive-1"),
		"no node":                   raw("type regular contents x )"),
		"no type":                   raw("( regular contents x )"),
		"type twice":                raw("( type type regular contents x )"),
		"unknown type":              raw("( type socket ) ", length(0), length(0), length(0)),
		"type of wrong case":        raw("( type Regular contents x )"),
		"regular without contents":  raw("( type regular )", length(0), length(0)),
		"executable after contents": raw("( type regular contents x executable EMPTY )"),
		"executable twice":          raw("( type regular executable EMPTY executable EMPTY contents x )"),
		"executable with a value":   raw("( type regular executable yes contents x )"),
		"contents twice":            raw("( type regular contents x contents y )"),
		"content padding":           badPad(raw("( type regular contents xyz )"), "xyz"),
		"file not closed":           raw("( type regular contents x entry"),
		"target on a file":          raw("( type regular target x )"),
		"contents on a symlink":     raw("( type symlink contents x )"),
		"symlink without target":    raw("( type symlink )", length(0), length(0), length(0)),
		"empty target":              raw("( type symlink target", length(0), ")", length(0)),
		"target with NUL":           raw("( type symlink target", str("a\x00b"), ")"),
		"target padding":            badPad(raw("( type symlink target xyz )"), "xyz"),
		"target too long":           raw("( type symlink target", str(strings.Repeat("t", MaxNarTarget+1)), ")"),
		"name empty":                inDir(""),
		"name .":                    inDir("."),
		"name ..":                   inDir(".."),
		"name with slash":           inDir("a/b"),
		"name only a slash":         inDir("/"),
		"name with NUL":             inDir("a\x00"),
		"name too long":             inDir(strings.Repeat("n", MaxNarName+1)),
		"name padding":              badPad(inDir("abc"), "abc"),
		"names unsorted":            twoInDir("b", "a"),
		"names equal":               twoInDir("a", "a"),
		"names unsorted by byte":    twoInDir("\xc3\xa4", "z"),
		"names unsorted by prefix":  twoInDir("ab", "a"),
		"name after subdirectory":   raw("( type directory entry ( name b node ( type directory entry ( name zz node ( type directory ) ) ) ) entry ( name a node ( type directory ) ) )"),
		"entry without name":        raw("( type directory entry ( node ( type directory ) ) )"),
		"entry without node":        raw("( type directory entry ( name x ) )", length(0), length(0), length(0), length(0), length(0), length(0)),
		"entry with two nodes":      raw("( type directory entry ( name x node ( type directory ) node ( type directory ) ) )"),
		"entry not closed":          raw("( type directory entry ( name x node ( type directory ) entry"),
		"unknown tag in directory":  raw("( type directory file ( name x node ( type directory ) ) )"),
		"depth 65":                  deep(65),
		"depth 100000":              deep(100000),
		"file of 2^64-1":            raw("( type regular contents", length(1<<64-1), "x )"),
		"file of 2^64-8":            raw("( type regular contents", length(1<<64-8), "x )"),
		"file of 2^63":              raw("( type regular contents", length(1<<63), "x )"),
		"file of 2^63-200":          raw("( type regular contents", length(1<<63-200), "x )"),
		"name of 2^64-8":            raw("( type directory entry ( name", length(1<<64-8), "node ( type directory ) ) )", make([]byte, 64)),
		"target of 2^64-8":          raw("( type symlink target", length(1<<64-8), "x )", make([]byte, 64)),
		"tag of 2^64-8":             append([]byte(narMagic), length(1<<64-8)...),
	} {
		t.Run(name, func(t *testing.T) {
			// Bytes behind a short one must not turn "malformed" into "truncated".
			_, _, err := decode(io.MultiReader(bytes.NewReader(nar), bytes.NewReader(make([]byte, 256))))
			if !errors.Is(err, flox.ErrBadInput) || errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("got %v", err)
			}
		})
	}
	for name, nar := range map[string][]byte{
		"depth 64":           deep(64),
		"name of 255":        inDir(strings.Repeat("n", MaxNarName)),
		"target of 4095":     raw("( type symlink target", str(strings.Repeat("t", MaxNarTarget)), ")"),
		"case collision":     twoInDir("A", "a"),
		"name of three dots": inDir("..."),
		"name not UTF-8":     inDir("\xff\xfe"),
	} {
		if _, _, err := decode(bytes.NewReader(nar)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Hostile lengths and depths must not cost memory beyond the reader's own.
func TestNarReaderMemory(t *testing.T) {
	inputs := [][]byte{
		raw("( type regular contents", length(1<<62), "x"),
		raw("( type symlink target", length(1<<40)),
		raw("( type directory entry ( name", length(1<<40)),
		raw(strings.Repeat("( type directory entry ( name d node ", 20000)),
	}
	var before, after runtime.MemStats
	for i, nar := range inputs {
		runtime.ReadMemStats(&before)
		decode(bytes.NewReader(nar))
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
			t.Errorf("input %d of %d bytes: %d bytes allocated", i, len(nar), got)
		}
	}
}

func TestNarWriterRefuses(t *testing.T) {
	deep := make([]node, 0, MaxNarDepth+1)
	for i := range MaxNarDepth + 1 {
		deep = append(deep, dir(strings.TrimSuffix(strings.Repeat("d/", i), "/")))
	}
	huge := node{NarEntry: NarEntry{Path: "h", Kind: flox.Regular, Size: 1<<64 - 8}}
	for name, nodes := range map[string][]node{
		"no root first":       {file("a", "")},
		"two roots":           {dir(""), dir("")},
		"below a file":        {dir(""), file("a", ""), file("a/b", "")},
		"beside a root file":  {file("", ""), file("a", "")},
		"unknown directory":   {dir(""), file("a/b", "")},
		"closed directory":    {dir(""), dir("a"), file("b", ""), file("a/c", "")},
		"unsorted":            {dir(""), file("b", ""), file("a", "")},
		"behind subdirectory": {dir(""), dir("b"), file("b/x", ""), file("a", "")},
		"twice":               {dir(""), dir("a"), dir("a")},
		"slash at the end":    {dir(""), dir("a/")},
		"slash first":         {dir(""), dir("/a")},
		"dot dot":             {dir(""), dir("..")},
		"long name":           {dir(""), dir(strings.Repeat("n", 256))},
		"long target":         {link("", strings.Repeat("t", 4096))},
		"empty target":        {link("", "")},
		"target of a file":    {{NarEntry: NarEntry{Kind: flox.Regular, Target: "t"}}},
		"executable symlink":  {executable(link("", "t"))},
		"size of a directory": {{NarEntry: NarEntry{Kind: flox.Directory, Size: 1}}},
		"no kind":             {{}},
		"too deep":            deep,
		"2^64-8 bytes":        {dir(""), huge},
		"too much content":    {dir(""), {NarEntry{Path: "f", Kind: flox.Regular, Size: 1}, "xy"}},
		"too little content":  {dir(""), {NarEntry{Path: "f", Kind: flox.Regular, Size: 2}, "x"}},
		"nothing":             {},
	} {
		w := NewNarWriter(io.Discard)
		err := func() error {
			for _, n := range nodes {
				if err := w.Entry(n.NarEntry); err != nil {
					return err
				}
				if _, err := w.Write([]byte(n.content)); err != nil {
					return err
				}
			}
			return w.Close()
		}()
		if !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: got %v", name, err)
		}
		if again := w.Close(); again == nil {
			t.Errorf("%s: Close after the error succeeded", name)
		}
	}
}

func TestNarConstants(t *testing.T) {
	smallest := encode(t, []node{dir("")})
	if len(smallest) != NarMagicSize+narLeastNode {
		t.Errorf("the smallest NAR has %d bytes", len(smallest))
	}
	inside := encode(t, []node{dir(""), dir("d")})
	if got := len(inside) - len(smallest); got != len(narEntry)+narLeastEntry {
		t.Errorf("the smallest entry has %d bytes", got)
	}
	if len(narClose) != narCloseLen || len(narMagic) != NarMagicSize || len(narEntry) != narCloseLen {
		t.Error("token lengths")
	}
}

func FuzzNarReader(f *testing.F) {
	f.Add(encode(f, sorted(sampleTree()))[:4096])
	f.Add(encode(f, []node{dir(""), executable(file("f", "12345")), link("l", "t"), dir("s"), file("s/x", "")}))
	f.Add(twoInDir("b", "a"))
	f.Add(raw("( type regular contents", length(1<<64-8), "x )"))
	f.Fuzz(func(t *testing.T, b []byte) {
		nodes, size, err := decode(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatalf("not ErrBadInput: %v", err)
			}
			return
		}
		if again := encode(t, nodes); !bytes.Equal(again, b[:size]) {
			t.Fatalf("accepted %d bytes, but they encode to others", size)
		}
	})
}

func smallFilesNar(b *testing.B, n int) []byte {
	nodes := []node{dir("")}
	for d := range n / 100 {
		nodes = append(nodes, dir(fmt.Sprintf("d%06d", d)))
		for i := range 100 {
			nodes = append(nodes, file(fmt.Sprintf("d%06d/f%02d", d, i), strings.Repeat("x", 1000)))
		}
	}
	return encode(b, nodes)
}

func BenchmarkNarReader(b *testing.B) {
	large := encode(b, []node{file("", strings.Repeat("x", 64<<20))})
	for name, nar := range map[string][]byte{"small": smallFilesNar(b, 20000), "large": large} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(nar)))
			b.ReportAllocs()
			files := 0
			for b.Loop() {
				nr := NewNarReader(bytes.NewReader(nar))
				for {
					if _, err := nr.Next(); err != nil {
						break
					}
					files++
					nr.WriteTo(io.Discard)
				}
			}
			b.ReportMetric(float64(files)/b.Elapsed().Seconds(), "files/s")
		})
	}
}

func BenchmarkNarWriter(b *testing.B) {
	nodes, _, _ := decode(bytes.NewReader(smallFilesNar(b, 20000)))
	content := []byte(strings.Repeat("x", 1000))
	for b.Loop() {
		w := NewNarWriter(io.Discard)
		for _, n := range nodes {
			w.Entry(n.NarEntry)
			w.Write(content[:n.Size])
		}
		w.Close()
	}
	b.ReportMetric(float64(len(nodes)*b.N)/b.Elapsed().Seconds(), "files/s")
}
