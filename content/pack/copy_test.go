package pack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// A rotten block that is replaced is whole again, also after the index was lost;
// one that was never there is simply put.
func TestReplace(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	cfg := Config{Dir: t.TempDir(), PackSize: 128 << 10, Reserve: 1}
	s := open(t, cfg)
	put(t, s, 0, 40)
	before := s.Stat()
	id, b := block(7)
	l, err := s.lookup(id)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, s.packPath(l.pack), int64(l.off)+headerSize, 1)
	if _, err := s.Get(ctx, id); !errors.Is(err, flox.ErrCorrupt) {
		t.Fatalf("the flip does nothing: %v", err)
	}
	if err := s.Replace(ctx, id, b[1:]); !errors.Is(err, flox.ErrCorrupt) {
		t.Fatalf("wrong bytes: %v", err)
	}
	newID, newBlock := block(40)
	for id, b := range map[flox.CID][]byte{id: b, newID: newBlock} {
		if err := s.Replace(ctx, id, b); err != nil {
			t.Fatal(err)
		}
	}
	wantBlocks(t, s, 0, 41)
	if after := s.Stat(); after.Blocks != before.Blocks+1 {
		t.Fatalf("%d blocks, want %d", after.Blocks, before.Blocks+1)
	}
	noBadBlocks(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(cfg.Dir, currentIndex(cfg.Dir))); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	wantBlocks(t, s, 0, 41)
	noBadBlocks(t, s)
}

// What one store gives as it keeps it, another keeps the same way; what is not
// the block is refused.
func TestPutStored(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	a, b := open(t, Config{Dir: t.TempDir()}), open(t, Config{Dir: t.TempDir()})
	plain := open(t, Config{Dir: t.TempDir(), Uncompressed: true})
	put(t, a, 0, 30)
	session := b.Session()
	defer session.Close()
	for i := range 30 {
		id, data := block(i)
		stored, zstd, err := a.Stored(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		other, _ := block(i + 1)
		if err := b.PutStored(ctx, other, stored, zstd); !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("block %d under another name: %v", i, err)
		}
		if err := b.PutStored(ctx, id, stored, !zstd); !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("block %d in a wrong form: %v", i, err)
		}
		for _, to := range []interface {
			PutStored(context.Context, flox.CID, []byte, bool) error
		}{session, plain} {
			if err := to.PutStored(ctx, id, stored, zstd); err != nil {
				t.Fatal(err)
			}
		}
		got, gotZstd, err := b.Stored(ctx, id)
		if err != nil || gotZstd != zstd || !bytes.Equal(got, stored) {
			t.Fatalf("block %d: kept as %d bytes, zstd %v, want %d, %v: %v", i, len(got), gotZstd, len(stored), zstd, err)
		}
		if got, gotZstd, err := plain.Stored(ctx, id); err != nil || gotZstd || !bytes.Equal(got, data) {
			t.Fatalf("block %d is not plain: %d bytes, zstd %v: %v", i, len(got), gotZstd, err)
		}
	}
	// 2 MiB of zeros in a few bytes.
	bomb := a.enc.EncodeAll(make([]byte, 2*content.MaxBlock), nil)
	if err := b.PutStored(ctx, content.Hash(make([]byte, 2*content.MaxBlock)), bomb, true); !errors.Is(err, flox.ErrCorrupt) {
		t.Fatalf("more than a block: %v", err)
	}
	wantBlocks(t, b, 0, 30)
	noBadBlocks(t, b)
}

// A copy that is taken in parts, each going on from the Cursor of the one before,
// across restarts, new blocks, sweeps and lost indexes, has everything.
func TestEachStoredGoesOn(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	cfg := Config{Dir: t.TempDir(), PackSize: 64 << 10, Reserve: 1}
	s, copied := open(t, cfg), open(t, Config{Dir: t.TempDir()})
	enough := errors.New("enough")
	var cursor Cursor
	take := func(n int) (taken int) {
		t.Helper()
		err := s.EachStored(ctx, cursor, func(c Cursor, id flox.CID, stored []byte, zstd bool) error {
			if taken == n {
				return enough
			}
			taken++
			cursor = c
			return copied.PutStored(ctx, id, stored, zstd)
		})
		if err != nil && !errors.Is(err, enough) {
			t.Fatal(err)
		}
		text, err := json.Marshal(cursor)
		if err != nil {
			t.Fatal(err)
		}
		cursor = Cursor{}
		if err := json.Unmarshal(text, &cursor); err != nil {
			t.Fatal(err)
		}
		return taken
	}
	lives := make(map[flox.CID]bool)
	for i := 0; i < 200; i += 3 {
		id, _ := block(i)
		lives[id] = true
	}
	live := func(id flox.CID) bool { return lives[id] }
	for round := range 20 {
		put(t, s, 10*round, 10*round+10)
		if got := take(7); got != 7 {
			t.Fatalf("round %d: %d blocks, want 7", round, got)
		}
		if round%5 == 4 {
			if _, err := s.Sweep(ctx, live); err != nil {
				t.Fatal(err)
			}
		}
		if round%3 == 2 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if round%2 == 0 {
				if err := os.RemoveAll(filepath.Join(cfg.Dir, currentIndex(cfg.Dir))); err != nil {
					t.Fatal(err)
				}
			}
			s = open(t, cfg)
		}
	}
	if _, err := s.Sweep(ctx, live); err != nil {
		t.Fatal(err)
	}
	put(t, s, 200, 210)
	take(-1)
	if got := take(-1); got != 0 {
		t.Fatalf("%d blocks behind the last", got)
	}
	for i := range 210 {
		if i%3 == 0 || i >= 200 {
			wantBlocks(t, copied, i, i+1)
		}
	}
	// An empty last pack that is swept away does not give its number to another.
	if _, err := s.Sweep(ctx, func(flox.CID) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	put(t, s, 300, 303)
	if got := take(-1); got != 3 {
		t.Fatalf("%d blocks since, want 3", got)
	}
	if err := s.EachStored(ctx, Cursor{Pack: 1 << 40}, nil); !errors.Is(err, flox.ErrBadInput) {
		t.Fatalf("a cursor of another kind: %v", err)
	}
}

