package entry

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/storehouse"
)

// house is a storehouse that lets in whom an invite lets in.
type house struct {
	t     *testing.T
	admin floxv1connect.AdminClient
	stop  func()
}

func newHouse(t *testing.T) *house {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s.sock")
	s, err := storehouse.New(storehouse.Config{
		StateDir: t.TempDir(), Name: "acme", ServerName: "s1", HTTPListen: "none", Listen: []string{"127.0.0.1:0"}, Consensus: "127.0.0.1:0",
		NoMDNS: true, Socket: socket, ReserveBytes: 1 << 20, Watermarks: storehouse.Watermarks{Slow: 100, Essential: 100, ReadOnly: 100},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Run(ctx) }()
	h := &house{t: t, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-result; err != nil {
			t.Errorf("storehouse: %v", err)
		}
	})}
	t.Cleanup(h.stop)
	if err := s.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	var done func()
	h.admin, done = cli.Admin(socket)
	t.Cleanup(done)
	return h
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (h *house) invite(m *floxv1.MakeInviteRequest) *api.JoinInvite {
	h.t.Helper()
	resp, err := h.admin.MakeInvite(within(h.t), connect.NewRequest(m))
	if err != nil {
		h.t.Fatal(err)
	}
	inv, err := api.ParseJoinInvite(resp.Msg.GetInvite())
	if err != nil {
		h.t.Fatal(err)
	}
	return inv
}

// machine gives what the storehouse has in its list, nil = it is no member.
func (h *house) machine(name string) *floxv1.Machine {
	h.t.Helper()
	resp, err := h.admin.ListMachines(within(h.t), connect.NewRequest(&floxv1.ListMachinesRequest{}))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, m := range resp.Msg.GetMachines() {
		if m.GetMachine().GetName() == name {
			return m.GetMachine()
		}
	}
	return nil
}

