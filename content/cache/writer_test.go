package cache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"

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
	if err := write1(f[0], f[1], f[2]); err != nil {
		fmt.Println("writer:", err)
		os.Exit(1)
	}
}

func write1(dir, session, seed string) error {
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
