package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/floxctl/flox"
)

// worker is a Worker and what it does.
type worker struct {
	Worker
	running      map[*node]bool
	memory, disk uint64   // taken
	classes      []*class // that it can do
	leases       uint64
	held         *node // that it keeps room for
	have         have
}

// SetWorker takes in a worker, or what has changed of one. ErrBadInput, ErrFull.
func (s *Scheduler) SetWorker(w Worker) error {
	if w.ID == "" || w.Slots < 0 || w.Speed < 0 {
		return fmt.Errorf("worker %q with %d slots of speed %g: %w", w.ID, w.Slots, w.Speed, flox.ErrBadInput)
	}
	w.Speed = cmp.Or(w.Speed, 1)
	known := s.workers[w.ID]
	if known == nil {
		if len(s.workers) >= MaxWorkers {
			return fmt.Errorf("there are %d workers already: %w", MaxWorkers, flox.ErrFull)
		}
		known = &worker{running: map[*node]bool{}, have: have{known: map[uint64]bool{}}}
		s.workers[w.ID] = known
	} else {
		s.unlist(known)
	}
	known.Worker = w
	at, _ := slices.BinarySearchFunc(s.order, known, func(a, b *worker) int {
		return cmp.Or(cmp.Compare(b.Speed, a.Speed), cmp.Compare(a.ID, b.ID))
	})
	s.order = slices.Insert(s.order, at, known)
	for _, key := range sortedKeys(s.classes) {
		if c := s.classes[key]; known.can(c) == "" {
			known.classes = append(known.classes, c)
		}
	}
	return nil
}

// unlist takes a worker out of the lists.
func (s *Scheduler) unlist(w *worker) {
	s.order = slices.DeleteFunc(s.order, func(o *worker) bool { return o == w })
	w.classes = nil
	if w.held != nil {
		w.held.held, w.held = nil, nil
	}
}

// RemoveWorker takes out a worker. What it builds is ready again at a time.
func (s *Scheduler) RemoveWorker(id string, at time.Time) {
	w := s.workers[id]
	if w == nil {
		return
	}
	for n := range w.running {
		s.PutOff(n.ID, at)
	}
	s.unlist(w)
	delete(s.workers, id)
}

// Has notes paths that a worker has; of many the latest are remembered.
func (s *Scheduler) Has(id string, paths ...uint64) {
	if w := s.workers[id]; w != nil {
		for _, p := range paths {
			w.have.add(p)
		}
	}
}

// can says why a worker never does builds of a class; "" = it can.
func (w *worker) can(c *class) string {
	if c.system != Builtin && !slices.Contains(w.Systems, c.system) {
		return "system"
	}
	for _, f := range c.features {
		if !slices.Contains(w.Features, f) && !slices.Contains(w.Mandatory, f) {
			return "features"
		}
	}
	for _, f := range w.Mandatory {
		if !slices.Contains(c.features, f) {
			return "mandatory"
		}
	}
	if w.Memory > 0 && c.memory > roundUp(w.Memory) || w.Disk > 0 && c.disk > roundUp(w.Disk) {
		return "size"
	}
	return ""
}

// free reports whether a worker can take one more.
func (w *worker) free() bool { return !w.Paused && len(w.running) < w.Slots }

// fits reports whether it has room now for a build of a class that it can do. One that is
// alone fits always.
func (w *worker) fits(c *class) bool {
	if len(w.running) == 0 {
		return true
	}
	return (w.Memory == 0 || w.memory+c.memory <= w.Memory) && (w.Disk == 0 || w.disk+c.disk <= w.Disk)
}

func (w *worker) take(n *node) {
	w.running[n] = true
	w.memory, w.disk = w.memory+n.class.memory, w.disk+n.class.disk
	w.leases++
	for _, in := range n.Inputs {
		w.have.add(in.Path)
	}
}

func (w *worker) release(n *node) {
	delete(w.running, n)
	w.memory, w.disk = w.memory-n.class.memory, w.disk-n.class.disk
}

// lacks is how many bytes a worker has to fetch for a build.
func (w *worker) lacks(n *node) (bytes uint64) {
	for _, in := range n.Inputs {
		if !w.have.known[in.Path] {
			bytes += in.Bytes
		}
	}
	return bytes
}

// have is which paths a worker has: the last maxHave it was told of.
type have struct {
	known map[uint64]bool
	ring  []uint64
	next  int
}

func (h *have) add(path uint64) {
	switch {
	case h.known[path]:
		return
	case len(h.ring) < maxHave:
		h.ring = append(h.ring, path)
	default:
		delete(h.known, h.ring[h.next])
		h.ring[h.next] = path
		h.next = (h.next + 1) % maxHave
	}
	h.known[path] = true
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
