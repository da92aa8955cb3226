package integration

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/members"
)

// invite has a server make an invite.
func (h *house) invite(server int, role string, labels ...*floxv1.Label) string {
	h.t.Helper()
	req := &floxv1.MakeInviteRequest{Role: role, Labels: labels}
	if role == members.Agent {
		req.User = &floxv1.UserGrant{Name: "root", Role: members.Member} // as whom the tests ask
	}
	made, err := h.servers[server].Admin().MakeInvite(h.t.Context(), connect.NewRequest(req))
	must(h.t, err)
	return made.Msg.GetInvite()
}

// machines are the names of the members, as a server has them.
func (h *house) machines(asked *hosts.Storehouse) (names []string) {
	h.t.Helper()
	list, err := asked.Admin().ListMachines(h.t.Context(), connect.NewRequest(&floxv1.ListMachinesRequest{}))
	must(h.t, err)
	for _, m := range list.Msg.GetMachines() {
		names = append(names, m.GetMachine().GetName())
	}
	return names
}

// entry is who gets in: whom an invite lets in, once, until they are removed.
func (h *house) entry() {
	a, b := h.host(h.t, "guest-a"), h.host(h.t, "guest-b")
	h.onceOnly(a, b)
	h.removed(a, b)
}

// onceOnly: an invite for one machine that two use at the same moment makes one a
// member, and the other is told no.
func (h *house) onceOnly(a, b *netns.Host) {
	h.t.Helper()
	invite := h.invite(1, "agent")
	failed := make([]error, 2)
	var group sync.WaitGroup
	for i, host := range []*netns.Host{a, b} {
		group.Go(func() {
			failed[i] = hosts.Join(h.t.Context(), h.programs, host, invite, "--name", fmt.Sprint("guest", i))
		})
	}
	group.Wait()
	no := failed[0]
	if no == nil {
		no = failed[1]
	}
	if (failed[0] == nil) == (failed[1] == nil) || no == nil {
		h.t.Fatalf("an invite for one machine, used by two at once: %v, %v", failed[0], failed[1])
	}
	if !strings.Contains(no.Error(), "invite") {
		h.t.Errorf("who came second is told %v", no)
	}
	guests := slices.DeleteFunc(h.machines(h.servers[0]), func(name string) bool { return !strings.HasPrefix(name, "guest") })
	if len(guests) != 1 {
		h.t.Errorf("members are now %v, want one of the guests", guests)
	}
	joined := 0
	h.eventually("the one that was refused is audited", func() bool {
		refused := 0
		joined = 0
		for _, r := range h.audit(0) {
			guest := strings.HasPrefix(r.GetActor().GetMachine(), "guest") || strings.Contains(r.GetDetail(), "from "+a.Addr().String()) ||
				strings.Contains(r.GetDetail(), "from "+b.Addr().String())
			switch {
			case guest && r.GetRefused():
				refused++
			case guest:
				joined++
			}
		}
		return refused > 0
	})
	if joined != 1 {
		h.t.Errorf("the audit log holds %d guests that joined, want 1", joined)
	}
}

// keptInvite is the file by which a machine that joined belongs to the storehouse.
const keptInvite = "/var/lib/floxd/agent/invite.json"

// removed: a machine that is removed is cut off within moments, and neither a
// restart nor another invite brings it back.
func (h *house) removed(a, b *netns.Host) {
	h.t.Helper()
	in, name := a, "guest0"
	if !slices.Contains(h.machines(h.servers[0]), name) {
		in, name = b, "guest1"
	}
	guest, err := hosts.StartAgent(h.t.Context(), h.programs, in, h.dir, keptInvite, "--lookup-timeout", "1s", "--read-timeout", "1s")
	must(h.t, err)
	h.t.Cleanup(func() { stop(h.t, guest.Daemon) })
	await(h.t, guest, "follows the storehouse", connected)
	paths := h.ledger.Acked(0)
	do(h.t, in, "cat", paths[0].File).want(h.t, 0)

	begun := time.Now()
	_, err = h.servers[2].Admin().RemoveMachine(h.t.Context(), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: name, Reason: "stolen"}))
	must(h.t, err)
	cutOff := func(s *hosts.Status) bool { return !s.Storehouse.Connected && s.Storehouse.Error != "" }
	await(h.t, guest, "is cut off", cutOff)
	h.t.Logf("cut off %s after it was removed", time.Since(begun))
	if r := do(h.t, in, "cat", paths[1].File); r.code == 0 {
		h.t.Error("a removed machine is given a path it did not have")
	}
	must(h.t, guest.Restart(h.t.Context()))
	await(h.t, guest, "stays cut off", cutOff)
	must(h.t, guest.Stop())
	if err := hosts.Join(h.t.Context(), h.programs, in, h.invite(0, "agent"), "--name", "again"); err == nil {
		h.t.Error("a removed machine joins again with its old key")
	}
}

