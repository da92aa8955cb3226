package schedule

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// op is something that happens to a Scheduler; what it does to which is found from n.
type op struct {
	kind string
	n    int
	b    Build
	w    Worker
}

// model is what a Scheduler should hold.
type model struct {
	builds  map[string]Build
	done    map[string]bool
	leased  map[string]string // by worker
	later   map[string]time.Time
	workers map[string]Worker
}

// drawOps draws what happens, from a few systems, features and owners.
func drawOps(t *rapid.T) (ops []op) {
	ids := []string{}
	some := func(label string, from ...string) []string {
		return slices.Compact(slices.Sorted(slices.Values(rapid.SliceOfN(rapid.SampledFrom(from), 0, 2).Draw(t, label))))
	}
	for i := range rapid.IntRange(1, 80).Draw(t, "ops") {
		o := op{kind: rapid.SampledFrom([]string{"add", "add", "next", "next", "next", "done", "done", "fail", "remove", "worker", "gone", "change", "time"}).Draw(t, "kind"), n: rapid.IntRange(0, 1<<16).Draw(t, "n")}
		switch o.kind {
		case "add":
			o.b = Build{
				ID: fmt.Sprint("b", i), Owner: rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "owner"),
				System: rapid.SampledFrom([]string{linux, arm, Builtin}).Draw(t, "system"), Features: some("features", "kvm", "gpu"),
				Interactive: rapid.Bool().Draw(t, "interactive"), Priority: rapid.IntRange(-1, 1).Draw(t, "priority"),
				Memory: rapid.Uint64Range(0, 40).Draw(t, "memory"), Expect: time.Duration(rapid.IntRange(1, 50).Draw(t, "expect")) * time.Second,
			}
			for range rapid.IntRange(0, 2).Draw(t, "inputs") {
				o.b.Inputs = append(o.b.Inputs, Input{rapid.Uint64Range(0, 9).Draw(t, "path"), 1 << 30})
			}
			if len(ids) > 0 {
				o.b.Needs = slices.Compact(slices.Sorted(slices.Values(rapid.SliceOfN(rapid.SampledFrom(ids), 0, 4).Draw(t, "needs"))))
			}
			ids = append(ids, o.b.ID)
		case "worker", "gone":
			o.w = Worker{
				ID: rapid.SampledFrom([]string{"p", "q", "r"}).Draw(t, "id"), Systems: some("systems", linux, arm), Features: some("has", "kvm", "gpu"),
				Mandatory: some("mandatory", "gpu"), Slots: rapid.IntRange(0, 3).Draw(t, "slots"), Speed: float64(rapid.IntRange(1, 3).Draw(t, "speed")),
				Memory: rapid.SampledFrom([]uint64{0, 32, 64}).Draw(t, "memory"), Paused: rapid.IntRange(0, 4).Draw(t, "paused") == 0,
			}
		}
		ops = append(ops, o)
	}
	return ops
}

// pick gives the n-th of some names, in order, "" of none.
func pick[V any](m map[string]V, n int) string {
	if len(m) == 0 {
		return ""
	}
	return sortedKeys(m)[n%len(m)]
}

// checked carries out what happens and compares with the model; it gives all leases.
func checked(t *rapid.T, ops []op) (leases []Lease) {
	s, now := New(Config{Patience: 30 * time.Second}), start
	m := &model{map[string]Build{}, map[string]bool{}, map[string]string{}, map[string]time.Time{}, map[string]Worker{}}
	for _, o := range ops {
		switch o.kind {
		case "add":
			o.b.Queued = now
			o.b.Needs = slices.DeleteFunc(slices.Clone(o.b.Needs), func(id string) bool { _, ok := m.builds[id]; return !ok })
			if err := s.Add([]Build{o.b}); err != nil {
				t.Fatal(err)
			}
			m.builds[o.b.ID] = o.b
		case "next":
			l, ok := s.Next(now)
			m.check(t, s, l, ok, now)
			if ok {
				leases = append(leases, l)
				m.leased[l.Build] = l.Worker
				delete(m.later, l.Build)
			}
		case "done", "fail":
			if id := pick(m.leased, o.n); id != "" && o.kind == "done" {
				s.Done(id, now, time.Second)
				m.done[id] = true
				m.forget(id)
			} else if id != "" {
				m.later[id] = now.Add(20 * time.Second)
				s.PutOff(id, m.later[id])
				delete(m.leased, id)
			}
		case "remove":
			id := pick(m.builds, o.n)
			s.Remove(id)
			m.forget(id)
		case "worker":
			if err := s.SetWorker(o.w); err != nil {
				t.Fatal(err)
			}
			m.workers[o.w.ID] = o.w
		case "gone":
			s.RemoveWorker(o.w.ID, now)
			delete(m.workers, o.w.ID)
			for id, w := range m.leased {
				if w == o.w.ID {
					delete(m.leased, id)
				}
			}
		case "change":
			if id := pick(m.builds, o.n); id != "" {
				b := m.builds[id]
				b.Priority, b.Interactive = o.n%5, o.n%2 == 0
				m.builds[id] = b
				if err := s.Change(id, b.Interactive, b.Priority); err != nil {
					t.Fatal(err)
				}
			}
		case "time":
			now = now.Add(time.Duration(o.n%30) * time.Second)
		}
		m.paths(t, s)
	}
	return leases
}

