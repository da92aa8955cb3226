package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

func TestIngestSmallIsIngest(t *testing.T) {
	for name, nodes := range map[string][]node{
		"empty file": {fileNode("", nil)}, "inline": {fileNode("", []byte("hello"))}, "chunk": {fileNode("", random(1, 5000))},
		"chunks": {fileNode("", random(2, 200_000))}, "link": {linkNode("", "/x")},
		"tree": {dirNode(""), fileNode("a", random(3, 100)), fileNode("b", random(4, 9000)), dirNode("c"), fileNode("c/d", random(5, 60_000)), linkNode("c/e", "d"), fileNode("f", random(4, 9000))},
	} {
		nar := narOf(t, nodes)
		want, one := &Memory{}, &Memory{}
		all, err := Ingest(t.Context(), bytes.NewReader(nar), want, IngestOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := IngestSmall(t.Context(), nar, one)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(all, got); d != "" {
			t.Errorf("%s (-Ingest +IngestSmall): %s", name, d)
		}
		if d := cmp.Diff(want.blocks, one.blocks); d != "" {
			t.Errorf("%s: other blocks: %s", name, d)
		}
		if _, err := IngestSmall(t.Context(), append(bytes.Clone(nar), 0), one); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: bytes behind its end: %v", name, err)
		}
		if _, err := IngestSmall(t.Context(), nar[:len(nar)-1], one); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: an end too early: %v", name, err)
		}
	}
	if _, err := IngestSmall(t.Context(), make([]byte, MaxSmallNar+1), &Memory{}); !errors.Is(err, flox.ErrBadInput) {
		t.Error("a NAR that is too large: ", err)
	}
	full := errors.New("full")
	if _, err := IngestSmall(t.Context(), narOf(t, []node{fileNode("", random(1, 5000))}), failing{full}); !errors.Is(err, full) {
		t.Error("a sink that fails: ", err)
	}
}

// failing is a sink without room.
type failing struct{ err error }

func (f failing) Put(context.Context, flox.CID, []byte) error { return f.err }
func (f failing) Sync(context.Context) error                  { return f.err }

func BenchmarkIngestSmall(b *testing.B) {
	nar := narOf(b, []node{fileNode("", random(1, 1500))})
	mem := &Memory{}
	for b.Loop() {
		if _, err := IngestSmall(b.Context(), nar, mem); err != nil {
			b.Fatal(err)
		}
	}
}

func TestCheckAddress(t *testing.T) {
	const dir, dep = flox.DefaultStoreDir, flox.StorePath("00000000000000000000000000000000-dep")
	text := random(7, 3000)
	file, tree := []node{fileNode("", text)}, []node{dirNode(""), fileNode("a", text), fileNode("b", []byte("b"))}
	exec := []node{fileNode("", text)}
	exec[0].Executable = true
	sum := func(algo nix.HashAlgo, b []byte) nix.Hash {
		h := algo.New()
		h.Write(b)
		return nix.Hash{Algo: algo, Sum: h.Sum(nil)}
	}
	check := func(what string, good bool, nodes []node, method nix.CAMethod, h nix.Hash, refs ...flox.StorePath) {
		t.Helper()
		mem := &Memory{}
		m, got, _ := ingestNodes(t, mem, nodes)
		ca := nix.ContentAddress{Method: method, Hash: h}
		p, err := ca.Path(dir, "x", refs, false)
		if err != nil {
			t.Fatal(err)
		}
		info := &flox.PathInfo{Path: p, CA: ca.String(), References: refs, NarHash: got.NarHash, NarSize: got.NarSize}
		err = CheckAddress(t.Context(), dir, info, m, mem)
		if good != (err == nil) || (err != nil && !errors.Is(err, flox.ErrBadInput)) {
			t.Errorf("%s: %v", what, err)
		}
		info.Path = flox.StorePath("1111" + string(p[4:]))
		if err := CheckAddress(t.Context(), dir, info, m, mem); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s under another name: %v", what, err)
		}
	}
	nar := narOf(t, tree)
	check("text", true, file, nix.CAText, sum(nix.SHA256, text))
	check("text with references", true, file, nix.CAText, sum(nix.SHA256, text), dep)
	check("other text", false, file, nix.CAText, sum(nix.SHA256, text[1:]))
	check("text that is a tree", false, tree, nix.CAText, sum(nix.SHA256, text))
	check("text that is executable", false, exec, nix.CAText, sum(nix.SHA256, text))
	check("inline text", true, []node{fileNode("", []byte("t"))}, nix.CAText, sum(nix.SHA256, []byte("t")))
	check("no text", true, []node{fileNode("", nil)}, nix.CAText, sum(nix.SHA256, nil))
	for _, algo := range []nix.HashAlgo{nix.MD5, nix.SHA1, nix.SHA256, nix.SHA512} {
		check("flat", true, file, nix.CAFlat, sum(algo, text))
		check("another flat", false, file, nix.CAFlat, sum(algo, text[1:]))
		check("recursive", true, tree, nix.CANar, sum(algo, nar))
		check("another recursive", false, tree, nix.CANar, sum(algo, nar[1:]))
	}
	check("recursive with references", true, tree, nix.CANar, sum(nix.SHA256, nar), dep)
}

// A path that mentions itself is hashed without that.
func TestCheckAddressOfWhatMentionsItself(t *testing.T) {
	const dir = flox.DefaultStoreDir
	make := func(hashPart string) []node {
		return []node{dirNode(""), fileNode("a", append(random(9, 20_000), hashPart+" and "+hashPart...))}
	}
	// The path follows from the content with another hash part of that length left out.
	const stand = "0123456789abcdfghijklmnpqrsvwxyz"
	h := nix.NewModuloHash(nix.SHA256, stand)
	if _, err := h.Write(narOf(t, make(stand))); err != nil {
		t.Fatal(err)
	}
	ca := nix.ContentAddress{Method: nix.CANar, Hash: h.Sum()}
	p, err := ca.Path(dir, "x", nil, true)
	if err != nil {
		t.Fatal(err)
	}
	mem := &Memory{}
	m, got, nar := ingestNodes(t, mem, make(p.HashPart()))
	info := &flox.PathInfo{Path: p, CA: ca.String(), References: []flox.StorePath{p}, NarHash: got.NarHash, NarSize: got.NarSize}
	if err := CheckAddress(t.Context(), dir, info, m, mem); err != nil {
		t.Error(err)
	}
	info.CA = nix.ContentAddress{Method: nix.CANar, Hash: nix.SHA256Hash(sha256.Sum256(nar))}.String()
	if err := CheckAddress(t.Context(), dir, info, m, mem); !errors.Is(err, flox.ErrBadInput) {
		t.Error("by the plain hash of its NAR: ", err)
	}
}
