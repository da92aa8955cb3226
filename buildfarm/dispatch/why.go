package dispatch

import (
	"fmt"
	"slices"
	"strings"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/schedule"
)

// Words for where a build stands, beside those of a schedule.Explanation.
const (
	stateWaiting = "waiting"
	statePutOff  = "put off"
	// StateReady is that of one that waits for a worker alone.
	StateReady    = "ready"
	stateBuilding = "building"
	stateDone     = "done"
	stateFailed   = "failed"
)

// maxNamed bounds the workers that are named.
const maxNamed = 10

// explain is where the Scheduler has a build. ok is false if it is not in the queue, or
// is over.
func (d *Dispatcher) explain(key string, now time.Time) (e schedule.Explanation, ok bool) {
	if d.sched == nil {
		return e, false
	}
	return d.sched.Why(key, now)
}

// Standing says why a build stands where it does; nil if it is not in the queue.
func (d *Dispatcher) Standing(key string, now time.Time) *floxv1.BuildStanding {
	b := d.builds[key]
	if b == nil {
		return nil
	}
	out := &floxv1.BuildStanding{Key: key, State: stateWaiting, Why: "it waits for what it needs"}
	switch b.GetState() {
	case done:
		out.State, out.Why = stateDone, "it is done"
		return out
	case failed:
		out.State, out.Why = stateFailed, "it failed: "+b.GetOutcome().GetMessage()
		return out
	}
	e, ok := d.explain(key, now)
	if !ok {
		return out
	}
	out.State = e.State
	if out.GetState() == statePutOff && !e.Until.After(now) {
		out.State = StateReady // as soon as it is looked at
	}
	out.Ahead, out.Needs, out.NeedsOf = uint32(e.Before()), e.Needs, uint32(e.NeedsOf) //nolint:gosec // at most all builds
	out.Able, out.Free = uint32(len(e.Able)), uint32(e.Free)                           //nolint:gosec // at most all workers
	for _, id := range e.Able {
		switch {
		case d.absent[id]:
			out.Away = append(out.Away, d.Name(id))
		case d.workers[id].GetState() != floxv1.WorkerState_WORKER_STATE_ACTIVE:
			out.Closed = append(out.Closed, d.Name(id))
		}
	}
	slices.Sort(out.GetAway())
	slices.Sort(out.GetClosed())
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	switch out.GetState() {
	case stateBuilding:
		out.Worker = d.Name(e.Worker)
		say("%s builds it", out.GetWorker())
	case stateWaiting:
		say("it waits for %d others: %s", e.NeedsOf, strings.Join(e.Needs, ", "))
	case statePutOff:
		out.UntilUnixMs = e.Until.UnixMilli()
		say("its worker failed it (%s), and it is tried again at %s", b.GetFault(), e.Until.UTC().Format(time.RFC3339))
	}
	if out.GetState() != stateBuilding {
		say("%s", d.workersFor(b, out, e))
	}
	if n := out.GetAhead(); n > 0 {
		say("it waits behind %d others: %s", n, strings.Join(e.Rivals(), ", "))
	}
	if out.GetState() == StateReady && e.Worker != "" {
		say("%s takes nothing else until it has room for it", d.Name(e.Worker))
	}
	out.Why = strings.Join(lines, "\n")
	return out
}

// workersFor says who can build something, and what of them.
func (d *Dispatcher) workersFor(b *floxv1.QueuedBuild, at *floxv1.BuildStanding, e schedule.Explanation) string {
	able, away, closed := int(at.GetAble()), len(at.GetAway()), len(at.GetClosed())
	var gone []string
	if away > 0 {
		gone = append(gone, named(at.GetAway())+" away")
	}
	if closed > 0 {
		gone = append(gone, named(at.GetClosed())+" cordoned or draining")
	}
	switch {
	case able == 0:
		have := "there is none"
		if unfit := e.Unfit(); len(unfit) > 0 {
			have = "there are " + strings.Join(unfit, ", ")
		}
		return fmt.Sprintf("no worker fits: it requires '%s' with features {%s}, and %s", b.GetSystem(), strings.Join(b.GetFeatures(), ", "), have)
	case away+closed == able:
		return "all workers that can build it take nothing now: " + strings.Join(gone, "; ")
	case e.Free > 0:
		return fmt.Sprintf("%d of the %d workers that can build it are free for it", e.Free, able)
	}
	return strings.Join(append([]string{fmt.Sprintf("%d of the %d workers that can build it are busy", able-away-closed, able)}, gone...), "; ")
}

// named names workers: "a, b are".
func named(names []string) string {
	switch n := len(names); {
	case n == 1:
		return names[0] + " is"
	case n > maxNamed:
		return fmt.Sprintf("%s and %d others are", strings.Join(names[:maxNamed], ", "), n-maxNamed)
	}
	return strings.Join(names, ", ") + " are"
}
