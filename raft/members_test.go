package raft

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/armon/go-metrics"
	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// byID finds a server in a list.
func byID(list []ServerStatus, id string) (s ServerStatus) {
	for _, m := range list {
		if m.ID == id {
			s = m
		}
	}
	return s
}

// join starts one more server and has it added through a server that follows.
func (c *cluster) join(id string, voter bool) int {
	c.t.Helper()
	i := c.spare(Config{Dir: c.t.TempDir(), ID: id, ReserveBytes: 1, Heartbeat: 600 * time.Millisecond, PromoteAfter: 80 * time.Millisecond, DeadAfter: c.cfg[0].DeadAfter})
	c.start(i)
	by := c.leader()
	for other := range i {
		if !c.away[other] && other != by {
			by = other
			break
		}
	}
	if err := c.nodes[by].AddServer(within(c.t), id, c.cfg[i].Address, voter); err != nil {
		c.t.Fatal(err)
	}
	return i
}

// A new server begins without a vote and gets it when it is stable, one that is
// not wanted as a voter never does; both have the state. What is not the server
// that was meant is not added.
func TestServersJoin(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	add(t, c.nodes[0], "x", ProposeOptions{})
	far := c.join("far", false)
	c.until("far in the list", func(s []ServerStatus) bool { m := byID(s, "far"); return m.ID != "" && m.Healthy && !m.Voter })
	near := c.join("near", true)
	c.until("near votes", func(s []ServerStatus) bool { return byID(s, "near").Voter })
	c.until("far does not", func(s []ServerStatus) bool {
		m := byID(s, "far")
		return m.Healthy && !m.Voter && !m.WantsVote && time.Since(m.HealthySince) > 5*c.cfg[0].PromoteAfter
	})
	for _, i := range []int{far, near} {
		if got := count(t, c.nodes[i], Linearizable, "x"); got != 1 {
			t.Errorf("server %s has %d, want 1", c.cfg[i].ID, got)
		}
	}
	n := c.nodes[1]
	if err := n.AddServer(within(t), "wrong", c.cfg[far].Address, true); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "far") {
		t.Errorf("another server's address: %v", err)
	}
	if err := n.AddServer(within(t), "nobody", "127.0.0.1:1", true); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
	if err := n.AddServer(within(t), "", "", true); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("no ID: %v", err)
	}
	if err := n.AddServer(within(t), "near", c.cfg[near].Address, false); err != nil {
		t.Errorf("take the vote away: %v", err)
	}
	c.until("near votes no more", func(s []ServerStatus) bool { return !byID(s, "near").Voter })
}

// Leadership goes where it is sent, over a follower too; a drained server gives
// it away, does not come back to it when the next leader dies, and does after
// Undrain.
func TestTransferAndDrain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	first := c.leader()
	second := (first + 1) % 3
	third := (first + 2) % 3
	if err := c.nodes[third].Transfer(within(t), c.cfg[second].ID); err != nil {
		t.Fatal(err)
	}
	if got := c.leader(); got != second {
		t.Fatalf("server %d leads, want %d", got, second)
	}
	if err := c.nodes[third].Transfer(within(t), "nobody"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("transfer to nobody: %v", err)
	}
	c.until("all healthy", func(s []ServerStatus) bool {
		return byID(s, c.cfg[first].ID).Healthy && byID(s, c.cfg[third].ID).Healthy
	})
	if err := c.nodes[third].Drain(within(t), c.cfg[second].ID); err != nil {
		t.Fatal(err)
	}
	now := c.leader()
	if now == second {
		t.Fatal("a drained server leads")
	}
	if err := c.nodes[third].Transfer(within(t), c.cfg[second].ID); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("transfer to a drained server: %v, want ErrBusy", err)
	}
	c.until("drained in the list", func(s []ServerStatus) bool { m := byID(s, c.cfg[second].ID); return m.Drained && m.Healthy && m.Voter })
	last := first + third - now
	if err := c.stop[now](); err != nil {
		t.Fatal(err)
	}
	if got := c.leader(); got != last {
		t.Fatalf("server %d leads, want %d: the other one is drained", got, last)
	}
	c.until("one is away", func(s []ServerStatus) bool { return !byID(s, c.cfg[now].ID).Healthy })
	if err := c.nodes[last].Drain(within(t), c.cfg[last].ID); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("drain of the last that may lead: %v, want ErrBusy", err)
	}
	if err := c.stop[second](); err != nil {
		t.Fatal(err)
	}
	c.start(second)
	c.until("still drained after a restart", func(s []ServerStatus) bool { m := byID(s, c.cfg[second].ID); return m.Drained && m.Healthy })
	if err := c.nodes[last].Undrain(within(t), c.cfg[second].ID); err != nil {
		t.Fatal(err)
	}
	if err := c.nodes[last].Transfer(within(t), c.cfg[second].ID); err != nil {
		t.Fatal(err)
	}
	if got := c.leader(); got != second {
		t.Fatalf("server %d leads, want %d", got, second)
	}
	// Rather a drained leader than none.
	c.until("both are healthy", func(s []ServerStatus) bool { return byID(s, c.cfg[last].ID).Healthy })
	if err := c.nodes[second].Drain(within(t), c.cfg[last].ID); err != nil {
		t.Fatal(err)
	}
	c.nodes[last].drained.Store(true)
	c.nodes[second].drained.Store(true) // as if it had been drained before the other one could be heard
	if err := errors.Join(c.stop[second](), c.stop[last]()); err != nil {
		t.Fatal(err)
	}
	c.start(last)
	c.start(now)
	c.nodes[now].drained.Store(true)
	c.leader()
}

