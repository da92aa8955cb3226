package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// node is an entry of a test tree, in NAR order.
type node struct {
	nix.NarEntry
	data []byte
}

func dirNode(path string) node {
	return node{NarEntry: nix.NarEntry{Path: path, Kind: flox.Directory}}
}

func fileNode(path string, data []byte) node {
	return node{nix.NarEntry{Path: path, Kind: flox.Regular, Size: uint64(len(data))}, data}
}

func linkNode(path, target string) node {
	return node{NarEntry: nix.NarEntry{Path: path, Kind: flox.Symlink, Target: target}}
}

// random gives n bytes that depend on seed only.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)}).Read(b)
	return b
}

func narOf(t testing.TB, nodes []node) []byte {
	t.Helper()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	for _, n := range nodes {
		if err := w.Entry(n.NarEntry); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(n.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// ingestNodes puts a tree into mem and opens its manifest with a cache of its own.
func ingestNodes(t testing.TB, mem *Memory, nodes []node) (*Manifest, *Ingested, []byte) {
	t.Helper()
	nar := narOf(t, nodes)
	got, err := Ingest(context.Background(), bytes.NewReader(nar), mem, IngestOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := NewPageCache(0).Open(context.Background(), got.Manifest, mem)
	if err != nil {
		t.Fatal(err)
	}
	if got.NarHash != sha256.Sum256(nar) || got.NarSize != uint64(len(nar)) {
		t.Fatalf("NAR hash or size differ: size %d, want %d", got.NarSize, len(nar))
	}
	return m, got, nar
}

// smallTree has every kind of entry and every form of content but chunk lists.
func smallTree() []node {
	exec := fileNode("bin/tool", random(1, 3000))
	exec.Executable = true
	return []node{
		dirNode(""),
		dirNode("bin"),
		exec,
		linkNode("bin/tool-link", "tool"),
		dirNode("empty"),
		fileNode("empty-file", nil),
		dirNode("lib"),
		fileNode("lib/a", random(2, 255)),
		fileNode("lib/a.b", random(2, 256)),
		dirNode("lib/a0"),
		fileNode("lib/a0/x", random(3, 257)),
		fileNode("lib/big.so", random(4, 1<<20)),
		fileNode("lib/zero", make([]byte, 700<<10)),
		fileNode("lib/\xff\xfe", []byte("name that is no UTF-8")),
		fileNode("share", random(5, 16<<10)),
		fileNode("share-1", random(5, 16<<10+1)),
	}
}

// bigTree has n small files in directories of 100, and many pages.
func bigTree(n int) []node {
	nodes := []node{dirNode("")}
	for i := range n {
		if i%100 == 0 {
			nodes = append(nodes, dirNode(fmt.Sprintf("d%05d", i/100)))
		}
		nodes = append(nodes, fileNode(fmt.Sprintf("d%05d/file-%02d", i/100, i%100), fmt.Appendf(nil, "%0*d", 200+i%200, i)))
	}
	return nodes
}

// counting counts what is read.
type counting struct {
	flox.Blocks
	gets, bytes atomic.Int64
}

func (c *counting) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	b, err := c.Blocks.Get(ctx, id)
	c.gets.Add(1)
	c.bytes.Add(int64(len(b)))
	return b, err
}

// discard names blocks and forgets them.
type discard struct{ blocks, bytes, syncs atomic.Int64 }

func (d *discard) Put(_ context.Context, _ flox.CID, b []byte) error {
	d.blocks.Add(1)
	d.bytes.Add(int64(len(b)))
	return nil
}

func (d *discard) Sync(context.Context) error {
	d.syncs.Add(1)
	return nil
}

// slowReader gives a stream in small, odd pieces.
type slowReader struct{ r io.Reader }

func (s slowReader) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), 37)]) }

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
