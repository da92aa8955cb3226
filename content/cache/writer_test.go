package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/floxctl/flox"
)

// The crash tests run this package's test binary again as a writer, and kill it.

const writerFiles = 40

// writerSample gives the i-th file the writer works on.
func writerSample(i int) *sample {
	return newSample(uint64(1000+i), []int{1200, 20 << 10, 180 << 10, 700 << 10}[i%4]+i, 16<<10)
}

// writer fills, marks, keeps and evicts until it is killed. Role is
// "directory|session|seed".
func writer(role string) {
	f := strings.Split(role, "|")
	work := writeAll
	if f[2] == "full" {
		work = writeFull
	}
	if err := work(f[0], f[1], f[2]); err != nil {
		fmt.Println("writer:", err)
		os.Exit(1)
	}
}

func writeAll(dir, session, seed string) error {
	cfg := small(dir)
	cfg.BootID = session
	cfg.Budget = 40 << 20
	c, err := Open(cfg)
	if err != nil {
		return err
	}
	var all []*sample
	for i := range writerFiles {
		all = append(all, writerSample(i))
	}
	fmt.Println("ready")
	var n uint64
	for _, b := range []byte(seed) {
		n = n*31 + uint64(b)
	}
	rng := rand.New(rand.NewPCG(n, 1))
	ctx := context.Background()
	for step := 0; ; step++ {
		s := all[rng.IntN(len(all))]
		// In any order, so that holes lie before bytes that are already safe.
		if err := s.put(c, rng.IntN(len(s.chunks))); err != nil && !errors.Is(err, flox.ErrFull) {
			return err
		}
		switch {
		case step%400 == 399:
			err = c.Sync(ctx)
		case step%90 == 89: // syncs the index, and not what it says is here
			err = c.Keep(ctx, "owner", slices.Values([]flox.CID{s.ID}))
		case step%700 == 699:
			_, err = c.GC(ctx, c.Usage().Bytes-4<<20)
		case step%1500 == 1499:
			err = c.Unkeep(ctx, "owner")
		}
		if err != nil {
			return err
		}
	}
}

// writeFull waits for a line, by when the disk is full, and writes the index
// until that fails, ballast and all. Then reads must go on, and eviction must
// free what it can.
func writeFull(dir, session, _ string) error {
	cfg := small(dir)
	cfg.BootID = session
	c, err := Open(cfg)
	if err != nil {
		return err
	}
	ctx := context.Background()
	for i := range writerFiles {
		s := writerSample(i)
		for j := range s.chunks {
			if err := s.put(c, j); err != nil {
				return err
			}
		}
		if i == 3 {
			if err := c.Keep(ctx, "owner", slices.Values([]flox.CID{s.ID})); err != nil {
				return err
			}
		}
	}
	if err := c.Sync(ctx); err != nil {
		return err
	}
	fmt.Println("ready")
	if _, err := fmt.Scanln(new(string)); err != nil {
		return err
	}
	var id flox.CID
	rng := rand.New(rand.NewPCG(1, 1))
	for n := 0; err == nil; n++ {
		if n == 1<<20 {
			return errors.New("the disk is never full")
		}
		binary.LittleEndian.PutUint64(id[:], rng.Uint64())
		_ = refill(dir) // others take the ballast too
		err = c.Keep(ctx, "many", slices.Values([]flox.CID{id}))
	}
	if !errors.Is(err, flox.ErrFull) {
		return err
	}
	if v := look(c); v.misses+v.wrong > 0 {
		return fmt.Errorf("reads on a full disk: %+v", v)
	}
	_, before, err := c.disk()
	if err != nil {
		return err
	}
	if _, err := c.GC(ctx, 0); err != nil {
		return err
	}
	if _, after, err := c.disk(); err != nil || after-before < 4<<20 {
		return fmt.Errorf("eviction freed %d bytes, error %v", after-before, err) //nolint:errorlint // err may be nil
	}
	if kept := writerSample(3); c.State(kept.File, 0, kept.Size) != Hit {
		return errors.New("kept content was evicted")
	}
	if v := look(c); v.wrong > 0 {
		return fmt.Errorf("reads after eviction: %+v", v)
	}
	return nil
}

// refill appends to a file beside the cache until the disk has no room.
func refill(dir string) error {
	f, err := os.OpenFile(dir+"/../filler", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			return err
		}
		err = nil
	}
	return nil
}
