package nix

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

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
	for range 2 {
		if _, err := nr.Next(); err != nil {
			t.Fatal(err)
		}
	}
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
		if _, _, err := decode(bytes.NewReader(nar)); err == nil {
			t.Errorf("input %d was accepted", i)
		}
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
					if _, err := nr.WriteTo(io.Discard); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(files)/b.Elapsed().Seconds(), "files/s")
		})
	}
}

func BenchmarkNarWriter(b *testing.B) {
	nodes, _, err := decode(bytes.NewReader(smallFilesNar(b, 20000)))
	if err != nil {
		b.Fatal(err)
	}
	content := []byte(strings.Repeat("x", 1000))
	for b.Loop() {
		w := NewNarWriter(io.Discard)
		for _, n := range nodes {
			if err := w.Entry(n.NarEntry); err != nil {
				b.Fatal(err)
			}
			if _, err := w.Write(content[:n.Size]); err != nil {
				b.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(nodes)*b.N)/b.Elapsed().Seconds(), "files/s")
}
