package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/floxctl/flox"
)

// model is what must hold of a cache whatever happens to it.
type model struct {
	t       *rapid.T
	c       *Cache
	cfg     Config
	samples []*sample
	kept    map[flox.CID]bool
	safe    map[string]bool // chunks of kept files that a crash must not cost
}

func (m *model) name(s *sample, i int) string { return fmt.Sprintf("%s/%d", s.ID, i) }

func (m *model) reopen(session string) {
	m.cfg.BootID = session
	c, err := Open(m.cfg)
	if err != nil {
		m.t.Fatalf("open: %v", err)
	}
	m.c = c
}

func (m *model) drawChunk() (*sample, int) {
	s := rapid.SampledFrom(m.samples).Draw(m.t, "file")
	return s, rapid.IntRange(0, len(s.chunks)-1).Draw(m.t, "chunk")
}

func (m *model) put() {
	s, i := m.drawChunk()
	if err := s.put(m.c, i); err != nil && !errors.Is(err, flox.ErrFull) {
		m.t.Fatalf("put: %v", err)
	}
}

func (m *model) putAll() {
	s, _ := m.drawChunk()
	for i := range s.chunks {
		if err := s.put(m.c, i); err != nil && !errors.Is(err, flox.ErrFull) {
			m.t.Fatalf("put: %v", err)
		}
	}
}

func (m *model) read() {
	s, _ := m.drawChunk()
	off := rapid.Int64Range(0, s.Size-1).Draw(m.t, "off")
	n := rapid.Int64Range(1, s.Size-off).Draw(m.t, "n")
	if _, err := s.look(m.c, off, n, uint64(s.Size)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *model) get() {
	s, i := m.drawChunk()
	data, err := m.c.Get(context.Background(), s.chunks[i].ID)
	if err == nil && string(data) != string(s.chunk(i)) {
		m.t.Fatal("get gave wrong bytes")
	}
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		m.t.Fatal(err)
	}
}

func (m *model) block() {
	s := rapid.SampledFrom(m.samples).Draw(m.t, "block")
	if err := m.c.PutBlock(context.Background(), s.ID, s.data); err != nil && !errors.Is(err, flox.ErrFull) {
		m.t.Fatal(err)
	}
}

func (m *model) gc() {
	before := m.here()
	target := rapid.Int64Range(0, m.c.Usage().Bytes).Draw(m.t, "target")
	if _, err := m.c.GC(context.Background(), target); err != nil {
		m.t.Fatal(err)
	}
	after := m.here()
	for name := range m.safe {
		if before[name] && !after[name] {
			m.t.Fatalf("kept chunk %s was evicted", name)
		}
	}
}

// here is which chunks of kept files are here.
func (m *model) here() map[string]bool {
	here := map[string]bool{}
	m.safe = map[string]bool{}
	for _, s := range m.samples {
		for i := range s.chunks {
			if m.kept[s.ID] && m.c.State(s.File, s.offs[i], int64(s.chunks[i].Size)) != Miss {
				here[m.name(s, i)] = true
				m.safe[m.name(s, i)] = true
			}
		}
	}
	return here
}

func (m *model) keep() {
	s := rapid.SampledFrom(m.samples).Draw(m.t, "file")
	if err := m.c.Keep(context.Background(), s.ID.String(), slices.Values([]flox.CID{s.ID})); err != nil {
		m.t.Fatal(err)
	}
	m.kept[s.ID] = true
}

func (m *model) unkeep() {
	s := rapid.SampledFrom(m.samples).Draw(m.t, "file")
	err := m.c.Unkeep(context.Background(), s.ID.String())
	if m.kept[s.ID] != (err == nil) {
		m.t.Fatalf("unkeep: %v, kept %v", err, m.kept[s.ID])
	}
	delete(m.kept, s.ID)
}

// killed: the process died, the system lives.
func (m *model) killed() {
	crash(m.c)
	m.reopen(m.cfg.BootID)
	for _, s := range m.samples {
		for i := range s.chunks {
			if m.c.State(s.File, s.offs[i], int64(s.chunks[i].Size)) == Unverified && m.cfg.BootID == "first" {
				m.t.Fatal("kill -9 cost trust")
			}
		}
	}
}

// powerCut: bytes that no mark covers turn into a hole in some object.
func (m *model) powerCut() {
	last := m.c.session.marks.Load().Durable
	type run struct {
		object   uint64
		off, end int64
	}
	var doubtful []run
	_ = m.c.index.pages(context.Background(), []byte{'f'}, func(list []entry) error {
		for _, e := range list {
			ct, _, _, err := decode(e.value)
			if err != nil {
				return err
			}
			for _, x := range ct.ext {
				if x.gen > last || m.c.session.lost(x.gen) {
					doubtful = append(doubtful, run{ct.object, ct.base + int64(x.off), ct.base + int64(x.end)})
				}
			}
		}
		return nil
	})
	path := m.c.objects.path
	crash(m.c)
	for _, r := range doubtful {
		if rapid.Bool().Draw(m.t, "reached the disk") {
			continue
		}
		f, err := os.OpenFile(path(r.object), os.O_RDWR, 0)
		if err != nil {
			m.t.Fatal(err)
		}
		_, err = f.WriteAt(make([]byte, r.end-r.off), r.off)
		f.Close()
		if err != nil {
			m.t.Fatal(err)
		}
	}
	m.reopen(m.cfg.BootID + "+")
}

func (m *model) closed() {
	if err := m.c.Close(); err != nil {
		m.t.Fatal(err)
	}
	m.reopen(m.cfg.BootID + "+")
}

func (m *model) sync() {
	if err := m.c.Sync(context.Background()); err != nil {
		m.t.Fatal(err)
	}
}

// Whatever is put, read, kept, evicted, killed and cut: a hit is right, kept
// content stays, the budget holds, and the sums are those of the records.
func TestModel(t *testing.T) {
	var samples []*sample
	for i := range 12 {
		samples = append(samples, newSample(uint64(i), []int{300, 5 << 10, 28 << 10, 90 << 10}[i%4]+i, 8<<10))
	}
	dir, n := t.TempDir(), 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		cfg := small(filepath.Join(dir, fmt.Sprint(n)))
		cfg.segment, cfg.small, cfg.pack, cfg.OpenFiles, cfg.Memory = 40<<10, 16<<10, 48<<10, 16, 1
		m := &model{t: t, cfg: cfg, samples: samples, kept: map[flox.CID]bool{}}
		m.reopen("first")
		defer func() {
			m.c.Close()
			os.RemoveAll(cfg.Dir)
		}()
		steps := []struct {
			weight int
			do     func()
		}{
			{30, m.put},
			{10, m.putAll},
			{25, m.read},
			{10, m.get},
			{4, m.block},
			{6, m.gc},
			{4, m.keep},
			{3, m.unkeep},
			{2, m.killed},
			{2, m.powerCut},
			{1, m.closed},
			{3, m.sync},
		}
		var bag []int
		for i, s := range steps {
			bag = append(bag, slices.Repeat([]int{i}, s.weight)...)
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			steps[rapid.SampledFrom(bag).Draw(t, "step")].do()
		}
		for _, s := range samples {
			if _, err := s.look(m.c, 0, s.Size, 0); err != nil {
				t.Fatal(err)
			}
		}
		if u := m.c.Usage(); u.Bytes > u.Budget {
			t.Fatalf("over budget: %+v", u)
		}
	})
}
