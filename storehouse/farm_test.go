package storehouse

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// queued is a storehouse of which all builds go through the queue.
func (f *farm) queued() *farm {
	f.t.Helper()
	eventually(f.t, "the queue knows the builder", func() bool {
		all, err := f.farm.workers(within(f.t))
		return err == nil && f.farm.on() && len(all) > 0
	})
	return f
}

// inQueue gives the builds of the queue.
func inQueue(t *testing.T, s *Server) (all []*floxv1.QueuedBuild) {
	t.Helper()
	err := s.farm.view(within(t), func(r *cluster.Reader) error {
		return queue.Builds(r, "", func(b *floxv1.QueuedBuild) bool {
			all = append(all, b)
			return true
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// commanded puts a command about the queue into the log.
func commanded(t *testing.T, s *Server, c *floxv1.QueueCommand) *floxv1.QueueReply {
	t.Helper()
	reply, err := s.farm.propose(within(t), s.node.NewSession(), c)
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

// Who has lost its lease makes nothing valid any more, and records nothing.
func TestNothingIsPublishedUnderALostLease(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	const drv, worker = "00000000000000000000000000000000-x.drv", "elsewhere"
	commanded(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Register{Register: &floxv1.FarmWorker{Id: worker, Systems: []string{"none"}, Slots: 1}}})
	commanded(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: &floxv1.EnqueueBuilds{
		Want: "w", Holder: "somebody", Builds: []*floxv1.NewBuild{{Drv: drv, System: "another"}},
	}}})
	lease := commanded(t, s, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Lease{Lease: &floxv1.LeaseBuild{Key: drv, Worker: worker}}})
	ctx := underLease(within(t), &floxv1.UnderLease{Build: drv, Token: lease.GetToken()})
	give := func(name string) error {
		p := makePath(t, name, 100)
		_, _, err := s.Publish(ctx, p.info, p.reader(), "tester")
		return errors.Join(err, s.builds.note(ctx, &floxv1.NoteBuild{Drv: drv}))
	}
	if err := give("first"); err != nil {
		t.Fatalf("under a lease that counts: %v", err)
	}
	commanded(t, s, releasing([]*floxv1.BuildLease{{Key: drv, Token: lease.GetToken()}}, ""))
	if err := give("second"); !errors.Is(err, cluster.ErrRefused) || !errors.Is(err, flox.ErrClosed) {
		t.Errorf("under a lost lease: %v", err)
	}
	if valid, err := s.isValid(within(t), makePath(t, "second", 100).info.Path); err != nil || valid {
		t.Errorf("it is valid: %v, %v", valid, err)
	}
	if err := s.builds.note(ctx, &floxv1.NoteBuild{Drv: drv}); !errors.Is(err, flox.ErrClosed) {
		t.Errorf("a build is recorded under a lost lease: %v", err)
	}
}

// Builds of a call leave the queue with it, also when it is ended before they are over.
func TestQueueIsEmptyBehindACall(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1).queued()
	quick := f.upload(mk("quick", "echo > $out", ""))
	f.must(quick, 0)
	eventually(t, "the queue is empty", func() bool { return len(inQueue(t, f.Server)) == 0 })
	long := f.upload(mk("long", "echo begun; sleep 300", ""))
	ctx, cancel := context.WithCancel(within(t))
	_, err := f.build(ctx, outs(long), func(e *floxv1.BuildEvent) {
		if e.GetLine() != nil {
			if all := inQueue(t, f.Server); len(all) != 1 || all[0].GetLease().GetWorker() != f.farm.id() {
				t.Errorf("the queue holds %v", all)
			}
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a call that was cancelled gives %v", err)
	}
	eventually(t, "the build is ended, and the queue is empty", func() bool {
		f.farm.mu.Lock()
		defer f.farm.mu.Unlock()
		return len(inQueue(t, f.Server)) == 0 && len(f.farm.runs) == 0
	})
}

// What nobody can build is said at once.
func TestSystemThatNobodyHas(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1).queued()
	drv := f.upload(`derivation { name = "odd"; system = "pdp11-unix"; builder = "/bin/sh"; requiredSystemFeatures = [ "punch-cards" ]; }`)
	h, err := f.build(within(t), outs(drv), nil)
	if err != nil || len(h.results) != 1 || !slices.Equal(h.stopped, []string{drv}) {
		t.Fatalf("%v, %v", h, err)
	}
	want := "a 'pdp11-unix' with features {punch-cards} is required to build '" + f.n.storeDir + "/" + drv + "', and no worker is one: test is for "
	if got := h.results[0].GetOutcome().GetMessage(); len(got) < len(want) || got[:len(want)] != want {
		t.Errorf("it says %q", got)
	}
}
