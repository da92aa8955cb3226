package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// queueOf is a storehouse with a worker of one slot, and builds that laptop (q-a, q-b, q-arm, and
// q-top, which needs q-b) and desk (q-b, q-old) want. It builds q-a.
func queueOf(t *testing.T) (s *Server, operator, laptop floxv1connect.AdminClient) {
	t.Helper()
	s, operator = closedHouse(t, func(c *Config) { c.workerLost = time.Hour })
	machine := joinedLaptop(t, s, operator)
	commanded(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Register{Register: &floxv1.FarmWorker{
		Id: "12D3elsewhere", Name: "w1", Systems: []string{"x86_64-linux"}, Features: []string{"kvm"}, Slots: 1,
	}}})
	s.farm.heard("12D3elsewhere", true)
	enqueue := func(owner string, builds ...*floxv1.NewBuild) {
		commanded(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: &floxv1.EnqueueBuilds{Want: owner, Owner: owner, Holder: "somebody", Builds: builds}}})
	}
	enqueue("laptop", queuedDrv("q-a", "x86_64-linux"))
	eventually(t, "the worker has q-a", func() bool { return inQueue(t, s)[0].GetLease() != nil })
	enqueue("laptop", queuedDrv("q-b", "x86_64-linux"), queuedDrv("q-arm", "aarch64-linux", "kvm"), queuedDrv("q-top", "x86_64-linux"))
	enqueue("laptop", func() *floxv1.NewBuild {
		b := queuedDrv("q-top", "x86_64-linux")
		b.Needs = []string{queuedDrv("q-b", "").GetDrv()}
		return b
	}())
	enqueue("desk", queuedDrv("q-b", "x86_64-linux"), queuedDrv("q-old", "x86_64-linux"))
	return s, operator, floxv1connect.NewAdminClient(machine.web(s), "http://storehouse")
}

func queuedDrv(name, system string, features ...string) *floxv1.NewBuild {
	return &floxv1.NewBuild{Drv: strings.Repeat("0", 32) + "-" + name + ".drv", System: system, Features: features}
}

