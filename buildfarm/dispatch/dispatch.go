// Package dispatch is what the leader of a storehouse does for the queue of builds: it
// holds a Scheduler to what the log says, and makes the commands that are to be proposed.
//
// It is pure: it has no clock, goroutine or log of its own. It must not know how workers
// are reached; a caller says which of them are gone.
package dispatch

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/buildfarm/schedule"
	"github.com/floxctl/flox/raft"
)

// usual is how long a build should take of which nobody knows.
const usual = 30 * time.Second

// Dispatcher knows the queue as it was at a log index. It is not safe for use by many
// goroutines.
type Dispatcher struct {
	cfg     schedule.Config
	sched   *schedule.Scheduler
	index   uint64
	builds  map[string]*floxv1.QueuedBuild
	users   map[string]map[string]bool // that need a build, by key
	placed  map[string]*place          // that the Scheduler has
	settle  map[string]bool            // that are to be looked at
	workers map[string]*floxv1.FarmWorker
	absent  map[string]bool // workers that get nothing, as they are not there
}

// place is what the Scheduler was told of a build.
type place struct {
	needs  []string
	worker string // that has it
	until  int64  // Unix milliseconds until which it was put off
}

// New makes one that knows nothing yet.
func New(cfg schedule.Config) *Dispatcher { return &Dispatcher{cfg: cfg, absent: map[string]bool{}} }

// Update takes in what is in the log by now. At is a time that does not go back.
func (d *Dispatcher) Update(r *raft.Reader, at time.Time) error {
	if d.sched == nil {
		return d.load(r, at)
	}
	changed, order := map[string]bool{}, []string{}
	workers := map[string]bool{}
	note := func(key string) bool {
		if !changed[key] {
			changed[key] = true
			order = append(order, key)
		}
		return true
	}
	var bad error
	ok, err := queue.Changes(r, d.index, func(c *floxv1.QueueChange) {
		for _, key := range c.GetKeys() {
			note(key)
		}
		if c.GetWorker() != "" {
			workers[c.GetWorker()] = true
		}
		if c.GetWant() != "" {
			bad = errors.Join(bad, queue.Members(r, c.GetWant(), note))
		}
	})
	if err = errors.Join(err, bad); err != nil {
		return err
	}
	if !ok {
		return d.load(r, at)
	}
	if len(workers) > 0 {
		if err := d.loadWorkers(r, at); err != nil {
			return err
		}
	}
	for _, key := range order {
		b, err := queue.Find(r, key)
		if errors.Is(err, flox.ErrNotFound) {
			b, err = nil, nil
		}
		if err != nil {
			return err
		}
		d.know(key, b)
	}
	d.sync(order, at)
	d.index = r.Index()
	return nil
}

// load reads everything anew.
func (d *Dispatcher) load(r *raft.Reader, at time.Time) error {
	d.sched = schedule.New(d.cfg)
	d.builds, d.users, d.settle = map[string]*floxv1.QueuedBuild{}, map[string]map[string]bool{}, map[string]bool{}
	d.placed, d.workers = map[string]*place{}, map[string]*floxv1.FarmWorker{}
	err := queue.Used(r, at, d.sched.Used)
	if err == nil {
		err = d.loadWorkers(r, at)
	}
	var all []string
	if err == nil {
		err = queue.Builds(r, "", func(b *floxv1.QueuedBuild) bool {
			d.know(b.GetKey(), b)
			all = append(all, b.GetKey())
			return true
		})
	}
	if err != nil {
		d.sched = nil
		return err
	}
	slices.SortFunc(all, func(a, b string) int {
		return cmp.Or(cmp.Compare(d.builds[a].GetQueuedIndex(), d.builds[b].GetQueuedIndex()), cmp.Compare(a, b))
	})
	d.sync(all, at)
	d.index = r.Index()
	return nil
}

func (d *Dispatcher) loadWorkers(r *raft.Reader, at time.Time) error {
	all, err := queue.Workers(r)
	if err != nil {
		return err
	}
	now := map[string]*floxv1.FarmWorker{}
	for _, w := range all {
		now[w.GetId()] = w
		if err := d.setWorker(w); err != nil {
			return err
		}
	}
	for id := range d.workers {
		if now[id] != nil {
			continue
		}
		d.sched.RemoveWorker(id, at)
		delete(d.absent, id)
		for _, p := range d.placed {
			if p.worker == id {
				p.worker = ""
			}
		}
	}
	d.workers = now
	return nil
}

func (d *Dispatcher) setWorker(w *floxv1.FarmWorker) error {
	return d.sched.SetWorker(schedule.Worker{
		ID: w.GetId(), Systems: w.GetSystems(), Features: w.GetFeatures(), Mandatory: w.GetMandatory(), Slots: int(w.GetSlots()),
		Speed: w.GetSpeed(), Memory: w.GetMemory(), Disk: w.GetDisk(), Paused: d.absent[w.GetId()] || w.GetState() != floxv1.WorkerState_WORKER_STATE_ACTIVE,
	})
}

// Present has workers that are not there, by what there says, get nothing until they are.
func (d *Dispatcher) Present(there func(worker string) bool) error {
	for id, w := range d.workers {
		if gone := !there(id); gone != d.absent[id] {
			if d.absent[id] = gone; !gone {
				delete(d.absent, id)
			}
			if err := d.setWorker(w); err != nil {
				return err
			}
		}
	}
	return nil
}

// Knows reports whether a worker is one now.
func (d *Dispatcher) Knows(worker string) bool { return d.workers[worker] != nil }

// Name is how people know a worker.
func (d *Dispatcher) Name(worker string) string { return cmp.Or(d.workers[worker].GetName(), worker) }

// know takes in a build as it is now; nil = it has left the queue.
func (d *Dispatcher) know(key string, b *floxv1.QueuedBuild) {
	was := d.builds[key]
	for _, in := range was.GetNeeds() {
		if delete(d.users[in], key); len(d.users[in]) == 0 {
			delete(d.users, in)
		}
	}
	for _, in := range b.GetNeeds() {
		if d.users[in] == nil {
			d.users[in] = map[string]bool{}
		}
		d.users[in][key] = true
	}
	if b == nil {
		delete(d.builds, key)
		return
	}
	d.builds[key] = b
}