// Nobody is removed if those who stay had no healthy majority, not by force
// either; who is away is removed by force only, and the leader may be.
func TestRemoveServer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	leader := c.leader()
	away, other := (leader+1)%3, (leader+2)%3
	if err := c.stop[away](); err != nil {
		t.Fatal(err)
	}
	c.until("one is away", func(s []ServerStatus) bool { return !byID(s, c.cfg[away].ID).Healthy })
	if err := c.nodes[other].RemoveServer(within(t), c.cfg[other].ID); !errors.Is(err, flox.ErrBusy) {
		t.Fatalf("remove one of the last two: %v, want ErrBusy", err)
	}
	if err := c.nodes[other].ForceRemoveServer(within(t), c.cfg[other].ID); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "restore") {
		t.Fatalf("remove one of the last two by force: %v, want ErrBusy and what to do", err)
	}
	if err := c.nodes[other].RemoveServer(within(t), "nobody"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("remove nobody: %v", err)
	}
	if err := c.nodes[other].RemoveServer(within(t), c.cfg[away].ID); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "force") {
		t.Fatalf("remove one that is away: %v, want ErrBusy and what to do", err)
	}
	if err := c.nodes[other].ForceRemoveServer(within(t), c.cfg[away].ID); err != nil {
		t.Fatal(err)
	}
	if err := c.nodes[other].RemoveServer(within(t), c.cfg[leader].ID); err != nil {
		t.Fatal(err)
	}
	c.away[leader] = true
	if got := c.leader(); got != other {
		t.Fatalf("server %d leads, want %d", got, other)
	}
	add(t, c.nodes[other], "x", ProposeOptions{})
	c.until("one is left", func(s []ServerStatus) bool { return len(s) == 1 })
}

// Without a majority nobody is removed, and the operator is told what to do.
func TestRemoveServerWithoutMajority(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	stays := c.leader()
	for i := range c.nodes {
		if i == stays {
			continue
		}
		if err := c.stop[i](); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	err := c.nodes[stays].ForceRemoveServer(ctx, c.cfg[(stays+1)%3].ID)
	if err == nil || !errors.Is(err, flox.ErrBusy) && !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "restore") {
		t.Errorf("remove without a majority: %v, want a refusal that says what to do", err)
	}
}

// slowLeader is a sink of measurements that holds a leader right after it told
// the others of a new entry, and holds the answers of all but "new" longer.
type slowLeader struct{ metrics.BlackholeSink }

func (*slowLeader) AddSampleWithLabels(key []string, _ float32, labels []metrics.Label) {
	switch {
	case slices.Contains(key, "dispatchLog"):
		time.Sleep(50 * time.Millisecond)
	case slices.Contains(key, "replication") && slices.Contains(key, "rpc") && !slices.Contains(labels, metrics.Label{Name: "peer_id", Value: "new"}):
		time.Sleep(100 * time.Millisecond)
	}
}

// slowDown makes all leaders slow until the test ends, which must not be parallel.
func slowDown(t *testing.T) {
	t.Helper()
	set := func(sink metrics.MetricSink) {
		if _, err := metrics.NewGlobal(&metrics.Config{FilterDefault: true}, sink); err != nil {
			t.Fatal(err)
		}
	}
	set(&slowLeader{})
	t.Cleanup(func() { set(&metrics.BlackholeSink{}) })
}

