package queue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/raft"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const linux = "x86_64-linux"

// Names of states.
const (
	waiting = floxv1.BuildState_BUILD_STATE_WAITING
	leased  = floxv1.BuildState_BUILD_STATE_LEASED
	done    = floxv1.BuildState_BUILD_STATE_DONE
	failed  = floxv1.BuildState_BUILD_STATE_FAILED
)

// clocked is a Processor with a clock of its own, which stands still unless it is told to go on.
type clocked struct {
	Processor
	now *time.Time
}

func (c clocked) Apply(tx *raft.Tx, command []byte, _ time.Time, index uint64) ([]byte, error) {
	return c.Processor.Apply(tx, command, *c.now, index)
}

// log is a replicated log of one server with the processor.
type log struct {
	t    testing.TB
	node *raft.Node
	now  time.Time // of the next command
}

func newLog(t testing.TB, p Processor) *log {
	t.Helper()
	node, err := raft.Open(raft.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	l := &log{t, node, time.Unix(1_700_000_000, 0)}
	node.Register(Kind, clocked{p, &l.now})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- node.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
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

func (l *log) apply(c *floxv1.QueueCommand) (*floxv1.QueueReply, error) {
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	reply, _, err := l.node.Propose(l.within(), Kind, b, raft.ProposeOptions{})
	if err != nil {
		return nil, err
	}
	r := &floxv1.QueueReply{}
	return r, proto.Unmarshal(reply, r)
}

// must is apply of what may not be refused with an error.
func (l *log) must(c *floxv1.QueueCommand) *floxv1.QueueReply {
	l.t.Helper()
	r, err := l.apply(c)
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

func (l *log) view(f func(r *raft.Reader) error) {
	l.t.Helper()
	r, err := l.node.View(l.within(), Kind, raft.Linearizable)
	if err == nil {
		err = errors.Join(f(r), r.Close())
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// build is a build as it is; nil = it is not in the queue.
func (l *log) build(name string) (b *floxv1.QueuedBuild) {
	l.t.Helper()
	l.view(func(r *raft.Reader) (err error) {
		b, err = Find(r, drv(name))
		if errors.Is(err, flox.ErrNotFound) {
			b, err = nil, nil
		}
		return err
	})
	return b
}

// states checks what builds do, as in "a leased, b gone".
func (l *log) states(want string) {
	l.t.Helper()
	var have []string
	for _, part := range strings.Split(want, ", ") {
		name, _, _ := strings.Cut(part, " ")
		state := "gone"
		if b := l.build(name); b != nil {
			state = strings.ToLower(strings.TrimPrefix(b.GetState().String(), "BUILD_STATE_"))
		}
		have = append(have, name+" "+state)
	}
	if got := strings.Join(have, ", "); got != want {
		l.t.Errorf("%s, want %s", got, want)
	}
}

// counted checks that there is as much of everything as is counted.
func (l *log) counted() {
	l.t.Helper()
	l.view(func(r *raft.Reader) error {
		c, err := loadCounts(r)
		for kind, want := range map[byte]uint64{
			buildKey: c.builds, wantKey: c.wants, workerKey: c.workers, failureKey: c.failures, failuresKey: c.failures,
			timeKey: c.times, timesKey: c.times, historyKey: c.history, changeKey: c.changes,
		} {
			n := uint64(0)
			err = errors.Join(err, r.Iterate([]byte{kind}, nil, func([]byte, []byte) bool { n++; return true }))
			if n != want {
				l.t.Errorf("there are %d of %q, and %d are counted", n, kind, want)
			}
		}
		return err
	})
}

// drv is the derivation of a name.
func drv(name string) string {
	return strings.Repeat("0", 32-len(name)) + strings.Map(func(r rune) rune {
		if strings.ContainsRune("0123456789abcdfghijklmnpqrsvwxyz", r) {
			return r
		}
		return '0'
	}, name) + "-" + name + "-1.0.drv"
}

// enqueue wants builds: names, with what they need behind a colon, as in "b:a,c".
func enqueue(want string, builds ...string) *floxv1.EnqueueBuilds {
	c := &floxv1.EnqueueBuilds{Want: want, Owner: "owner-" + want, Holder: "server"}
	for _, b := range builds {
		name, needs, _ := strings.Cut(b, ":")
		n := &floxv1.NewBuild{Drv: drv(name), System: linux}
		for _, in := range strings.FieldsFunc(needs, func(r rune) bool { return r == ',' }) {
			n.Needs = append(n.Needs, drv(in))
		}
		c.Builds = append(c.Builds, n)
	}
	return c
}

func (l *log) enqueue(want string, builds ...string) *floxv1.QueueReply {
	l.t.Helper()
	return l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: enqueue(want, builds...)}})
}

func (l *log) register(ids ...string) {
	l.t.Helper()
	for _, id := range ids {
		l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Register{Register: &floxv1.FarmWorker{Id: id, Systems: []string{linux}, Slots: 2}}})
	}
}

