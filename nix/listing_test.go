package nix

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

func build(t testing.TB, nodes []node) *Listing {
	t.Helper()
	var b ListingBuilder
	for _, n := range nodes {
		if err := b.Add(n.NarEntry); err != nil {
			t.Fatal(err)
		}
	}
	l, err := b.Listing()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Building, streaming and parsing must agree on every tree.
func TestListingRoundTrip(t *testing.T) {
	for _, nodes := range [][]node{sorted(sampleTree()), {file("", "x")}, {link("", "\"\\\x01\n\t")}, {dir("")}, {dir(""), dir("a"), dir("a/b"), dir("c")}} {
		decoded, _, err := decode(bytes.NewReader(encode(t, nodes)))
		if err != nil {
			t.Fatal(err)
		}
		l := build(t, decoded)
		text, err := MarshalListing(l)
		if err != nil {
			t.Fatal(err)
		}
		var streamed bytes.Buffer
		w := NewListingWriter(&streamed)
		for _, n := range decoded {
			if err := w.Entry(n.NarEntry); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(text), streamed.String()); d != "" {
			t.Error(d)
		}
		again, err := ParseListing(text)
		if err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		if d := cmp.Diff(l, again); d != "" {
			t.Error(d)
		}
	}
}

func TestListingAccepts(t *testing.T) {
	for _, text := range []string{
		`{"version":1,"root":{"type":"regular","size":1,"executable":false,"narOffset":96}}`, // Nix 2.20 and later
		`{"root":{"type":"regular"},"version":1}`,
		" { \"version\" : 1 , \"root\" : { \"entries\" : { \"\u00e4\" : { \"target\" : \"t\" , \"type\" : \"symlink\" } } , \"type\" : \"directory\" } }\n",
		`{"version":1,"new":{"a":[1,{"b":null}]},"root":{"type":"directory","entries":{},"new":[[]]}}`,
	} {
		if _, err := ParseListing([]byte(text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestListingRefuses(t *testing.T) {
	root := func(node string) string { return `{"version":1,"root":` + node + `}` }
	for _, text := range []string{
		"", "null", "[]", "{}", `{"version":1}`, `{"version":2,"root":{"type":"regular","size":1}}`, `{"root":{"type":"regular","size":1}}`,
		root(`{"type":"regular","size":1}`) + "x", root(`{"type":"regular","size":1}`)[:20],
		root(`{}`), root(`null`), root(`{"type":"socket"}`), root(`{"type":"Regular"}`), root(`{"type":1}`),
		root(`{"type":"regular","size":-1}`), root(`{"type":"regular","size":1.5}`), root(`{"type":"regular","size":1e3}`), root(`{"type":"regular","size":"1"}`),
		root(`{"type":"regular","size":9223372036854775808}`), root(`{"type":"regular","size":1,"size":2}`), root(`{"type":"regular","executable":1}`),
		root(`{"type":"regular","entries":{}}`), root(`{"type":"regular","target":"x"}`), root(`{"type":"directory"}`), root(`{"type":"directory","entries":null}`),
		root(`{"type":"directory","entries":[]}`), root(`{"type":"directory","entries":{},"size":1}`), root(`{"type":"symlink"}`), root(`{"type":"symlink","target":""}`),
		root(`{"type":"symlink","target":"t","narOffset":1}`), root(`{"type":"symlink","target":"` + strings.Repeat("t", MaxNarTarget+1) + `"}`),
		root(`{"type":"directory","entries":{"":{"type":"regular"}}}`), root(`{"type":"directory","entries":{"..":{"type":"regular"}}}`),
		root(`{"type":"directory","entries":{"a/b":{"type":"regular"}}}`), root(`{"type":"directory","entries":{"a\u0000":{"type":"regular"}}}`),
		root(`{"type":"directory","entries":{"a":{"type":"regular"},"a":{"type":"regular"}}}`), root("{\"type\":\"directory\",\"entries\":{\"\xff\":{\"type\":\"regular\"}}}"),
		root(strings.Repeat(`{"type":"directory","entries":{"d":`, MaxNarDepth) + `{"type":"regular"}` + strings.Repeat("}}", MaxNarDepth)),
		strings.Repeat("[", 1<<20), root(strings.Repeat(`{"new":`, 1<<16)),
	} {
		if l, err := ParseListing([]byte(text)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%.200s: %v, %v", text, l, err)
		}
	}
}

func TestListingWriterRefuses(t *testing.T) {
	deep := &Listing{Kind: flox.Directory}
	for range MaxNarDepth {
		deep = &Listing{Kind: flox.Directory, Entries: map[string]*Listing{"d": deep}}
	}
	for _, l := range []*Listing{{}, deep, {Kind: flox.Directory, Entries: map[string]*Listing{"a/b": {Kind: flox.Regular}}}, {Kind: flox.Regular, Entries: map[string]*Listing{"a": {Kind: flox.Regular}}}} {
		if _, err := MarshalListing(l); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("got %v", err)
		}
	}
	if err := NewListingWriter(new(bytes.Buffer)).Close(); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("empty: %v", err)
	}
	if _, err := new(ListingBuilder).Listing(); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("empty: %v", err)
	}
}

func FuzzParseListing(f *testing.F) {
	text, err := MarshalListing(build(f, sorted(sampleTree())))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1,"root":{"type":"symlink","target":"t"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseListing(b)
		if err != nil {
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatal(err)
			}
			return
		}
		text, err := MarshalListing(l)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseListing(text)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(l, again); d != "" {
			t.Fatal(d)
		}
	})
}
