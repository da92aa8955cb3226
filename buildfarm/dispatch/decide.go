package dispatch

import (
	"slices"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/buildfarm/schedule"
)

// Next gives the next lease to be proposed, and takes it as given; ok is false if there is
// none now.
func (d *Dispatcher) Next(now time.Time) (l schedule.Lease, ok bool) {
	if d.sched == nil {
		return l, false
	}
	if l, ok = d.sched.Next(now); ok {
		d.placed[l.Build].worker = l.Worker
	}
	return l, ok
}

// Refused takes a lease back that the log did not take: it is tried again later, unless
// the log says something else by then.
func (d *Dispatcher) Refused(key string, until time.Time) {
	if p := d.placed[key]; p != nil {
		p.worker, p.until = "", until.UnixMilli()
		d.sched.PutOff(key, until)
	}
}

// Wake is when there may be a lease that there is not yet; zero = nothing waits for a time.
func (d *Dispatcher) Wake() time.Time {
	if d.sched == nil {
		return time.Time{}
	}
	return d.sched.Wake()
}

// Lost gives the leases of those workers that are not there, by what there says, or that
// are draining: at most as many as one command takes back.
func (d *Dispatcher) Lost(there func(worker string) bool) (lost, given []*floxv1.BuildLease) {
	for _, b := range d.builds {
		if b.GetState() != leased || len(lost)+len(given) >= queue.MaxKeys {
			continue
		}
		switch w := d.workers[b.GetLease().GetWorker()]; {
		case w == nil || !there(w.GetId()):
			lost = append(lost, b.GetLease())
		case w.GetState() == floxv1.WorkerState_WORKER_STATE_DRAINING:
			given = append(given, b.GetLease())
		}
	}
	byKey := func(a, b *floxv1.BuildLease) int {
		return int(min(max(int64(a.GetToken())-int64(b.GetToken()), -1), 1))
	} //nolint:gosec // log indexes
	slices.SortFunc(lost, byKey)
	slices.SortFunc(given, byKey)
	return lost, given
}
