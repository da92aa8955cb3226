package pack

import (
	"bufio"
	"bytes"
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

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// childEnv makes the test binary put blocks into a store until it is killed.
const childEnv = "PACK_CRASH_DIR"

func crashChild() {
	ctx := context.Background()
	if url := os.Getenv(childBucketEnv); url != "" {
		fmt.Println("error", crashBucketChild(url))
		os.Exit(1)
	}
	cfg := Config{Dir: os.Getenv(childEnv), PackSize: 256 << 10, Reserve: 1}
	if os.Getenv("PACK_CRASH_SWEEP") != "" {
		cfg.PackSize = 0
	}
	s, err := Open(cfg)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	start, _ := strconv.Atoi(os.Getenv("PACK_CRASH_START"))
	if os.Getenv("PACK_CRASH_INGEST") != "" {
		for i := start; ; i++ {
			session := s.Session()
			got, err := content.Ingest(ctx, bytes.NewReader(crashNar(i)), session, content.IngestOptions{})
			if err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
			fmt.Println(got.Manifest)
			session.Close()
		}
	}
	if cfg.PackSize == 0 {
		fmt.Println("error", sweepChild(s, start))
		os.Exit(1)
	}
	for i := start; ; i++ {
		id, b := block(i)
		if err := s.Put(ctx, id, b); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		if i%7 == 0 {
			if err := s.Sync(ctx); err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
			fmt.Println("synced", i)
		}
	}
}

// After kill -9 in the middle of puts the store opens by itself, has everything a
// Sync acknowledged, and nothing that is wrong.
func TestKillDuringPuts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	next, synced := 0, -1
	rng := rand.New(rand.NewPCG(3, 4))
	for range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir, "PACK_CRASH_START="+strconv.Itoa(next))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop := 5 + rng.IntN(40)
		for in := bufio.NewScanner(out); in.Scan(); {
			word, n, _ := strings.Cut(in.Text(), " ")
			if word == "error" {
				t.Errorf("child: %s", n)
				break
			}
			synced, _ = strconv.Atoi(n)
			if stop--; stop == 0 {
				_ = cmd.Process.Kill()
			}
		}
		_ = cmd.Wait()
		s := open(t, Config{Dir: dir, PackSize: 256 << 10})
		wantBlocks(t, s, 0, synced+1)
		noBadBlocks(t, s)
		next = synced + 1
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if synced < 50 {
		t.Fatalf("only %d blocks were synced: the test proves nothing", synced)
	}
}

