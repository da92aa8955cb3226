package dispatch

import (
	"hash/fnv"
	"slices"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/buildfarm/schedule"
)

// Names of states.
const (
	waiting = floxv1.BuildState_BUILD_STATE_WAITING
	leased  = floxv1.BuildState_BUILD_STATE_LEASED
	done    = floxv1.BuildState_BUILD_STATE_DONE
	failed  = floxv1.BuildState_BUILD_STATE_FAILED
)

// nominal is what the output of a build counts as, in bytes, where a worker lacks it.
const nominal = 16 << 20

// sync has the Scheduler know what is known now of some builds.
func (d *Dispatcher) sync(keys []string, at time.Time) {
	todo := slices.Clone(keys)
	for _, key := range keys {
		d.unsettled(key)
		todo = append(todo, d.moved(key, at)...)
	}
	var adds []schedule.Build
	for len(todo) > 0 {
		key := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		before := len(adds)
		d.add(key, &adds)
		for _, b := range adds[before:] {
			for u := range d.users[b.ID] {
				if d.placed[u] == nil {
					todo = append(todo, u)
				}
			}
		}
	}
	if err := d.sched.Add(adds); err != nil {
		d.sched = nil // it holds fewer than the queue; all is read anew
		return
	}
	for _, b := range adds {
		d.stands(b.ID, at)
	}
	for _, key := range keys {
		d.stands(key, at)
	}
}

// moved takes out of the Scheduler a build that is over, or waits for others than
// before. It gives those that may be taken in because of that.
func (d *Dispatcher) moved(key string, at time.Time) (todo []string) {
	b, p := d.builds[key], d.placed[key]
	switch {
	case b.GetState() == done && b != nil:
		if p != nil {
			took := time.Duration(0)
			if o := b.GetOutcome(); o.GetStartUnix() > 0 {
				took = time.Duration(max(o.GetStopUnix()-o.GetStartUnix(), 0)) * time.Second
			}
			if p.worker != "" {
				d.sched.Has(p.worker, hash(key))
			}
			d.sched.Done(key, at, took)
			delete(d.placed, key)
		}
	case p != nil && (b == nil || b.GetState() == failed || !slices.Equal(p.needs, d.open(b))):
		todo = d.unplace(key)
	}
	open := b != nil && b.GetState() != done
	for u := range d.users[key] {
		switch p := d.placed[u]; {
		case p == nil && !open:
			todo = append(todo, u)
		case p != nil && !open:
			p.needs = slices.DeleteFunc(slices.Clone(p.needs), func(in string) bool { return in == key })
		case p != nil && d.builds[u].GetState() != leased && !slices.Contains(p.needs, key): // it has come again
			todo = append(todo, d.unplace(u)...)
		}
	}
	return todo
}

// open are the needs of a build that are in the queue and not done; a build that is
// leased waits for none.
func (d *Dispatcher) open(b *floxv1.QueuedBuild) (needs []string) {
	if b.GetState() == leased {
		return nil
	}
	for _, in := range b.GetNeeds() {
		if n := d.builds[in]; n != nil && n.GetState() != done {
			needs = append(needs, in)
		}
	}
	return needs
}

// unplace takes a build out of the Scheduler, and all that need it there.
func (d *Dispatcher) unplace(key string) (gone []string) {
	stack := []string{key}
	for len(stack) > 0 {
		key := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if d.placed[key] == nil {
			continue
		}
		d.sched.Remove(key)
		delete(d.placed, key)
		gone = append(gone, key)
		for u := range d.users[key] {
			stack = append(stack, u)
		}
	}
	return gone
}

// add notes that a build and what it needs are to be taken in, if nothing that it needs
// has failed.
func (d *Dispatcher) add(key string, adds *[]schedule.Build) bool {
	b := d.builds[key]
	if d.placed[key] != nil {
		return true
	}
	if b == nil || b.GetState() == done || b.GetState() == failed {
		return false
	}
	needs := d.open(b)
	for _, in := range needs {
		if !d.add(in, adds) {
			return false
		}
	}
	took := time.Duration(b.GetExpectMs()) * time.Millisecond //nolint:gosec // of the log
	if took == 0 {
		took = usual
	}
	s := schedule.Build{
		ID: key, Owner: b.GetOwner(), Interactive: b.GetInteractive(), Priority: int(b.GetPriority()), System: b.GetSystem(), Features: b.GetFeatures(),
		Memory: b.GetMemory(), Disk: b.GetDisk(), Expect: took, Queued: time.UnixMilli(b.GetQueuedUnixMs()), Needs: needs,
	}
	for _, in := range b.GetNeeds() {
		s.Inputs = append(s.Inputs, schedule.Input{Path: hash(in), Bytes: nominal})
	}
	*adds = append(*adds, s)
	d.placed[key] = &place{needs: needs}
	return true
}

// hash names a path to the Scheduler.
func hash(key string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(key)) // never fails
	return h.Sum64()
}

// stands has the Scheduler know who has a build, until when it is put off, and its rank.
func (d *Dispatcher) stands(key string, at time.Time) {
	b, p := d.builds[key], d.placed[key]
	if b == nil || p == nil {
		return
	}
	_ = d.sched.Change(key, b.GetInteractive(), int(b.GetPriority())) // it is there
	worker := b.GetLease().GetWorker()
	switch {
	case worker != "" && p.worker == worker:
	case worker != "":
		if p.worker != "" {
			d.sched.PutOff(key, at)
		}
		p.worker = worker
		if d.sched.Leased(key, worker) != nil { // by who is gone: until it is taken back
			d.sched.PutOff(key, at.Add(time.Hour))
			p.worker, p.until = "", at.Add(time.Hour).UnixMilli()
		}
	case p.worker != "" || p.until != b.GetNotBeforeUnixMs():
		p.worker, p.until = "", b.GetNotBeforeUnixMs()
		d.sched.PutOff(key, time.UnixMilli(p.until))
	}
}

// unsettled notes what has to be looked at because a build has failed, or no longer has.
func (d *Dispatcher) unsettled(key string) {
	d.settle[key] = true
	for u := range d.users[key] {
		d.settle[u] = true
	}
}

// Settle gives builds, at most so many, that are to fail because one they need has, or to
// wait again because none has any more.
func (d *Dispatcher) Settle(most int) (keys []string) {
	for key := range d.settle {
		if len(keys) == most {
			break
		}
		delete(d.settle, key)
		b := d.builds[key]
		bad := slices.ContainsFunc(b.GetNeeds(), func(in string) bool { return d.builds[in].GetState() == failed })
		waits := b.GetState() == waiting
		if b != nil && (waits && bad || b.GetState() == failed && b.GetOutcome().GetStatus() == uint32(buildfarm.DependencyFailed) && !bad) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}
