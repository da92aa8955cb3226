package storehouse

import (
	"errors"
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
	cluster "github.com/floxctl/flox/raft"
)

// operatedHouse is a house whose servers can be asked over their sockets.
func operatedHouse(t *testing.T, n int, change ...func(*Config)) (*house, []floxv1connect.AdminClient) {
	t.Helper()
	h := newHouse(t, n, append(change, func(c *Config) {
		dir, err := os.MkdirTemp("", "house") // a socket's name must be short
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		c.Socket = filepath.Join(dir, "s")
	})...)
	var operators []floxv1connect.AdminClient
	for _, s := range h.servers {
		operators = append(operators, operatorOf(t, s))
	}
	return h, operators
}

func serversOver(t *testing.T, a floxv1connect.AdminClient) map[string]*floxv1.ServerState {
	t.Helper()
	resp, err := a.Servers(within(t), connect.NewRequest(&floxv1.ServersRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*floxv1.ServerState{}
	for _, s := range resp.Msg.GetServers() {
		all[s.GetName()] = s
	}
	return all
}

// leaderName is who leads, as a server knows.
func leaderName(t *testing.T, a floxv1connect.AdminClient) string {
	t.Helper()
	for name, s := range serversOver(t, a) {
		if s.GetLeader() {
			return name
		}
	}
	return ""
}

// Whichever server is asked, an operator sees all of them, moves leadership, and
// collects.
func TestAnyServerTakesAnOperatorsCommand(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3, func(c *Config) { c.CollectGrace, c.touchEvery = 20*time.Millisecond, time.Millisecond })
	dead := makePath(t, "dead", 100_000)
	publish(t, h.servers[0], dead)
	for i, a := range ask {
		eventually(t, "all are well and have everything", func() bool {
			all := serversOver(t, a)
			for _, s := range all {
				if !s.GetHealthy() || !s.GetVoter() || s.GetProblem() != "" || s.GetLackingBlocks() != 0 || s.GetLastContactMs() < 0 ||
					s.GetDiskUsed() <= 0 || s.GetVersion() != "dev" || s.GetLevel() == 0 ||
					s.GetBuilds().GetOn() || !strings.Contains(s.GetBuilds().GetWhy(), "builds = true") || !strings.HasPrefix(s.GetAddress(), "127.0.0.1:") {
					return false
				}
			}
			return len(all) == 3
		})
		if u := usageOver(t, a); u.GetUnderPlaced() != 0 {
			t.Errorf("server %d: %d blocks under-placed", i, u.GetUnderPlaced())
		}
	}
	moved, err := ask[2].Transfer(within(t), connect.NewRequest(&floxv1.TransferRequest{Server: "s2"}))
	if err != nil || moved.Msg.GetLeader() != string(h.servers[1].id.peer) {
		t.Fatalf("transfer: %v, %v", moved, err)
	}
	eventually(t, "s2 leads", func() bool { return leaderName(t, ask[0]) == "s2" })
	if _, err := ask[0].Transfer(within(t), connect.NewRequest(&floxv1.TransferRequest{Server: "s9"})); !errors.Is(api.FromConnect(err), flox.ErrNotFound) {
		t.Errorf("to nobody: %v", err)
	}
	if _, err := ask[0].Drain(within(t), connect.NewRequest(&floxv1.DrainRequest{Server: "s2"})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "s2 leads no more", func() bool { name := leaderName(t, ask[1]); return name != "" && name != "s2" })
	if s := serversOver(t, ask[2])["s2"]; !s.GetDrained() {
		t.Errorf("s2 is not shown as drained: %v", s)
	}
	if _, err := ask[1].Transfer(within(t), connect.NewRequest(&floxv1.TransferRequest{Server: "s2"})); !errors.Is(api.FromConnect(err), flox.ErrBusy) {
		t.Errorf("to one that is drained: %v", err)
	}
	if _, err := ask[1].Drain(within(t), connect.NewRequest(&floxv1.DrainRequest{Server: "s2", Undo: true})); err != nil {
		t.Fatal(err)
	}

	agedMore()
	got, _, err := collectOver(t, ask[1], &floxv1.CollectRequest{KeepRecentSeconds: 1}) // it follows
	if err != nil || !got.GetFinished() || got.GetDeadPaths() != 1 {
		t.Fatalf("a collection asked for at a follower: %v, %v", got, err)
	}
	for i, a := range ask {
		eventually(t, "all know of it", func() bool { u := usageOver(t, a); return u.GetCollectedUnix() > 0 && u.GetPaths() == 0 })
		if i == 2 {
			want := "server.transfer server.drain server.undrain content.collect content.collected"
			got := strings.Join(append(auditOf(t, a, &floxv1.AuditRequest{Action: "server."}), auditOf(t, a, &floxv1.AuditRequest{Action: "content."})...), " ")
			if got != want {
				t.Errorf("the audit log has %q, want %q", got, want)
			}
		}
	}
}

// A server that is away is shown so at once, and goes only by force; one that is
// well goes as it is, and is cut off. Nothing takes the majority away.
func TestServersGoOnlyWhileAMajorityStays(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3)
	remove := func(at int, name string, force bool) error {
		_, err := ask[at].RemoveServer(within(t), connect.NewRequest(&floxv1.RemoveServerRequest{Server: name, Force: force}))
		return api.FromConnect(err)
	}
	h.stops[2]()
	away := serversOver(t, ask[1])["s3"]
	if away.GetHealthy() && away.GetProblem() == "" || away == nil {
		t.Errorf("a server that is away is shown as %v", away)
	}
	eventually(t, "the leader misses it", func() bool { s := serversOver(t, ask[1])["s3"]; return !s.GetHealthy() && s.GetProblem() != "" })
	if err := remove(0, "s2", true); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "no majority") {
		t.Errorf("the second of two that are well, by force: %v, want ErrBusy", err)
	}
	if err := remove(1, "s3", false); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "by force") {
		t.Errorf("one that is away, without force: %v, want ErrBusy", err)
	}
	if err := remove(1, "s3", true); err != nil {
		t.Fatal(err)
	}
	if got := auditOf(t, ask[1], &floxv1.AuditRequest{Action: "key.known", Machine: "s3"}); len(got) != 1 {
		t.Errorf("the audit log says %d times that s3 knew the keys", len(got))
	}
	// The server that was asked knows at once, the others a moment later.
	if all := serversOver(t, ask[1]); len(all) != 2 || all["s3"] != nil {
		t.Errorf("after that: %v", all)
	}
	eventually(t, "the removed server is let in nowhere", func() bool {
		return !h.servers[0].servers.allowed(h.servers[2].id.peer) && !h.servers[1].servers.allowed(h.servers[2].id.peer)
	})
	publish(t, h.servers[1], makePath(t, "after", 1000))
	eventually(t, "both are well and have everything", func() bool {
		for _, s := range serversOver(t, ask[0]) {
			if !s.GetHealthy() || s.GetLackingBlocks() != 0 {
				return false
			}
		}
		return true
	})
	// The leader itself, asked at the leader.
	at := map[string]int{"test": 0, "s2": 1}[leaderName(t, ask[0])]
	name := []string{"test", "s2"}[at]
	if err := remove(at, name, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one server is left", func() bool {
		other := ask[1-at]
		all := serversOver(t, other)
		return len(all) == 1 && all[[]string{"test", "s2"}[1-at]].GetLeader()
	})
	if err := remove(1-at, []string{"test", "s2"}[1-at], true); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("the last one: %v, want ErrBusy", err)
	}
}

