package pack

import (
	"bytes"
	"context"
	"io"
	"os"
	"testing"

	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// benchNar is the NAR of $CONTENT_BENCH_TREE, or else of the Go library's sources.
func benchNar(b *testing.B) []byte {
	b.Helper()
	tree := os.Getenv("CONTENT_BENCH_TREE")
	if tree == "" {
		tree = "/usr/share"
	}
	var nar bytes.Buffer
	if err := nix.DumpPath(context.Background(), &nar, tree); err != nil {
		b.Skip(err)
	}
	return nar.Bytes()
}

func BenchmarkIngest(b *testing.B) {
	nar := benchNar(b)
	b.SetBytes(int64(len(nar)))
	for b.Loop() {
		s, err := Open(Config{Dir: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := content.Ingest(context.Background(), bytes.NewReader(nar), s, content.IngestOptions{}); err != nil {
			b.Fatal(err)
		}
		st := s.Stat()
		b.ReportMetric(float64(st.DiskBytes)/float64(len(nar)), "disk/nar")
		b.ReportMetric(float64(st.Blocks), "blocks")
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRebuild(b *testing.B) {
	ctx := context.Background()
	nar := benchNar(b)
	s := open(b, Config{Dir: b.TempDir()})
	got, err := content.Ingest(ctx, bytes.NewReader(nar), s, content.IngestOptions{})
	if err != nil {
		b.Fatal(err)
	}
	m, err := content.OpenManifest(ctx, got.Manifest, s)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("plain", func(b *testing.B) {
		b.SetBytes(int64(len(nar)))
		for b.Loop() {
			if err := m.WriteNar(ctx, io.Discard, s.Checksummed(), 0, -1); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("zstd", func(b *testing.B) {
		b.SetBytes(int64(len(nar)))
		for b.Loop() {
			if err := m.WriteNarZstd(ctx, io.Discard, s.Stored); err != nil {
				b.Fatal(err)
			}
		}
	})
}