// crashNar is the NAR of the i-th path that the child ingests: shared and new
// files, small and large.
func crashNar(i int) []byte {
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	add := func(path string, data []byte) {
		e := nix.NarEntry{Path: path, Kind: flox.Regular, Size: uint64(len(data))}
		if data == nil {
			e.Kind = flox.Directory
		}
		if err := w.Entry(e); err != nil {
			panic(err)
		}
		if _, err := w.Write(data); err != nil {
			panic(err)
		}
	}
	add("", nil)
	for k := range 40 {
		_, data := block(20*i + k)
		add(fmt.Sprintf("f%03d", k), data)
	}
	add("large", bytes.Repeat(random32(i), 20_000))
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

func random32(i int) []byte {
	id := content.Hash([]byte(strconv.Itoa(i)))
	return id[:]
}

// kill -9 in the middle of an ingest leaves every path that was acknowledged
// whole, and nothing that is wrong.
func TestKillDuringIngest(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var manifests []flox.CID
	rng := rand.New(rand.NewPCG(13, 14))
	for range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir, "PACK_CRASH_INGEST=1", "PACK_CRASH_START="+strconv.Itoa(len(manifests)))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop := 1 + rng.IntN(6)
		for in := bufio.NewScanner(out); in.Scan(); {
			id, err := flox.ParseCID(in.Text())
			if err != nil {
				t.Errorf("child: %s", in.Text())
				break
			}
			manifests = append(manifests, id)
			if stop--; stop == 0 {
				_ = cmd.Process.Kill()
			}
		}
		_ = cmd.Wait()
		s := open(t, Config{Dir: dir, PackSize: 256 << 10})
		checkIngested(t, s, manifests)
		noBadBlocks(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A frame that was not written whole, as a power cut leaves it, is cut off; what
// comes before it stays, and the store goes on.
func TestTornTail(t *testing.T) {
	t.Parallel()
	for _, tear := range []string{"cut", "zeros", "garbage"} {
		t.Run(tear, func(t *testing.T) {
			cfg := Config{Dir: t.TempDir(), Reserve: 1}
			s := open(t, cfg)
			put(t, s, 0, 20)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			// As if the index had been written before the last blocks came.
			if err := os.RemoveAll(filepath.Join(cfg.Dir, currentIndex(cfg.Dir))); err != nil {
				t.Fatal(err)
			}
			path := s.packPath(1)
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			id, _ := block(19)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, b := block(19)
			switch tear {
			case "cut":
				err = f.Truncate(st.Size() - 1)
			case "zeros":
				_, err = f.WriteAt(make([]byte, min(100, len(b))), st.Size()-int64(min(100, len(b))))
			case "garbage":
				_, err = f.WriteAt([]byte(frameMagic+"garbage"+frameMagic), st.Size()-30)
			}
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			s = open(t, cfg)
			wantBlocks(t, s, 0, 19)
			if _, err := s.Get(context.Background(), id); !errors.Is(err, flox.ErrNotFound) {
				t.Fatalf("the torn block: %v", err)
			}
			put(t, s, 19, 40)
			wantBlocks(t, s, 0, 40)
			noBadBlocks(t, s)
		})
	}
}

// A pack that is cut or damaged before its first frame holds nothing, or all it held: either
// way it is whole again after a start, also one without frames, which no scrub comes to.
func TestDamagedStart(t *testing.T) {
	t.Parallel()
	for what, spoil := range map[string]func(path string) error{
		"cut":   func(path string) error { return os.Truncate(path, 6) },
		"empty": func(path string) error { return os.Truncate(path, 0) },
		"cut behind the first bytes, which are others": func(path string) error {
			return os.WriteFile(path, []byte("Flhpack1"), 0o600)
		},
	} {
		t.Run(what, func(t *testing.T) {
			cfg := Config{Dir: t.TempDir(), Reserve: 1}
			s := open(t, cfg)
			put(t, s, 0, 20)
			path := s.packPath(1)
			if err := errors.Join(s.Close(), spoil(path)); err != nil {
				t.Fatal(err)
			}
			s = open(t, cfg)
			if b, err := os.ReadFile(path); err != nil || string(b) != fileMagic {
				t.Errorf("%q, %v", b, err)
			}
			put(t, s, 0, 40)
			wantBlocks(t, s, 0, 40)
			noBadBlocks(t, s)
			if err := s.checkMagic(1); err != nil {
				t.Error(err)
			}
		})
	}
}

// Scrub finds every flipped bit and every truncation of a pack, says which blocks
// they hurt, and no reader gets wrong bytes. Put after Delete repairs.
func TestScrubFindsEveryFlip(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	cfg := Config{Dir: t.TempDir(), PackSize: 512 << 10}
	s := open(t, cfg)
	const n = 150
	put(t, s, 0, n)
	type place struct {
		id flox.CID
		loc
	}
	var places []place
	for i := range n {
		id, _ := block(i)
		l, err := s.lookup(id)
		if err != nil {
			t.Fatal(err)
		}
		places = append(places, place{id, l})
	}
	rng := rand.New(rand.NewPCG(5, 6))
	for round := range 120 {
		p := places[rng.IntN(n)]
		at := int64(p.off) + rng.Int64N(p.frameSize())
		if round%2 == 0 {
			at = int64(p.off) + rng.Int64N(headerSize) // headers are small: aim at them
		}
		bit := byte(1) << rng.IntN(8)
		flip(t, s.packPath(p.pack), at, bit)
		bad := scrubbed(t, s)
		if len(bad) != 1 || bad[p.id] == nil || !errors.Is(bad[p.id], flox.ErrCorrupt) {
			t.Fatalf("round %d: flip at %d of block %s in pack %d: found %v", round, at-int64(p.off), p.id, p.pack, bad)
		}
		if _, err := s.Get(ctx, p.id); at-int64(p.off) < headerSize && !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("round %d: get: %v", round, err)
		}
		if _, err := s.Checksummed().Get(ctx, p.id); !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("round %d: a flip the checksum does not see: %v", round, err)
		}
		flip(t, s.packPath(p.pack), at, bit)
	}
	flip(t, s.packPath(1), 3, 1)
	if bad := scrubbed(t, s); len(bad) != 1 || bad[flox.CID{}] == nil {
		t.Fatalf("flip in a pack's first bytes: %v", bad)
	}
	flip(t, s.packPath(1), 3, 1)
	noBadBlocks(t, s)

	// Cut the first pack in the middle of a frame.
	cut := places[n/3]
	if err := os.Truncate(s.packPath(cut.pack), int64(cut.off)+cut.frameSize()-1); err != nil {
		t.Fatal(err)
	}
	bad := scrubbed(t, s)
	for _, p := range places {
		if lost := p.pack == cut.pack && p.off >= cut.off; lost != (bad[p.id] != nil) {
			t.Fatalf("truncation: block at %d of pack %d: reported %v, want %v", p.off, p.pack, bad[p.id], lost)
		}
	}
	for id := range bad {
		if err := s.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, 0, n)
	wantBlocks(t, s, 0, n)
	noBadBlocks(t, s)
	for i := range n {
		id, data := block(i)
		if got, err := s.Checksummed().Get(ctx, id); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("block %d by its checksum: %d bytes, %v", i, len(got), err)
		}
	}
}

