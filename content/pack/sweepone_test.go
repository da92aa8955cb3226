package pack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// liveOf says that of the blocks from 0 to n every k-th is live; k 0 = none.
func liveOf(n, k int) func(flox.CID) bool {
	live := make(map[flox.CID]bool)
	for i := 0; k > 0 && i < n; i += k {
		id, _ := block(i)
		live[id] = true
	}
	return func(id flox.CID) bool { return live[id] }
}

// A store that fits in one pack gives its room back, too, whatever of the index a power
// cut takes with it; and the number of the pack that went is not given again.
func TestSweepOfOnePack(t *testing.T) {
	t.Parallel()
	for _, k := range []int{0, 10} {
		for _, cut := range []string{"nothing", "changes of the index", "the index"} {
			t.Run(fmt.Sprintf("every %d lives, %s lost", k, cut), func(t *testing.T) {
				t.Parallel()
				sweepOfOnePack(t, k, cut)
			})
		}
	}
}

func sweepOfOnePack(t *testing.T, k int, cut string) {
	ctx := context.Background()
	cfg := Config{Dir: t.TempDir(), Reserve: 1}
	s := open(t, cfg)
	const n = 300
	put(t, s, 0, n)
	if err := s.Close(); err != nil { // writes the index
		t.Fatal(err)
	}
	index := filepath.Join(cfg.Dir, currentIndex(cfg.Dir))
	old := filepath.Join(t.TempDir(), "old")
	if err := os.CopyFS(old, os.DirFS(index)); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	var last Cursor
	if err := s.EachStored(ctx, last, func(c Cursor, _ flox.CID, _ []byte, _ bool) error { last = c; return nil }); err != nil {
		t.Fatal(err)
	}
	before := s.Stat()
	done, err := s.Sweep(ctx, liveOf(n, k))
	if err != nil {
		t.Fatal(err)
	}
	after := s.Stat()
	if after.DiskBytes > before.DiskBytes/2 || done.Bytes != int64(before.DiskBytes-after.DiskBytes)+int64(len(fileMagic)) {
		t.Fatalf("swept %+v, before %+v, after %+v", done, before, after)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if cut != "nothing" {
		if err := os.RemoveAll(index); err != nil {
			t.Fatal(err)
		}
	}
	if cut == "changes of the index" {
		if err := os.CopyFS(index, os.DirFS(old)); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, cfg)
	for i := 0; k > 0 && i < n; i += k {
		wantBlocks(t, s, i, i+1)
	}
	if got := s.Stat(); got.Blocks != after.Blocks {
		t.Errorf("%d blocks after the cut, %d before", got.Blocks, after.Blocks)
	}
	put(t, s, n, n+5)
	seen := 0
	if err := s.EachStored(ctx, last, func(Cursor, flox.CID, []byte, bool) error { seen++; return nil }); err != nil {
		t.Fatal(err)
	}
	if want := int(after.Blocks) + 5; seen != want {
		t.Errorf("%d blocks behind a cursor from before the sweep, want %d", seen, want)
	}
	noBadBlocks(t, s)
}

// A disk without room for a new pack does not end the sweep: the last pack keeps its
// room until another one gave some back, or until a later sweep.
func TestSweepOnAFullDisk(t *testing.T) {
	ctx := context.Background()
	for packs, size := range map[int]int64{1: 8 << 20, 2: 1<<20 + 1<<19} {
		dir := smallDisk(t, "32m")
		s := open(t, Config{Dir: filepath.Join(dir, "store"), PackSize: size})
		n := 0
		for ; n < 400 || s.Stat().DiskBytes < uint64(packs)*(minLeave+1<<18); n += 50 {
			put(t, s, n, n+50)
		}
		if got := s.Stat().Packs; got != packs {
			t.Fatalf("%d packs, want %d", got, packs)
		}
		full := filepath.Join(dir, "filler")
		filler(t, full, 0)
		before := s.Stat()
		done, err := s.Sweep(ctx, liveOf(n, 0))
		if err != nil || done.Blocks != uint64(n) {
			t.Fatalf("%d packs on a full disk: %+v: %v", packs, done, err)
		}
		if now := s.Stat(); packs == 1 && now.DiskBytes != before.DiskBytes || packs > 1 && now.DiskBytes > uint64(len(fileMagic)) {
			t.Errorf("%d packs on a full disk: swept %+v, before %+v, after %+v", packs, done, before, now)
		}
		if err := os.Remove(full); err != nil {
			t.Fatal(err)
		}
		put(t, s, 0, 20)
		if _, err := s.Sweep(ctx, liveOf(20, 1)); err != nil {
			t.Fatal(err)
		}
		if now := s.Stat(); now.DiskBytes > before.DiskBytes/4 {
			t.Errorf("%d packs: with room again %+v, before %+v", packs, now, before)
		}
		wantBlocks(t, s, 0, 20)
		noBadBlocks(t, s)
	}
}

// What is live in a pack is moved only where there is room for all of it: the disk is not
// filled up with blocks that are there twice.
func TestSweepFillsNoDisk(t *testing.T) {
	dir := smallDisk(t, "32m")
	s := open(t, Config{Dir: filepath.Join(dir, "store"), PackSize: 16 << 20, Reserve: 1})
	const n = 600
	put(t, s, 0, n)
	full := filepath.Join(dir, "filler")
	filler(t, full, 768<<10)
	before := s.Stat()
	if live := liveOf(n, 3); before.DiskBytes < 3<<20 {
		t.Fatalf("%+v: too little", before)
	} else if _, err := s.Sweep(context.Background(), live); err != nil {
		t.Fatal(err)
	}
	if free, err := s.free(); err != nil || free < 512<<10 {
		t.Errorf("%d bytes are free after a sweep: %v", free, err)
	}
	if now := s.Stat(); now.DiskBytes > before.DiskBytes+64<<10 {
		t.Errorf("without room %+v, before %+v", now, before)
	}
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sweep(context.Background(), liveOf(n, 3)); err != nil {
		t.Fatal(err)
	}
	if now := s.Stat(); now.DiskBytes > before.DiskBytes/2 {
		t.Errorf("with room again %+v, before %+v", now, before)
	}
	for i := 0; i < n; i += 3 {
		wantBlocks(t, s, i, i+1)
	}
	noBadBlocks(t, s)
}

// sweepChild puts blocks of which every tenth lives, and sweeps after each hundred,
// until it is killed.
func sweepChild(s *Store, i int) error {
	ctx := context.Background()
	for ; ; i++ {
		id, b := block(i)
		if err := s.Put(ctx, id, b); err != nil {
			return err
		}
		if i%100 != 99 {
			continue
		}
		if err := s.Sync(ctx); err != nil {
			return err
		}
		fmt.Println("synced", i)
		done, err := s.Sweep(ctx, liveOf(i, 10))
		if err != nil {
			return err
		}
		fmt.Println("freed", done.Bytes)
	}
}

// kill -9 in the middle of sweeps of the pack that is written to takes no live block.
func TestKillDuringSweeps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(17, 18))
	synced, freed := -1, 0
	for range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir, "PACK_CRASH_SWEEP=1", "PACK_CRASH_START="+strconv.Itoa(synced+1))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop := 3 + rng.IntN(3)
		for in := bufio.NewScanner(out); in.Scan(); {
			word, n, _ := strings.Cut(in.Text(), " ")
			switch word {
			case "error":
				t.Errorf("child: %s", n)
			case "synced":
				synced, _ = strconv.Atoi(n)
				if stop--; stop == 0 {
					time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond) // anywhere in the sweep
					_ = cmd.Process.Kill()
				}
			case "freed":
				if n != "0" {
					freed++
				}
			}
		}
		_ = cmd.Wait()
		s := open(t, Config{Dir: dir})
		for i := 0; i <= synced; i += 10 {
			wantBlocks(t, s, i, i+1)
		}
		noBadBlocks(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if freed == 0 || synced < 500 {
		t.Fatalf("%d blocks, %d sweeps that gave room back: the test proves nothing", synced, freed)
	}
}

