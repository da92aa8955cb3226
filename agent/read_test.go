package agent

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content/cache"
)

// treeOf opens a published path as the mount does.
func treeOf(ctx context.Context, t *testing.T, a *Agent, p flox.StorePath) flox.Tree {
	t.Helper()
	manifest, _, err := a.store.Lookup(ctx, string(p), flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := a.store.Tree(ctx, manifest, flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// entryOf finds a file by its name below the store path.
func entryOf(ctx context.Context, t *testing.T, tr flox.Tree, name string) uint32 {
	t.Helper()
	i, _, err := tr.(*tree).Find(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// readAtRandom reads random ranges of files from many goroutines and compares
// every byte.
func readAtRandom(ctx context.Context, t *testing.T, tr flox.Tree, files []testFile, readers, reads int) {
	t.Helper()
	index := make([]uint32, len(files))
	for i, f := range files {
		index[i] = entryOf(ctx, t, tr, f.name)
	}
	var group sync.WaitGroup
	for r := range readers {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(r), 7))
			for range reads {
				f := rng.IntN(len(files))
				data := files[f].data
				off := rng.Int64N(int64(len(data)) + 10)
				p := bytes.Repeat([]byte{0xA5}, 1+rng.IntN(400_000))
				n, err := tr.ReadAt(ctx, index[f], p, off, flox.Reader{Node: uint64(f + 2)})
				if err != nil {
					t.Errorf("%s at %d: %v", files[f].name, off, err)
					return
				}
				want := data[min(off, int64(len(data))):]
				want = want[:min(len(want), len(p))]
				if !bytes.Equal(p[:n], want) {
					t.Errorf("%s: %d bytes at %d are wrong (got %d)", files[f].name, len(want), off, n)
					return
				}
			}
		})
	}
	group.Wait()
}

// swapCache gives an agent that does not run yet a cache with another configuration.
func swapCache(t *testing.T, a *Agent, cfg cache.Config) {
	t.Helper()
	if err := a.cache.Close(); err != nil {
		t.Error(err)
	}
	cfg.Budget, cfg.Reserve = 256<<20, 1
	c, err := cache.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	a.cache, a.fetcher.cache = c, c
}

func TestReadsGiveTheFilesBytes(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	files := manyFiles()
	info := h.make(t, "world", nil, files...)
	h.publish(info)
	for _, c := range []struct {
		name   string
		budget int64
		gc     bool
	}{
		{"cache larger than the files", 256 << 20, false},
		{"cache far too small", 600 << 10, false},
		{"no cache at all", 1, false},
		{"content taken away while it is read", 256 << 20, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, _ := runAgent(t, h, func(cfg *Config) { cfg.CacheBudget = c.budget }, func(a *Agent) {
				if c.gc {
					swapCache(t, a, cache.Config{Dir: filepath.Join(t.TempDir(), "cache"), Grace: time.Millisecond})
				}
			})
			ctx := within(t, time.Minute)
			tr := treeOf(ctx, t, a, info.Path)
			stop := make(chan struct{})
			var taker sync.WaitGroup
			if c.gc {
				taker.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
							_, _ = a.cache.GC(ctx, 0)
						}
					}
				})
			}
			readAtRandom(ctx, t, tr, files, 6, 40)
			close(stop)
			taker.Wait()
			if c.gc && a.cache.Usage().Evicted == 0 {
				t.Error("nothing was taken away: the test tested nothing")
			}
		})
	}
}

// After a power cut the cache does not trust what no sync mark covers, and some
// of it is not what was written.
func TestReadsAfterAPowerCutGiveTheFilesBytes(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	files := manyFiles()
	info := h.make(t, "world", nil, files...)
	h.publish(info)
	useCache := func(a *Agent, dir, session string) {
		swapCache(t, a, cache.Config{Dir: dir, BootID: session, SyncEvery: time.Hour})
	}
	ctx := within(t, time.Minute)
	before, after := filepath.Join(t.TempDir(), "cache"), filepath.Join(t.TempDir(), "cache")
	first, stop := runAgent(t, h, nil, func(a *Agent) { useCache(a, before, "one") })
	readAtRandom(ctx, t, treeOf(ctx, t, first, info.Path), files, 4, 30)
	if err := first.keep(ctx, info); err != nil { // writes the index to disk, but no sync mark
		t.Fatal(err)
	}
	if err := os.CopyFS(after, os.DirFS(before)); err != nil {
		t.Fatal(err)
	}
	stop()
	holes := punch(t, after)
	second, _ := runAgent(t, h, nil, func(a *Agent) { useCache(a, after, "two") })
	tr := treeOf(ctx, t, second, info.Path)
	readAtRandom(ctx, t, tr, files, 4, 40)
	if holes == 0 || second.cache.Usage().Dropped == 0 {
		t.Errorf("%d holes made and %d bytes dropped: the test tested nothing", holes, second.cache.Usage().Dropped)
	}
}