// lease gives a token; 0 = it was refused.
func (l *log) lease(name, worker string) uint64 {
	l.t.Helper()
	r := l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Lease{Lease: &floxv1.LeaseBuild{Key: drv(name), Worker: worker}}})
	if r.GetRefused() != (r.GetToken() == 0) {
		l.t.Fatalf("lease of %s: %v", name, r)
	}
	return r.GetToken()
}

// finish ends a lease with Nix's status, or, below 0, with a fault; lost says that
// another one counts.
func (l *log) finish(name string, token uint64, status int) (lost bool) {
	l.t.Helper()
	c := &floxv1.FinishBuild{Key: drv(name), Token: token, Outcome: &floxv1.BuildOutcome{Status: uint32(max(status, 0)), Message: "said"}, Evidence: &floxv1.BuildEvidence{BuildingMs: 4000}} //nolint:gosec // small
	if status < 0 {
		c.Fault = "out of disk"
	}
	return l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Finish{Finish: c}}).GetLost()
}

func (l *log) release(fault string, leases ...*floxv1.BuildLease) {
	l.t.Helper()
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Release{Release: &floxv1.ReleaseBuilds{Leases: leases, Fault: fault}}})
}

func leaseOf(name string, token uint64) *floxv1.BuildLease {
	return &floxv1.BuildLease{Key: drv(name), Token: token}
}

func (l *log) leave(want string) {
	l.t.Helper()
	for l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Leave{Leave: &floxv1.LeaveQueue{Want: want}}}).GetMore() {
	}
}

func (l *log) settle(names ...string) {
	l.t.Helper()
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Settle{Settle: &floxv1.SettleBuilds{Keys: drvs(names)}}})
}

func (l *log) retry(names ...string) {
	l.t.Helper()
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Retry{Retry: &floxv1.RetryBuilds{Keys: drvs(names)}}})
}

func drvs(names []string) (keys []string) {
	for _, n := range names {
		keys = append(keys, drv(n))
	}
	return keys
}

// What two want is built once, after what it needs, and stays until neither does.
func TestWantedByTwo(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("one", "a", "b:a")
	l.enqueue("two", "a", "b:a", "c:b")
	if b := l.build("b"); b.GetWants() != 2 || b.GetOwner() != "owner-one" {
		t.Errorf("%v", b)
	}
	if l.lease("b", "w") != 0 {
		t.Error("b is leased before a is done")
	}
	a := l.lease("a", "w")
	if a == 0 || l.lease("a", "w") != 0 {
		t.Error("a is not leased once")
	}
	l.finish("a", a, 0)
	b := l.lease("b", "w")
	if b == 0 {
		t.Fatal("b is not leased after a is done")
	}
	l.leave("one")
	l.states("a done, b leased, c waiting")
	l.leave("two")
	l.states("a gone, b gone, c gone")
	if !l.finish("b", b, 0) {
		t.Error("what nobody wants is taken")
	}
}

// What needs a build that has left the queue with its last want does not wait for it.
func TestNeedsThatLeave(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("two", "b")
	l.enqueue("one", "a", "b:a")
	if l.lease("b", "w") != 0 {
		t.Error("b is leased before a is done")
	}
	l.leave("one")
	l.states("a gone, b waiting")
	if l.lease("b", "w") == 0 {
		t.Error("b waits for what is not in the queue")
	}
}

// A worker that has lost its lease changes nothing, though it has the build again.
func TestFencing(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w", "other")
	l.enqueue("one", "a")
	first := l.lease("a", "w")
	l.release("worker w was not heard of", leaseOf("a", first))
	l.states("a waiting")
	if b := l.build("a"); b.GetTries() != 1 || !strings.Contains(b.GetFault(), "not heard of") {
		t.Errorf("%v", b)
	}
	if !l.finish("a", 0, 0) {
		t.Error("what nobody has a lease of can be ended")
	}
	second := l.lease("a", "w")
	if second <= first {
		t.Fatalf("tokens %d, then %d", first, second)
	}
	for _, old := range []uint64{first, 0} {
		if !l.finish("a", old, int(buildfarm.PermanentFailure)) {
			t.Errorf("token %d counts", old)
		}
		l.release("", leaseOf("a", old))
	}
	l.states("a leased")
	if l.finish("a", second, 0) {
		t.Error("its lease does not count")
	}
	if !l.finish("a", second, int(buildfarm.PermanentFailure)) {
		t.Error("it can be ended twice")
	}
	l.states("a done")
}