// step is a machine of its own that joins.
func step(t *testing.T, name string, inv *api.JoinInvite) *Step {
	t.Helper()
	dir := t.TempDir()
	for _, part := range []string{AgentDir, StorehouseDir} {
		if err := os.Mkdir(filepath.Join(dir, part), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return &Step{Do: Join, StateDir: dir, Invite: inv, Name: name, User: "alice", Consensus: "10.0.0.9:7783"}
}

func TestAgentJoinsOnce(t *testing.T) {
	h := newHouse(t)
	s := step(t, "laptop", h.invite(&floxv1.MakeInviteRequest{Role: RoleAgent, Labels: []*floxv1.Label{{Key: "site", Value: "berlin"}}}))
	first, err := s.Join(within(t))
	if err != nil || first.Already || first.Name != "laptop" || first.Role != RoleAgent || first.Storehouse != "acme" || first.Fingerprint != s.Invite.TrustList {
		t.Fatalf("it became %+v, %v", first, err)
	}
	m := h.machine("laptop")
	if m.GetPeer() != first.Peer || len(m.GetUsers()) != 1 || m.GetUsers()[0].GetName() != "alice" || len(m.GetLabels()) != 1 {
		t.Errorf("the storehouse has %v", m)
	}
	kept := filepath.Join(s.StateDir, AgentDir, InviteName)
	if info, err := os.Stat(kept); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("what is kept: %v, %v", info, err)
	}

	// The invite is used up, by this machine: it is a member all the same, also if
	// the answer was lost before anything was kept.
	for _, lost := range []bool{false, true} {
		if lost {
			if err := os.Remove(kept); err != nil {
				t.Fatal(err)
			}
		}
		again, err := s.Join(within(t))
		if err != nil || !again.Already && !lost || again.Peer != first.Peer || again.Unconfirmed {
			t.Errorf("again (answer lost: %v): %+v, %v", lost, again, err)
		}
		if _, err := api.LoadInvite(kept); err != nil {
			t.Error(err)
		}
	}

	h.stop()
	if again, err := s.Join(within(t)); err != nil || !again.Already || !again.Unconfirmed {
		t.Errorf("while nobody answers: %+v, %v", again, err)
	}
}

func TestServerJoins(t *testing.T) {
	h := newHouse(t)
	s := step(t, "s2", h.invite(&floxv1.MakeInviteRequest{Role: RoleServer}))
	first, err := s.Join(within(t))
	if err != nil || first.Role != RoleServer {
		t.Fatalf("it became %+v, %v", first, err)
	}
	if m := h.machine("s2"); m.GetRaftAddress() != first.Peer+"@10.0.0.9:7783" || len(m.GetSealKey()) != 32 {
		t.Errorf("the storehouse has %v", m)
	}
	if _, err := api.LoadInvite(filepath.Join(s.StateDir, StorehouseDir, "joined.json")); err != nil {
		t.Error(err)
	}
	// Before its first start nobody but a second join can say that it will be elsewhere.
	s.Consensus = "10.0.0.10:7783"
	if again, err := s.Join(within(t)); err != nil || !again.Already {
		t.Errorf("again: %+v, %v", again, err)
	}
	if m := h.machine("s2"); m.GetRaftAddress() != first.Peer+"@10.0.0.10:7783" {
		t.Errorf("the storehouse has %v", m)
	}
}

func TestJoinIsRefusedInWords(t *testing.T) {
	h, other := newHouse(t), newHouse(t)
	agent := func() *api.JoinInvite { return h.invite(&floxv1.MakeInviteRequest{Role: RoleAgent}) }
	join := func(s *Step) *Step {
		if _, err := s.Join(within(t)); err != nil {
			t.Fatal(err)
		}
		return s
	}
	short := h.invite(&floxv1.MakeInviteRequest{Role: RoleAgent, TtlSeconds: 1})
	used := join(step(t, "first", agent())).Invite
	cancelled := agent()
	if _, err := h.admin.CancelInvite(within(t), connect.NewRequest(&floxv1.CancelInviteRequest{Id: cancelled.ID})); err != nil {
		t.Fatal(err)
	}
	forged := agent()
	forged.Secret = make([]byte, len(forged.Secret))
	elsewhere := join(step(t, "b", other.invite(&floxv1.MakeInviteRequest{Role: RoleAgent})))
	elsewhere.Invite = agent()
	own := step(t, "s9", h.invite(&floxv1.MakeInviteRequest{Role: RoleServer}))
	if err := os.WriteFile(filepath.Join(own.StateDir, StorehouseDir, "storehouse.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	revoked := join(step(t, "thief", agent()))
	if _, err := h.admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "thief"})); err != nil {
		t.Fatal(err)
	}
	revoked.Invite = agent()
	time.Sleep(time.Until(short.Expires) + time.Millisecond)
	for name, c := range map[string]struct {
		step  *Step
		kind  error
		words string
	}{
		"used":               {step(t, "c", used), flox.ErrDenied, "used up"},
		"cancelled":          {step(t, "c", cancelled), flox.ErrDenied, "withdrawn"},
		"over":               {step(t, "c", short), flox.ErrDenied, "the invite ended at"},
		"forged":             {step(t, "c", forged), flox.ErrDenied, "secret"},
		"other storehouse":   {elsewhere, flox.ErrBusy, "leave"},
		"own storehouse":     {own, flox.ErrBusy, "storehouse of its own"},
		"name taken":         {step(t, "FIRST", agent()), flox.ErrBusy, "such as FIRST-2"},
		"name of no machine": {step(t, "a b", agent()), flox.ErrBadInput, "letters, digits"},
		"revoked":            {revoked, flox.ErrDenied, "revoked"},
	} {
		_, err := c.step.Join(within(t))
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %v saying %q", name, err, c.kind, c.words)
		}
	}
}

// However many come at once with an invite for one, one gets in.
func TestInviteForOneLetsOneIn(t *testing.T) {
	h := newHouse(t)
	inv := h.invite(&floxv1.MakeInviteRequest{Role: RoleAgent})
	const n = 4
	results := make(chan error, n)
	for i := range n {
		s := step(t, "m"+string(rune('0'+i)), inv)
		go func() {
			_, err := s.Join(within(t))
			results <- err
		}()
	}
	in := 0
	for range n {
		switch err := <-results; {
		case err == nil:
			in++
		case !errors.Is(err, flox.ErrDenied):
			t.Errorf("refused with %v", err)
		}
	}
	if in != 1 {
		t.Errorf("%d machines joined with an invite for one", in)
	}
}

// Addresses that nobody answers at cost a second each, and are said.
func TestDeadAddresses(t *testing.T) {
	h := newHouse(t)
	mute, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	inv := h.invite(&floxv1.MakeInviteRequest{Role: RoleAgent})
	at := inv.Storehouse[0]
	inv.Storehouse = append([]api.InvitePeer{{ID: at.ID, Addrs: []string{mute.Addr().String(), "127.0.0.1:1"}}}, inv.Storehouse...)
	if _, err := step(t, "a", inv).Join(within(t)); err != nil {
		t.Errorf("behind two dead addresses: %v", err)
	}
	inv = h.invite(&floxv1.MakeInviteRequest{Role: RoleAgent})
	inv.Storehouse = []api.InvitePeer{{ID: at.ID, Addrs: []string{"127.0.0.1:1", "127.0.0.1:2"}}}
	_, err = step(t, "b", inv).Join(within(t))
	if !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "no server of the storehouse acme answers") || !strings.Contains(err.Error(), "127.0.0.1:2") {
		t.Errorf("nobody there: %v", err)
	}
}
