package nix

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

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