// joins: a new server brings everything here while the others are written to, and the
// leader stays the leader, though its link is full. A busy machine may hold the leader
// up for longer than the others wait; a link that is in its way does so each time.
func (h *house) joins() {
	must(h.t, h.copyTo(h.t.Context(), h.servers[0], h.world.Ripgrep.Path, h.world.Unused.Path))
	for range 3 {
		if h.joined() {
			return
		}
	}
	h.t.Error("each time that a server joined, another one became the leader while the leader's link was full")
}

// fullLink is the leader's link while a server joins, in bits per second: the content
// alone fills it for more than a second.
const fullLink = 60e6

// joined has a new server join and go, and reports whether the leader stayed it
// while content was fetched.
func (h *house) joined() bool {
	_, leader := h.leader()
	must(h.t, leader.Host.Rate(h.t.Context(), fullLink))
	sent, err := leader.Host.Counters()
	must(h.t, err)
	before := h.led()
	stopWriting := h.writing(4)
	host := h.host(h.t, "server4")
	d := disk(h.t, h.lab, host, 512<<20)
	s := hosts.NewServer(h.programs, host, h.dir, d.Dir, "--reserve", "16MiB")
	h.t.Cleanup(func() {
		if s.Daemon != nil {
			stop(h.t, s.Daemon)
		}
	})
	begun := time.Now()
	must(h.t, s.Join(h.t.Context(), h.invite(0, "server", &floxv1.Label{Key: "voter", Value: "false"})))
	must(h.t, s.Start(h.t.Context()))
	want := dirSize(h.t, h.servers[0].State()+"/packs/packs")
	have := func() int64 { return dirSize(h.t, s.State()+"/packs/packs") }
	most, now, verified := uint64(0), uint64(0), ""
	h.t.Cleanup(func() {
		if h.t.Failed() {
			h.t.Logf("the new server lacked %d, at most %d; it has %d bytes, the first one had %d; verify said: %s", now, most, have(), want, verified)
		}
	})
	lacks := func() bool {
		resp, err := h.servers[0].Admin().Servers(h.t.Context(), connect.NewRequest(&floxv1.ServersRequest{}))
		must(h.t, err)
		i := slices.IndexFunc(resp.Msg.GetServers(), func(state *floxv1.ServerState) bool { return state.GetName() == host.Name })
		if i < 0 || resp.Msg.GetServers()[i].GetProblem() != "" { // who does not answer does not say what it lacks
			return true
		}
		now = resp.Msg.GetServers()[i].GetLackingBytes() + resp.Msg.GetServers()[i].GetLackingBlocks()
		most = max(most, now)
		return now > 0
	}
	// What the writers write meanwhile it may lack all the time.
	h.eventually("the new server has most of the content", func() bool { return !lacks() && have() > 0 || have() > want/2 })
	h.flows(time.Now())
	stayed := slices.Equal(before, h.led())
	counters, err := leader.Host.Counters()
	must(h.t, err)
	took := time.Since(begun)
	h.t.Logf("%d MiB brought in %s beside writers, told to lack up to %d; the leader sent %d MiB meanwhile, and stayed: %v", want>>20, took, most, counters.Sub(sent).TxBytes>>20, stayed)
	must(h.t, leader.Host.Rate(h.t.Context(), 0))
	stopWriting()
	h.progresses("the new server holds every path", &now, func() bool {
		if lacks() {
			return false
		}
		must(h.t, s.Stop())
		r := do(h.t, host, h.programs.Floxd, "storehouse", "verify", "--state-dir", d.Dir)
		if verified = string(tail([]byte(r.out))); r.code != 0 {
			must(h.t, s.Start(h.t.Context()))
		}
		return r.code == 0
	})
	_, err = h.servers[0].Admin().RemoveMachine(h.t.Context(), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: host.Name, Reason: "the test is over"}))
	must(h.t, err)
	return stayed
}

// led is when each server became the leader last.
func (h *house) led() (at []time.Time) {
	h.t.Helper()
	for _, s := range h.servers {
		t, err := s.Led()
		must(h.t, err)
		at = append(at, t)
	}
	return at
}
