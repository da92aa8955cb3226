package storehouse

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// What a fixture has in the queue of builds, from level 7 on: one that failed behind the
// snapshot and what needs it, one that a worker has, and one that was done before.
const (
	goldenFails, goldenNeeds = "00000000000000000000000000000000-fails-1.drv", "11111111111111111111111111111111-needs-1.drv"
	goldenHeld, goldenDone   = "22222222222222222222222222222222-held-1.drv", "33333333333333333333333333333333-done-1.drv"
)

func proposeQueue(t *testing.T, s *Server, c *floxv1.QueueCommand) *floxv1.QueueReply {
	t.Helper()
	b, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := enterAt(within(t), s.node.NewSession(), queue.Level, queue.Kind, b)
	reply := &floxv1.QueueReply{}
	if err = errors.Join(err, proto.Unmarshal(answer, reply)); err != nil {
		t.Fatal(err)
	}
	return reply
}

// finishQueued has a worker build something.
func finishQueued(t *testing.T, s *Server, key string, status buildfarm.Status) {
	t.Helper()
	lease := proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Lease{Lease: &floxv1.LeaseBuild{Key: key, Worker: "worker"}}})
	finish := &floxv1.FinishBuild{Key: key, Token: lease.GetToken(), Outcome: &floxv1.BuildOutcome{Status: uint32(status), Message: "golden"}, Evidence: &floxv1.BuildEvidence{BuildingMs: 1234}}
	if proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Finish{Finish: finish}}).GetLost() {
		t.Fatalf("the lease of %s is lost", key)
	}
}

func enqueueGolden(t *testing.T, s *Server) {
	t.Helper()
	proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Register{Register: &floxv1.FarmWorker{Id: "worker", Systems: []string{linux}, Slots: 4, Speed: 1.5}}})
	enqueue := &floxv1.EnqueueBuilds{Want: "golden", Owner: "alice", Holder: string(s.id.peer), Interactive: true, Priority: 3}
	for _, drv := range []string{goldenFails, goldenNeeds, goldenHeld, goldenDone} {
		n := &floxv1.NewBuild{Drv: drv, System: linux, Features: []string{"kvm"}, Memory: 1 << 30, Options: &floxv1.BuildOptions{Cores: 2}}
		if drv == goldenNeeds {
			n.Needs = []string{goldenFails}
		}
		enqueue.Builds = append(enqueue.Builds, n)
	}
	proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: enqueue}})
	finishQueued(t, s, goldenDone, buildfarm.Built)
	proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Lease{Lease: &floxv1.LeaseBuild{Key: goldenHeld, Worker: "worker"}}})
}

func finishGolden(t *testing.T, s *Server) {
	t.Helper()
	finishQueued(t, s, goldenFails, buildfarm.PermanentFailure)
	proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Settle{Settle: &floxv1.SettleBuilds{Keys: []string{goldenNeeds}}}})
	cordon := &floxv1.SetWorkerState{Worker: "worker", State: floxv1.WorkerState_WORKER_STATE_CORDONED}
	proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_WorkerState{WorkerState: cordon}})
}

// checkGoldenQueue checks the queue of fixtures that have one, and that it goes on.
func checkGoldenQueue(t *testing.T, s *Server) {
	t.Helper()
	r, err := s.view(within(t), queue.Kind, cluster.Linearizable)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // of a test
	for key, want := range map[string]floxv1.BuildState{
		goldenFails: floxv1.BuildState_BUILD_STATE_FAILED, goldenNeeds: floxv1.BuildState_BUILD_STATE_FAILED,
		goldenHeld: floxv1.BuildState_BUILD_STATE_LEASED, goldenDone: floxv1.BuildState_BUILD_STATE_DONE,
	} {
		b, err := queue.Find(r, key)
		if err != nil || b.GetState() != want || b.GetOwner() != "alice" || b.GetPriority() != 3 || b.GetOptions().GetCores() != 2 {
			t.Errorf("%s is %v, %v; want %s", key, b, err, want)
		}
		if key == goldenHeld && (b.GetLease().GetWorker() != "worker" || b.GetLease().GetToken() == 0) {
			t.Errorf("lease %v", b.GetLease())
		}
	}
	if f, err := queue.Failure(r, goldenFails); err != nil || f.GetOutcome().GetMessage() != "golden" {
		t.Errorf("failure %v, %v", f, err)
	}
	if _, err := queue.Failure(r, goldenDone); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a failure of what was done: %v", err)
	}
	if all, err := queue.Workers(r); err != nil || len(all) != 1 || all[0].GetState() != floxv1.WorkerState_WORKER_STATE_CORDONED || all[0].GetSpeed() != 1.5 {
		t.Errorf("workers %v, %v", all, err)
	}
	if h, err := queue.History(r, 10); err != nil || len(h) != 2 || h[1].GetBuildingMs() != 1234 {
		t.Errorf("history %v, %v", h, err)
	}
	again := &floxv1.EnqueueBuilds{Want: "again", Owner: "bob", Builds: []*floxv1.NewBuild{{Drv: goldenFails, System: linux}}}
	if reply := proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: again}}); len(reply.GetBuilds()) != 1 {
		t.Errorf("wanted again: %v", reply)
	}
	proposeQueue(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Leave{Leave: &floxv1.LeaveQueue{Want: "again"}}})
}
