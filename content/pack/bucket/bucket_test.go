package bucket_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/pack/bucket"
	"github.com/floxctl/flox/content/pack/bucket/s3test"
)

// A bucket on a real S3 server and one in a directory behave alike.
func TestBucket(t *testing.T) {
	for name, where := range map[string]string{"s3": s3test.Start(t).URL(), "file": "file://" + t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			b, err := bucket.Open(ctx, where)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			if _, err := get(ctx, b, "packs/none", 0, -1); !errors.Is(err, flox.ErrNotFound) {
				t.Fatalf("an object that is not there: %v", err)
			}
			large := make([]byte, 12<<20) // several parts
			rng := rand.NewChaCha8([32]byte{1})
			_, _ = rng.Read(large)
			objects := map[string][]byte{"packs/a/1": large, "packs/a/2": []byte("two"), "packs/b/1": []byte("b"), "index/a/1": {}}
			for name, data := range objects {
				if err := b.Put(ctx, name, bytes.NewReader(data)); err != nil {
					t.Fatal(err)
				}
			}
			for name, data := range objects {
				if got, err := get(ctx, b, name, 0, -1); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%s: %d bytes, want %d: %v", name, len(got), len(data), err)
				}
			}
			if got, err := get(ctx, b, "packs/a/1", 5<<20, 1<<20); err != nil || !bytes.Equal(got, large[5<<20:6<<20]) {
				t.Fatalf("a range: %d bytes: %v", len(got), err)
			}
			if got, err := get(ctx, b, "packs/a/2", 1, 100); err != nil || string(got) != "wo" {
				t.Fatalf("a range over the end: %q: %v", got, err)
			}
			if got := names(t, b, "packs/a/"); !slices.Equal(got, []string{"packs/a/1", "packs/a/2"}) {
				t.Fatalf("list: %v", got)
			}
			for range 2 {
				if err := b.Delete(ctx, "packs/a/2"); err != nil {
					t.Fatal(err)
				}
			}
			if got := names(t, b, ""); len(got) != 3 {
				t.Fatalf("after delete: %v", got)
			}
		})
	}
}

// Whether a bucket is away, refuses the keys, or is written down wrongly is told
// apart; after it comes back it goes on.
func TestBucketAway(t *testing.T) {
	ctx := t.Context()
	for _, where := range []string{"", "gs://x", "file:///does/not/exist", "s3://x?colour=red"} {
		if _, err := bucket.Open(ctx, where); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q: %v", where, err)
		}
	}
	s3 := s3test.Start(t)
	b, err := bucket.Open(ctx, s3.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Put(ctx, "x", bytes.NewReader([]byte("y"))); err != nil {
		t.Fatal(err)
	}
	s3.Kill()
	if err := b.Put(ctx, "z", bytes.NewReader([]byte("y"))); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("put to nobody: %v", err)
	}
	if _, err := get(ctx, b, "x", 0, -1); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("get from nobody: %v", err)
	}
	s3.Restart()
	if got, err := get(ctx, b, "x", 0, -1); err != nil || string(got) != "y" {
		t.Fatalf("afterwards: %q: %v", got, err)
	}
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
	stranger, err := bucket.Open(ctx, s3.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if err := stranger.Put(ctx, "z", bytes.NewReader([]byte("y"))); err == nil {
		t.Fatal("a wrong key is taken")
	}
}

func get(ctx context.Context, b *bucket.Bucket, name string, off, n int64) ([]byte, error) {
	r, err := b.Get(ctx, name, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func names(t *testing.T, b *bucket.Bucket, prefix string) (names []string) {
	t.Helper()
	err := b.List(t.Context(), prefix, func(name string, _ int64, modified time.Time) error {
		if modified.IsZero() {
			t.Errorf("%s: no time", name)
		}
		names = append(names, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