// standingOf is where a build stands, as an operator is told.
func standingOf(t *testing.T, a floxv1connect.AdminClient, build string) *floxv1.BuildStanding {
	t.Helper()
	resp, err := a.WhyBuild(within(t), connect.NewRequest(&floxv1.WhyBuildRequest{Build: build}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg.GetStanding()
}

// Everybody sees what is in the queue and why it waits.
func TestQueueShowsWhyBuildsWait(t *testing.T) {
	t.Parallel()
	s, operator, laptop := queueOf(t)
	list, err := laptop.ListBuilds(within(t), connect.NewRequest(&floxv1.ListBuildsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, b := range list.Msg.GetBuilds() {
		got = append(got, fmt.Sprint(b.GetKey()[33:], " ", b.GetOwner(), " ", list.Msg.GetWorkers()[b.GetLease().GetWorker()]))
	}
	if m := list.Msg; strings.Join(got, ", ") != "q-a.drv laptop w1, q-arm.drv laptop , q-b.drv laptop , q-top.drv laptop , q-old.drv desk " || m.GetBuilding() != 1 || m.GetWaiting() != 4 {
		t.Errorf("the queue is %q, %d under way, %d waiting", got, m.GetBuilding(), m.GetWaiting())
	}
	few, err := laptop.ListBuilds(within(t), connect.NewRequest(&floxv1.ListBuildsRequest{Owner: "desk", Limit: 1}))
	if err != nil || len(few.Msg.GetBuilds()) != 1 || few.Msg.GetBuilds()[0].GetKey()[33:] != "q-old.drv" {
		t.Errorf("of desk: %v, %v", few, err)
	}
	for build, want := range map[string]string{
		"q-a":   "building 0: w1 builds it",
		"q-arm": "ready 0: no worker fits: it requires 'aarch64-linux' with features {kvm}, and there are 1 for other systems",
		"q-b":   "ready 1: 1 of the 1 workers that can build it are busy\nit waits behind 1 others: 1 of owners who have used less",
		"q-top": "waiting 0: it waits for 1 others: " + queuedDrv("q-b", "").GetDrv() + "\n1 of the 1 workers that can build it are busy",
	} {
		if st := standingOf(t, operator, build); fmt.Sprintf("%s %d: %s", st.GetState(), st.GetAhead(), st.GetWhy()) != want {
			t.Errorf("%s is %s %d: %s", build, st.GetState(), st.GetAhead(), st.GetWhy())
		}
	}
	if _, err := operator.SetWorker(within(t), connect.NewRequest(&floxv1.SetWorkerRequest{Worker: "W1", State: floxv1.WorkerState_WORKER_STATE_CORDONED})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is said that the worker is cordoned", func() bool {
		return strings.HasPrefix(standingOf(t, operator, "q-old").GetWhy(), "all workers that can build it take nothing now: w1 is cordoned or draining")
	})
	for text, want := range map[string]error{"q-": flox.ErrBadInput, "0000": flox.ErrBadInput, "q-none": flox.ErrNotFound, queuedDrv("none", "").GetDrv(): flox.ErrNotFound} {
		if _, err := operator.WhyBuild(within(t), connect.NewRequest(&floxv1.WhyBuildRequest{Build: text})); !errors.Is(api.FromConnect(err), want) {
			t.Errorf("why %s: %v, want %v", text, err, want)
		}
	}
	shown, err := laptop.ShowBuild(within(t), connect.NewRequest(&floxv1.ShowBuildRequest{Build: "/nix/store/" + queuedDrv("q-b", "").GetDrv()}))
	if err != nil || strings.Join(shown.Msg.GetOwners(), " ") != "desk laptop" || shown.Msg.GetBuild().GetWants() != 2 {
		t.Errorf("q-b is %v, %v", shown, err)
	}

	// A machine that is no server, and is not heard, is no worker any more.
	s.farm.mu.Lock()
	delete(s.farm.beats, "12D3elsewhere")
	s.farm.since, s.farm.here["somebody"], s.farm.here[s.farm.id()] = time.Now().Add(-2*time.Hour), time.Now(), time.Now()
	s.farm.mu.Unlock()
	eventually(t, "what it had waits, as nobody is there", func() bool {
		st := standingOf(t, operator, "q-a")
		return st.GetState() == "ready" && strings.HasPrefix(st.GetWhy(), "no worker fits: it requires 'x86_64-linux' with features {}, and there is none")
	})
}

// Who wants builds changes them, an admin all; what was done is in the audit log.
func TestWhoMayChangeTheQueue(t *testing.T) {
	t.Parallel()
	s, operator, laptop := queueOf(t)
	bump := &floxv1.ChangeBuildsRequest_Bump{Bump: &floxv1.BumpThem{Priority: 7}}
	cancelThem := &floxv1.ChangeBuildsRequest_Cancel{Cancel: &floxv1.CancelThem{Reason: "enough"}}
	retry := &floxv1.ChangeBuildsRequest_Retry{Retry: &floxv1.RetryThem{}}
	change := func(a floxv1connect.AdminClient, q *floxv1.ChangeBuildsRequest, builds ...string) (*floxv1.ChangeBuildsResponse, error) {
		q.Builds = builds
		resp, err := a.ChangeBuilds(within(t), connect.NewRequest(q))
		if err != nil {
			return nil, api.FromConnect(err)
		}
		return resp.Msg, nil
	}
	found := func(name string) *floxv1.QueuedBuild {
		for _, b := range inQueue(t, s) {
			if b.GetKey() == queuedDrv(name, "").GetDrv() {
				return b
			}
		}
		return nil
	}

	// What it needs goes with it; what it wants with others it may bump and not cancel.
	if m, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: bump}, "q-top"); err != nil || m.GetChanged() != 2 || found("q-top").GetPriority() != 7 || found("q-b").GetPriority() != 7 {
		t.Errorf("bumped: %v, %v", m, err)
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: cancelThem}, "q-arm", "q-b"); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "wanted by desk as well") {
		t.Errorf("a build that others want, too, is cancelled: %v", err)
	}
	if found("q-arm").GetState() != floxv1.BuildState_BUILD_STATE_WAITING {
		t.Error("a change that is refused was carried out in part")
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: bump}, "q-old"); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a build of others is bumped: %v", err)
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: &floxv1.ChangeBuildsRequest_Bump{Bump: &floxv1.BumpThem{Priority: 3}}}, "q-b"); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "has priority 7 and is wanted by desk as well") {
		t.Errorf("a build that others want, too, is put back: %v", err)
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: bump}, "q-a"); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "is being built") {
		t.Errorf("one that is being built is bumped: %v", err)
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: cancelThem}, "q-arm"); err != nil || !strings.HasSuffix(found("q-arm").GetOutcome().GetMessage(), "on laptop: enough") &&
		!strings.HasSuffix(found("q-arm").GetOutcome().GetMessage(), "by laptop: enough") {
		t.Errorf("cancelled: %v, %v", found("q-arm"), err)
	}
	for _, q := range []*floxv1.ChangeBuildsRequest{{Change: cancelThem}, {Change: bump}} {
		if _, err := change(laptop, q, "q-arm"); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("a build that is over: %v", err)
		}
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: retry}, "q-b"); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("one is tried again that has not failed: %v", err)
	}
	if _, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: retry}, "q-arm"); err != nil || found("q-arm").GetState() != floxv1.BuildState_BUILD_STATE_WAITING {
		t.Errorf("tried again: %v, %v", found("q-arm"), err)
	}
	if _, err := change(operator, &floxv1.ChangeBuildsRequest{Change: cancelThem}, "q-b"); err != nil {
		t.Errorf("an admin cancels: %v", err)
	}
	eventually(t, "what needs it fails", func() bool { return found("q-top").GetState() == floxv1.BuildState_BUILD_STATE_FAILED })
	if m, err := change(laptop, &floxv1.ChangeBuildsRequest{Change: retry}, "q-top"); err != nil || m.GetChanged() != 2 || found("q-top").GetState() != floxv1.BuildState_BUILD_STATE_WAITING ||
		found("q-b").GetState() != floxv1.BuildState_BUILD_STATE_WAITING {
		t.Errorf("tried again with what it needs: %v, %v", m, err)
	}

	drain := &floxv1.SetWorkerRequest{Worker: "w1", State: floxv1.WorkerState_WORKER_STATE_DRAINING}
	if _, err := laptop.SetWorker(within(t), connect.NewRequest(drain)); !errors.Is(api.FromConnect(err), flox.ErrDenied) {
		t.Errorf("who is no admin drains: %v", err)
	}
	if _, err := operator.SetWorker(within(t), connect.NewRequest(&floxv1.SetWorkerRequest{Worker: "w2"})); !errors.Is(api.FromConnect(err), flox.ErrNotFound) || !strings.Contains(err.Error(), "there are: w1") {
		t.Errorf("a worker that is none: %v", err)
	}
	if _, err := operator.SetWorker(within(t), connect.NewRequest(drain)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it gives back what it has", func() bool { return found("q-a").GetLease() == nil })
	workers, err := laptop.ListWorkers(within(t), connect.NewRequest(&floxv1.ListWorkersRequest{}))
	if err != nil || len(workers.Msg.GetWorkers()) != 1 || workers.Msg.GetWorkers()[0].GetWorker().GetState() != drain.GetState() || workers.Msg.GetWorkers()[0].GetAway() {
		t.Errorf("workers: %v, %v", workers, err)
	}
	want := "build.bump !build.cancel !build.bump build.cancel build.retry build.cancel build.retry !worker.drain worker.drain"
	got := strings.Join(append(auditOf(t, operator, &floxv1.AuditRequest{Action: "build."}), auditOf(t, operator, &floxv1.AuditRequest{Action: "worker."})...), " ")
	if got != want {
		t.Errorf("the audit log has %q, want %q", got, want)
	}
}

