// Package fleet runs real agents and real servers of a storehouse in one process,
// where what matters is who is let in, cut off and asked: no mounts, no hosts.
package fleet

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
	"github.com/floxctl/flox/storehouse"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("github.com/ipfs/go-log/v2/writer.(*MirrorWriter).logRoutine"),
		goleak.IgnoreTopFunction("github.com/ipfs/go-log/writer.(*MirrorWriter).logRoutine"),
		goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"),
		goleak.IgnoreTopFunction("github.com/libp2p/go-netroute.init.0"))
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	soon(t, 90*time.Second, what, ok)
}

// revocation is how long the news that a machine is revoked may take to everybody:
// seconds, of which a busy machine needs more.
const revocation = 20 * time.Second

// soon waits for so long at most, and gives how long it took.
func soon(t *testing.T, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	begun := time.Now()
	for !ok() {
		if time.Since(begun) > limit {
			t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(begun)
}

// server is one server of the storehouse.
type server struct {
	*storehouse.Server
	admin floxv1connect.AdminClient
	stop  func()
}

// startServer runs a server; state directory and addresses are cfg's.
func startServer(t *testing.T, cfg storehouse.Config) *server {
	t.Helper()
	cfg.Name, cfg.HTTPListen, cfg.NoMDNS, cfg.ReserveBytes = "acme", "none", true, 1<<20
	cfg.Listen, cfg.Socket = []string{"127.0.0.1:0"}, filepath.Join(t.TempDir(), "s.sock")
	cfg.Watermarks = storehouse.Watermarks{Slow: 100, Essential: 100, ReadOnly: 100}
	s, err := storehouse.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Run(ctx) }()
	out := &server{Server: s, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-result; err != nil {
			t.Errorf("storehouse: %v", err)
		}
	})}
	t.Cleanup(out.stop)
	if err := s.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	var done func()
	out.admin, done = cli.Admin(cfg.Socket)
	t.Cleanup(done)
	return out
}

