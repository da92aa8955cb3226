package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/integration/fault"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/ledger"
	"github.com/floxctl/flox/integration/load"
)

// kills kills the leader, over and over, while an operator makes invites at
// another server and somebody uploads files through an agent. Nobody sees anything
// of it: only who was talking to the one that was killed asks again.
func (h *house) kills(r *readers, n int) {
	from := len(h.ledger.Failures())
	h.ledger.Patient(true)
	defer h.ledger.Patient(false)
	stop := h.writing(4)
	var waits []time.Duration
	var invites []string
	var dead []ledger.Failure // when which server was
	for round := range n {
		h.flows(time.Now())
		i, leader := h.leader()
		file := h.randomFile(round)
		killed := time.Now()
		leader.Kill()
		made, added := make(chan error, 1), make(chan error, 1)
		go func() {
			req := connect.NewRequest(&floxv1.MakeInviteRequest{Role: "agent"})
			resp, err := h.servers[(i+1)%3].Admin().MakeInvite(h.t.Context(), req)
			if err == nil {
				invites = append(invites, resp.Msg.GetRecord().GetId())
			}
			made <- err
		}()
		go func() { added <- r.add(h.t.Context(), round%len(r.agents), file) }()
		waits = append(waits, h.flows(killed))
		if err := <-made; err != nil {
			h.t.Errorf("an operator saw the leader die: %v", err)
		}
		if err := <-added; err != nil {
			h.t.Errorf("who uploaded a file saw the leader die: %v", err)
		}
		must(h.t, leader.Launch())
		h.up()
		dead = append(dead, ledger.Failure{Server: i, Begun: killed, End: time.Now()})
		h.whole()
	}
	stop()
	h.agree(invites)
	failures := h.ledger.Failures()[from:]
	for _, f := range failures {
		if !slices.ContainsFunc(dead, func(d ledger.Failure) bool {
			return d.Server == f.Server && f.Begun.Before(d.End) && d.Begun.Before(f.End)
		}) {
			h.t.Errorf("%s, which nobody had killed, failed a writer after %s: %v", h.servers[f.Server].Host.Name, f.End.Sub(f.Begun), f.Err)
		}
	}
	h.t.Logf("%d kills of the leader: the next write is acknowledged after %s (p50), %s (max); killed servers failed %d writers, others none", n, load.Quantile(waits, 0.5), load.Quantile(waits, 1), len(failures))
}

// randomFile makes a file that no store path is of.
func (h *house) randomFile(number int) string {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), fmt.Sprint("added-", number))
	content := make([]byte, 600<<10)
	for i := range content {
		content[i] = byte(rand.Uint32())
	}
	must(h.t, os.WriteFile(file, content, 0o600))
	return file
}

// agree waits until every server has applied the same and checks that their audit
// logs are equal and hold each of these invites once.
func (h *house) agree(invites []string) {
	h.t.Helper()
	h.eventually("all servers have applied the same", func() bool {
		resp, err := h.servers[0].Admin().Servers(h.t.Context(), connect.NewRequest(&floxv1.ServersRequest{}))
		if err != nil || len(resp.Msg.GetServers()) != len(h.servers) {
			return false
		}
		first := resp.Msg.GetServers()[0].GetApplied()
		return !slices.ContainsFunc(resp.Msg.GetServers(), func(s *floxv1.ServerState) bool { return s.GetApplied() != first })
	})
	first := h.audit(0)
	for i := range h.servers {
		if other := h.audit(i); !slices.EqualFunc(first, other, func(a, b *floxv1.AuditRecord) bool { return proto.Equal(a, b) }) {
			h.t.Errorf("the audit logs of %s and %s differ: %d and %d records", h.servers[0].Host.Name, h.servers[i].Host.Name, len(first), len(other))
		}
	}
	for _, id := range invites {
		n := 0
		for _, r := range first {
			if strings.Contains(r.GetSubject()+" "+r.GetDetail(), id) {
				n++
			}
		}
		if n != 1 {
			h.t.Errorf("invite %s stands in the audit log %d times, want once", id, n)
		}
	}
}

// audit is the audit log as one server has it.
func (h *house) audit(server int) (all []*floxv1.AuditRecord) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 20*time.Second)
	defer cancel()
	stream, err := h.servers[server].Admin().Audit(ctx, connect.NewRequest(&floxv1.AuditRequest{}))
	must(h.t, err)
	defer stream.Close()
	for stream.Receive() {
		all = append(all, stream.Msg().GetRecords()...)
	}
	must(h.t, stream.Err())
	return all
}

// partition is a way to cut servers off from each other. It breaks and mends.
type partition struct {
	name      string
	cut, mend func(ctx context.Context) error
}