// A server that is away stays a member until another one came for it, and goes
// then, one for one, also if that one answers sooner than the leader counts its vote.
func TestDeadServerIsReplaced(t *testing.T) {
	slowDown(t)
	told := make(chan string, 8) // of whoever leads
	c := newCluster(t, func(cfg *Config) {
		cfg.DeadAfter = time.Second
		cfg.Replacing = func(_ context.Context, id, by string) error {
			if told <- id + " " + by; len(told) == 1 {
				return flox.ErrBusy // puts it off
			}
			return nil
		}
	})
	dead := (c.leader() + 1) % 3
	if err := c.stop[dead](); err != nil {
		t.Fatal(err)
	}
	c.until("it is down", func(s []ServerStatus) bool { return !byID(s, c.cfg[dead].ID).DownSince.IsZero() })
	c.join("keep", false)
	c.until("it is kept", func(s []ServerStatus) bool {
		return len(s) == 4 && byID(s, "keep").Healthy && time.Since(byID(s, "keep").HealthySince) > 5*c.cfg[0].PromoteAfter
	})
	c.join("new", true)
	c.until("it is replaced", func(s []ServerStatus) bool {
		return byID(s, "new").Voter && byID(s, c.cfg[dead].ID).ID == "" && len(s) == 4
	})
	for range 2 {
		select {
		case got := <-told:
			if want := c.cfg[dead].ID + " new"; got != want {
				t.Errorf("told that %q, want %q", got, want)
			}
		default:
			t.Error("it was removed and nobody was told before, or an error did not put it off")
		}
	}
}

// Commands of a level are refused until every server knows it, by name of who
// does not; the level lasts, and a program that is too old is told so.
func TestLevels(t *testing.T) {
	t.Parallel()
	c := newCluster(t, func(cfg *Config) { cfg.Version = "1.0" })
	restart := func(i int) {
		if err := c.stop[i](); err != nil {
			t.Fatal(err)
		}
		c.cfg[i].Level, c.cfg[i].Version = 2, "2.0"
		c.start(i)
	}
	newer := ProposeOptions{Level: 2}
	restart(0)
	restart(1)
	c.until("two are upgraded", func(s []ServerStatus) bool { return byID(s, "n0").Level == 2 && byID(s, "n1").Level == 2 })
	if err := c.nodes[0].Transfer(within(t), "n0"); err != nil {
		t.Fatal(err)
	}
	c.until("the old one is heard", func(s []ServerStatus) bool { return byID(s, "n2").Level == 1 })
	_, _, err := c.nodes[1].Propose(within(t), testKind, []byte("add x"), newer)
	if !errors.Is(err, ErrLevel) || !strings.Contains(err.Error(), `server n2 knows level 1 (version "1.0")`) {
		t.Fatalf("before all are upgraded: %v, want ErrLevel naming n2", err)
	}
	restart(2)
	c.until("all are upgraded", func(s []ServerStatus) bool {
		return byID(s, "n2").Level == 2 && c.nodes[c.leader()].ClusterLevel() == 2
	})
	if _, _, err := c.nodes[1].NewSession().ProposeWith(within(t), testKind, []byte("add x"), ProposeOptions{Level: 2}); err != nil {
		t.Fatal(err)
	}
	c.same("x", 1)

	old := c.spare(Config{Dir: t.TempDir(), ID: "old", ReserveBytes: 1, Version: "1.0"})
	c.start(old)
	if err := c.nodes[0].AddServer(within(t), "old", c.cfg[old].Address, true); !errors.Is(err, ErrLevel) {
		t.Errorf("too old a server joins: %v, want ErrLevel", err)
	}
	if err := c.stop[2](); err != nil {
		t.Fatal(err)
	}
	cfg := c.cfg[2]
	cfg.Level, cfg.Layer = 1, nil
	if n, err := Open(cfg); !errors.Is(err, ErrUnknownCommand) || !strings.Contains(err.Error(), "level 2") {
		if n != nil {
			n.Close()
		}
		t.Errorf("too old a program on the directory: %v", err)
	}
}

// Nothing about the members that this program does not know is skipped.
func TestMembersRefuse(t *testing.T) {
	t.Parallel()
	for name, c := range map[string][]byte{
		"noise":         {0xff},
		"empty":         nil,
		"unknown field": {0xf8, 0x07, 1},
	} {
		if _, err := (members{1}).Apply(nil, c, time.Time{}, 1); !errors.Is(err, ErrUnknownCommand) {
			t.Errorf("%s: %v, want ErrUnknownCommand", name, err)
		}
	}
	n, _ := single(t, t.TempDir())
	long := &floxv1.ServersCommand{Command: &floxv1.ServersCommand_Drain{Drain: &floxv1.ServerDrain{Id: strings.Repeat("x", maxServerID+1)}}}
	if _, err := n.proposeHere(within(t), n.decide(long)); !errors.Is(err, ErrRefused) || !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("long ID: %v", err)
	}
	m, err := Open(Config{Dir: filepath.Join(t.TempDir(), "m"), ID: "m"})
	if err != nil {
		t.Fatal(err)
	}
	m.Register(memberKind, counter{})
	if err := m.Run(context.Background()); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("kind 0 registered: %v", err)
	}
}