// A flipped bit in the index's tables is found; the index made anew is whole.
func TestScrubFindsIndexDamage(t *testing.T) {
	t.Parallel()
	cfg := Config{Dir: t.TempDir(), Reserve: 1}
	s := open(t, cfg)
	put(t, s, 0, 100)
	noBadBlocks(t, s) // flushes
	tables, err := filepath.Glob(filepath.Join(cfg.Dir, currentIndex(cfg.Dir), "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("no tables: %v", err)
	}
	rng := rand.New(rand.NewPCG(8, 9))
	for range 60 {
		path := tables[rng.IntN(len(tables))]
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		at, bit := rng.Int64N(st.Size()), byte(1)<<rng.IntN(8)
		flip(t, path, at, bit)
		if bad := scrubbed(t, s); bad[flox.CID{}] == nil {
			t.Fatalf("flip at %d of %s of %d bytes: found %v", at, path, st.Size(), bad)
		}
		flip(t, path, at, bit)
	}
	// Found or not, the next Open has a whole index.
	for _, found := range []bool{true, false} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if !found {
			if err := os.Remove(filepath.Join(cfg.Dir, damagedName)); err == nil {
				t.Error("the note outlived the index it was about")
			}
			if tables, err = filepath.Glob(filepath.Join(cfg.Dir, currentIndex(cfg.Dir), "*.sst")); err != nil {
				t.Fatal(err)
			}
			for _, path := range tables {
				if err := os.WriteFile(path, []byte("rubbish"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		s = open(t, cfg)
		wantBlocks(t, s, 0, 100)
		noBadBlocks(t, s)
	}
}

func scrubbed(t *testing.T, s *Store) map[flox.CID]error {
	t.Helper()
	bad := make(map[flox.CID]error)
	if err := s.Scrub(context.Background(), func(id flox.CID, err error) { bad[id] = err }); err != nil {
		t.Fatal(err)
	}
	return bad
}

func flip(t *testing.T, path string, at int64, bit byte) {
	t.Helper()
	if err := tryFlip(path, at, bit); err != nil {
		t.Fatal(err)
	}
}

func tryFlip(path string, at int64, bit byte) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return err
	}
	b[0] ^= bit
	_, err = f.WriteAt(b[:], at)
	return err
}