// punch writes zeros over a part of each content file in dir.
func punch(t *testing.T, dir string) (holes int) {
	t.Helper()
	err := filepath.Walk(dir, func(name string, st os.FileInfo, err error) error {
		if err != nil || st.IsDir() || st.Size() < 60_000 || filepath.Ext(name) == ".log" || filepath.Ext(name) == ".sst" {
			return err
		}
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		holes++
		_, err = f.WriteAt(make([]byte, 20_000), st.Size()/2)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return holes
}

func TestReadsOfWhatIsNoFileOrOutOfRange(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	info := h.make(t, "world", nil, testFile{name: "dir/f", data: []byte("hello")})
	h.publish(info)
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, time.Minute)
	tr := treeOf(ctx, t, a, info.Path)
	p := make([]byte, 10)
	if _, err := tr.ReadAt(ctx, 0, p, 0, flox.Reader{}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("read of a directory: %v", err)
	}
	if _, err := tr.ReadAt(ctx, 99, p, 0, flox.Reader{}); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("read of an entry that does not exist: %v", err)
	}
	f := entryOf(ctx, t, tr, "dir/f")
	if _, err := tr.ReadAt(ctx, f, p, -1, flox.Reader{}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("read at -1: %v", err)
	}
	if n, err := tr.ReadAt(ctx, f, p, 3, flox.Reader{}); err != nil || string(p[:n]) != "lo" {
		t.Errorf("read across the end: %q %v", p[:n], err)
	}
}

// Content that nobody has any more is an error to wait for, never a name that
// does not exist.
func TestAManifestNobodyHasIsUnreachable(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	info := h.make(t, "lost", nil, testFile{name: "f", data: randomBytes(1, 1000)})
	h.publish(info)
	h.set(func() { clear(h.blocks) })
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, time.Minute)
	manifest, _, err := a.store.Lookup(ctx, string(info.Path), flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.store.Tree(within(t, 300*time.Millisecond), manifest, flox.Reader{})
	if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("got %v, want ErrUnreachable and not ErrNotFound", err)
	}
}

func TestWhatAPeerHoldsIsReadWithoutTheStorehouse(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	data := randomBytes(3, 400_000)
	dep := h.make(t, "dep", nil, testFile{name: "lib/dep.so", data: randomBytes(4, 50_000)})
	info := h.make(t, "tool", []flox.StorePath{dep.Path}, testFile{name: "bin/tool", data: data, exec: true})
	h.publish(dep, info)
	ctx := within(t, 40*time.Second)
	a, _ := runAgent(t, h, nil, nil)
	ta := treeOf(ctx, t, a, info.Path)
	p := make([]byte, len(data))
	if n, err := ta.ReadAt(ctx, entryOf(ctx, t, ta, "bin/tool"), p, 0, flox.Reader{}); err != nil || n != len(p) {
		t.Fatal(n, err)
	}

	b, _ := runAgent(t, h, nil, nil)
	following(t, b)
	if err := b.host.AddPeer(peerAddr(a)); err != nil {
		t.Fatal(err)
	}
	until(t, "the two know each other", func() bool { return len(b.host.Peers()) > 1 })
	h.set(func() { // a storehouse that has lost everything and answers nothing
		clear(h.blocks)
		h.broken = errors.New("out of order")
	})
	tb := treeOf(ctx, t, b, info.Path)
	clear(p)
	if n, err := tb.ReadAt(ctx, entryOf(ctx, t, tb, "bin/tool"), p, 0, flox.Reader{}); err != nil || !bytes.Equal(p[:n], data) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if got := b.traffic.message(0); got.GetStorehouseBytes() != 0 || got.GetLanBytes() == 0 {
		t.Errorf("bytes came from elsewhere: %v", got)
	}
}
