package cache

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// A full disk: puts say ErrFull and nothing worse, what is cached can be read,
// eviction works with no byte free, and then there is room again.
func TestDiskFull(t *testing.T) {
	if private(t) {
		return
	}
	d := newLoopDisk(t, 96<<20)
	cfg := small(filepath.Join(d.dir, "cache"))
	cfg.Budget = 1 << 40
	cfg.pack = 256 << 10
	c := open(t, cfg)
	var cached []*sample
	for i := range 30 {
		s := writerSample(i)
		s.putAll(t, c)
		cached = append(cached, s)
	}
	filler := filepath.Join(d.dir, "filler")
	if err := refill(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	full, others := 0, 0
	for i := range 200 {
		s := newSample(uint64(5000+i), 100<<10, 16<<10)
		for j := range s.chunks {
			switch err := s.put(c, j); {
			case errors.Is(err, flox.ErrFull):
				full++
			case err != nil:
				others++
				t.Error(err)
			}
		}
	}
	if full == 0 {
		t.Fatal("the disk was never full: this test shows nothing")
	}
	for _, s := range cached {
		if st := s.readAll(t, c, 0); st != Hit {
			t.Errorf("state %d on a full disk, want hit", st)
		}
	}
	for range 3 {
		gc(t, c)
	}
	tend(t, c)
	s := newSample(1, 100<<10, 16<<10)
	s.putAll(t, c)
	if st := s.readAll(t, c, 0); st != Hit {
		t.Errorf("state %d, want hit", st)
	}
	tend(t, c)
	if err := refill(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	crash(c)
	again, err := Open(cfg)
	if err != nil {
		t.Fatalf("open on a full disk: %v", err)
	}
	s.readAll(t, again, 0)
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
}

// tend sets the ballast aside again, as Run does.
func tend(t *testing.T, c *Cache) {
	t.Helper()
	if err := c.index.Tend(); err != nil {
		t.Fatal(err)
	}
}

// A disk on which others take the very last byte, ballast included: what is
// cached can be read, also by the next process, eviction gives room back, and once
// there is room everything works again.
func TestDiskFullToTheLastByte(t *testing.T) {
	if private(t) {
		return
	}
	d := newLoopDisk(t, 96<<20)
	dir := filepath.Join(d.dir, "cache")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "FLOXD_TEST_CACHE_WRITER="+dir+"||full")
	cmd.Stdin = strings.NewReader("go\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("writer: %v: %s", err, out)
	}
	if err := refill(dir); err != nil {
		t.Fatal(err)
	}
	cfg := small(dir)
	cfg.BootID = ""
	c, err := Open(cfg)
	if err != nil {
		t.Fatalf("open on a full disk: %v", err)
	}
	if v := look(c); v.wrong > 0 || v.hits == 0 {
		t.Errorf("on a full disk: %+v", v)
	}
	if c.index.Broken() != nil {
		is(t, newSample(1, 100, 100).put(c, 0), flox.ErrFull)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(d.dir, "filler")); err != nil {
		t.Fatal(err)
	}
	c = open(t, cfg)
	newSample(1, 100, 100).putAll(t, c)
	if v := look(c); v.wrong > 0 || v.hits == 0 {
		t.Errorf("with room again: %+v", v)
	}
	checkDisk(t, c)
	os.Exit(exitCode(t)) // an attempt to open may have been left behind
}

// A disk that fails under the running cache: errors, never wrong bytes, and nothing hangs.
func TestDiskDies(t *testing.T) {
	if private(t) {
		return
	}
	d := newLoopDisk(t, 96<<20)
	c, err := Open(small(filepath.Join(d.dir, "cache")))
	if err != nil {
		t.Fatal(err)
	}
	s := newSample(1, 300<<10, 16<<10)
	s.putAll(t, c)
	d.cut(t)
	if err := c.Keep(context.Background(), "owner", slices.Values([]flox.CID{s.ID})); err == nil {
		t.Error("a keep is durable on a dead disk")
	}
	if err := newSample(2, 300<<10, 16<<10).put(c, 0); err == nil {
		t.Error("a put on a dead disk")
	}
	s.readAll(t, c, 1)
	_ = c.Sync(context.Background())
	_ = c.Close()
	os.Exit(exitCode(t)) // the index's goroutines cannot be ended
}

func exitCode(t *testing.T) int {
	if t.Failed() {
		return 1
	}
	return 0
}

// When others fill the disk the running cache shrinks, and leaves the reserve free.
func TestShrinks(t *testing.T) {
	if private(t) {
		return
	}
	d := newLoopDisk(t, 128<<20)
	cfg := small(filepath.Join(d.dir, "cache"))
	cfg.Reserve = 24 << 20
	c := open(t, cfg)
	for i := range 60 {
		newSample(uint64(i), 700<<10, 64<<10).putAll(t, c)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	f, err := os.Create(filepath.Join(d.dir, "others"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, c.Usage().FreeDisk-4<<20); err != nil {
		t.Fatal(err)
	}
	for try := 0; c.Usage().FreeDisk < cfg.Reserve; try++ {
		if try == 1000 {
			t.Fatalf("the cache does not shrink: %+v", c.Usage())
		}
		time.Sleep(20 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
