package content

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/PlakarKorp/go-cdc-chunkers/chunkers/fastcdc"
	"github.com/google/go-cmp/cmp"
	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// This file is a second encoder, written from DESIGN.md alone: everything in
// memory, every step spelled out, nothing shared with the real one.

// cutLength is DESIGN.md's "Chunks".
func cutLength(b []byte) int {
	const low, normal, high = 8192, 32768, 131072
	const strict, loose = 0x9249249249248000, 0x8888888888888000
	if len(b) <= low {
		return len(b)
	}
	h := uint64(0)
	for i := low; i < len(b) && i < high; i++ {
		h = h<<1 + fastcdc.G[b[i]]
		if i < normal && i < len(b) && h&strict == 0 || i >= normal && h&loose == 0 {
			return i
		}
	}
	return min(len(b), high)
}

func uv(b []byte, v int) []byte { return binary.AppendUvarint(b, uint64(v)) }

func str(b []byte, s string) []byte { return append(uv(b, len(s)), s...) }

// naive encodes a tree and gives all its blocks and the manifest's name.
func naive(nodes []node, narSize int) (root flox.CID, blocks map[flox.CID][]byte) {
	blocks = make(map[flox.CID][]byte)
	add := func(b []byte) flox.CID {
		id := flox.CID(blake3.Sum256(b))
		blocks[id] = bytes.Clone(b)
		return id
	}
	depth := func(n node) int {
		if n.Path == "" {
			return 0
		}
		return strings.Count(n.Path, "/") + 1
	}
	below := func(i int) (span, dirs int) {
		for _, n := range nodes[i+1:] {
			if depth(n) <= depth(nodes[i]) {
				break
			}
			span++
			if n.Kind == flox.Directory && depth(n) == depth(nodes[i])+1 {
				dirs++
			}
		}
		return span, dirs
	}
	encodeFile := func(data []byte) (form int, rest []byte) {
		if len(data) <= 256 {
			return 0, data
		}
		id := blake3.Sum256(data)
		var sizes []int
		var ids [][]byte
		for left := data; len(left) > 0; {
			n := cutLength(left)
			c := add(left[:n])
			sizes, ids, left = append(sizes, n), append(ids, c[:]), left[n:]
		}
		list := func(from, to int) (b []byte, bytes int) {
			b = uv(nil, to-from)
			for i := from; i < to; i++ {
				b = append(uv(b, sizes[i]), ids[i]...)
				bytes += sizes[i]
			}
			return b, bytes
		}
		switch {
		case len(ids) == 1:
			return 1, id[:]
		case len(ids) <= 1024:
			b, _ := list(0, len(ids))
			return 2, append(id[:], b...)
		}
		rest = uv(id[:], (len(ids)+1023)/1024)
		for from := 0; from < len(ids); from += 1024 {
			b, bytes := list(from, min(from+1024, len(ids)))
			c := add(append([]byte("FXL1"), b...))
			rest = append(uv(rest, bytes), c[:]...)
		}
		return 3, rest
	}

	type pageInfo struct {
		id      flox.CID
		path    string
		entries int
		size    int
		offset  int
	}
	var pages []pageInfo
	var page []byte
	offset, entries := 0, 0
	var framer nix.NarFramer // only tells where content lies
	for i, n := range nodes {
		if _, err := framer.Next(n.NarEntry); err != nil {
			panic(err)
		}
		up := 0
		if i > 0 {
			level := depth(nodes[i-1])
			if nodes[i-1].Kind == flox.Directory {
				level++
			}
			up = level - depth(n)
		}
		dir, name := "", n.Path
		if k := strings.LastIndexByte(n.Path, '/'); k >= 0 {
			dir, name = n.Path[:k], n.Path[k+1:]
		}
		if entries == 0 {
			up, page, offset = 0, str([]byte("FXP1"), dir), int(framer.Offset())
			pages = append(pages, pageInfo{path: n.Path})
		}
		e := []byte{byte(up)}
		switch n.Kind {
		case flox.Directory:
			span, dirs := below(i)
			e = uv(uv(str(append(e, 2), name), span), dirs)
		case flox.Symlink:
			e = str(str(append(e, 3), name), n.Target)
		case flox.Regular:
			form, rest := encodeFile(n.data)
			flags := 1 | form<<3
			if n.Executable {
				flags |= 4
			}
			e = append(uv(str(append(e, byte(flags)), name), len(n.data)), rest...)
		}
		page = append(page, e...)
		entries++
		cut := len(page) >= 98304 || len(page) >= 32768 && crc32.Checksum(e, crc32.MakeTable(crc32.Castagnoli))%512 == 0
		if cut || i == len(nodes)-1 {
			p := &pages[len(pages)-1]
			p.entries, p.size, p.offset = entries, len(page), offset
			entries = 0
			if len(pages) > 1 || i < len(nodes)-1 {
				p.id = add(page)
			}
		}
	}
	b := append([]byte("FXM1"), 1)
	_, dirs := below(0)
	flags := byte(nodes[0].Kind)
	if nodes[0].Executable {
		flags |= 4
	}
	for _, v := range []int{8192, 32768, 131072, 256, len(nodes), narSize} {
		b = uv(b, v)
	}
	b = uv(uv(append(b, flags), dirs), len(pages))
	if len(pages) == 1 {
		return add(append(b, page...)), blocks
	}
	pages[0].offset = 0
	for i, p := range pages {
		before := pageInfo{}
		if i > 0 {
			before = pages[i-1]
		}
		shared := 0
		for shared < len(p.path) && shared < len(before.path) && p.path[shared] == before.path[shared] {
			shared++
		}
		b = str(uv(b, shared), p.path[shared:])
		b = uv(uv(uv(b, p.entries), p.size), p.offset-before.offset)
		b = append(b, p.id[:]...)
	}
	return add(b), blocks
}

