package content

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// A NAR rebuilt from its manifest is the NAR that was taken in, whole and in
// every range.
func TestNarComesBack(t *testing.T) {
	trees := map[string][]node{
		"small":   smallTree(),
		"pages":   bigTree(5000),
		"file":    {fileNode("", random(6, 300<<10))},
		"inline":  {fileNode("", []byte("x"))},
		"nothing": {fileNode("", nil)},
		"link":    {linkNode("", "/nix/store/elsewhere")},
		"empty":   {dirNode("")},
	}
	for name, nodes := range trees {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			mem := &Memory{}
			m, _, nar := ingestNodes(t, mem, nodes)
			var b bytes.Buffer
			if err := m.WriteNar(ctx, &b, mem, 0, -1); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b.Bytes(), nar) {
				t.Fatalf("the NAR differs: %d bytes, want %d", b.Len(), len(nar))
			}
			rng := rand.New(rand.NewPCG(1, 2))
			for range 300 {
				off := rng.Int64N(int64(len(nar)) + 1)
				n := rng.Int64N(int64(len(nar))-off+2) - 1
				if rng.IntN(2) == 0 {
					n = rng.Int64N(300)
				}
				want := nar[off:]
				if n >= 0 && n < int64(len(want)) {
					want = want[:n]
				}
				b.Reset()
				if err := m.WriteNar(ctx, &b, mem, off, n); err != nil {
					t.Fatalf("range %d+%d: %v", off, n, err)
				}
				if !bytes.Equal(b.Bytes(), want) {
					t.Fatalf("range %d+%d differs", off, n)
				}
			}
			if err := m.WriteNar(ctx, io.Discard, mem, int64(len(nar))+1, 1); !errors.Is(err, flox.ErrBadInput) {
				t.Fatalf("behind the end: %v", err)
			}
		})
	}
}

// A NAR made of stored zstd frames decompresses to the NAR, whether chunks were
// stored compressed or not.
func TestNarZstd(t *testing.T) {
	ctx := context.Background()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, nodes := range [][]node{smallTree(), bigTree(3000), {fileNode("", random(6, 256<<10))}} {
		mem := &Memory{}
		m, _, nar := ingestNodes(t, mem, nodes)
		for _, compress := range []bool{true, false} {
			var b bytes.Buffer
			err := m.WriteNarZstd(ctx, &b, func(ctx context.Context, id flox.CID) ([]byte, bool, error) {
				data, err := mem.Get(ctx, id)
				if compress {
					data = enc.EncodeAll(data, nil)
				}
				return data, compress, err
			})
			if err != nil {
				t.Fatal(err)
			}
			dec, err := zstd.NewReader(&b)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(dec)
			dec.Close()
			if err != nil || !bytes.Equal(got, nar) {
				t.Fatalf("compress %v: %d bytes, want %d: %v", compress, len(got), len(nar), err)
			}
		}
	}
}

// A chunk that is missing, or not of the size the manifest says, ends the NAR
// with an error and not with wrong bytes.
func TestNarWithBadChunk(t *testing.T) {
	ctx := context.Background()
	mem := &Memory{}
	m, _, nar := ingestNodes(t, mem, smallTree())
	for name, c := range map[string]struct {
		get  func(flox.CID) ([]byte, error)
		want error
	}{
		"missing": {func(flox.CID) ([]byte, error) { return nil, flox.ErrNotFound }, flox.ErrNotFound},
		"short":   {func(flox.CID) ([]byte, error) { return []byte("x"), nil }, flox.ErrCorrupt},
	} {
		var b bytes.Buffer
		err := m.WriteNar(ctx, &b, blocksFunc(c.get), 0, -1)
		if !errors.Is(err, c.want) || !bytes.HasPrefix(nar, b.Bytes()) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type blocksFunc func(flox.CID) ([]byte, error)

func (f blocksFunc) Get(_ context.Context, id flox.CID) ([]byte, error) { return f(id) }

// The listing made from a manifest is the one made from the NAR.
func TestListing(t *testing.T) {
	for _, nodes := range [][]node{smallTree(), bigTree(2000)} {
		m, _, nar := ingestNodes(t, &Memory{}, nodes)
		var b nix.ListingBuilder
		r := nix.NewNarReader(bytes.NewReader(nar))
		for {
			e, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		want, err := b.Listing()
		if err != nil {
			t.Fatal(err)
		}
		got, err := m.Listing(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	}
}
