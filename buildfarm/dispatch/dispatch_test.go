package dispatch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/buildfarm/schedule"
	"github.com/floxctl/flox/raft"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const linux = "x86_64-linux"

// log is a replicated log of one server with the queue.
type log struct {
	t    *testing.T
	node *raft.Node
}

func newLog(t *testing.T) *log {
	t.Helper()
	node, err := raft.Open(raft.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	node.Register(queue.Kind, queue.Processor{})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- node.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	l := &log{t, node}
	if err := node.Ready(l.within()); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *log) within() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	l.t.Cleanup(cancel)
	return ctx
}

func (l *log) must(c *floxv1.QueueCommand) *floxv1.QueueReply {
	l.t.Helper()
	b, err := proto.Marshal(c)
	if err != nil {
		l.t.Fatal(err)
	}
	reply, _, err := l.node.Propose(l.within(), queue.Kind, b, raft.ProposeOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	r := &floxv1.QueueReply{}
	if err := proto.Unmarshal(reply, r); err != nil {
		l.t.Fatal(err)
	}
	return r
}

func (l *log) update(d *Dispatcher) {
	l.t.Helper()
	r, err := l.node.View(l.within(), queue.Kind, raft.Linearizable)
	if err == nil {
		err = errors.Join(d.Update(r, time.Now()), r.Close())
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *log) worker(id string, slots uint32) {
	l.t.Helper()
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Register{Register: &floxv1.FarmWorker{Id: id, Systems: []string{linux}, Slots: slots}}})
}

func (l *log) state(worker string, state floxv1.WorkerState) {
	l.t.Helper()
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_WorkerState{WorkerState: &floxv1.SetWorkerState{Worker: worker, State: state}}})
}

func drv(name string) string { return strings.Repeat("0", 32) + "-" + name + ".drv" }

// enqueue wants builds: names, with what they need behind a colon, as in "b:a,c".
func (l *log) enqueue(want string, retry bool, builds ...string) {
	l.t.Helper()
	c := &floxv1.EnqueueBuilds{Want: want, Owner: want, Retry: retry}
	for _, b := range builds {
		name, needs, _ := strings.Cut(b, ":")
		n := &floxv1.NewBuild{Drv: drv(name), System: linux}
		for _, in := range strings.FieldsFunc(needs, func(r rune) bool { return r == ',' }) {
			n.Needs = append(n.Needs, drv(in))
		}
		c.Builds = append(c.Builds, n)
	}
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: c}})
}

func (l *log) leave(want string) {
	l.t.Helper()
	for l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Leave{Leave: &floxv1.LeaveQueue{Want: want}}}).GetMore() {
	}
}

func (l *log) finish(lease *floxv1.BuildLease, status buildfarm.Status, fault string) {
	l.t.Helper()
	c := &floxv1.FinishBuild{Key: lease.GetKey(), Token: lease.GetToken(), Fault: fault, Outcome: &floxv1.BuildOutcome{Status: uint32(status)}}
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Finish{Finish: c}})
}

// dispatch does what a leader does until nothing is left for it, and gives the leases.
func (l *log) dispatch(d *Dispatcher, there func(string) bool) (leases []*floxv1.BuildLease) {
	l.t.Helper()
	for {
		l.update(d)
		if keys := d.Settle(queue.MaxKeys); len(keys) > 0 {
			l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Settle{Settle: &floxv1.SettleBuilds{Keys: keys}}})
			continue
		}
		lost, given := d.Lost(there)
		for _, r := range []*floxv1.ReleaseBuilds{{Leases: lost, Fault: "its worker was lost"}, {Leases: given}} {
			if len(r.GetLeases()) > 0 {
				l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Release{Release: r}})
			}
		}
		if len(lost)+len(given) > 0 {
			continue
		}
		lease, ok := d.Next(time.Now())
		if !ok {
			return leases
		}
		reply := l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Lease{Lease: &floxv1.LeaseBuild{Key: lease.Build, Worker: lease.Worker}}})
		if reply.GetRefused() {
			l.t.Fatalf("the log refuses %+v", lease)
		}
		leases = append(leases, reply.GetBuilds()[0].GetLease())
	}
}

func all(string) bool { return true }

func names(leases []*floxv1.BuildLease) string {
	var out []string
	for _, l := range leases {
		out = append(out, strings.TrimSuffix(l.GetKey()[33:], ".drv")+"@"+l.GetWorker())
	}
	return strings.Join(out, " ")
}