// partitions are the ways to cut a server, most of all the leader, off.
func (h *house) partitions(one int) []partition {
	a, b, c := h.servers[one].Host, h.servers[(one+1)%3].Host, h.servers[(one+2)%3].Host
	each := func(f func(ctx context.Context) error, more func(ctx context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error { return errors.Join(f(ctx), more(ctx)) }
	}
	both := func(f func(context.Context, *hosts.Storehouse) error) func(context.Context) error {
		return each(func(ctx context.Context) error { return f(ctx, h.servers[(one+1)%3]) }, func(ctx context.Context) error { return f(ctx, h.servers[(one+2)%3]) })
	}
	return []partition{
		{
			"the leader is cut off",
			both(func(ctx context.Context, s *hosts.Storehouse) error { return h.net.Partition(ctx, a, s.Host) }),
			both(func(ctx context.Context, s *hosts.Storehouse) error { return h.net.Heal(ctx, a, s.Host) }),
		},
		{
			"the leader is heard and hears nobody",
			both(func(ctx context.Context, s *hosts.Storehouse) error { return h.net.Deafen(ctx, a, s.Host) }),
			both(func(ctx context.Context, s *hosts.Storehouse) error { return h.net.Undeafen(ctx, a, s.Host) }),
		},
		{
			"the leader is heard by nobody",
			both(func(ctx context.Context, s *hosts.Storehouse) error { return h.net.Deafen(ctx, s.Host, a) }),
			both(func(ctx context.Context, s *hosts.Storehouse) error { return h.net.Undeafen(ctx, s.Host, a) }),
		},
		{
			"the leader and one other do not reach each other",
			func(ctx context.Context) error { return h.net.Partition(ctx, a, b) },
			func(ctx context.Context) error { return h.net.Heal(ctx, a, b) },
		},
		{
			"the others do not reach each other",
			func(ctx context.Context) error { return h.net.Partition(ctx, b, c) },
			func(ctx context.Context) error { return h.net.Heal(ctx, b, c) },
		},
		{
			"the leader's cable is pulled", a.Unplug, a.Plug,
		},
	}
}

// cutOff cuts servers off from each other, over and over.
func (h *house) cutOff(n int) {
	defer h.writing(4)()
	order := []int{0, 1, 3, 2, 5, 4} // what the short form shows comes first
	for i := range n {
		h.flows(time.Now())
		one, _ := h.leader()
		p := h.partitions(one)[order[i%len(order)]]
		h.t.Log(p.name)
		must(h.t, p.cut(h.t.Context()))
		wait := h.flows(time.Now())
		for range 3 { // and on
			h.flows(time.Now())
		}
		must(h.t, p.mend(h.t.Context()))
		h.up()
		h.whole()
		h.t.Logf("%s: the next write is acknowledged after %s", p.name, wait)
	}
}

// powerCuts takes the power from one server or from all, over and over.
func (h *house) powerCuts(n int) {
	defer h.writing(4)()
	for i := range n {
		h.flows(time.Now())
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		cut := []int{rand.IntN(3)}
		if i%2 == 0 {
			cut = []int{0, 1, 2}
		}
		h.cutPower(cut...)
		for _, s := range cut {
			must(h.t, h.servers[s].Launch())
		}
		h.up()
		h.flows(time.Now())
		h.whole()
	}
	h.t.Logf("%d power cuts: %d acknowledged writes, none lost", n, h.ledger.Len())
}

// cutPower takes the power from servers at the same moment and gives their disks
// it back.
func (h *house) cutPower(servers ...int) {
	h.t.Helper()
	var pids []int
	for _, i := range servers {
		pids = append(pids, h.servers[i].PID())
	}
	must(h.t, fault.Freeze(h.t.Context(), pids...))
	for k, i := range servers {
		err := h.servers[i].Host.DoMounted(func() error { return h.disks[i].PowerCut(h.t.Context(), pids[k]) })
		must(h.t, err)
		h.servers[i].Kill() // it is dead: this waits for it
	}
}

// lossIsSeen is what makes the power cuts a proof: servers whose syncs do nothing
// lose what they acknowledged, and that is found. The house is of no use afterwards.
func (h *house) lossIsSeen() {
	nosync := filepath.Join(h.dir, "nosync")
	build := exec.CommandContext(h.t.Context(), "go", "build", "-o", nosync, "github.com/floxctl/flox/integration/fault/nosync")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		h.t.Fatalf("build: %v\n%s", err, out)
	}
	for _, s := range h.servers {
		must(h.t, s.Stop())
		must(h.t, s.LaunchBy(nosync))
	}
	h.up()
	stop := h.writing(4)
	from := h.ledger.Len()
	for range 20 {
		h.flows(time.Now())
	}
	stop()
	h.cutPower(0, 1, 2)
	for _, s := range h.servers {
		must(h.t, s.Launch())
	}
	lost := ""
	h.eventually("the servers answer, or say what is wrong", func() bool {
		answer := 0
		for _, s := range h.servers {
			line, err := s.Said("damaged")
			must(h.t, err)
			if lost += line; !s.Running() {
				lost += s.Tail()
			}
			if lost != "" {
				return true
			}
			if s.Answers(h.t.Context()) == nil {
				answer++
			}
		}
		return answer == len(h.servers)
	})
	if lost != "" {
		h.t.Logf("seen: %s", lost)
		return
	}
	missing, err := h.ledger.Check(h.t.Context(), h.ledger.Acked(from))
	must(h.t, err)
	if len(missing) == 0 {
		h.t.Error("servers that sync nothing lost nothing in a power cut: the cuts of this test show nothing")
		return
	}
	h.t.Logf("seen: %d acknowledged writes, asked for on three servers: %d answers are missing, such as %s", h.ledger.Len()-from, len(missing), missing[0])
}