// While another server has yet to fetch some content, a server that is to go waits for
// it, and goes then without force.
func TestServerGoesOnceTheOthersHaveCaughtUp(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3)
	eventually(t, "nobody lacks anything", func() bool {
		for _, s := range serversOver(t, ask[0]) {
			if !s.GetHealthy() || !s.GetVoter() || s.GetLackingBlocks() != 0 {
				return false
			}
		}
		return true
	})
	const lacking = 1 << 20
	backlog := &h.servers[2].catchUp.backlog
	backlog.expect(lacking)
	if s := serversOver(t, ask[0])["s3"]; s.GetLackingBlocks() == 0 {
		t.Fatalf("s3 does not lack anything: %v", s)
	}
	result := make(chan error, 1)
	go func() {
		_, err := ask[0].RemoveServer(within(t), connect.NewRequest(&floxv1.RemoveServerRequest{Server: "s2"}))
		result <- api.FromConnect(err)
	}()
	time.Sleep(3 * removalEvery) // so that the call meets it, on most machines
	backlog.pass(lacking)
	if err := <-result; err != nil {
		t.Errorf("a server that goes while another one catches up: %v", err)
	}
	if all := serversOver(t, ask[0]); len(all) != 2 || all["s2"] != nil {
		t.Errorf("after that the servers are %v", all)
	}
}