// A worker that is lost costs its builds a try, and they are leased to others at once;
// one that drains gives them back. A leader that comes later knows the same.
func TestLostWorkers(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	d := New(schedule.Config{})
	l.worker("a", 1)
	l.enqueue("me", false, "x", "y:x")
	if got := names(l.dispatch(d, all)); got != "x@a" {
		t.Fatalf("leases %q", got)
	}
	l.worker("b", 1)
	l.state("a", floxv1.WorkerState_WORKER_STATE_CORDONED)
	if got := names(l.dispatch(d, all)); got != "" {
		t.Errorf("what a cordoned worker has is leased again: %q", got)
	}
	second := l.dispatch(New(schedule.Config{}), func(w string) bool { return w != "a" })
	if got := names(second); got != "x@b" {
		t.Fatalf("a new leader's leases: %q", got)
	}
	l.state("b", floxv1.WorkerState_WORKER_STATE_DRAINING)
	l.worker("c", 1)
	third := l.dispatch(d, all)
	if got := names(third); got != "x@c" {
		t.Fatalf("of a draining worker: %q", got)
	}
	l.finish(second[0], buildfarm.PermanentFailure, "")
	l.finish(third[0], buildfarm.Built, "")
	if got := names(l.dispatch(d, all)); got != "y@c" {
		t.Errorf("at last %q", got)
	}
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_RemoveWorker{RemoveWorker: "c"}})
	l.worker("d", 1)
	if got := names(l.dispatch(d, all)); got != "y@d" {
		t.Errorf("of a worker that was removed: %q", got)
	}
}

// Who is not there gets nothing until it is.
func TestAbsentWorkers(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	d := New(schedule.Config{})
	l.worker("a", 1)
	l.worker("b", 1)
	l.update(d)
	there := func(ids ...string) {
		t.Helper()
		if err := d.Present(func(w string) bool { return slices.Contains(ids, w) }); err != nil {
			t.Fatal(err)
		}
	}
	there("b")
	l.enqueue("me", false, "x", "y")
	got := l.dispatch(d, all)
	if len(got) != 1 || got[0].GetWorker() != "b" {
		t.Fatalf("leases %q, want one of b", names(got))
	}
	has, waits := drv("x"), drv("y")
	if got[0].GetKey() == waits {
		has, waits = waits, has
	}
	l.worker("a", 2) // it is said anew what it is, which does not make it be there
	if got := names(l.dispatch(d, all)); got != "" {
		t.Errorf("what a worker has that is not there: %q", got)
	}
	there("b")
	l.enqueue("me", false, "z")
	l.update(d)
	why := func(key, want string) {
		t.Helper()
		if got := d.Standing(key, time.Now()).GetWhy(); got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
	why(has, "b builds it")
	why(waits, "1 of the 2 workers that can build it are busy; a is away")
	why(drv("z"), "1 of the 2 workers that can build it are busy; a is away\nit waits behind 1 others: 1 that have waited longer")
	l.state("b", floxv1.WorkerState_WORKER_STATE_CORDONED)
	l.update(d)
	why(waits, "all workers that can build it take nothing now: a is away; b is cordoned or draining")
	l.state("b", floxv1.WorkerState_WORKER_STATE_ACTIVE)
	there("a", "b")
	if got := l.dispatch(d, all); len(got) != 2 || got[0].GetWorker() != "a" {
		t.Errorf("leases %q, want two of a", names(got))
	}
}

// What needs a build that fails fails too, and waits again when that does.
func TestFailuresSpread(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	d := New(schedule.Config{})
	l.worker("a", 1)
	l.enqueue("me", false, "x", "y:x", "z:y")
	leases := l.dispatch(d, all)
	l.finish(leases[0], buildfarm.PermanentFailure, "")
	if got := names(l.dispatch(d, all)); got != "" || d.builds[drv("z")].GetState() != failed {
		t.Errorf("leases %q; z %v", got, d.builds[drv("z")])
	}
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Retry{Retry: &floxv1.RetryBuilds{Keys: []string{drv("x")}}}})
	for _, want := range []string{"x@a", "y@a", "z@a"} {
		leases := l.dispatch(d, all)
		if got := names(leases); got != want {
			t.Fatalf("leases %q, want %q", got, want)
		}
		l.finish(leases[0], buildfarm.Built, "")
	}
}

// What needs a build that leaves the queue is given to a worker, and waits for it if it
// comes again before that.
func TestNeedsThatLeave(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	d := New(schedule.Config{})
	l.enqueue("other", false, "b")
	l.enqueue("me", false, "a", "b:a")
	l.dispatch(d, all)
	l.leave("me")
	l.dispatch(d, all)
	l.enqueue("me", false, "a")
	l.worker("w", 1)
	if got := names(l.dispatch(d, all)); got != "a@w" {
		t.Fatalf("leases %q, want what b needs first", got)
	}
	l.leave("me")
	if got := names(l.dispatch(d, all)); got != "b@w" {
		t.Errorf("leases %q, want b, as what it needs has left", got)
	}
}