// A full last pack, after which none was begun, is left as well.
func TestSweepOfAFullLastPack(t *testing.T) {
	t.Parallel()
	cfg := Config{Dir: t.TempDir(), Reserve: 1}
	s := open(t, cfg)
	put(t, s, 0, 300)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.PackSize = minLeave // so that it is full
	s = open(t, cfg)
	before := s.Stat()
	if _, err := s.Sweep(context.Background(), liveOf(300, 10)); err != nil {
		t.Fatal(err)
	}
	if after := s.Stat(); after.DiskBytes > before.DiskBytes/2 {
		t.Errorf("before %+v, after %+v", before, after)
	}
	id, _ := block(1)
	if _, err := s.Get(context.Background(), id); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a dead block: %v", err)
	}
	noBadBlocks(t, s)
}

// What came into the pack since the last Sync is live: it moves along, and where it is
// the half of the pack the pack stays.
func TestSweepOfAPackThatIsWrittenTo(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for more, left := range map[int]bool{20: true, 400: false} {
		cfg := Config{Dir: t.TempDir(), Reserve: 1}
		s := open(t, cfg)
		put(t, s, 0, 300)
		var dead []flox.CID
		for i := range 290 {
			id, _ := block(i)
			dead = append(dead, id)
		}
		if err := s.Delete(ctx, dead...); err != nil {
			t.Fatal(err)
		}
		for i := 300; i < 300+more; i++ {
			id, b := block(i)
			if err := s.Put(ctx, id, b); err != nil {
				t.Fatal(err)
			}
		}
		freed, err := s.compact(ctx)
		if err != nil || freed > 0 != left {
			t.Fatalf("with %d blocks that are not durable: %d bytes freed: %v", more, freed, err)
		}
		if got := s.Stat().Packs; got != 1 {
			t.Errorf("with %d blocks that are not durable: %d packs", more, got)
		}
		for range 2 {
			wantBlocks(t, s, 290, 300+more)
			noBadBlocks(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, cfg)
		}
		if got := s.Stat(); got.Blocks != uint64(10+more) {
			t.Errorf("with %d blocks that are not durable: %+v", more, got)
		}
	}
}