// A server's key is revoked like that of any machine: the one that leads hands over
// and is out when the call ends. Where no majority would be left nothing is done, and
// that is said.
func TestServersAreRevokedLikeAnyMachine(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 4)
	revoke := func(at int, name string) error {
		_, err := ask[at].RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: name, Reason: "stolen"}))
		return api.FromConnect(err)
	}
	if _, err := ask[1].Transfer(within(t), connect.NewRequest(&floxv1.TransferRequest{Server: "s4"})); err != nil {
		t.Fatal(err)
	}
	gone := h.servers[3].id.peer
	if err := revoke(1, "s4"); err != nil {
		t.Fatal(err)
	}
	if h.servers[1].servers.allowed(gone) {
		t.Error("the server that led is revoked and let in")
	}
	if all := serversOver(t, ask[1]); len(all) != 3 || all["s4"] != nil {
		t.Errorf("after that the servers are %v", all)
	}
	if got := auditOf(t, ask[1], &floxv1.AuditRequest{Action: "key.known", Machine: "s4"}); len(got) != 1 {
		t.Errorf("the audit log says %d times that s4 knew the keys", len(got))
	}
	eventually(t, "the keys are sealed to the others alone", func() bool {
		sealed := h.servers[0].roster.now.Load().secrets.GetSeals()
		return len(sealed) == 3 && !h.servers[0].keysKnownTo(string(gone))
	})

	h.stops[2]()
	eventually(t, "the leader misses the third", func() bool { return !serversOver(t, ask[0])["s3"].GetHealthy() })
	if err := revoke(0, "s2"); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "s2 is not revoked") || !strings.Contains(err.Error(), "start or add") {
		t.Errorf("the second of two that are well: %v, want ErrBusy that says what to do", err)
	}
	if s := serversOver(t, ask[0])["s2"]; !s.GetVoter() || !s.GetHealthy() {
		t.Errorf("and then it is %v", s)
	}
	if err := revoke(0, "s3"); err != nil {
		t.Errorf("the one that is away: %v", err)
	}
	publish(t, h.servers[1], makePath(t, "after", 1000))
}

// The label voter takes a server's vote away and gives it back while it runs; one that
// leads hands over first. The others keep their majority.
func TestVoterLabelTakesEffect(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3)
	label := func(at int, name, value string) error {
		_, err := ask[at].ChangeMachine(within(t), connect.NewRequest(&floxv1.ChangeMachineRequest{
			Machine: name, Change: &floxv1.ChangeMachine{SetLabels: []*floxv1.Label{{Key: "voter", Value: value}}},
		}))
		return api.FromConnect(err)
	}
	votes := func(at int, name string) func() bool {
		return func() bool { s := serversOver(t, ask[at])[name]; return s.GetVoter() && s.GetHealthy() }
	}
	if err := label(0, "s3", "no"); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "true, or false") {
		t.Errorf("voter=no: %v, want ErrBadInput", err)
	}
	if err := label(0, "s3", "false"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has no vote, and is well", func() bool {
		s := serversOver(t, ask[0])["s3"]
		return s.GetHealthy() && !s.GetVoter() && !s.GetWantsVote()
	})
	if err := label(1, "s3", "true"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it votes again", votes(0, "s3"))

	leader := leaderName(t, ask[0])
	if err := label(1, leader, "false"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server that led follows", func() bool {
		s := serversOver(t, ask[1])[leader]
		return s != nil && !s.GetLeader() && !s.GetVoter() && leaderName(t, ask[1]) != ""
	})
	if err := label(1, leader, "true"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it votes again", votes(1, leader))

	h.stops[2]()
	eventually(t, "the leader misses the third", func() bool { return !votes(0, "s3")() })
	if err := label(0, "s2", "false"); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "s2 keeps its vote") {
		t.Errorf("the vote of the second of two that are well: %v, want ErrBusy", err)
	}
}

// A collection ends when leadership moves, and says where to go on.
func TestCollectionEndsWhenLeadershipMoves(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3, func(c *Config) { c.CollectGrace, c.touchEvery = time.Hour, time.Millisecond })
	dead := makePath(t, "dead", 1000)
	publish(t, h.servers[0], dead)
	agedMore()
	stream, err := ask[1].Collect(within(t), connect.NewRequest(&floxv1.CollectRequest{KeepRecentSeconds: 1}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() && stream.Msg().GetPhase() != phaseWait { //nolint:revive // until it waits
	}
	if _, err := ask[2].Transfer(within(t), connect.NewRequest(&floxv1.TransferRequest{Server: "s3"})); err != nil {
		t.Fatal(err)
	}
	for stream.Receive() { //nolint:revive // to its end
	}
	if err := api.FromConnect(stream.Err()); !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "leads no more") {
		t.Errorf("it ended with %v", err)
	}
	for _, s := range h.servers {
		s.cfg.CollectGrace = time.Millisecond
	}
	if got, _, err := collectOver(t, ask[0], &floxv1.CollectRequest{Resume: true}); err != nil || got.GetDeadPaths() != 1 {
		t.Errorf("resumed at the server that leads now: %v, %v", got, err)
	}
}

