package storehouse

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/buildfarm/schedule"
	cluster "github.com/floxctl/flox/raft"
)

// want is what a call of this server wants of the queue.
type want struct {
	id   string // farm.mu
	keys []string

	mu   sync.Mutex
	news map[string]*floxv1.QueuedBuild // builds as they are now, that changed since take; nil = gone
	wake chan struct{}                  // holds one token while there is something to take
	// What of its builds waits, what is done, and since take, why some wait.
	waiting   map[string]*floxv1.QueuedBuild
	done      map[string]bool
	standings []*floxv1.BuildStanding
}

// put notes how a build is now.
func (w *want) put(key string, b *floxv1.QueuedBuild) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.news[key] = b
	delete(w.waiting, key)
	delete(w.done, key)
	switch {
	case b == nil:
	case b.GetState() == floxv1.BuildState_BUILD_STATE_WAITING:
		w.waiting[key] = b
	case b.GetState() == floxv1.BuildState_BUILD_STATE_DONE:
		w.done[key] = true
	}
	w.rouse()
}

// rouse says that there is something to take. It needs w.mu.
func (w *want) rouse() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// take gives what changed since the last time, and why what waits.
func (w *want) take() (news map[string]*floxv1.QueuedBuild, standings []*floxv1.BuildStanding) {
	w.mu.Lock()
	defer w.mu.Unlock()
	news, standings = w.news, w.standings
	w.news, w.standings = map[string]*floxv1.QueuedBuild{}, nil
	return news, standings
}

// begin makes a want, which hears of builds from now on. It is in the log once
// something is enqueued under its name.
func (f *farming) begin(keys []string) *want {
	w := &want{
		id: rand.Text(), keys: keys, news: map[string]*floxv1.QueuedBuild{}, wake: make(chan struct{}, 1),
		waiting: map[string]*floxv1.QueuedBuild{}, done: map[string]bool{},
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wants[w.id] = w
	for _, key := range keys {
		if f.watch[key] == nil {
			f.watch[key] = map[*want]bool{}
		}
		f.watch[key][w] = true
	}
	return w
}

// leave ends a want. The log hears of it soon: what nobody else wants is stopped then.
func (f *farming) leave(w *want) {
	f.mu.Lock()
	delete(f.wants, w.id)
	for _, key := range w.keys {
		if delete(f.watch[key], w); len(f.watch[key]) == 0 {
			delete(f.watch, key)
		}
	}
	f.mu.Unlock()
	f.left.ring()
}

// rename gives a want another name, as the log has ended the one it had.
func (f *farming) rename(w *want) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.wants, w.id)
	w.id = rand.Text()
	f.wants[w.id] = w
}

// sweepEvery is how often a server looks for wants of its own that it has forgotten.
const sweepEvery = 15 * time.Second

// sweep ends what this server wanted and does not want any more, until ctx ends: when a
// call ends, and what it wanted before it was started again.
func (f *farming) sweep(ctx context.Context) error {
	session := f.s.node.NewSession()
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		rung := f.left.wait()
		if f.on() {
			if err := f.sweepWants(ctx, session); err != nil && ctx.Err() == nil {
				f.s.cfg.Log.Warn("builds stay in the queue that nobody here wants any more, trying again", "error", err)
			}
		}
		select {
		case <-tick.C:
		case <-rung:
		case <-ctx.Done():
			return nil
		}
	}
}

func (f *farming) sweepWants(ctx context.Context, session *cluster.Session) error {
	var gone []string
	err := f.view(ctx, func(r *cluster.Reader) error {
		return queue.Wants(r, func(w *floxv1.BuildWant) bool {
			if w.GetHolder() == f.id() && !f.mine(w.GetId()) {
				gone = append(gone, w.GetId())
			}
			return true
		})
	})
	for _, id := range gone {
		for more := err == nil; more; {
			var reply *floxv1.QueueReply
			reply, err = f.propose(ctx, session, leaving(id))
			more = err == nil && reply.GetMore()
		}
	}
	return err
}

// mine reports whether this server wants something by a name.
func (f *farming) mine(want string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wants[want] != nil
}

