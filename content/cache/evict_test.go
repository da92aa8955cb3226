package cache

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// kernel plays the mount: pages stay cached until they are dropped, and reads
// of cached pages are not seen by the cache.
type kernel struct {
	mu     sync.Mutex
	cached map[uint64]bool
	inUse  map[uint64]struct{}
	err    error
}

func (k *kernel) DropPages(_ context.Context, nodes []uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, n := range nodes {
		delete(k.cached, n)
	}
	return k.err
}

func (k *kernel) InUse(context.Context) (map[uint64]struct{}, error) { return k.inUse, k.err }

// use reads a file through the page cache, and fetches it if need be. It says
// whether it had to.
func (k *kernel) use(t *testing.T, c *Cache, s *sample, node uint64) (fetched bool) {
	t.Helper()
	k.mu.Lock()
	warm := k.cached[node]
	k.cached[node] = true
	k.mu.Unlock()
	if warm {
		return false
	}
	if s.readAll(t, c, node) == Hit {
		return false
	}
	for i := range s.chunks {
		if err := s.put(c, i); err != nil && !errors.Is(err, flox.ErrFull) {
			t.Fatal(err)
		}
	}
	c.Used(s.File, 0, s.Size, node)
	return true
}

// traffic pushes ten times the cache's budget through it while a service uses
// ten files, and counts how often those had to be fetched again.
// It also counts those that are not in the cache in the end, or not wholly.
func traffic(t *testing.T, withKernel bool) (again, lost int) {
	ctx := context.Background()
	k := &kernel{cached: map[uint64]bool{}}
	var hot []*sample
	var c *Cache
	service := func() {
		for i, s := range hot {
			if k.use(t, c, s, uint64(i+1)) {
				again++
			}
		}
	}
	cfg := small(t.TempDir())
	cfg.Budget = 16 << 20
	if withKernel {
		cfg.Kernel = k
	}
	// "Every second" is shorter than the grace: each file is used within it.
	cfg.wait = func(context.Context, time.Duration) error { service(); return nil }
	c = open(t, cfg)
	for i := range 10 {
		hot = append(hot, newSample(uint64(i), []int{3000, 20 << 10, 200 << 10, 500 << 10}[i%4], 64<<10))
	}
	service()
	again = 0
	for i := range 10 * int(cfg.Budget) / (400 << 10) {
		s := newSample(uint64(100+i), []int{390 << 10, 780 << 10, 30 << 10}[i%3], 64<<10)
		k.use(t, c, s, uint64(100+i))
		service()
		c.shrink(ctx, c.limit())
	}
	if u := c.Usage(); u.Evicted < 8*cfg.Budget || u.Bytes > u.Budget {
		t.Errorf("after the traffic: %+v", u)
	}
	for _, s := range hot {
		if c.State(s.File, 0, s.Size) != Hit {
			lost++
		}
	}
	return again, lost
}

// Ten files a running service uses every second survive a cache ten times
// smaller than the traffic, though their reads are answered by the kernel's page cache.
func TestHotFilesSurvive(t *testing.T) {
	if again, lost := traffic(t, true); again+lost != 0 {
		t.Errorf("hot files were fetched again %d times, %d are not here", again, lost)
	}
	// The control: without the second chance they are lost.
	if _, lost := traffic(t, false); lost == 0 {
		t.Error("hot files survive without the kernel's help: this test shows nothing")
	}
}

// What a process has open or mapped is not evicted, read or not; and when the
// kernel cannot be asked, only what nobody ever read is.
func TestInUse(t *testing.T) {
	k := &kernel{cached: map[uint64]bool{}, inUse: map[uint64]struct{}{7: {}}}
	cfg := small(t.TempDir())
	cfg.Kernel = k
	c := open(t, cfg)
	mapped, idle, unread, packed := newSample(1, 300<<10, 64<<10), newSample(2, 300<<10, 64<<10), newSample(3, 300<<10, 64<<10), newSample(4, 9000, 64<<10)
	for i, s := range []*sample{mapped, idle, unread, packed} {
		s.putAll(t, c)
		if s != unread {
			s.readAll(t, c, uint64(7+i))
		}
	}
	c.Used(packed.File, 0, 1, 7)
	states := func() []State {
		var out []State
		for _, s := range []*sample{mapped, idle, unread, packed} {
			out = append(out, c.State(s.File, 0, s.Size))
		}
		return out
	}
	k.err = errors.New("no answer")
	gc(t, c)
	if d := cmp.Diff([]State{Hit, Hit, Miss, Hit}, states()); d != "" {
		t.Errorf("kernel does not answer: %s", d)
	}
	k.err = nil
	gc(t, c)
	if d := cmp.Diff([]State{Hit, Miss, Miss, Hit}, states()); d != "" {
		t.Errorf("one inode in use: %s", d)
	}
	k.inUse = nil
	gc(t, c)
	gc(t, c)
	if d := cmp.Diff([]State{Miss, Miss, Miss, Miss}, states()); d != "" {
		t.Errorf("nothing in use: %s", d)
	}
}

