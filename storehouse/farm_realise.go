package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/buildfarm/queue"
)

// queueing is a call of Build whose builds go through the queue.
type queueing struct {
	*realising
	f       *farming
	w       *want
	nodes   map[string]*node // by key
	needed  map[*node][]*node
	views   map[*node]*viewing
	ending  map[*node]bool // over, and the rest is being told
	failing map[*node]bool // failed, or one that it needs has
	tries   map[*node]uint32
	whys    map[*node]string // what was told last of why they wait
	ended   chan finished
	group   sync.WaitGroup
}

// viewing is a build whose events are being passed on.
type viewing struct {
	lease  *floxv1.BuildLease
	cancel context.CancelFunc
	done   chan struct{}
	// Once done is closed:
	err     error
	seen    int // events
	lines   int
	started bool
}

// lastEvents is how long the end of a build waits for what it said last.
const lastEvents = 10 * time.Second

// viewPause is how long events are not asked for again after that failed.
const viewPause = time.Second

// queue has everything built that a request needs, by whoever the queue gives it to.
func (r *realising) queue(ctx context.Context) error {
	q := &queueing{
		realising: r, f: r.b.s.farm, nodes: map[string]*node{}, needed: map[*node][]*node{}, views: map[*node]*viewing{},
		ending: map[*node]bool{}, failing: map[*node]bool{}, tries: map[*node]uint32{}, whys: map[*node]string{}, ended: make(chan finished, len(r.graph.order)),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer q.group.Wait()
	defer cancel()
	var keys []string
	for _, n := range r.graph.order {
		k := q.keyOf(n)
		key := queue.Key(k.drv, k.check)
		q.nodes[key] = n
		keys = append(keys, key)
		for _, in := range n.inputs {
			q.needed[in] = append(q.needed[in], n)
		}
	}
	if stop, err := q.refuse(ctx); err != nil || stop {
		return err
	}
	q.w = q.f.begin(keys)
	defer q.f.leave(q.w)
	if err := q.enqueue(ctx); err != nil {
		return err
	}
	return q.wait(ctx)
}

// wait takes in what becomes of the builds, until all are over or one has failed.
func (q *queueing) wait(ctx context.Context) error {
	for len(q.outcome) < len(q.graph.order) {
		select {
		case <-q.w.wake:
			news, standings := q.w.take()
			if err := q.see(ctx, news); err != nil {
				return err
			}
			q.why(standings)
		case e := <-q.ended:
			if e.err != nil {
				return e.err
			}
			if q.end(e.n, e.out) {
				return nil // what else runs is nobody's any more
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// keyOf is what a node is in the queue.
func (r *realising) keyOf(n *node) buildKey { return buildKey{n.path, r.check && r.asksFor(n.path)} }

// refuse has builds fail that nobody can ever build. Stop says that this is the end.
func (q *queueing) refuse(ctx context.Context) (stop bool, err error) {
	workers, err := q.f.workers(ctx)
	if err != nil {
		return false, err
	}
	for _, n := range q.graph.order {
		if q.outcome[n] != nil {
			continue
		}
		if why := unbuildable(q.b.s.cfg.StoreDir, n, workers); why != "" {
			if stop = q.end(n, q.stopped(n, failedOutcome(buildfarm.MiscFailure, "%s", why))) || stop; stop {
				return true, nil
			}
		}
	}
	return len(q.outcome) == len(q.graph.order), nil
}

// stopped tells the caller that a build is over.
func (q *queueing) stopped(n *node, out *floxv1.BuildOutcome) *floxv1.BuildOutcome {
	q.to.put(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Stop{Stop: &floxv1.BuildStop{Drv: string(n.path), Outcome: out}}})
	return out
}

// end notes what became of a build. Stop says that nothing more is to be done.
func (q *queueing) end(n *node, out *floxv1.BuildOutcome) (stop bool) {
	q.outcome[n] = out
	if ok(out) {
		return false
	}
	q.fail(n, q.needed)
	return !q.req.GetOptions().GetKeepGoing()
}

// see takes in how builds are now.
func (q *queueing) see(ctx context.Context, news map[string]*floxv1.QueuedBuild) error {
	gone := false
	for key, b := range news {
		q.failing[q.nodes[key]] = b.GetState() == floxv1.BuildState_BUILD_STATE_FAILED
		gone = gone || b == nil
	}
	for key, b := range news {
		n := q.nodes[key]
		if q.outcome[n] != nil || q.ending[n] {
			continue
		}
		switch b.GetState() {
		case floxv1.BuildState_BUILD_STATE_LEASED:
			q.view(ctx, n, b.GetLease())
		case floxv1.BuildState_BUILD_STATE_DONE:
			q.over(ctx, n, b)
		case floxv1.BuildState_BUILD_STATE_FAILED:
			if !q.blamed(n, b) {
				q.over(ctx, n, b)
			}
		case floxv1.BuildState_BUILD_STATE_WAITING:
			if b.GetTries() > q.tries[n] {
				q.say(1, "'%s' is tried again: %s", q.b.s.cfg.StoreDir.Join(n.path), b.GetFault())
			}
			q.tries[n] = b.GetTries()
		}
	}
	if gone {
		return q.again(ctx)
	}
	return nil
}

// blamed reports whether a build failed because of one that the caller hears of.
func (q *queueing) blamed(n *node, b *floxv1.QueuedBuild) bool {
	if b.GetOutcome().GetStatus() != uint32(buildfarm.DependencyFailed) {
		return false
	}
	for _, in := range n.inputs {
		if q.failing[in] {
			return true
		}
	}
	b.Outcome = failedOutcome(buildfarm.DependencyFailed, "1 dependencies of derivation '%s' failed to build", q.b.s.cfg.StoreDir.Join(n.path))
	return false
}

// view passes on what happens under a lease.
func (q *queueing) view(ctx context.Context, n *node, l *floxv1.BuildLease) {
	if v := q.views[n]; v != nil {
		if v.lease.GetToken() == l.GetToken() {
			return
		}
		v.cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	v := &viewing{lease: l, cancel: cancel, done: make(chan struct{})}
	q.views[n] = v
	q.group.Go(func() {
		defer close(v.done)
		defer cancel()
		for {
			skip := v.seen
			v.err = q.f.eventsOf(ctx, l, false, func(e *floxv1.BuildEvent) error {
				if skip > 0 { // told before the stream broke
					skip--
					return nil
				}
				v.seen++
				return q.pass(ctx, v, e)
			})
			if v.err == nil || errors.Is(v.err, flox.ErrNotFound) || ctx.Err() != nil {
				return
			}
			select {
			case <-time.After(viewPause):
			case <-ctx.Done():
				return
			}
		}
	})
}

// pass tells the caller one event, once there is room for it.
func (q *queueing) pass(ctx context.Context, v *viewing, e *floxv1.BuildEvent) error {
	switch {
	case e.GetLine() != nil:
		v.lines++
	case e.GetStart() != nil:
		v.started = true
	}
	if err := q.to.room(ctx); err != nil {
		return err
	}
	q.to.put(e)
	return nil
}

// over tells the rest of what a build said, and then what became of it.
func (q *queueing) over(ctx context.Context, n *node, b *floxv1.QueuedBuild) {
	q.ending[n] = true
	v := q.views[n]
	q.group.Go(func() {
		out := b.GetOutcome()
		err := q.rest(ctx, n, v, out)
		if err == nil && v == nil && ok(out) {
			err = q.made(ctx, n, out)
		}
		if err == nil {
			q.stopped(n, out)
		}
		q.ended <- finished{n, out, err}
	})
}

// made refuses what was built for somebody else, and has gone again meanwhile.
func (q *queueing) made(ctx context.Context, n *node, out *floxv1.BuildOutcome) error {
	for _, o := range out.GetOutputs() {
		valid, err := q.b.s.isValid(ctx, flox.StorePath(o.GetPath()))
		if err != nil {
			return err
		}
		if !valid {
			return fmt.Errorf("%s, an output of %s that was built for others just now, is not valid any more, try again: %w", o.GetPath(), n.path, flox.ErrBusy)
		}
	}
	return nil
}

// rest waits for the last events of a build. What cannot be had of who built it comes
// from the log that is kept.
func (q *queueing) rest(ctx context.Context, n *node, v *viewing, out *floxv1.BuildOutcome) error {
	if v != nil {
		late := time.NewTimer(lastEvents)
		defer late.Stop()
		select {
		case <-v.done:
		case <-late.C:
			v.cancel()
			<-v.done
		}
		if v.err == nil {
			return nil
		}
	} else {
		v = &viewing{}
	}
	if out.GetStartUnix() == 0 || ctx.Err() != nil {
		return ctx.Err() // nothing was started
	}
	record, log, err := q.b.log(ctx, string(n.path))
	if err != nil && ctx.Err() != nil {
		return err
	}
	if !v.started {
		q.to.put(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Start{Start: &floxv1.BuildStart{Drv: string(n.path), Machine: record.GetServer()}}})
	}
	if err != nil || record.GetStopUnixMs()/1000 != out.GetStopUnix() { // of another time
		return nil //nolint:nilerr // the outcome has its last lines
	}
	skip := v.lines
	for line := range bytes.Lines(log) {
		if skip > 0 {
			skip--
			continue
		}
		text := strings.ToValidUTF8(string(bytes.TrimRight(line, "\n")), "?")
		err := q.pass(ctx, v, &floxv1.BuildEvent{Event: &floxv1.BuildEvent_Line{Line: &floxv1.BuildLine{Drv: string(n.path), Text: text}}})
		if err != nil {
			return err
		}
	}
	return nil
}