// A census decides by majorities of those who would vote.
func TestCensusSafe(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		healthy, without, with string
		want                   bool
	}{
		{"abc", "", "", true},
		{"ab", "c", "", true},
		{"ab", "b", "", false},
		{"a", "c", "", false},
		{"abd", "", "d", true},
		{"ad", "", "d", false},
		{"abc", "", "d", true},
	} {
		if got := testCensus(c.healthy).safe(c.without, c.with); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// testCensus is the voters a, b, c and the non-voter d, seen by a.
func testCensus(healthy string) *census {
	c := &census{self: "a", probes: map[string]probe{}, state: map[string]*floxv1.ServerFacts{}}
	for _, id := range []string{"a", "b", "c", "d"} {
		s := raft.Server{ID: raft.ServerID(id)}
		if id == "d" {
			s.Suffrage = raft.Nonvoter
		}
		c.servers = append(c.servers, s)
		if strings.Contains(healthy, id) {
			c.probes[id] = probe{healthy: time.Now()}
		}
	}
	return c
}

// A slow network makes servers more patient, within bounds, and a fast one
// brings them back to what is configured.
func TestPatience(t *testing.T) {
	t.Parallel()
	ms := time.Millisecond
	for _, c := range []struct{ configured, rtt, wait, lease time.Duration }{
		{200 * ms, 0, 200 * ms, 200 * ms},
		{200 * ms, 15 * ms, 200 * ms, 200 * ms},
		{200 * ms, 60 * ms, 600 * ms, 200 * ms},
		{200 * ms, 300 * ms, 3 * time.Second, 900 * ms},
		{200 * ms, 2 * time.Second, heartbeatMost, leaseMost},
		{8 * time.Second, 2 * time.Second, 8 * time.Second, 8 * time.Second},
	} {
		if wait, lease := Patience(c.configured, c.rtt); wait != c.wait || lease != c.lease {
			t.Errorf("%v with round trips of %v: %v and %v, want %v and %v", c.configured, c.rtt, wait, lease, c.wait, c.lease)
		}
	}
	c := newCluster(t, nil)
	n := c.nodes[(c.leader()+1)%3]
	r := n.raft.Load()
	tuned := func(rtt time.Duration) (wait, lease time.Duration) {
		n.tune(r, rtt)
		return r.ReloadableConfig().HeartbeatTimeout, leaseOf(r)
	}
	// On a busy machine it was nearly there before, and small changes are let be.
	if wait, lease := tuned(400 * ms); wait < 3200*ms || lease < 960*ms || lease > wait {
		t.Errorf("heartbeat %v and lease %v with round trips of 400 ms, want about 4 s and 1.2 s", wait, lease)
	}
	want := c.cfg[0].Heartbeat
	if wait, lease := tuned(ms); wait != want || lease != want {
		t.Errorf("heartbeat %v and lease %v with short round trips, want %v", wait, lease, want)
	}

	all := testCensus("abd") // d does not vote
	for id, rtt := range map[string]time.Duration{"b": 2 * ms, "c": 300 * ms, "d": 400 * ms} {
		p := all.probes[id]
		p.rtt = rtt
		all.probes[id] = p
	}
	if got := all.slowest(); got != 2*ms {
		t.Errorf("the slowest healthy voter is %v away, want 2 ms", got)
	}
	all.state["d"] = &floxv1.ServerFacts{Id: "d", WantsVote: true}
	if got := all.slowest(); got != 400*ms {
		t.Errorf("the slowest that is to vote is %v away, want 400 ms", got)
	}
}

// A command of a level that nothing keeps the cluster from is taken right after the
// start, when the level was not raised yet.
func TestLevelIsReachedAfterTheStart(t *testing.T) {
	t.Parallel()
	n, _ := start(t, Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1, Level: 3})
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{Level: 3}); err != nil {
		t.Error(err)
	}
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{Level: 4}); !errors.Is(err, ErrLevel) {
		t.Errorf("a level that this program does not know: %v", err)
	}
}

// Who reads while a server ends is told, and nobody waits on raft for ever (TestMain
// looks for goroutines).
func TestReadsMeetTheEnd(t *testing.T) {
	t.Parallel()
	n, stop := single(t, t.TempDir())
	r := n.raft.Load()
	if err := n.verify(within(t), r); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for range 32 { // raft takes half of them
		if err := n.verify(within(t), r); !errors.Is(err, ErrNotLeader) {
			t.Fatalf("verified behind the end: %v", err)
		}
	}
}