// wideTree has long names, deep directories and entries around page ends.
func wideTree() []node {
	nodes := []node{dirNode("")}
	deep := ""
	for i := range 62 {
		deep = joinPath(deep, fmt.Sprintf("a%0*d", i%50, i))
		nodes = append(nodes, dirNode(deep))
	}
	for i := range 900 {
		nodes = append(nodes, fileNode(fmt.Sprintf("%s/%03d%s", deep, i, strings.Repeat("n", i%200)), random(uint64(i), i%400)))
	}
	for i := range 700 {
		nodes = append(nodes, linkNode(fmt.Sprintf("b%04d", i), strings.Repeat("../", i%300+1)))
	}
	return nodes
}

// hugeFileTree has a file of more chunks than one list holds.
func hugeFileTree() []node {
	return []node{dirNode(""), fileNode("a", []byte("before")), fileNode("huge", random(99, 100<<20)), fileNode("z", random(98, 40<<10))}
}

func goldenTrees() map[string][]node {
	return map[string][]node{
		"small":  smallTree(),
		"pages":  bigTree(5000),
		"wide":   wideTree(),
		"huge":   hugeFileTree(),
		"file":   {fileNode("", random(6, 300<<10))},
		"empty":  {fileNode("", nil)},
		"link":   {linkNode("", "target")},
		"script": {{nix.NarEntry{Kind: flox.Regular, Executable: true, Size: 10}, []byte("#!/bin/sh\n")}},
	}
}

// Two encoders that share no code give the same blocks, and the names of the
// manifests are those committed: signatures depend on them for ever.
func TestTwoEncodersAgree(t *testing.T) {
	got := make(map[string]string)
	for name, nodes := range goldenTrees() {
		mem := &Memory{}
		m, in, nar := ingestNodes(t, mem, nodes)
		id, blocks := naive(nodes, len(nar))
		if id != in.Manifest {
			t.Errorf("%s: manifest %s, the second encoder says %s", name, in.Manifest, id)
		}
		for id, want := range blocks {
			if b, err := mem.Get(context.Background(), id); err != nil || !bytes.Equal(b, want) {
				t.Errorf("%s: block %s of %d bytes: %v", name, id, len(want), err)
			}
		}
		if n, _ := mem.Len(); n != len(blocks) {
			t.Errorf("%s: %d blocks, the second encoder made %d", name, n, len(blocks))
		}
		checkBlocks(t, m, blocks)
		got[name] = in.Manifest.String()
	}
	path := filepath.Join("testdata", "golden.txt")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		var b bytes.Buffer
		for _, name := range sortedKeys(got) {
			fmt.Fprintln(&b, name, got[name])
		}
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		name, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		want[name] = id
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

// checkBlocks checks that Blocks names each block with its size.
func checkBlocks(t *testing.T, m *Manifest, want map[flox.CID][]byte) {
	t.Helper()
	sizes, got := make(map[flox.CID]int), make(map[flox.CID]int)
	for id, b := range want {
		sizes[id] = len(b)
	}
	err := m.Blocks(context.Background(), func(id flox.CID, size uint32) bool {
		got[id] = int(size)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sizes, got); diff != "" {
		t.Error(diff)
	}
}

// The chunker's table is a part of the format, and comes from a library.
func TestGearTable(t *testing.T) {
	var b []byte
	for _, v := range fastcdc.G {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	const want = "bafkr4igjjqlg4jgekfphrvbtzzaqeh5rcagb7uvgbz4st6usizmr5cnjpq"
	if got := Hash(b).String(); got != want {
		t.Fatalf("the table hashes to %s, want %s", got, want)
	}
}
