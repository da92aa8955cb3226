package pack

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/pack/bucket"
	"github.com/floxctl/flox/content/pack/bucket/s3test"
)

// counted counts what is read of a bucket.
type counted struct {
	Bucket
	bytes atomic.Int64
}

func (c *counted) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	r, err := c.Bucket.Get(ctx, name, off, n)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.TeeReader(r, countWriter{c}), r}, nil
}

type countWriter struct{ c *counted }

func (w countWriter) Write(b []byte) (int, error) {
	w.c.bytes.Add(int64(len(b)))
	return len(b), nil
}

func openURL(t testing.TB, url string) *counted {
	t.Helper()
	b, err := bucket.Open(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return &counted{Bucket: b}
}

// onBucket is a Config of a server with an empty disk.
func onBucket(t testing.TB, b Bucket, server string) Config {
	return Config{Dir: t.TempDir(), PackSize: 1 << 20, Reserve: 1, Bucket: &BucketConfig{Bucket: b, Server: server, Grace: time.Hour}}
}

// A server that lost its disk finds everything in the bucket, and reads little for
// that. What is kept of it locally stays within its bound.
func TestBucketEmptyDisk(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := openURL(t, s3test.Start(t).URL())
	s := open(t, onBucket(t, b, "s1"))
	const n = 600
	for i := 0; i < n; i += 100 {
		put(t, s, i, i+100)
	}
	st := s.Stat()
	if st.Unplaced != 0 || st.BucketPacks < 6 || st.Blocks != n {
		t.Fatalf("stat %+v", st)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	cfg := onBucket(t, b, "s1")
	cfg.Bucket.CacheBytes = 2 << 20
	b.bytes.Store(0)
	s = open(t, cfg)
	if got := b.bytes.Load(); got > n*100 {
		t.Fatalf("opening read %d bytes of the bucket, which has %d", got, st.BucketBytes)
	}
	if got := s.Stat(); got.Blocks != n || got.BucketBytes != st.BucketBytes {
		t.Fatalf("stat %+v, before %+v", got, st)
	}
	wantBlocks(t, s, 0, n)
	if used := diskUse(t, cfg.Dir, "cache") + diskUse(t, cfg.Dir, "packs"); used > cfg.Bucket.CacheBytes || used == 0 {
		t.Fatalf("the cache has %d bytes, want at most %d", used, cfg.Bucket.CacheBytes)
	}
	// What was read last is here.
	b.bytes.Store(0)
	wantBlocks(t, s, n-20, n)
	if got := b.bytes.Load(); got != 0 {
		t.Fatalf("%d bytes were read again", got)
	}
	// What is put is kept within the bound, too.
	put(t, s, n, 2*n)
	if used := diskUse(t, cfg.Dir, "cache") + diskUse(t, cfg.Dir, "packs"); used > cfg.Bucket.CacheBytes {
		t.Fatalf("the cache has %d bytes, want at most %d", used, cfg.Bucket.CacheBytes)
	}
	wantBlocks(t, s, 0, 2*n)
	noBadBlocks(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	local := cfg
	local.Bucket = nil
	if _, err := Open(local); !errors.Is(err, flox.ErrBadInput) {
		t.Fatalf("without its bucket: %v", err)
	}
	// With its disk it needs none of it.
	b.bytes.Store(0)
	s = open(t, cfg)
	if got := b.bytes.Load(); got != 0 {
		t.Fatalf("opening again read %d bytes of the bucket", got)
	}
	if has, err := s.Has(ctx, []flox.CID{mustBlock(3), {1}}); err != nil || !has[0] || has[1] {
		t.Fatalf("has %v: %v", has, err)
	}
}

func diskUse(t *testing.T, dir, sub string) (bytes int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(dir, sub), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			bytes += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

// While the bucket is away what is cached is read on, what is not says why, and
// uploads are refused; when it comes back it all goes on by itself.
func TestBucketAway(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s3 := s3test.Start(t)
	cfg := onBucket(t, openURL(t, s3.URL()), "s1")
	s := open(t, cfg)
	put(t, s, 0, 50)
	put(t, s, 100, 150)
	other := open(t, onBucket(t, openURL(t, s3.URL()), "s2"))
	wantBlocks(t, other, 0, 2)
	s3.Kill()
	wantBlocks(t, s, 0, 50)
	wantBlocks(t, other, 0, 2)
	if _, err := other.Get(ctx, mustBlock(149)); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("a block nobody has: %v", err)
	}
	id, data := block(50)
	err := errors.Join(s.Put(ctx, id, data), s.Sync(ctx))
	if !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "uploads are refused") {
		t.Fatalf("an upload: %v", err)
	}
	// The next is refused before it takes room.
	next, nextData := block(51)
	if err := s.Put(ctx, next, nextData); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("the next upload: %v", err)
	}
	if st := s.Stat(); st.Unplaced != 1 {
		t.Fatalf("%d packs wait, want 1", st.Unplaced)
	}
	// Its uploader asks again and finds it there: that it is here does not place it.
	if err := errors.Join(s.Put(ctx, id, data), s.Sync(ctx)); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("the same upload again: %v", err)
	}
	// A start with the bucket away goes on with what is known.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	wantBlocks(t, s, 0, 51)
	if _, err := Open(onBucket(t, openURL(t, s3.URL()), "s3")); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("a start with nothing known: %v", err)
	}

	// A pack that somebody takes away before the bucket has it does not hold up others.
	lost := false
	s.cfg.Lost = func(id flox.CID) { lost = lost || id == mustBlock(50) }
	if err := os.Remove(s.packPath(s.unplaced()[0])); err != nil {
		t.Fatal(err)
	}
	s3.Restart()
	for err = s.Sync(ctx); err != nil; err = s.Sync(ctx) {
		if !errors.Is(err, flox.ErrUnreachable) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if st := s.Stat(); st.Unplaced != 0 {
		t.Fatalf("%d packs still wait", st.Unplaced)
	}
	if !lost {
		t.Fatal("nobody was told that block 50 is lost")
	}
	put(t, s, 50, 60)
	if err := other.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, other, 0, 60)
}

