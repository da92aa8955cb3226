package pack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		crashChild()
		return
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	if cfg.Reserve == 0 {
		cfg.Reserve = 1
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// block gives the i-th test block: of varying size, every second one compressible.
func block(i int) (flox.CID, []byte) {
	rng := rand.New(rand.NewPCG(uint64(i), 7))
	b := make([]byte, 1+rng.IntN(20_000))
	for k := range b {
		if b[k] = byte(rng.Uint32()); i%2 == 0 {
			b[k] &= 3
		}
	}
	return content.Hash(b), b
}

func put(t testing.TB, s flox.BlockSink, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		id, b := block(i)
		if err := s.Put(context.Background(), id, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func wantBlocks(t testing.TB, s *Store, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		id, b := block(i)
		got, err := s.Get(context.Background(), id)
		if err != nil || !bytes.Equal(got, b) {
			t.Fatalf("block %d: %d bytes, want %d: %v", i, len(got), len(b), err)
		}
	}
}

// What was put is there, before and after Sync, across packs, after reopening,
// and after the index was lost.
func TestPutGet(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := t.TempDir()
	cfg := Config{Dir: dir, PackSize: 256 << 10, Reserve: 1}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	id, b := block(0)
	if err := s.Put(ctx, id, b); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, s, 0, 1)
	put(t, s, 0, 300)
	put(t, s, 100, 300) // again: nothing happens
	st := s.Stat()
	if st.Blocks != 300 || st.Packs < 5 || st.DiskBytes != st.StoredBytes+uint64(st.Packs*len(fileMagic)) {
		t.Fatalf("stat %+v", st)
	}
	wantBlocks(t, s, 0, 300)
	if _, err := s.Get(ctx, content.Hash([]byte("none"))); !errors.Is(err, flox.ErrNotFound) {
		t.Fatalf("a block that is not there: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, id); !errors.Is(err, flox.ErrClosed) {
		t.Fatalf("closed: %v", err)
	}
	for _, lost := range []string{"", "index"} {
		if lost != "" {
			if err := os.RemoveAll(filepath.Join(dir, lost)); err != nil {
				t.Fatal(err)
			}
		}
		s := open(t, cfg)
		wantBlocks(t, s, 0, 300)
		if got := s.Stat(); got != st {
			t.Fatalf("without %q: stat %+v, want %+v", lost, got, st)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Put refuses bytes that are not what names them, Open a second user and bad
// configurations.
func TestRefusals(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	if err := s.Put(ctx, flox.CID{1}, []byte("x")); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("wrong name: %v", err)
	}
	big := make([]byte, content.MaxBlock+1)
	if err := s.Put(ctx, content.Hash(big), big); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too big: %v", err)
	}
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, flox.ErrBusy) || !bytes.Contains([]byte(err.Error()), fmt.Append(nil, os.Getpid())) {
		t.Errorf("second open: %v", err)
	}
	for _, cfg := range []Config{{}, {Dir: dir, PackSize: 1}, {Dir: dir, PackSize: 1 << 40}} {
		if _, err := Open(cfg); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	if err := open(t, Config{Dir: t.TempDir(), Reserve: 1 << 62}).Put(ctx, content.Hash(nil), nil); !errors.Is(err, flox.ErrFull) {
		t.Errorf("reserve: %v", err)
	}
}

// Many writers and readers at once lose and double nothing.
func TestConcurrentPuts(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := open(t, Config{Dir: t.TempDir(), PackSize: 128 << 10})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for k := range 150 {
				i := (k*7 + w*13) % 150
				id, b := block(i)
				if err := s.Put(ctx, id, b); err != nil {
					t.Error(err)
				}
				if got, err := s.Get(ctx, id); err != nil || !bytes.Equal(got, b) {
					t.Errorf("block %d: %v", i, err)
				}
				if k%20 == 0 {
					if err := s.Sync(ctx); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	st := s.Stat()
	if st.Blocks != 150 || st.DiskBytes != st.StoredBytes+uint64(st.Packs*len(fileMagic)) {
		t.Fatalf("stat %+v: a block is there twice", st)
	}
}

// Stored gives what decodes to the block, Has and Size tell of it.
func TestStored(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := open(t, Config{Dir: t.TempDir()})
	put(t, s, 0, 20)
	compressed := 0
	for i := range 20 {
		id, b := block(i)
		data, zstd, err := s.Stored(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		plain, stored, err := s.Size(ctx, id)
		if err != nil || int(plain) != len(b) || int(stored) != len(data) {
			t.Fatalf("block %d: sizes %d and %d, want %d and %d: %v", i, plain, stored, len(b), len(data), err)
		}
		if zstd {
			compressed++
			if data, err = s.dec.DecodeAll(data, nil); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(data, b) {
			t.Fatalf("block %d differs", i)
		}
	}
	if compressed == 0 || compressed == 20 {
		t.Fatalf("%d of 20 blocks are compressed, want some", compressed)
	}
	here, _ := block(3)
	there, err := s.Has(ctx, []flox.CID{here, {9}})
	if err != nil || !there[0] || there[1] {
		t.Fatalf("has %v: %v", there, err)
	}
}

// A sweep takes what is not live, gives the room back, and spares what an open
// session counts on.
func TestSweep(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := t.TempDir()
	cfg := Config{Dir: dir, PackSize: 128 << 10, Reserve: 1}
	s := open(t, cfg)
	put(t, s, 0, 300)
	before := s.Stat()
	live := make(map[flox.CID]bool)
	for i := 0; i < 300; i += 10 {
		id, _ := block(i)
		live[id] = true
	}
	session := s.Session()
	put(t, session, 55, 58)   // were there before
	put(t, session, 300, 310) // are new
	done, err := s.Sweep(ctx, func(id flox.CID) bool { return live[id] })
	if err != nil {
		t.Fatal(err)
	}
	after := s.Stat()
	if after.Blocks != 30+3+10 || done.Blocks != 300-30-3 || after.DiskBytes > before.DiskBytes/2 || done.Bytes <= 0 {
		t.Fatalf("swept %+v, before %+v, after %+v", done, before, after)
	}
	wantBlocks(t, s, 55, 58)
	wantBlocks(t, s, 300, 310)
	session.Close()
	if _, err := s.Sweep(ctx, func(id flox.CID) bool { return live[id] }); err != nil {
		t.Fatal(err)
	}
	if got := s.Stat().Blocks; got != 30 {
		t.Fatalf("%d blocks without the session, want 30", got)
	}
	noBadBlocks(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	for i := 0; i < 300; i += 10 {
		wantBlocks(t, s, i, i+1)
	}
}

// Readers and sessions go on during sweeps: no reader of a live block fails, and
// no session loses a block it put.
func TestSweepDuringUse(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	s := open(t, Config{Dir: t.TempDir(), PackSize: 64 << 10})
	put(t, s, 0, 100)
	live := make(map[flox.CID]bool)
	for i := 0; i < 100; i += 5 {
		id, _ := block(i)
		live[id] = true
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			for i := 0; i < 100; i += 5 {
				id, b := block(i)
				if got, err := s.Get(context.Background(), id); err != nil || !bytes.Equal(got, b) {
					t.Errorf("live block %d: %v", i, err)
				}
			}
		}
	})
	for round := range 10 {
		wg.Go(func() {
			session := s.Session()
			defer session.Close()
			put(t, session, 10*round, 10*round+10)
			for i := 10 * round; i < 10*round+10; i++ {
				id, _ := block(i)
				if _, err := s.Get(context.Background(), id); err != nil {
					t.Errorf("block %d of an open session: %v", i, err)
				}
			}
		})
		if _, err := s.Sweep(ctx, func(id flox.CID) bool { return live[id] }); err != nil {
			t.Error(err)
		}
	}
	cancel()
	wg.Wait()
	noBadBlocks(t, s)
}

func noBadBlocks(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Scrub(context.Background(), func(id flox.CID, err error) { t.Errorf("scrub: %s: %v", id, err) }); err != nil {
		t.Fatal(err)
	}
}
