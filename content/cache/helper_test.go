package cache

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/zeebo/blake3"
	"go.uber.org/goleak"

	"github.com/floxctl/flox"
)

func TestMain(m *testing.M) {
	if role := os.Getenv("FLOXD_TEST_CACHE_WRITER"); role != "" {
		writer(role)
		return
	}
	// What is quick enough for every run; -rapid.checks=1000 looks longer.
	if f := flag.Lookup("rapid.checks"); f != nil {
		_ = f.Value.Set("30")
	}
	goleak.VerifyTestMain(m)
}

// sample is content with the chunks a manifest would list.
type sample struct {
	File
	data   []byte
	chunks []flox.Chunk
	offs   []int64
}

// newSample gives the same content for the same arguments. No byte of it is
// zero, so that a hole never looks like content.
func newSample(n uint64, size, chunk int) *sample {
	rng := rand.New(rand.NewPCG(n, uint64(size)))
	s := &sample{data: make([]byte, size)}
	var word uint64
	for i := range s.data {
		if i%8 == 0 {
			word = rng.Uint64() | 0x0101010101010101
		}
		s.data[i] = byte(word >> (i % 8 * 8))
	}
	s.File = File{blake3.Sum256(s.data), int64(size)}
	for off := 0; off < size; {
		// Sizes differ, as content-defined ones do.
		end := min(size, off+max(1, chunk/2+int(rng.UintN(uint(chunk)))))
		if size <= chunk {
			end = size
		}
		s.chunks = append(s.chunks, flox.Chunk{ID: blake3.Sum256(s.data[off:end]), Size: uint32(end - off)})
		s.offs = append(s.offs, int64(off))
		off = end
	}
	return s
}

func (s *sample) chunk(i int) []byte {
	return s.data[s.offs[i] : s.offs[i]+int64(s.chunks[i].Size)]
}

func (s *sample) put(c *Cache, i int) error {
	return c.PutChunk(context.Background(), s.File, s.offs[i], s.chunks[i], s.chunk(i))
}

func (s *sample) putAll(t testing.TB, c *Cache) {
	t.Helper()
	for i := range s.chunks {
		if err := s.put(c, i); err != nil {
			t.Fatalf("put chunk %d: %v", i, err)
		}
	}
}

// look reads [off, off+n) as a mount does: unverified chunks are verified and
// read again. It fails if a Hit gives wrong bytes.
func (s *sample) look(c *Cache, off, n int64, node uint64) (State, error) {
	p := make([]byte, n)
	for range 2 {
		got, st := c.ReadAt(s.File, p, off, node)
		switch st {
		case Hit:
			want := s.data[off:min(off+n, s.Size)]
			if !bytes.Equal(p[:got], want) {
				return st, fmt.Errorf("file %s: wrong bytes in [%d, %d), first at %d", s.ID, off, off+n, off+int64(diff(p[:got], want)))
			}
			return st, nil
		case Miss:
			return st, nil
		}
		for i := range s.chunks {
			if s.offs[i] < off+n && s.offs[i]+int64(s.chunks[i].Size) > off {
				if _, err := c.Verify(context.Background(), s.File, s.offs[i], s.chunks[i]); err != nil {
					return st, err
				}
			}
		}
	}
	if _, st := c.ReadAt(s.File, p, off, node); st == Unverified {
		return st, fmt.Errorf("file %s: unverified after verifying", s.ID)
	}
	return Miss, nil
}

func (s *sample) read(t testing.TB, c *Cache, off, n int64, node uint64) State {
	t.Helper()
	st, err := s.look(c, off, n, node)
	if err != nil {
		t.Error(err)
	}
	return st
}

func (s *sample) readAll(t testing.TB, c *Cache, node uint64) State {
	t.Helper()
	return s.read(t, c, 0, s.Size, node)
}

func diff(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// small is a configuration in which a few MB have many segments and packs.
func small(dir string) Config {
	return Config{
		Dir: dir, Budget: 64 << 20, Reserve: 1, BootID: "test",
		segment: 256 << 10, small: 32 << 10, pack: 256 << 10,
		wait: func(context.Context, time.Duration) error { return nil },
	}
}

func open(t testing.TB, cfg Config) *Cache {
	t.Helper()
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// crash lets go of a cache as kill -9 does: nothing is flushed or marked.
func crash(c *Cache) {
	c.evicting <- struct{}{}
	_ = c.release()
	<-c.evicting
}

func is(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}