// Without a majority the servers are shown all the same, and what needs one says so.
func TestServersAreShownWithoutALeader(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 2)
	h.stops[1]()
	eventually(t, "nobody leads", func() bool {
		all := serversOver(t, ask[0])
		for _, s := range all {
			if s.GetLeader() || s.GetHealthy() || s.GetProblem() == "" || !s.GetVoter() {
				return false
			}
		}
		return len(all) == 2
	})
	if u := usageOver(t, ask[0]); u.GetDiskTotal() == 0 {
		t.Errorf("no usage: %v", u)
	}
	if _, _, err := collectOver(t, ask[0], &floxv1.CollectRequest{}); !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "no majority") {
		t.Errorf("a collection without a leader: %v", err)
	}
	h.start(1)
	eventually(t, "all are well again", func() bool {
		for _, s := range serversOver(t, ask[0]) {
			if !s.GetHealthy() || s.GetProblem() != "" {
				return false
			}
		}
		return true
	})
}

// What a server lacks that nobody has is counted, and under-placed.
func TestLackingContentIsCounted(t *testing.T) {
	t.Parallel()
	cfg := clusterConfig(t.TempDir())
	dir, err := os.MkdirTemp("", "house")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cfg.Socket = filepath.Join(dir, "s")
	s, stop := start(t, cfg)
	p := makePath(t, "p", 1_000_000)
	publish(t, s, p)
	eventually(t, "nothing is lacking", func() bool { return serversOver(t, operatorOf(t, s))["test"].GetLackingBlocks() == 0 })
	stop()
	if err := os.RemoveAll(stateFile(s, "packs")); err != nil {
		t.Fatal(err)
	}
	s, _ = start(t, cfg)
	a := operatorOf(t, s)
	eventually(t, "all of it is lacking", func() bool {
		st := serversOver(t, a)["test"]
		return st.GetLackingBytes() == p.info.NarSize && st.GetLackingBlocks() == 1+p.info.NarSize/meanBlock
	})
	if u := usageOver(t, a); u.GetUnderPlaced() == 0 {
		t.Errorf("nothing is under-placed: %v", u)
	}
}

// It is told how long servers wait for a voter that is far away, and what to do where it
// is too far for that.
func TestFarVotersAreToldOf(t *testing.T) {
	t.Parallel()
	if got := farAdvice("s2", 100*time.Millisecond, 200*time.Millisecond); got != "" {
		t.Errorf("half of the heartbeat: %q", got)
	}
	for rtt, words := range map[time.Duration][]string{
		150 * time.Millisecond: {"takes 150ms", "wait 1.5s for their leader", "450ms for a majority", "of 200ms", "label s2 voter=false"},
		900 * time.Millisecond: {"takes 900ms", `set heartbeat = "3.6s"`, "label s2 voter=false"},
	} {
		for _, want := range words {
			if got := farAdvice("s2", rtt, 200*time.Millisecond); !strings.Contains(got, want) {
				t.Errorf("%v: %q, want %q in it", rtt, got, want)
			}
		}
	}
	s, _ := start(t, testConfig(t.TempDir()))
	for rtt, far := range map[time.Duration]bool{time.Millisecond: false, time.Second: true} {
		st := &floxv1.ServerState{Peer: "a", Name: "s2"}
		s.judge(st, []cluster.ServerStatus{{ID: "a", Voter: true, Healthy: true, RTT: rtt}}, nil, true)
		if (st.GetAdvice() != "") != far || st.GetRttUs() != uint32(rtt.Microseconds()) || !st.GetHealthy() {
			t.Errorf("a voter %v away: %v", rtt, st)
		}
	}
}

func TestUnderPlaced(t *testing.T) {
	t.Parallel()
	const away = ^uint64(0)
	for name, c := range map[string]struct {
		lacking []uint64
		want    uint64
	}{
		"a single server":        {[]uint64{0}, 0},
		"a single one that lost": {[]uint64{7}, 7},
		"one of three lost":      {[]uint64{9, 0, 0}, 0},
		"two of three lost":      {[]uint64{9, 4, 0}, 4},
		"one away":               {[]uint64{away, 4, 0}, 4},
		"two away":               {[]uint64{away, away, 0}, 0},
		"two of five":            {[]uint64{5, 6, 0, 0, 0}, 0},
		"three of five":          {[]uint64{5, 6, 3, 0, 0}, 3},
		"two of two":             {[]uint64{5, 6}, 6},
		"nobody votes":           {nil, 0},
	} {
		h := &houseState{answered: map[string]bool{}}
		for i, n := range c.lacking {
			st := &floxv1.ServerState{Peer: string(rune('a' + i)), Voter: true}
			if n != away {
				st.LackingBlocks, h.answered[st.GetPeer()] = n, true
			}
			h.servers = append(h.servers, st)
		}
		h.servers = append(h.servers, &floxv1.ServerState{Peer: "follower", LackingBlocks: 1000})
		if got := h.underPlaced(); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}