// A copy passes damaged blocks over and says so; a scrub repairs them from
// elsewhere, goes on where it was stopped, and reports what it could not repair.
func TestScrubRepairs(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := open(t, Config{Dir: t.TempDir(), PackSize: 128 << 10})
	const n = 100
	put(t, s, 0, n)
	hurt := make(map[flox.CID][]byte)
	for i := 3; i < n; i += 10 {
		id, b := block(i)
		l, err := s.lookup(id)
		if err != nil {
			t.Fatal(err)
		}
		flip(t, s.packPath(l.pack), int64(l.off)+l.frameSize()-1, 0x10)
		hurt[id] = b
	}
	flip(t, s.packPath(2), 1, 1)
	good := 0
	err := s.EachStored(ctx, Cursor{}, func(_ Cursor, id flox.CID, _ []byte, _ bool) error {
		if good++; hurt[id] != nil {
			t.Errorf("damaged block %s is given", id)
		}
		return nil
	})
	if !errors.Is(err, flox.ErrCorrupt) || good != n-len(hurt) {
		t.Fatalf("%d blocks, want %d: %v", good, n-len(hurt), err)
	}

	nowhere, _ := block(53)
	repair := func(_ context.Context, id flox.CID) ([]byte, error) {
		switch {
		case hurt[id] == nil:
			t.Errorf("block %s is whole", id)
			return nil, flox.ErrNotFound
		case id == nowhere:
			return []byte("something else"), nil
		}
		return hurt[id], nil
	}
	// The first is stopped half way.
	part, cancel := context.WithCancel(ctx)
	defer cancel()
	asked := 0
	var bad []flox.CID
	report := func(id flox.CID, _ error) { bad = append(bad, id) }
	done, err := s.ScrubWith(part, ScrubOptions{Repair: func(ctx context.Context, id flox.CID) ([]byte, error) {
		if asked++; asked == 4 {
			cancel()
		}
		return repair(ctx, id)
	}}, report)
	if !errors.Is(err, context.Canceled) || done.Blocks == 0 || done.Blocks >= n {
		t.Fatalf("stopped: %+v: %v", done, err)
	}
	var last Scrubbed
	done, err = s.ScrubWith(ctx, ScrubOptions{After: done.Cursor, Rate: 1 << 30, Repair: repair, Progress: func(p Scrubbed) { last = p }}, report)
	if err != nil || done != last || done.Blocks >= n {
		t.Fatalf("the rest: %+v, told %+v: %v", done, last, err)
	}
	if len(bad) != 1 || bad[0] != nowhere {
		t.Fatalf("not repaired: %v, want %s only", bad, nowhere)
	}
	found := scrubbed(t, s)
	if len(found) != 1 || found[nowhere] == nil {
		t.Fatalf("left over: %v", found)
	}
	if err := s.Replace(ctx, nowhere, hurt[nowhere]); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, s, 0, n)
	noBadBlocks(t, s)
}

// A session that comes and goes between the decision what is live and the
// forgetting loses nothing: neither what it found there nor what it put.
func TestSweepSparesSessionsThatEnd(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := open(t, Config{Dir: t.TempDir(), PackSize: 64 << 10})
	put(t, s, 0, 50)
	came := false
	live := func(flox.CID) bool {
		if !came {
			came = true
			session := s.Session()
			put(t, session, 10, 20)
			put(t, session, 50, 55)
			session.Close()
		}
		return false
	}
	if _, err := s.Sweep(ctx, live); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, s, 10, 20)
	wantBlocks(t, s, 50, 55)
	if got := s.Stat().Blocks; got != 15 {
		t.Fatalf("%d blocks are left, want 15", got)
	}
	// The same for a session that ends while what is live is being found out.
	_, err := s.SweepMarked(ctx, func(context.Context) (func(flox.CID) bool, error) {
		session := s.Session()
		put(t, session, 12, 15)
		session.Close()
		return func(flox.CID) bool { return false }, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, s, 12, 15)
	if got := s.Stat().Blocks; got != 3 {
		t.Fatalf("%d blocks are left, want 3", got)
	}
	// The next one counts on nobody.
	if _, err := s.Sweep(ctx, func(flox.CID) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if got := s.Stat().Blocks; got != 0 || len(s.lingering) != 0 {
		t.Fatalf("%d blocks and %d filters are left", got, len(s.lingering))
	}
}
