package pack

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
)

// A thousand flipped bits and cut files, in packs and index, in a store that is
// open and in one that is closed: no reader ever gets wrong bytes, every block that
// was hurt is reported or found by a scrub, and afterwards everything is there.
func TestThousandDamages(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	const n, damages = 40, 1000
	lost := make(map[flox.CID]bool)
	cfg := Config{Dir: t.TempDir(), PackSize: 96 << 10, Reserve: 1, Lost: func(id flox.CID) { lost[id] = true }}
	s := open(t, cfg)
	put(t, s, 0, n)
	blocks := make(map[flox.CID][]byte)
	for i := range n {
		id, b := block(i)
		blocks[id] = b
	}
	rng := rand.New(rand.NewPCG(21, 22))
	kinds := map[string]int{}
	for done := 0; done < damages; {
		closed := rng.IntN(2) == 0
		if closed {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		} else if err := flushed(ctx, s); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if kind := hurtFile(t, rng, cfg.Dir, !closed); kind != "none" {
				kinds[kind]++
				done++
			}
		}
		if closed {
			s = open(t, cfg)
		}
		readOnlyTruth(t, s, blocks)
		// A scrub repairs what it finds; blocks that were lost are put again.
		repair := func(_ context.Context, id flox.CID) ([]byte, error) { return blocks[id], nil }
		var left []error
		_, err := s.ScrubWith(ctx, ScrubOptions{Repair: repair}, func(id flox.CID, err error) {
			if id != (flox.CID{}) {
				left = append(left, err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if s.index.rotten() {
			kinds["found while open"]++
			if err := s.mend(ctx); err != nil {
				t.Fatal(err)
			}
		} else if len(left) > 0 {
			t.Fatalf("not repaired: %v", left)
		}
		for id, b := range blocks {
			has, err := s.Has(ctx, []flox.CID{id})
			if err != nil {
				t.Fatal(err)
			}
			if !has[0] && !lost[id] && !lost[flox.CID{}] {
				t.Fatalf("block %s is gone and nobody said so", id)
			}
			if err := s.Put(ctx, id, b); err != nil {
				t.Fatal(err)
			}
		}
		clear(lost)
		// What the first scrub could not reach behind a damaged index.
		if _, err := s.ScrubWith(ctx, ScrubOptions{Repair: repair}, func(id flox.CID, err error) { t.Errorf("%s: %v", id, err) }); err != nil {
			t.Fatal(err)
		}
		readOnlyTruth(t, s, blocks)
		if s.Stat().Packs > 20 {
			_, err := s.Sweep(ctx, func(id flox.CID) bool { return blocks[id] != nil })
			if errors.Is(err, flox.ErrBusy) && s.index.rotten() { // only now was that part of the index read
				kinds["found while open"]++
				err = s.mend(ctx)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("damages: %v", kinds)
	if kinds["index"] < damages/10 || kinds["pack"] < damages/10 || kinds["found while open"] < 10 {
		t.Fatalf("too little was hurt: %v", kinds)
	}
	wantBlocks(t, s, 0, n)
	noBadBlocks(t, s)
}

// A process dies before its index was written, and a frame that only the pack knew
// is damaged: nobody can name the block, but that something may be lost is said.
func TestBlockThatNobodyKnowsIsSaidToBeLost(t *testing.T) {
	t.Parallel()
	for name, last := range map[string]int{"at the end": 1, "before others": 2} {
		t.Run(name, func(t *testing.T) {
			s := open(t, Config{Dir: t.TempDir(), Reserve: 1})
			put(t, s, 0, 1)
			if err := flushed(context.Background(), s); err != nil {
				t.Fatal(err)
			}
			put(t, s, 1, last+1)
			l, err := s.lookup(mustBlock(1))
			if err != nil {
				t.Fatal(err)
			}
			said := 0
			dead := Config{Dir: t.TempDir(), Reserve: 1, Lost: func(flox.CID) { said++ }}
			if err := os.CopyFS(dead.Dir, os.DirFS(s.cfg.Dir)); err != nil {
				t.Fatal(err)
			}
			pack, err := filepath.Rel(s.cfg.Dir, s.packPath(l.pack))
			if err == nil {
				err = tryFlip(filepath.Join(dead.Dir, pack), int64(l.off)+8, 4) // in the header
			}
			if err != nil {
				t.Fatal(err)
			}
			again := open(t, dead)
			if has, err := again.Has(context.Background(), []flox.CID{mustBlock(0), mustBlock(1)}); err != nil || !has[0] || has[1] {
				t.Fatalf("has %v, %v: want the first block alone", has, err)
			}
			if said == 0 {
				t.Error("a block is gone and nobody said so")
			}
		})
	}
}

// flushed makes the index write its tables, so that there is something to hurt.
func flushed(ctx context.Context, s *Store) error {
	return errors.Join(s.Sync(ctx), s.index.db.Flush())
}

// hurtFile flips a bit of a file or cuts it. Of an open index only the tables are
// read again.
func hurtFile(t *testing.T, rng *rand.Rand, dir string, isOpen bool) string {
	t.Helper()
	kind, pattern := "pack", filepath.Join(dir, "packs", "*.pack")
	if rng.IntN(2) == 0 {
		kind, pattern = "index", filepath.Join(dir, currentIndex(dir), "*")
		if isOpen {
			pattern += ".sst"
		}
	}
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("nothing like %s: %v", pattern, err)
	}
	path := files[rng.IntN(len(files))]
	size := int64(0)
	if st, statErr := os.Stat(path); statErr == nil {
		size = st.Size()
	}
	switch {
	case size == 0:
		return "none"
	case rng.IntN(10) == 0:
		kind, err = kind+" cut", os.Truncate(path, rng.Int64N(size))
	default:
		err = tryFlip(path, rng.Int64N(size), 1<<rng.IntN(8))
	}
	if err != nil {
		return "none" // an open index adds and removes tables
	}
	return kind
}

// readOnlyTruth reads every block: what comes must be right.
func readOnlyTruth(t *testing.T, s *Store, blocks map[flox.CID][]byte) {
	t.Helper()
	ctx := context.Background()
	for id, want := range blocks {
		for name, from := range map[string]flox.Blocks{"get": s, "checksummed": s.Checksummed()} {
			got, err := from.Get(ctx, id)
			if err == nil && !bytes.Equal(got, want) {
				t.Fatalf("%s %s: wrong bytes", name, id)
			}
			if err != nil && !errors.Is(err, flox.ErrCorrupt) && !errors.Is(err, flox.ErrNotFound) {
				t.Fatalf("%s %s: %v", name, id, err)
			}
		}
		stored, zstd, err := s.Stored(ctx, id)
		if err == nil && zstd {
			stored, err = s.dec.DecodeAll(stored, nil)
		}
		if err == nil && !bytes.Equal(stored, want) {
			t.Fatalf("stored %s: wrong bytes", id)
		}
	}
}

// While the index is damaged uploads and reads go on, and Run makes it anew under
// them: what was put before, while it was damaged, and after, is there.
func TestRunMendsInUse(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	lost := make(chan flox.CID, 1000)
	s := open(t, Config{Dir: t.TempDir(), PackSize: 96 << 10, Lost: func(id flox.CID) { lost <- id }})
	put(t, s, 0, 100)
	if err := flushed(ctx, s); err != nil {
		t.Fatal(err)
	}
	l, err := s.lookup(mustBlock(5))
	if err != nil {
		t.Fatal(err)
	}
	// A pack is cut as well: the old index still knows what was in it.
	if err := os.Truncate(s.packPath(l.pack), int64(l.off)+3); err != nil {
		t.Fatal(err)
	}
	for try := int64(3); !s.index.rotten(); try++ {
		tables, err := filepath.Glob(filepath.Join(s.cfg.Dir, currentIndex(s.cfg.Dir), "*.sst"))
		if err != nil || len(tables) == 0 || try == 20 {
			t.Fatalf("tables %v: the damage was not noted: %v", tables, err)
		}
		for _, path := range tables {
			// One that is just written, or goes just now, does not count.
			if st, err := os.Stat(path); err == nil && st.Size() > 0 {
				_ = tryFlip(path, st.Size()/try, 4)
			}
		}
		scrubbed(t, s)
	}
	put(t, s, 100, 150)
	wantBlocks(t, s, 100, 150)
	if _, err := s.Sweep(ctx, func(flox.CID) bool { return true }); err != nil && !errors.Is(err, flox.ErrBusy) && !errors.Is(err, flox.ErrCorrupt) {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- s.Run(ctx) }()
	named := make(map[flox.CID]bool)
	for !named[mustBlock(5)] && !named[flox.CID{}] {
		named[<-lost] = true
		put(t, s, 150, 200)
	}
	for s.index.rotten() {
		put(t, s, 200, 210)
	}
	cancel()
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	put(t, s, 0, 210)
	wantBlocks(t, s, 0, 210)
	noBadBlocks(t, s)
}

func mustBlock(i int) flox.CID {
	id, _ := block(i)
	return id
}