// Servers share a bucket: each reads what the others put. A sweep moves blocks and
// condemns packs; they go after the grace, not before, and what another server
// counted on in the meantime stays.
func TestBucketShared(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	url := s3test.Start(t).URL()
	a, b := open(t, onBucket(t, openURL(t, url), "a")), open(t, onBucket(t, openURL(t, url), "b"))
	put(t, a, 0, 100)
	if err := b.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	put(t, b, 50, 150) // of which 50 are there
	if st := b.Stat(); st.Blocks != 150 {
		t.Fatalf("%d blocks, want 150", st.Blocks)
	}
	live := make(map[flox.CID]bool)
	for i := range 150 {
		if i%5 == 0 {
			live[mustBlock(i)] = true
		}
	}
	isLive := func(id flox.CID) bool { return live[id] }
	// A session of b counts on a block of a; a knows nothing of it and sweeps.
	session := b.Session()
	put(t, session, 61, 62)
	if done, err := a.Sweep(ctx, isLive); err != nil || done.Blocks != 80 {
		t.Fatalf("swept %+v: %v", done, err)
	}
	live[mustBlock(61)] = true // b made its path valid
	session.Close()
	wantBlocks(t, b, 61, 62)
	if err := b.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	// From here on b counts on nothing in the condemned pack.
	put(t, b, 62, 63)
	if l, err := b.lookup(mustBlock(62)); err != nil || !b.ownsPack(l.pack) {
		t.Fatalf("block in %+v, want it in a pack of b: %v", l, err)
	}
	// Within the grace nothing goes.
	if _, err := a.Sweep(ctx, isLive); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, b, 0, 150)
	a.remote.Grace = time.Nanosecond
	done, err := a.Sweep(ctx, isLive)
	if err != nil || done.Bytes <= 0 {
		t.Fatalf("swept %+v: %v", done, err)
	}
	for _, s := range []*Store{a, b} {
		if err := s.Refresh(ctx); err != nil {
			t.Fatal(err)
		}
		for i := range 150 {
			id, data := block(i)
			switch got, err := s.Get(ctx, id); {
			case live[id] && (err != nil || !bytes.Equal(got, data)):
				t.Fatalf("live block %d: %v", i, err)
			case i < 50 && !live[id] && !errors.Is(err, flox.ErrNotFound):
				t.Fatalf("block %d that nobody wants: %v", i, err)
			}
		}
	}
	noBadBlocks(t, b)
	// What a forgot and b made live again is still in a pack of a: it is found there.
	put(t, a, 200, 230)
	if err := b.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	for i := 200; i < 220; i++ {
		live[mustBlock(i)] = true
	}
	if _, err := a.Sweep(ctx, isLive); err != nil {
		t.Fatal(err)
	}
	put(t, b, 225, 226)
	live[mustBlock(225)] = true
	if _, err := a.Get(ctx, mustBlock(225)); !errors.Is(err, flox.ErrNotFound) {
		t.Fatalf("block 225 was not forgotten: %v", err)
	}
	if there, err := a.Find(ctx, []flox.CID{mustBlock(225), mustBlock(210), {1}}); err != nil || !there[0] || !there[1] || there[2] {
		t.Fatalf("found %v: %v", there, err)
	}
	wantBlocks(t, a, 225, 226)
	// The same from an empty disk.
	wantLive := open(t, onBucket(t, openURL(t, url), "a"))
	for id := range live {
		if _, err := wantLive.Get(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *Store) ownsPack(id uint32) bool {
	p, ok := s.index.remotePack(id)
	return ok && s.remote.owns(p.Name)
}

// A reader that did not yet see that a pack is gone finds its blocks where they are
// now. Small packs are joined.
func TestBucketJoinsSmallPacks(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	url := s3test.Start(t).URL()
	cfg := onBucket(t, openURL(t, url), "a")
	cfg.Bucket.Grace = time.Nanosecond
	a := open(t, cfg)
	for i := range 20 {
		put(t, a, i, i+1)
	}
	b := open(t, onBucket(t, openURL(t, url), "b"))
	if st := b.Stat(); st.BucketPacks != 20 {
		t.Fatalf("%d packs, want one for each upload", st.BucketPacks)
	}
	all := func(flox.CID) bool { return true }
	for range 2 { // the second removes what the first condemned
		if _, err := a.Sweep(ctx, all); err != nil {
			t.Fatal(err)
		}
	}
	if st := a.Stat(); st.BucketPacks > 2 || st.Blocks != 20 {
		t.Fatalf("stat %+v, want the small packs joined", st)
	}
	wantBlocks(t, a, 0, 20)
	wantBlocks(t, b, 0, 20)
}

// Rot in what is cached is found and fetched again; a pack that somebody deletes
// from the bucket is uploaded again by who has it whole.
func TestBucketRot(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s3 := s3test.Start(t)
	cfg := onBucket(t, openURL(t, s3.URL()), "a")
	a := open(t, cfg)
	put(t, a, 0, 150)
	b := open(t, onBucket(t, openURL(t, s3.URL()), "b"))
	wantBlocks(t, b, 0, 150)
	rng := rand.New(rand.NewPCG(31, 32))
	for range 100 {
		for _, pattern := range []string{filepath.Join(b.cfg.Dir, "cache", "*"), filepath.Join(a.cfg.Dir, "packs", "*")} {
			files, err := filepath.Glob(pattern)
			if err != nil {
				t.Fatal(err)
			}
			if len(files) == 0 {
				continue // all was dropped
			}
			path := files[rng.IntN(len(files))]
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if rng.IntN(5) == 0 {
				err = os.Truncate(path, rng.Int64N(st.Size()+1))
			} else if st.Size() > 0 {
				flip(t, path, rng.Int64N(st.Size()), 1<<rng.IntN(8))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		i := rng.IntN(150)
		wantBlocks(t, b, i, i+1)
		wantBlocks(t, a, i, i+1)
	}
	wantBlocks(t, a, 0, 150)
	wantBlocks(t, b, 0, 150)

	put(t, a, 150, 160)
	l, err := a.lookup(mustBlock(155))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := a.index.remotePack(l.pack)
	for _, prefix := range []string{packPrefix, indexPrefix} {
		if err := a.remote.Bucket.Delete(ctx, prefix+p.Name); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(a.Refresh(ctx), a.Sync(ctx)); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, a, 0, 160)
	a.tend(ctx)
	wantBlocks(t, open(t, onBucket(t, openURL(t, s3.URL()), "c")), 0, 160)
	// The index made anew knows the bucket, too.
	if err := a.mend(ctx); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, a, 0, 160)
	if st := a.Stat(); st.Blocks != 160 || st.Unplaced != 0 {
		t.Fatalf("stat %+v", st)
	}
}

// childBucketEnv gives the crashing child a bucket.
const childBucketEnv = "PACK_CRASH_BUCKET"

// kill -9 of the S3 server and of our process in the middle: what was acknowledged
// is in the bucket, and a server with an empty disk serves it.
func TestBucketKills(t *testing.T) {
	t.Parallel()
	s3 := s3test.Start(t)
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(41, 42))
	synced, killed := -1, map[string]int{}
	for round := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir, childBucketEnv+"="+s3.URL(), "PACK_CRASH_START="+strconv.Itoa(synced+1))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop, end := 3+rng.IntN(10), 20+rng.IntN(5)
		away := false
		for in, seen := bufio.NewScanner(out), 0; in.Scan(); {
			word, rest, _ := strings.Cut(in.Text(), " ")
			switch word {
			case "synced":
				if synced, err = strconv.Atoi(rest); err != nil {
					t.Fatal(err)
				}
				seen++
			case "refused":
				killed["uploads refused"]++
				if away {
					away = false
					s3.Restart()
				}
			default:
				t.Errorf("child: %s", in.Text())
				_ = cmd.Process.Kill()
			}
			if round%2 == 0 && seen == stop {
				stop = -1
				killed["server"]++
				s3.Kill()
				// In some rounds it stays away until an upload is refused.
				if away = round%4 == 0; !away {
					s3.Restart()
				}
			}
			if seen == end {
				killed["us"]++
				_ = cmd.Process.Kill()
				end = -1
			}
		}
		_ = cmd.Wait()
		fresh := onBucket(t, openURL(t, s3.URL()), fmt.Sprintf("fresh-%d", round))
		wantBlocks(t, open(t, fresh), 0, synced+1)
	}
	t.Logf("%d blocks acknowledged, %v", synced+1, killed)
	if synced < 50 || killed["server"] < 4 || killed["us"] < 8 || killed["uploads refused"] < 2 {
		t.Fatalf("%d blocks acknowledged, %v: the test proves nothing", synced+1, killed)
	}
}

