package content

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox"
)

const (
	version1File  = "manifest-1.gz"
	version1ID    = "bafkr4ia3uchk4n6hxvdyubvahkybmeee6zi5ejkxx6qaw5hl3j6vgvydam"
	version1Links = 900
)

// version1Tree is a directory of links, in more than one page.
func version1Tree() (nodes []node) {
	nodes = []node{dirNode("")}
	for i := range version1Links {
		nodes = append(nodes, linkNode(fmt.Sprintf("link-%04d", i), version1Target(i)))
	}
	return nodes
}

func version1Target(i int) string { return fmt.Sprintf("%04d%s", i, strings.Repeat("/up", 30)) }

// The blocks of a manifest of format version 1, as a cache or a peer has them
// from a program of that time, are read by this one: root block and pages.
func TestManifestOfVersion1(t *testing.T) {
	path := filepath.Join("testdata", version1File)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		writeVersion1(t, path)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	plain, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(plain)
	if err != nil {
		t.Fatal(err)
	}
	ctx, mem := context.Background(), &Memory{}
	var root []byte
	blocks := 0
	for ; len(all) > 0; blocks++ { // each behind its length, the root first
		n := binary.LittleEndian.Uint32(all)
		b := all[4 : 4+n]
		all = all[4+n:]
		if root == nil {
			root = b
		}
		if err := mem.Put(ctx, Hash(b), b); err != nil {
			t.Fatal(err)
		}
	}
	id := Hash(root)
	if id.String() != version1ID || blocks < 3 {
		t.Fatalf("%d blocks of the manifest %s, want %s and some pages", blocks, id, version1ID)
	}
	m, err := OpenManifest(ctx, id, mem)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, version1Links / 2, version1Links - 1} {
		_, e, err := m.Child(ctx, 0, fmt.Sprintf("link-%04d", i))
		if err != nil || e.Kind != flox.Symlink || e.Target != version1Target(i) {
			t.Errorf("link %d: %+v, %v", i, e, err)
		}
	}
	// One of a later version is not taken for damage of the disk.
	newer := bytes.Clone(root)
	newer[3]++
	if err := mem.Put(ctx, Hash(newer), newer); err != nil {
		t.Fatal(err)
	}
	_, err = OpenManifest(ctx, Hash(newer), mem)
	if !errors.Is(err, flox.ErrCorrupt) || !strings.Contains(err.Error(), "format version 2") || !strings.Contains(err.Error(), "newer floxd") {
		t.Errorf("a manifest of version 2: %v", err)
	}
}

func writeVersion1(t *testing.T, path string) {
	t.Helper()
	mem := &Memory{}
	m, in, _ := ingestNodes(t, mem, version1Tree())
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	for _, id := range append([]flox.CID{in.Manifest}, m.Pages()...) {
		b, err := mem.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(b))))
		w.Write(b)
	}
	if err := errors.Join(w.Close(), os.WriteFile(path, out.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}