// What is no fault of the build is tried again, later and later, and given up at last;
// that is not remembered.
func TestFaults(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("one", "a")
	var waited []time.Duration
	for l.build("a").GetState() == waiting {
		if due := time.UnixMilli(l.build("a").GetNotBeforeUnixMs()); due.After(l.now) {
			waited = append(waited, due.Sub(l.now))
			l.now = due.Add(-time.Millisecond)
			if l.lease("a", "w") != 0 {
				t.Error("it is leased before it is time")
			}
			l.now = due
		}
		l.finish("a", l.lease("a", "w"), -1)
	}
	if want := []time.Duration{time.Second, 4 * time.Second, 16 * time.Second, 64 * time.Second}; !slices.Equal(waited, want) {
		t.Errorf("waited %v, want %v", waited, want)
	}
	o := l.build("a").GetOutcome()
	if o.GetStatus() != uint32(buildfarm.TransientFailure) || !strings.Contains(o.GetMessage(), "5 tries") || !strings.Contains(o.GetMessage(), "out of disk") {
		t.Errorf("%v", o)
	}
	l.leave("one")
	l.enqueue("two", "a")
	l.states("a waiting")
	// A worker that gives its builds back has not failed.
	for range 2 * maxTries {
		l.release("", leaseOf("a", l.lease("a", "w")))
	}
	l.states("a waiting")
}

// A real failure is not tried again, and remembered until somebody forgets it; what needs
// it fails with it.
func TestFailuresAreRemembered(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("one", "a", "b:a", "c:b", "d")
	l.finish("a", l.lease("a", "w"), int(buildfarm.PermanentFailure))
	l.settle("d", "b", "c")
	l.states("a failed, b failed, c failed, d waiting")
	if got := l.build("c").GetOutcome().GetStatus(); got != uint32(buildfarm.DependencyFailed) {
		t.Errorf("status %d", got)
	}
	l.retry("a")
	l.settle("b", "c", "d")
	l.states("a waiting, b waiting, c waiting, d waiting")
	l.finish("a", l.lease("a", "w"), int(buildfarm.PermanentFailure))
	l.leave("one")
	r := l.enqueue("two", "a", "b:a")
	l.states("a failed, b failed")
	if len(r.GetBuilds()) != 2 || !r.GetBuilds()[0].GetRemembered() || r.GetBuilds()[0].GetOutcome().GetMessage() != "said" {
		t.Errorf("at once: %v", r.GetBuilds())
	}
	c := enqueue("three", "a", "b:a")
	c.Retry = true
	if r := l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: c}}); len(r.GetBuilds()) != 0 {
		t.Errorf("again: %v", r.GetBuilds())
	}
	l.states("a waiting, b waiting")
	l.finish("a", l.lease("a", "w"), int(buildfarm.TimedOut))
	l.leave("two")
	l.leave("three")
	l.enqueue("four", "a")
	l.states("a waiting") // who asks now may have more time
	l.counted()
}

// Who asks later knows what is valid by then: a build does not wait for what was given
// up by those who wanted it.
func TestNeedsAreThoseOfTheLast(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("one", "a", "b:a")
	l.finish("a", l.lease("a", "w"), 0)
	l.enqueue("two", "b")
	l.leave("one")
	l.states("a gone, b waiting")
	if l.lease("b", "w") == 0 {
		t.Error("it waits for what has left the queue")
	}
}

// Operators end builds, rank them, and say which workers get some.
func TestOperators(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("one", "a", "b")
	state := func(s floxv1.WorkerState) {
		l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_WorkerState{WorkerState: &floxv1.SetWorkerState{Worker: "w", State: s}}})
	}
	for _, s := range []floxv1.WorkerState{floxv1.WorkerState_WORKER_STATE_CORDONED, floxv1.WorkerState_WORKER_STATE_DRAINING} {
		state(s)
		l.register("w") // as it does when it comes again
		if l.lease("a", "w") != 0 {
			t.Errorf("it gets a build: %s", s)
		}
	}
	state(floxv1.WorkerState_WORKER_STATE_ACTIVE)
	token := l.lease("a", "w")
	cancel := &floxv1.CancelBuilds{Keys: drvs([]string{"a"}), By: "alice", Reason: "not now"}
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Cancel{Cancel: cancel}})
	if b := l.build("a"); b.GetState() != failed || b.GetOutcome().GetMessage() != "it was cancelled by alice: not now" || token == 0 || !l.finish("a", token, 0) {
		t.Errorf("%v", b)
	}
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Rank{Rank: &floxv1.RankBuilds{Keys: drvs([]string{"b", "none"}), Priority: 7}}})
	if got := l.build("b").GetPriority(); got != 7 {
		t.Errorf("priority %d", got)
	}
	l.finish("b", l.lease("b", "w"), 0)
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Cancel{Cancel: &floxv1.CancelBuilds{Keys: drvs([]string{"b"}), By: "alice"}}})
	l.states("b done")
	l.enqueue("two", "c")
	l.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_RemoveWorker{RemoveWorker: "w"}})
	if l.lease("c", "w") != 0 {
		t.Error("a worker that is gone gets a build")
	}
	l.counted()
}

