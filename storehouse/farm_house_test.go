package storehouse

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// newFarmHouse is three servers that build, and a member that asks the first. A server
// that is stopped leaves its leases as one that is killed. Builds see gate, a directory.
func newFarmHouse(t *testing.T) (h *house, f *farm, gate string) {
	t.Helper()
	n := evaluator(t)
	gate, err := os.MkdirTemp("/var/tmp", "flox-gate-") // builds have a /tmp of their own
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(gate) })
	if err := os.Chmod(gate, 0o755); err != nil {
		t.Fatal(err)
	}
	h = newHouse(t, 3, func(c *Config) {
		c.StoreDir, c.Builds = flox.StoreDir(n.storeDir), farmConfig(n, c.StateDir, 1).Builds
		c.Builds.SandboxPaths = append(c.Builds.SandboxPaths, gate)
		c.workerLost, c.keepsLeases = 5*time.Second, true
		t.Cleanup(func() { unprotect(filepath.Join(c.StateDir, "builder", "inputs")) })
	})
	s := h.servers[0]
	n.token(s, uploadToken(t, s))
	eventually(t, "the queue knows all builders", func() bool {
		all, err := s.farm.workers(within(t))
		return err == nil && len(all) == 3
	})
	return h, &farm{t, s, n, join(t, s.Invite())}, gate
}

// only has one of the servers get builds.
func (h *house) only(worker *Server) {
	h.t.Helper()
	for _, s := range h.servers {
		state := floxv1.WorkerState_WORKER_STATE_CORDONED
		if s == worker {
			state = floxv1.WorkerState_WORKER_STATE_ACTIVE
		}
		commanded(h.t, h.servers[0], &floxv1.QueueCommand{Command: &floxv1.QueueCommand_WorkerState{WorkerState: &floxv1.SetWorkerState{Worker: s.farm.id(), State: state}}})
	}
}

// A build under way goes on when the leader is gone; when the server is gone that builds
// it, another one builds it again. Who waits hears all of it, wherever it is built, and
// nothing is built twice at once.
func TestBuildOutlivesServers(t *testing.T) {
	t.Parallel()
	h, f, gate := newFarmHouse(t)
	waits := func(name string) string {
		return f.upload(mk(name, fmt.Sprintf("echo begun; until test -e %s/%s; do sleep 0.1; done; echo goes on; echo %s > $out", gate, name, name), ""))
	}
	open := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(gate, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// ask builds, and calls begun once the builder has said so for the i-th time.
	ask := func(drv string, begun func(i int), seen ...func(*floxv1.BuildEvent)) *happened {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		times := 0
		got, err := f.build(ctx, outs(drv), func(e *floxv1.BuildEvent) {
			for _, see := range seen {
				see(e)
			}
			if e.GetLine().GetText() == "begun" {
				begun(times)
				times++
			}
		})
		if err != nil || len(got.results) != 1 || got.results[0].GetOutcome().GetStatus() != uint32(buildfarm.Built) {
			t.Fatalf("%v, %v", got, err)
		}
		if text, want := f.read(got.results[0].GetOutcome().GetOutputs()[0].GetPath()), flox.StorePath(drv).Name(); text != strings.TrimSuffix(want, ".drv")+"\n" {
			t.Errorf("%s is %q", want, text)
		}
		return got
	}

	// The leader goes: the build does not notice.
	leader, builder := h.servers[2], h.servers[1]
	if err := f.node.Transfer(within(t), leader.farm.id()); err != nil {
		t.Fatal(err)
	}
	first := waits("first")
	h.only(nil)
	heard := "" // that nobody takes it, by a server that does not lead
	operator := context.WithValue(within(t), socketKey{}, os.Geteuid())
	asked := &admin{s: f.Server}
	opened := func(e *floxv1.BuildEvent) {
		if e.GetWait().GetStuck() && heard == "" {
			heard = e.GetWait().GetWhy()
			h.only(builder)
		}
	}
	got := ask(first, func(int) {
		st, err := asked.WhyBuild(operator, connect.NewRequest(&floxv1.WhyBuildRequest{Build: "first"}))
		if err != nil || st.Msg.GetStanding().GetWhy() != "s2 builds it" {
			t.Errorf("why: %v, %v", st, err)
		}
		said := ""
		err = asked.buildOutput(within(t), &floxv1.BuildOutputRequest{Build: "first"}, func(p *floxv1.BuildOutputPiece) { said += string(p.GetData()) })
		if err != nil || said != "begun\n" {
			t.Errorf("it has said %q, %v", said, err)
		}
		h.stops[2]()
		open("first")
	}, opened)
	if !strings.HasPrefix(heard, "all workers that can build it take nothing now: ") || !strings.Contains(heard, " are cordoned or draining") {
		t.Errorf("while nobody takes it who waits heard %q", heard)
	}
	if !slices.Equal(got.started, []string{first}) || !slices.Equal(got.lines[first], []string{"begun", "goes on"}) {
		t.Errorf("while the leader went: started %v, lines %q", got.started, got.lines)
	}

	// The builder goes: the first server builds it, from the beginning.
	h.start(2)
	second := waits("second")
	got = ask(second, func(i int) {
		if i > 0 {
			open("second")
			return
		}
		h.only(f.Server)
		h.stops[1]()
	})
	if !slices.Equal(got.started, []string{second, second}) || !slices.Equal(got.lines[second], []string{"begun", "begun", "goes on"}) {
		t.Errorf("while the builder went: started %v, lines %q", got.started, got.lines)
	}
	var tried []string
	err := f.farm.view(within(t), func(r *cluster.Reader) error {
		all, err := queue.History(r, 10)
		for _, e := range all {
			tried = append(tried, e.GetKey())
		}
		return err
	})
	if err != nil || !slices.Equal(tried, []string{second, first}) {
		t.Errorf("ended were %v, %v", tried, err)
	}
}