// crashBucketChild puts blocks into a bucket until it is killed. A refused upload is
// tried again.
func crashBucketChild(url string) error {
	ctx := context.Background()
	b, err := bucket.Open(ctx, url)
	if err != nil {
		return err
	}
	cfg := Config{Dir: os.Getenv(childEnv), PackSize: 64 << 10, Reserve: 1, Bucket: &BucketConfig{Bucket: b, Server: "s1", CacheBytes: 200 << 10}}
	s, err := Open(cfg)
	if err != nil {
		return err
	}
	start, _ := strconv.Atoi(os.Getenv("PACK_CRASH_START"))
	for i := start; ; {
		n := i + 1 + i%7
		err := func() error {
			for k := i; k < n; k++ {
				id, data := block(k)
				if err := s.Put(ctx, id, data); err != nil {
					return err
				}
			}
			return s.Sync(ctx)
		}()
		switch {
		case err == nil:
			fmt.Println("synced", n-1)
			i = n
		case errors.Is(err, flox.ErrUnreachable):
			fmt.Println("refused", err)
			time.Sleep(20 * time.Millisecond)
		default:
			return err
		}
	}
}

// A pack's index that is not as it was written is refused.
func FuzzDecodeEntries(f *testing.F) {
	id, _ := block(1)
	f.Add(encodeEntries([]packEntry{{id, loc{off: 8, plain: 100, stored: 50, enc: encodingZstd}}}, 1000))
	f.Add(encodeEntries(nil, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, size, err := decodeEntries(b)
		if err != nil {
			if !errors.Is(err, flox.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(encodeEntries(entries, size), b) {
			t.Fatal("not as it was written")
		}
	})
}