// What was built is known afterwards: how long such builds take, what owners used, and
// what became of each try.
func TestMemory(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	l.enqueue("one", "a", "b")
	token := l.lease("a", "w")
	l.now = l.now.Add(10 * time.Second)
	l.finish("a", token, 0)
	token = l.lease("b", "w")
	l.now = l.now.Add(3 * time.Second)
	l.finish("b", token, -1)
	l.leave("one")
	l.enqueue("two", "a")
	if got := l.build("a").GetExpectMs(); got != 4000 {
		t.Errorf("it should take %d ms, want what it took", got)
	}
	used := func() (sum time.Duration) {
		l.view(func(r *raft.Reader) error {
			return Used(r, l.now, func(owner string, at time.Time, took time.Duration) {
				if owner != "owner-one" || l.now.Sub(at) > Window+windowPart {
					t.Errorf("%s used %s at %s", owner, took, at)
				}
				sum += took
			})
		})
		return sum
	}
	if got := used(); got != 13*time.Second {
		t.Errorf("used %s, want 13 s", got)
	}
	l.view(func(r *raft.Reader) error {
		h, err := History(r, 10)
		if err == nil && (len(h) != 2 || h[0].GetFault() != "out of disk" || h[0].GetTries() != 1 || h[1].GetFault() != "" || h[1].GetBuildingMs() != 4000 || h[1].GetWorker() != "w" ||
			h[1].GetStoppedUnixMs()-h[1].GetLeasedUnixMs() != 10_000) {
			t.Errorf("history %v", h)
		}
		return err
	})
	l.now = l.now.Add(2 * Window)
	if got := used(); got != 0 {
		t.Errorf("two hours later %s count", got)
	}
	l.now = l.now.Add(2 * Window)
	l.finish("a", l.lease("a", "w"), 0)
	l.view(func(r *raft.Reader) error {
		n := 0
		err := r.Iterate([]byte{usedKey}, nil, func([]byte, []byte) bool { n++; return true })
		if n != 1 {
			t.Errorf("%d records of use, want the new one alone", n)
		}
		return err
	})
	l.counted()
}

// Everything that grows has a bound, and drops its oldest, or refuses.
func TestBounds(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{bounds{builds: 6, failures: 2, times: 2, history: 3, changes: 4}})
	l.register("w")
	l.enqueue("one", "a", "b", "c", "d", "f", "g")
	if _, err := l.apply(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: enqueue("two", "a", "h")}}); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("a full queue: %v", err)
	}
	if b := l.build("a"); b.GetWants() != 1 {
		t.Errorf("what was refused has changed something: %v", b)
	}
	var before uint64
	l.view(func(r *raft.Reader) error { before = r.Index(); return nil })
	for _, name := range []string{"a", "b", "c"} {
		l.finish(name, l.lease(name, "w"), int(buildfarm.PermanentFailure))
	}
	for _, name := range []string{"d", "f", "g"} {
		l.finish(name, l.lease(name, "w"), 0)
	}
	l.leave("one")
	l.enqueue("two", "a", "b", "c", "d", "f", "g")
	l.states("a waiting, b failed, c failed, d waiting")
	for name, want := range map[string]uint64{"d": 0, "f": 4000, "g": 4000} {
		if got := l.build(name).GetExpectMs(); got != want {
			t.Errorf("%s should take %d ms, want %d", name, got, want)
		}
	}
	l.view(func(r *raft.Reader) error {
		h, err := History(r, 10)
		if err != nil || len(h) != 3 || h[0].GetKey() != drv("g") {
			t.Errorf("history %v, %v", h, err)
		}
		if ok, err := Changes(r, before, func(*floxv1.QueueChange) {}); ok || err != nil {
			t.Errorf("changes that were dropped are all known: %v", err)
		}
		n := 0
		ok, err := Changes(r, r.Index()-1, func(c *floxv1.QueueChange) {
			n++
			if c.GetWant() != "two" {
				t.Errorf("changed: %v", c)
			}
		})
		if !ok || err != nil || n != 1 {
			t.Errorf("the last change: %t, %v, %d", ok, err, n)
		}
		return nil
	})
}