// stands is where every build stands for a Dispatcher.
func stands(d *Dispatcher, keys []string) string {
	var out []string
	for _, key := range keys {
		if e, ok := d.explain(key, time.Now()); ok {
			slices.Sort(e.Needs)
			if e.State == "put off" && !e.Until.After(time.Now()) {
				e.State = "ready" // as soon as it is looked at
			}
			out = append(out, fmt.Sprint(key[33:], " ", e.State, " ", e.Worker, " ", e.Needs, " ", e.Reason.Priority))
		}
	}
	return strings.Join(out, "\n")
}

// Whatever happens to the queue, who follows it knows what one does that reads it anew,
// nothing is proposed that the log does not take, and everything comes to an end.
func TestFollows(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	checks := 0
	rapid.Check(t, func(rt *rapid.T) {
		checks++
		d := New(schedule.Config{})
		run := &run{rt: rt, log: l, check: fmt.Sprint(checks), running: map[string]*floxv1.BuildLease{}}
		for _, w := range []string{"v", "w"} {
			l.worker(w, 2)
		}
		for range rapid.IntRange(1, 15).Draw(rt, "steps") {
			run.step(d)
			fresh := New(schedule.Config{})
			l.update(d)
			l.update(fresh)
			if got, want := stands(d, run.keys()), stands(fresh, run.keys()); got != want {
				rt.Fatalf("who followed knows\n%s\nwho reads it anew\n%s", got, want)
			}
			if !reflect.DeepEqual(d.users, fresh.users) || len(d.builds) != len(fresh.builds) || len(d.placed) != len(fresh.placed) {
				rt.Fatalf("who followed keeps %v, who reads it anew %v", d.users, fresh.users)
			}
		}
		run.end(d)
	})
}

// run is one check of TestFollows.
type run struct {
	*log
	rt      *rapid.T
	check   string
	running map[string]*floxv1.BuildLease
}

var runNames = []string{"a", "b", "c", "d", "e", "f"}

func (r *run) keys() (keys []string) {
	for _, n := range runNames {
		keys = append(keys, drv(n+r.check))
	}
	return keys
}

func (r *run) step(d *Dispatcher) {
	want := rapid.SampledFrom([]string{"x", "y"}).Draw(r.rt, "want") + r.check
	switch rapid.SampledFrom([]string{"enqueue", "enqueue", "dispatch", "dispatch", "finish", "finish", "finish", "leave", "retry", "cancel", "rank", "lose"}).Draw(r.rt, "what") {
	case "enqueue":
		var builds []string
		for i, n := range runNames {
			if i > 0 && !rapid.Bool().Draw(r.rt, "wanted") {
				break
			}
			text := n + r.check + ":"
			for _, in := range runNames[:i] {
				if rapid.Bool().Draw(r.rt, "needed") {
					text += in + r.check + ","
				}
			}
			builds = append(builds, text)
		}
		r.enqueue(want, rapid.Bool().Draw(r.rt, "retry"), builds...)
	case "dispatch":
		for _, lease := range r.dispatch(d, all) {
			r.running[lease.GetKey()] = lease
		}
	case "finish":
		if len(r.running) > 0 {
			key := rapid.SampledFrom(slices.Sorted(maps.Keys(r.running))).Draw(r.rt, "lease")
			status := rapid.SampledFrom([]buildfarm.Status{buildfarm.Built, buildfarm.Built, buildfarm.PermanentFailure}).Draw(r.rt, "status")
			r.finish(r.running[key], status, "")
			delete(r.running, key)
		}
	case "leave":
		r.leave(want)
	case "retry":
		r.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Retry{Retry: &floxv1.RetryBuilds{Keys: r.keys()[:2]}}})
	case "cancel":
		r.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Cancel{Cancel: &floxv1.CancelBuilds{Keys: []string{rapid.SampledFrom(r.keys()).Draw(r.rt, "key")}}}})
	case "rank":
		r.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Rank{Rank: &floxv1.RankBuilds{Keys: r.keys()[1:3], Priority: rapid.Int32Range(-3, 3).Draw(r.rt, "priority")}}})
	case "lose":
		r.update(d)
		lost, _ := d.Lost(func(w string) bool { return w != "v" })
		r.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Release{Release: &floxv1.ReleaseBuilds{Leases: lost}}})
	}
}

// end has everything come to an end, and checks that it does.
func (r *run) end(d *Dispatcher) {
	for range 20 {
		for _, lease := range append(r.dispatch(d, all), slices.Collect(maps.Values(r.running))...) {
			r.finish(lease, buildfarm.Built, "")
		}
		clear(r.running)
	}
	r.update(d)
	if left := stands(d, r.keys()); left != "" {
		r.rt.Fatalf("these are not built:\n%s", left)
	}
	for _, key := range r.keys() {
		if b := d.builds[key]; b != nil && b.GetState() != done && b.GetState() != failed {
			r.rt.Fatalf("nothing is left to be given, and this one is not over: %v", b)
		}
	}
	for _, want := range []string{"x", "y"} {
		r.leave(want + r.check)
	}
}