// Who waits for a build hears why it waits, and what it says is there for everybody.
func TestCallersHearWhyBuildsWait(t *testing.T) {
	t.Parallel()
	gate, err := os.MkdirTemp("/var/tmp", "flox-gate-") // builds have a /tmp of their own
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(gate) })
	if err := os.Chmod(gate, 0o755); err != nil {
		t.Fatal(err)
	}
	f := newFarmOf(t, evaluator(t), "", 1, func(c *Config) { c.Builds.SandboxPaths = append(c.Builds.SandboxPaths, gate) }).queued()
	begun := func(name string) string {
		return f.upload(mk(name, fmt.Sprintf("echo begun; until test -e %s/open; do sleep 0.1; done; echo > $out", gate), ""))
	}
	one, other := begun("one"), begun("other")
	asked := &admin{s: f.Server}
	output := func(q *floxv1.BuildOutputRequest) (text string, ongoing bool) {
		err := asked.buildOutput(within(t), q, func(p *floxv1.BuildOutputPiece) {
			text += string(p.GetData())
			ongoing = ongoing || p.GetOngoing()
		})
		if err != nil {
			t.Errorf("output of %s: %v", q.GetBuild(), err)
		}
		return text, ongoing
	}
	var waits *floxv1.BuildWait
	req := outs(one, other)
	if _, err := f.build(within(t), req, func(e *floxv1.BuildEvent) {
		if e.GetWait() == nil || waits != nil {
			return
		}
		waits = e.GetWait()
		runs := map[string]string{one: other, other: one}[waits.GetDrv()]
		eventually(t, "what the one under way has said is there", func() bool {
			text, ongoing := output(&floxv1.BuildOutputRequest{Build: runs})
			return text == "begun\n" && ongoing
		})
		if err := os.WriteFile(filepath.Join(gate, "open"), nil, 0o644); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if waits.GetWhy() != "1 of the 1 workers that can build it are busy" || waits.GetStuck() {
		t.Errorf("it waits: %v", waits)
	}
	if text, ongoing := output(&floxv1.BuildOutputRequest{Build: one, Follow: true}); text != "begun\n" || ongoing {
		t.Errorf("of one that is over: %q, %v", text, ongoing)
	}

	// Nobody takes it: that is said, and ends.
	cordon := func(state floxv1.WorkerState) {
		commanded(t, f.Server, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_WorkerState{WorkerState: &floxv1.SetWorkerState{Worker: f.farm.id(), State: state}}})
	}
	cordon(floxv1.WorkerState_WORKER_STATE_CORDONED)
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	waits = nil
	if _, err := f.build(ctx, outs(begun("third")), func(e *floxv1.BuildEvent) {
		if e.GetWait() != nil && waits == nil {
			waits = e.GetWait()
			cordon(floxv1.WorkerState_WORKER_STATE_ACTIVE)
		}
	}); err != nil || !waits.GetStuck() || !strings.HasSuffix(waits.GetWhy(), "is cordoned or draining") {
		t.Errorf("while nobody takes it: %v, %v", waits, err)
	}
}