func TestBadCommands(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	enq := func(c *floxv1.EnqueueBuilds, f func(c *floxv1.EnqueueBuilds)) *floxv1.QueueCommand {
		f(c)
		return &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: c}}
	}
	for name, c := range map[string]*floxv1.QueueCommand{
		"nothing wanted":    enq(enqueue("w"), func(*floxv1.EnqueueBuilds) {}),
		"no name":           enq(enqueue("", "a"), func(*floxv1.EnqueueBuilds) {}),
		"a name with 0":     enq(enqueue("a\x00b", "a"), func(*floxv1.EnqueueBuilds) {}),
		"no derivation":     enq(enqueue("w", "a"), func(c *floxv1.EnqueueBuilds) { c.Builds[0].Drv = strings.Repeat("0", 32) + "-x" }),
		"needs behind it":   enq(enqueue("w", "a:b", "b"), func(*floxv1.EnqueueBuilds) {}),
		"needs nobody has":  enq(enqueue("w", "a:z"), func(*floxv1.EnqueueBuilds) {}),
		"no system":         enq(enqueue("w", "a"), func(c *floxv1.EnqueueBuilds) { c.Builds[0].System = "" }),
		"priority":          enq(enqueue("w", "a"), func(c *floxv1.EnqueueBuilds) { c.Priority = 101 }),
		"too many features": enq(enqueue("w", "a"), func(c *floxv1.EnqueueBuilds) { c.Builds[0].Features = make([]string, maxFeatures+1) }),
		"too many":          enq(enqueue("w", "a"), func(c *floxv1.EnqueueBuilds) { c.Builds = make([]*floxv1.NewBuild, MaxBatch+1) }),
		"no outcome":        {Command: &floxv1.QueueCommand_Finish{Finish: &floxv1.FinishBuild{Key: drv("a"), Token: 1}}},
		"a worker":          {Command: &floxv1.QueueCommand_Register{Register: &floxv1.FarmWorker{}}},
		"a worker's state":  {Command: &floxv1.QueueCommand_WorkerState{WorkerState: &floxv1.SetWorkerState{Worker: "none"}}},
		"a key":             {Command: &floxv1.QueueCommand_Retry{Retry: &floxv1.RetryBuilds{Keys: []string{"x"}}}},
		"keys":              {Command: &floxv1.QueueCommand_Settle{Settle: &floxv1.SettleBuilds{Keys: make([]string, MaxKeys+1)}}},
	} {
		if _, err := l.apply(c); !errors.Is(err, raft.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	l.view(func(r *raft.Reader) error {
		return r.Iterate(nil, nil, func(key, _ []byte) bool {
			t.Errorf("%q is in the state", key)
			return true
		})
	})
}

// A want of many builds ends in steps, and what is wanted by others stays.
func TestLeavesInSteps(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	var many []string
	for i := range 2*leaveStep + 5 {
		many = append(many, fmt.Sprint(i))
	}
	l.enqueue("one", many...)
	l.enqueue("two", many[7])
	leave := &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Leave{Leave: &floxv1.LeaveQueue{Want: "one"}}}
	if !l.must(leave).GetMore() {
		t.Error("it ends with one command")
	}
	if _, err := l.apply(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: enqueue("one", "a")}}); !errors.Is(err, flox.ErrClosed) {
		t.Errorf("what is ending takes more: %v", err)
	}
	l.leave("one")
	l.view(func(r *raft.Reader) error {
		c, err := loadCounts(r)
		if err != nil || c.builds != 1 || c.wants != 1 {
			t.Errorf("%+v, %v", c, err)
		}
		return nil
	})
	l.states("7 waiting, 8 gone")
}

func TestNames(t *testing.T) {
	t.Parallel()
	for drv, want := range map[string]string{"hello-2.12.drv": "hello", "a-b-1.drv": "a-b", "x.drv": "x", "gtk+-3.drv": "gtk+", "python3-numpy.drv": "python3-numpy"} {
		if got := nameOf(flox.StorePath(strings.Repeat("0", 32) + "-" + drv)); got != want {
			t.Errorf("%s is %s, want %s", drv, got, want)
		}
	}
	for _, check := range []bool{false, true} {
		name := flox.StorePath(drv("a"))
		if d, c, err := Split(Key(name, check)); d != name || c != check || err != nil {
			t.Error(d, c, err)
		}
	}
}