// ready reports whether builds go through the queue, and waits until somebody builds. An
// error says that nobody does.
func (f *farming) ready(ctx context.Context) (queued bool, err error) {
	if !f.on() {
		return false, f.s.builds.ready(ctx)
	}
	for waits := false; ; waits = true {
		rung := f.changed.wait()
		all, err := f.workers(ctx)
		if err != nil || len(all) > 0 {
			return true, err
		}
		if err := f.s.builds.ready(ctx); err != nil {
			return true, err
		}
		if !waits {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, readWait)
			defer cancel()
			f.tended.ring()
		}
		select {
		case <-rung:
		case <-ctx.Done():
			return true, fmt.Errorf("the queue of builds does not know the builder yet: %w: %w", ctx.Err(), flox.ErrUnreachable)
		}
	}
}

func (f *farming) workers(ctx context.Context) (all []*floxv1.FarmWorker, err error) {
	err = f.view(ctx, func(r *cluster.Reader) (err error) {
		all, err = queue.Workers(r)
		return err
	})
	return all, err
}

// unbuildable says why none of the workers can ever build something; "" = one can.
func unbuildable(dir flox.StoreDir, n *node, workers []*floxv1.FarmWorker) string {
	features := n.drv.RequiredFeatures()
	var have []string
	for _, w := range workers {
		if n.drv.Platform != schedule.Builtin && !slices.Contains(w.GetSystems(), n.drv.Platform) ||
			slices.ContainsFunc(features, func(f string) bool {
				return !slices.Contains(w.GetFeatures(), f) && !slices.Contains(w.GetMandatory(), f)
			}) {
			have = append(have, fmt.Sprintf("%s is for %s with features {%s}", w.GetName(), strings.Join(w.GetSystems(), ", "), strings.Join(w.GetFeatures(), ", ")))
			continue
		}
		return ""
	}
	if len(have) > maxNamed {
		have = append(have[:maxNamed], fmt.Sprintf("and %d others", len(have)-maxNamed))
	}
	return fmt.Sprintf("a '%s' with features {%s} is required to build '%s', and no worker is one: %s",
		n.drv.Platform, strings.Join(features, ", "), dir.Join(n.path), strings.Join(have, "; "))
}

// maxNamed is how many workers are named in an error.
const maxNamed = 5

// Bounds of one command that enqueues builds.
const enqueueNeeds = 1 << 14

// enqueue puts what is not over of a call into the queue, inputs first.
func (q *queueing) enqueue(ctx context.Context) error {
	session := q.f.s.node.NewSession()
	c := q.command()
	needs := 0
	put := func() error {
		if len(c.GetBuilds()) == 0 {
			return nil
		}
		_, err := q.f.propose(ctx, session, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: c}})
		c, needs = q.command(), 0
		return err
	}
	for _, n := range q.graph.order {
		if q.outcome[n] != nil || q.ending[n] {
			continue
		}
		b := &floxv1.NewBuild{
			Drv: string(n.path), Check: q.keyOf(n).check, System: n.drv.Platform, Features: n.drv.RequiredFeatures(), Options: q.req.GetOptions(),
		}
		for _, in := range n.inputs {
			if q.outcome[in] == nil && !q.ending[in] {
				k := q.keyOf(in)
				b.Needs = append(b.Needs, queue.Key(k.drv, k.check))
			}
		}
		if len(c.GetBuilds()) == queue.MaxBatch || needs > 0 && needs+len(b.GetNeeds()) > enqueueNeeds {
			if err := put(); err != nil {
				return err
			}
		}
		c.Builds = append(c.Builds, b)
		needs += len(b.GetNeeds())
	}
	return put()
}

func (q *queueing) command() *floxv1.EnqueueBuilds {
	person := !q.req.GetBatch()
	return &floxv1.EnqueueBuilds{Want: q.w.id, Owner: q.asked, Holder: q.f.id(), Interactive: person, Retry: person}
}

// again enqueues anew what is not over, if the log has ended the want.
func (q *queueing) again(ctx context.Context) error {
	err := q.f.view(ctx, func(r *cluster.Reader) error {
		w, err := queue.Want(r, q.w.id)
		if err == nil && w.GetLeft() {
			err = flox.ErrNotFound
		}
		return err
	})
	if !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	q.f.rename(q.w)
	return q.enqueue(ctx)
}