func (s *server) invite(t *testing.T, m *floxv1.MakeInviteRequest) *api.JoinInvite {
	t.Helper()
	resp, err := s.admin.MakeInvite(within(t), connect.NewRequest(m))
	if err != nil {
		t.Fatal(err)
	}
	inv, err := api.ParseJoinInvite(resp.Msg.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	return inv
}

// names are the machines the storehouse has in its list.
func (s *server) names(t *testing.T) (names []string) {
	t.Helper()
	resp, err := s.admin.ListMachines(within(t), connect.NewRequest(&floxv1.ListMachinesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range resp.Msg.GetMachines() {
		names = append(names, m.GetMachine().GetName())
	}
	return names
}

// join makes a machine a member that has nothing yet, and gives its state directory.
func join(t *testing.T, inv *api.JoinInvite, name, consensus string) string {
	t.Helper()
	dir := t.TempDir()
	for _, part := range []string{entry.AgentDir, entry.StorehouseDir} {
		if err := os.Mkdir(filepath.Join(dir, part), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	step := &entry.Step{Do: entry.Join, StateDir: dir, Invite: inv, Name: name, User: "alice", Consensus: consensus}
	if _, err := step.Join(within(t)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// machine is an agent and what it answers on its socket.
type machine struct {
	t       *testing.T
	agent   *agent.Agent
	control floxv1connect.AgentClient
	stop    func()
}

// startAgent runs the agent of a machine that joined.
func startAgent(t *testing.T, dir string) *machine {
	t.Helper()
	state := filepath.Join(dir, entry.AgentDir)
	inv, err := api.LoadInvite(filepath.Join(state, entry.InviteName))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "a.sock")
	a, err := agent.New(agent.Config{
		StateDir: state, Socket: socket, Invite: inv, Listen: []string{"127.0.0.1:0"}, NoMDNS: true, CacheReserve: 1, CacheBudget: 64 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- a.Run(ctx) }()
	m := &machine{t: t, agent: a, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-result; err != nil {
			t.Errorf("agent: %v", err)
		}
	})}
	t.Cleanup(m.stop)
	var done func()
	m.control, done = cli.Agent(socket)
	t.Cleanup(done)
	return m
}

func (m *machine) house() *floxv1.StorehouseLink {
	m.t.Helper()
	resp, err := m.control.Status(within(m.t), connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		return &floxv1.StorehouseLink{Error: err.Error()} // its socket is not open yet
	}
	return resp.Msg.GetStorehouse()
}

// peers are the names of the machines it is connected to.
func (m *machine) peers() (names []string) {
	resp, err := m.control.Peers(within(m.t), connect.NewRequest(&floxv1.PeersRequest{}))
	if err != nil {
		m.t.Fatal(err)
	}
	for _, p := range resp.Msg.GetPeers() {
		names = append(names, p.GetName())
	}
	return names
}

// A machine that is revoked loses its connections to all others, not just to the
// storehouse, and is told why nobody talks to it.
func TestRevokedMachineIsShutOutEverywhere(t *testing.T) {
	s := startServer(t, storehouse.Config{StateDir: t.TempDir(), ServerName: "s1"})
	inv := s.invite(t, &floxv1.MakeInviteRequest{Role: entry.RoleAgent, Uses: 3})
	machines := map[string]*machine{}
	dirs := map[string]string{}
	for _, name := range []string{"one", "two", "three"} {
		dirs[name] = join(t, inv, name, "")
		machines[name] = startAgent(t, dirs[name])
	}
	for name, m := range machines {
		eventually(t, name+" follows the storehouse and knows everybody", func() bool { l := m.house(); return l.GetConnected() && l.GetMembers() == 4 })
	}
	// They are of one site: each meets the others by its key.
	for name, m := range machines {
		eventually(t, name+" is connected to all", func() bool { return len(m.peers()) == 3 })
	}
	if _, err := s.admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "two", Reason: "stolen"})); err != nil {
		t.Fatal(err)
	}
	took := soon(t, revocation, "the others have cut it off, and it is told why", func() bool {
		for _, name := range []string{"one", "three"} {
			peers := machines[name].peers()
			if len(peers) != 2 || slices.Contains(peers, "two") || machines[name].house().GetMembers() != 3 {
				return false
			}
		}
		l := machines["two"].house()
		return !l.GetConnected() && strings.Contains(l.GetError(), "no longer) a member")
	})
	t.Logf("a revocation reached everybody after %s", took)
	if peers := machines["two"].peers(); len(peers) != 0 {
		t.Errorf("the revoked machine is still connected to %v", peers)
	}
	// One that starts with nobody to ask knows it, too.
	machines["one"].stop()
	machines["three"].stop()
	s.stop()
	again := startAgent(t, dirs["one"])
	eventually(t, "the agent answers", func() bool { return again.house().GetMembers() == 3 })
}

// What is here for a moment is forgotten when it is gone.
func TestEphemeralMachineIsForgotten(t *testing.T) {
	s := startServer(t, storehouse.Config{StateDir: t.TempDir(), ServerName: "s1", EphemeralTTL: 4 * time.Second})
	runner := startAgent(t, join(t, s.invite(t, &floxv1.MakeInviteRequest{Role: entry.RoleAgent, Ephemeral: true}), "runner", ""))
	eventually(t, "it follows the storehouse", func() bool { return runner.house().GetConnected() })
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if !slices.Contains(s.names(t), "runner") {
			t.Fatal("it is forgotten while it is there")
		}
	}
	runner.stop()
	eventually(t, "it is forgotten", func() bool { return !slices.Contains(s.names(t), "runner") })
}

// freePort is an address that nobody listens at.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // binds and returns
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Of three servers the one that leads and is followed ends: what becomes valid
// afterwards is known at once, and a revocation still reaches everybody.
func TestStorehouseGoesOnWithoutItsLeader(t *testing.T) {
	consensus := []string{freePort(t), freePort(t), freePort(t)}
	servers := []*server{startServer(t, storehouse.Config{StateDir: t.TempDir(), ServerName: "s1", Consensus: consensus[0]})}
	for i, name := range []string{"s2", "s3"} {
		dir := join(t, servers[0].invite(t, &floxv1.MakeInviteRequest{Role: entry.RoleServer}), name, consensus[i+1])
		servers = append(servers, startServer(t, storehouse.Config{StateDir: filepath.Join(dir, entry.StorehouseDir), ServerName: name, Consensus: consensus[i+1]}))
	}
	eventually(t, "all vote", func() bool {
		resp, err := servers[0].admin.Servers(within(t), connect.NewRequest(&floxv1.ServersRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		voters := 0
		for _, s := range resp.Msg.GetServers() {
			if s.GetVoter() {
				voters++
			}
		}
		return voters == 3
	})
	inv := servers[0].invite(t, &floxv1.MakeInviteRequest{Role: entry.RoleAgent, Uses: 2})
	laptop, thief := startAgent(t, join(t, inv, "laptop", "")), startAgent(t, join(t, inv, "thief", ""))
	for _, m := range []*machine{laptop, thief} {
		eventually(t, "it knows all servers", func() bool {
			l := m.house()
			up := 0
			for _, s := range l.GetServers() {
				if s.GetConnected() {
					up++
				}
			}
			return l.GetConnected() && up == 3
		})
	}
	index := laptop.house().GetIndex()
	servers[0].stop()
	eventually(t, "another server is followed", func() bool {
		l := laptop.house()
		for _, s := range l.GetServers() {
			if s.GetFollowed() && s.GetName() != "s1" {
				return l.GetConnected()
			}
		}
		return false
	})
	eventually(t, "the thief is revoked at another server", func() bool {
		_, err := servers[1].admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "thief"}))
		return err == nil
	})
	took := soon(t, revocation, "the others hear of it, and it is shut out", func() bool {
		l := laptop.house()
		return l.GetMembers() == 4 && l.GetIndex() > index && !thief.house().GetConnected()
	})
	t.Logf("a revocation reached everybody after %s", took)
}