func gc(t *testing.T, c *Cache) {
	t.Helper()
	if _, err := c.GC(context.Background(), 0); err != nil {
		t.Fatal(err)
	}
}

// The inodes that read a file are still known after kill -9: the mount and its
// page cache live on.
func TestReadersSurviveCrash(t *testing.T) {
	dir := t.TempDir()
	c, err := Open(small(dir))
	if err != nil {
		t.Fatal(err)
	}
	s := newSample(1, 100<<10, 64<<10)
	s.putAll(t, c)
	for n := range uint64(20) {
		s.readAll(t, c, n+1)
	}
	if err := c.memory.flush(); err != nil {
		t.Fatal(err)
	}
	crash(c)
	c = open(t, small(dir))
	if d := cmp.Diff([]uint64{13, 14, 15, 16, 17, 18, 19, 20}, c.record(key{s.ID, 0}).readers()); d != "" {
		t.Error(d)
	}
}

// Kept content stays until its last owner lets go: put before or after the
// Keep, packed or not, and across a crash.
func TestKeep(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	c, err := Open(small(dir))
	if err != nil {
		t.Fatal(err)
	}
	before, after, packed, other := newSample(1, 600<<10, 64<<10), newSample(2, 300<<10, 64<<10), newSample(3, 9000, 64<<10), newSample(4, 9000, 64<<10)
	kept := []*sample{before, after, packed}
	before.putAll(t, c)
	packed.putAll(t, c)
	ids := slices.Values([]flox.CID{before.ID, after.ID, packed.ID})
	for _, owner := range []string{"a", "b"} {
		if err := c.Keep(ctx, owner, ids); err != nil {
			t.Fatal(err)
		}
	}
	after.putAll(t, c)
	other.putAll(t, c)
	size := before.Size + after.Size + packed.Size
	want := []Kept{{"a", 3, size}, {"b", 3, size}}
	check := func(what string) {
		t.Helper()
		for range 3 {
			gc(t, c)
		}
		got, err := c.Keeps(ctx)
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v %s", what, err, d)
		}
		var names []string
		for _, k := range want {
			names = append(names, k.Owner)
		}
		owners, err := c.Owners(ctx)
		if d := cmp.Diff(names, owners); err != nil || d != "" {
			t.Errorf("%s: %v %s", what, err, d)
		}
		for _, s := range kept {
			if st := s.readAll(t, c, 0); st != Hit {
				t.Errorf("%s: kept file of %d bytes: state %d, want hit", what, s.Size, st)
			}
		}
		if u := c.Usage(); u.Kept < size || u.Kept > size+64<<10 {
			t.Errorf("%s: %d bytes kept, want about %d", what, u.Kept, size)
		}
	}
	check("kept")
	if st := other.readAll(t, c, 0); st != Miss {
		t.Errorf("not kept: state %d, want miss", st)
	}
	crash(c)
	if c, err = Open(small(dir)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	check("after a crash")
	if err := c.Unkeep(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	is(t, c.Unkeep(ctx, "a"), flox.ErrNotFound)
	want = want[1:]
	check("one owner left")
	if err := c.Unkeep(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		gc(t, c)
	}
	if u := c.Usage(); u.Kept != 0 || u.Files != 0 {
		t.Errorf("nothing kept: %+v", u)
	}
}

// A crash between a durable keep and the marks on records does not cost kept content.
func TestKeepMarksLost(t *testing.T) {
	c := open(t, small(t.TempDir()))
	s := newSample(1, 100<<10, 64<<10)
	s.putAll(t, c)
	if err := c.Keep(context.Background(), "a", slices.Values([]flox.CID{s.ID})); err != nil {
		t.Fatal(err)
	}
	if err := c.setKept(s.ID, false); err != nil { // as an index that lost its tail
		t.Fatal(err)
	}
	gc(t, c)
	if st := s.readAll(t, c, 0); st != Hit || c.Usage().Kept == 0 {
		t.Errorf("state %d, %+v", st, c.Usage())
	}
}

// A pack whose files are half evicted gives its space back, and the other half
// is still right, trusted and known by chunk.
func TestCompaction(t *testing.T) {
	dir := t.TempDir()
	c, err := Open(small(dir))
	if err != nil {
		t.Fatal(err)
	}
	var all []*sample
	for i := range 200 {
		all = append(all, newSample(uint64(i), 500+i*100, 4<<10))
		all[i].putAll(t, c)
	}
	packs := c.objects.total.Load()
	for _, s := range all[:100] {
		s.readAll(t, c, 1)
	}
	if _, err := c.GC(context.Background(), c.index.size(0)); err != nil { // one lap is not enough for used ones
		t.Fatal(err)
	}
	check := func(c *Cache) (hits int) {
		for _, s := range all {
			if st := s.readAll(t, c, 0); st == Hit {
				hits++
				for i := range s.chunks {
					if _, err := c.Get(context.Background(), s.chunks[i].ID); err != nil {
						t.Error(err)
					}
				}
			}
		}
		return hits
	}
	hits := check(c)
	if now := c.objects.total.Load(); now >= packs || hits == len(all) {
		t.Errorf("packs: %d bytes before, %d after; %d files left", packs, now, hits)
	}
	crash(c)
	cfg := small(dir)
	cfg.BootID = "another" // moved bytes were made durable before their entry
	c = open(t, cfg)
	if got := check(c); got > hits {
		t.Errorf("%d files after a crash, %d before", got, hits)
	}
}

// A collection takes what is not live, however lately it was read, and nothing else.
func TestCollect(t *testing.T) {
	c := open(t, small(t.TempDir()))
	var all []*sample
	for i := range 40 {
		all = append(all, newSample(uint64(i), 500+i*3000, 4<<10))
		all[i].putAll(t, c)
		all[i].readAll(t, c, uint64(i)+1)
	}
	live := func(id flox.CID) bool {
		return slices.ContainsFunc(all[:20], func(s *sample) bool { return s.ID == id })
	}
	here := func() (n [2]int) {
		for i, s := range all {
			if s.readAll(t, c, 0) == Hit {
				n[i/20]++
			}
		}
		return n
	}
	if freed, err := c.Collect(t.Context(), 1, live); err != nil || freed == 0 {
		t.Fatal(freed, err)
	}
	if n := here(); n[0] != 20 || n[1] == 0 || n[1] == 20 {
		t.Errorf("after the first byte %d live and %d others are left", n[0], n[1])
	}
	if freed, err := c.Collect(t.Context(), 1<<40, live); err != nil || freed == 0 {
		t.Fatal(freed, err)
	}
	if n := here(); n != [2]int{20, 0} {
		t.Errorf("%d live and %d others are left", n[0], n[1])
	}
}

// Full means ErrFull at once, not an error of another kind, and Run makes room.
func TestBudget(t *testing.T) {
	cfg := small(t.TempDir())
	cfg.Budget = 24 << 20
	c := open(t, cfg)
	refused := 0
	for i := range 60 {
		s := newSample(uint64(i), 700<<10, 64<<10)
		for j := range s.chunks {
			if err := s.put(c, j); errors.Is(err, flox.ErrFull) {
				refused++
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	if u := c.Usage(); refused == 0 || u.Refused != int64(refused) || u.Bytes > u.Budget {
		t.Errorf("%d puts refused, %+v", refused, u)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { _ = c.Run(ctx) })
	s := newSample(99, 700<<10, 64<<10)
	for try := 0; s.put(c, 0) != nil; try++ {
		if try == 1000 {
			t.Fatalf("no room after a while: %+v", c.Usage())
		}
		time.Sleep(20 * time.Millisecond)
	}
	cancel()
	run.Wait()
}