func (m *model) forget(id string) {
	delete(m.builds, id)
	delete(m.leased, id)
	delete(m.later, id)
}

// open reports whether a build may be leased: what it needs is done, and it is time.
func (m *model) open(id string, now time.Time) bool {
	_, taken := m.leased[id]
	for _, in := range m.builds[id].Needs {
		if !m.done[in] {
			return false
		}
	}
	return !taken && !m.later[id].After(now)
}

// able reports whether a worker may take a build now.
func (m *model) able(w Worker, b Build) bool {
	taken, memory := 0, roundUp(b.Memory)
	for id, by := range m.leased {
		if by == w.ID {
			taken++
			memory += roundUp(m.builds[id].Memory)
		}
	}
	has := append(slices.Clone(w.Features), w.Mandatory...)
	lacks := func(want, have []string) bool {
		return slices.ContainsFunc(want, func(f string) bool { return !slices.Contains(have, f) })
	}
	switch {
	case w.Paused, taken >= w.Slots, b.System != Builtin && !slices.Contains(w.Systems, b.System):
		return false
	case lacks(b.Features, has), lacks(w.Mandatory, b.Features):
		return false
	}
	return w.Memory == 0 || roundUp(b.Memory) <= roundUp(w.Memory) && (taken == 0 || memory <= w.Memory)
}

// check compares a decision: what is leased may be, and nothing is left that could be,
// unless a worker keeps room for something.
func (m *model) check(t *rapid.T, s *Scheduler, l Lease, ok bool, now time.Time) {
	if ok {
		b, known := m.builds[l.Build]
		if !known || !m.open(l.Build, now) || !m.able(m.workers[l.Worker], b) {
			t.Fatalf("%+v must not be", l)
		}
		if l.Reason.Overdue {
			return
		}
		for id, other := range m.builds {
			if m.open(id, now) && other.Interactive && !b.Interactive && s.workers[l.Worker].held == nil && m.able(m.workers[l.Worker], other) {
				t.Fatalf("%s is interactive, and %+v goes before it", id, l)
			}
		}
		return
	}
	for id, b := range m.builds {
		for _, w := range m.workers {
			if m.open(id, now) && m.able(w, b) && s.workers[w.ID].held == nil {
				t.Fatalf("%s is idle, and %s waits", w.ID, id)
			}
		}
	}
}

// paths compares the longest chains, and what is known of each build.
func (m *model) paths(t *rapid.T, s *Scheduler) {
	s.settle(1 << 30)
	longest := map[string]time.Duration{}
	all := make([]*node, 0, len(s.nodes))
	for _, n := range s.nodes {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b *node) int { return int(b.seq) - int(a.seq) }) //nolint:gosec // small
	users := map[string]int{}
	for _, n := range all {
		longest[n.ID] += n.Expect
		if n.path != longest[n.ID] || n.wanted() != users[n.ID] {
			t.Fatalf("%s begins a chain of %s, want %s; %d wait for it, want %d", n.ID, n.path, longest[n.ID], n.wanted(), users[n.ID])
		}
		for _, in := range m.builds[n.ID].Needs {
			longest[in] = max(longest[in], longest[n.ID])
			users[in]++
		}
	}
	if len(s.nodes) != len(m.builds) {
		t.Fatalf("%d builds, want %d", len(s.nodes), len(m.builds))
	}
}

// Whatever happens: nothing is built before what it needs, by who cannot, or twice at
// once; no worker is idle that could build; somebody who waits goes first; and the same
// leads to the same.
func TestModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		ops := drawOps(t)
		if first, again := checked(t, ops), checked(t, ops); !reflect.DeepEqual(first, again) {
			t.Fatalf("%v, then %v", first, again)
		}
	})
}
