package schedule

import "time"

// windowParts is in how many parts the window moves on, and maxOwners at how many owners
// those that have nothing are forgotten.
const (
	windowParts = 16
	maxOwners   = 4096
)

// owner is who has things built.
type owner struct {
	weight  float64
	builds  int
	running time.Duration // that what is leased should take
	used    [windowParts]time.Duration
	last    int64 // part of the time that was noted last

	at  uint64  // decision in which was found:
	now float64 // its share
}

func (s *Scheduler) owner(name string) *owner {
	o := s.owners[name]
	if o == nil {
		if len(s.owners) >= maxOwners {
			for k, old := range s.owners {
				if old.builds == 0 && old.sum() == 0 {
					delete(s.owners, k)
				}
			}
		}
		o = &owner{weight: 1}
		if w := s.cfg.Weights[name]; w > 0 {
			o.weight = w
		}
		s.owners[name] = o
	}
	return o
}

// forward moves the window on to a time.
func (o *owner) forward(window time.Duration, at time.Time) {
	part := at.UnixNano() / max(int64(window)/windowParts, 1)
	for p := max(o.last+1, part-windowParts+1); p <= part; p++ {
		o.used[uint64(p)%windowParts] = 0
	}
	o.last = max(o.last, part)
}

// use notes that an owner has used a worker for a time, until at.
func (o *owner) use(window time.Duration, at time.Time, took time.Duration) {
	o.forward(window, at)
	o.used[uint64(o.last)%windowParts] += took
}

func (o *owner) sum() (all time.Duration) {
	for _, u := range o.used {
		all += u
	}
	return all
}

// share is what an owner has used in the window, with what it uses now, by weight, in
// seconds.
func (o *owner) share(window time.Duration, at time.Time) float64 {
	o.forward(window, at)
	return (o.sum() + o.running).Seconds() / o.weight
}
