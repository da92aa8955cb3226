package storehouse

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/dispatch"
)

const (
	// maxAsks is how many builds one beat asks about, and maxLooked how many of those that
	// wait are looked at to find them.
	maxAsks   = 64
	maxLooked = 1 << 14
	// standingsWait is how long a beat waits for the leader to have time for answers.
	standingsWait = 500 * time.Millisecond
	// whyWait is how long a person's question does.
	whyWait = 10 * time.Second
)

// asks are builds that callers of this server wait for, that wait for a worker alone.
func (f *farming) asks() (keys []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	left := maxLooked
	for _, w := range f.wants {
		keys = append(keys, w.ready(min(shownPlaces, maxAsks-len(keys)), &left)...)
		if len(keys) >= maxAsks || left <= 0 {
			break
		}
	}
	return keys
}

// ready gives builds, at most so many, of which all that they need is done. It looks at no
// more than left.
func (w *want) ready(most int, left *int) (keys []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, b := range w.waiting {
		if *left--; len(keys) >= most || *left <= 0 {
			break
		}
		open := false
		for _, in := range b.GetNeeds() {
			open = open || !w.done[in]
		}
		if !open {
			keys = append(keys, key)
		}
	}
	return keys
}

// told passes on where builds stand to the callers of this server.
func (f *farming) told(all []*floxv1.BuildStanding) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range all {
		for w := range f.watch[s.GetKey()] {
			w.explain(s)
		}
	}
}

// cutOff has the callers of this server hear that nobody decides anything.
func (f *farming) cutOff() {
	why := fmt.Sprintf("no server that leads was heard for %s: nothing more is given to builders, and nothing that ends is recorded, until a majority of the servers reach each other again; see: floxctl storehouse servers", f.patience())
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.wants {
		w.mu.Lock()
		w.standings = []*floxv1.BuildStanding{{Why: why}}
		w.rouse()
		w.mu.Unlock()
	}
}

// waits gives a build that waits, or else one that is not over; nil = all are.
func (q *queueing) waits() (begun *node) {
	for _, n := range q.graph.order {
		switch {
		case q.outcome[n] != nil || q.ending[n]:
		case q.views[n] == nil:
			return n
		case begun == nil:
			begun = n
		}
	}
	return begun
}

// explain notes why a build waits.
func (w *want) explain(s *floxv1.BuildStanding) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting[s.GetKey()] == nil || len(w.standings) >= maxAsks {
		return // not any more, or it is told later
	}
	w.standings = append(w.standings, s)
	w.rouse()
}

// why tells the caller where builds stand, if that is not what was told last. One without
// a key is about all.
func (q *queueing) why(all []*floxv1.BuildStanding) {
	for _, s := range all {
		n := q.nodes[s.GetKey()]
		if s.GetKey() == "" {
			n = q.waits()
		}
		if n == nil || q.outcome[n] != nil || q.ending[n] || s.GetState() == dispatch.StateReady && s.GetFree() > 0 && s.GetAhead() == 0 {
			continue // it is about to begin
		}
		text := strings.ReplaceAll(s.GetWhy(), "\n", "; ")
		if q.whys[n] == text {
			continue
		}
		q.whys[n] = text
		stuck := int(s.GetAble()) == len(s.GetAway())+len(s.GetClosed()) // also where no worker fits
		q.to.put(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Wait{Wait: &floxv1.BuildWait{Drv: string(n.path), Place: s.GetAhead(), Why: text, Stuck: stuck}}})
	}
}

// standings says where builds stand, as far as this server leads and has the time.
func (f *farming) standings(ctx context.Context, keys []string) (all []*floxv1.BuildStanding) {
	if len(keys) == 0 {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, standingsWait)
	defer cancel()
	_ = f.knowing(limited, func(d *dispatch.Dispatcher) error { //nolint:errcheck // the next beat asks again
		for _, key := range keys {
			if s := d.Standing(key, time.Now()); s != nil {
				all = append(all, s)
			}
		}
		return nil
	})
	return all
}

// knowing calls do with what this server, which leads, knows of the queue.
// ErrUnreachable if it knows nothing now.
func (f *farming) knowing(ctx context.Context, do func(d *dispatch.Dispatcher) error) error {
	select {
	case f.deciding <- struct{}{}:
		defer func() { <-f.deciding }()
	case <-ctx.Done():
		return fmt.Errorf("the server that leads has much to do with the queue of builds, try again: %w: %w", ctx.Err(), flox.ErrUnreachable)
	}
	if f.decides == nil || f.s.node.Status().State != "leader" {
		return fmt.Errorf("the server that leads has not read the queue of builds yet, try again: %w", flox.ErrUnreachable)
	}
	return do(f.decides)
}
