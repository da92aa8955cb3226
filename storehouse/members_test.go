package storehouse

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
)

// closedHouse is a storehouse that lets in whom an invite lets in.
func closedHouse(t *testing.T, change func(*Config)) (*Server, floxv1connect.AdminClient) {
	t.Helper()
	cfg := testConfig(t.TempDir())
	cfg.OpenMembership, cfg.Socket = false, filepath.Join(t.TempDir(), "s.sock")
	if change != nil {
		change(&cfg)
	}
	s, _ := start(t, cfg)
	return s, operatorOf(t, s)
}

// operatorOf calls through a server's control socket.
func operatorOf(t *testing.T, s *Server) floxv1connect.AdminClient {
	t.Helper()
	return floxv1connect.NewAdminClient(httpOver(t, func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.cfg.Socket)
	}), "http://storehouse")
}

func httpOver(t *testing.T, dial func(context.Context) (net.Conn, error)) *http.Client {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// computer is a machine of the tests.
type computer struct {
	t    *testing.T
	key  ed25519.PrivateKey
	host *p2p.Host
	// vouched is p2p.Config.Vouched.
	vouched func(p2p.PeerID) bool
}

func newComputer(t *testing.T) *computer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &computer{t: t, key: key}
}

// joinedLaptop is one that has joined as an agent, "laptop", and is connected.
func joinedLaptop(t *testing.T, s *Server, operator floxv1connect.AdminClient) *computer {
	t.Helper()
	c := newComputer(t)
	joined, err := c.join(s, makeInvite(t, operator, &floxv1.MakeInviteRequest{Role: members.Agent}), "laptop")
	if err != nil {
		t.Fatal(err)
	}
	keep, err := api.ParseInvite(joined.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	c.online(s, keep.Secret)
	return c
}

func (c *computer) id() p2p.PeerID {
	public, _ := c.key.Public().(ed25519.PublicKey)
	id, err := p2p.IDFromKey(public)
	if err != nil {
		c.t.Fatal(err)
	}
	return id
}

// door calls what guests may call, with an invite's text.
func (c *computer) door(s *Server, text string) floxv1connect.JoinClient {
	c.t.Helper()
	inv, err := api.ParseJoinInvite(text)
	if err != nil {
		c.t.Fatal(err)
	}
	g := p2p.Guest{}
	if !inv.LAN {
		g.InviteID = inv.ID
		if g.Secret, err = inv.Proof(); err != nil {
			c.t.Fatal(err)
		}
	}
	to := p2p.PeerAddr{ID: s.id.peer, Addrs: s.swarm.Addrs()}
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return p2p.DialGuest(ctx, c.key, to, g, JoinProtocol)
	}}}
	return floxv1connect.NewJoinClient(hc, "http://storehouse")
}

// join redeems an invite at a server.
func (c *computer) join(s *Server, text, name string) (*floxv1.JoinResponse, error) {
	c.t.Helper()
	out, err := c.door(s, text).Join(within(c.t), connect.NewRequest(&floxv1.JoinRequest{Machine: &floxv1.Machine{Name: name, Role: members.Server}, User: "alice"}))
	if errors.Is(err, flox.ErrDenied) || errors.Is(err, flox.ErrBusy) {
		return nil, err // in the handshake
	}
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return out.Msg, nil
}

// online connects a machine with a swarm secret.
func (c *computer) online(s *Server, secret []byte) *p2p.Host {
	c.t.Helper()
	h, err := p2p.New(p2p.Config{
		Key: c.key, Listen: []string{"127.0.0.1:0"}, Secret: secret, NoMDNS: true, Vouched: c.vouched,
		Bootstrap: []p2p.PeerAddr{{ID: s.id.peer, Addrs: s.swarm.Addrs()}},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	c.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			c.t.Errorf("host: %v", err)
		}
	})
	c.host = h
	return h
}

func (c *computer) web(s *Server) *http.Client {
	return httpOver(c.t, func(ctx context.Context) (net.Conn, error) { return c.host.Dial(ctx, s.id.peer, rpcProtocol) })
}

func makeInvite(t *testing.T, a floxv1connect.AdminClient, m *floxv1.MakeInviteRequest) string {
	t.Helper()
	out, err := a.MakeInvite(within(t), connect.NewRequest(m))
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Msg.GetRecord().GetVerifier()) > 0 {
		t.Error("the answer gives the verifier away")
	}
	return out.Msg.GetInvite()
}

// auditOf lists the audit log's actions, refused ones with "!".
func auditOf(t *testing.T, a floxv1connect.AdminClient, q *floxv1.AuditRequest) (list []string) {
	t.Helper()
	stream, err := a.Audit(within(t), connect.NewRequest(q))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		for _, r := range stream.Msg().GetRecords() {
			mark := ""
			if r.GetRefused() {
				mark = "!"
			}
			list = append(list, mark+r.GetAction())
		}
	}
	if stream.Err() != nil {
		t.Fatal(stream.Err())
	}
	return list
}

func TestMachineJoinsAndIsCutWhenRevoked(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	stranger := newComputer(t)
	if conn, err := stranger.online(s, s.id.ring.secrets()[0]).Dial(within(t), s.id.peer, rpcProtocol); !errors.Is(err, flox.ErrDenied) {
		t.Fatalf("a machine that is no member, but knows the secret: %v, %v, want ErrDenied", conn, err)
	}

	_, err := admin.MakeInvite(within(t), connect.NewRequest(&floxv1.MakeInviteRequest{Role: members.Agent, Labels: []*floxv1.Label{{Key: "site", Value: "here\nthere"}}}))
	if err := api.FromConnect(err); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), `site="here\nthere": want printable text`) {
		t.Errorf("an invite with a label of two lines: %v, want ErrBadInput", err)
	}
	text := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, Labels: []*floxv1.Label{{Key: "site", Value: "berlin"}}})
	laptop := newComputer(t)
	look, err := laptop.door(s, text).Look(within(t), connect.NewRequest(&floxv1.LookRequest{}))
	if err != nil || look.Msg.GetName() != "test" || look.Msg.GetRole() != members.Agent {
		t.Fatalf("look: %v, %v", look, err)
	}
	joined, err := laptop.join(s, text, "Laptop")
	if err != nil {
		t.Fatal(err)
	}
	if m := joined.GetMachine(); m.GetRole() != members.Agent || members.Label(m, "site") != "berlin" || members.UserRole(m, "alice") != members.Member || m.GetPeer() != string(laptop.id()) {
		t.Errorf("it became %v: role and labels are the invite's", m)
	}
	keep, err := api.ParseInvite(joined.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	laptop.online(s, keep.Secret)

	stream, err := floxv1connect.NewMembershipClient(laptop.web(s), "http://storehouse").WatchMembers(within(t), connect.NewRequest(&floxv1.WatchMembersRequest{}))
	if err != nil || !stream.Receive() {
		t.Fatalf("watch: %v, %v", err, stream.Err())
	}
	if e := stream.Msg(); !e.GetReset_() || len(e.GetPut()) != 2 || len(e.GetSwarmSecrets()) != 1 {
		t.Errorf("the stream begins with %v, want both machines and the secret", e)
	}
	list, err := admin.ListMachines(within(t), connect.NewRequest(&floxv1.ListMachinesRequest{Machine: "LAPTOP"}))
	if err != nil || len(list.Msg.GetMachines()) != 1 || !list.Msg.GetMachines()[0].GetConnected() || list.Msg.GetMachines()[0].GetMachine().GetName() != "Laptop" {
		t.Fatalf("machines: %v, %v", list, err)
	}

	// Who is no admin may look and change nothing; that is in the audit log.
	asAlice := connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "test"})
	asAlice.Header().Set(UserHeader, "alice")
	remote := floxv1connect.NewAdminClient(laptop.web(s), "http://storehouse")
	if _, err := remote.RemoveMachine(within(t), asAlice); !errors.Is(api.FromConnect(err), flox.ErrDenied) {
		t.Errorf("a member that is no admin revoked a machine: %v", err)
	}
	if _, err := remote.ListMachines(within(t), connect.NewRequest(&floxv1.ListMachinesRequest{})); err != nil {
		t.Errorf("a member may not list machines: %v", err)
	}

	if _, err := admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "laptop", Reason: "stolen"})); err != nil {
		t.Fatal(err)
	}
	for stream.Receive() { //nolint:revive // until it is cut
	}
	if stream.Err() == nil {
		t.Error("the stream of a revoked machine ended as if nothing had happened")
	}
	if _, err := laptop.host.Dial(within(t), s.id.peer, rpcProtocol); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a revoked machine dials again: %v, want ErrDenied", err)
	}
	again := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent})
	if _, err := laptop.join(s, again, "other"); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "Laptop, was revoked on ") ||
		!strings.Contains(err.Error(), "(stolen)") || !strings.Contains(err.Error(), "floxctl leave --purge") {
		t.Errorf("a revoked key joins again: %v", err)
	}
	for _, name := range []string{"LAPTOP", string(laptop.id()), "test"} { // who is gone is found, too
		if len(auditOf(t, admin, &floxv1.AuditRequest{Machine: name})) == 0 {
			t.Errorf("the audit log has nothing of %s", name)
		}
	}
	unknown, err := admin.Audit(within(t), connect.NewRequest(&floxv1.AuditRequest{Machine: "laptpo"}))
	if err == nil {
		for unknown.Receive() { //nolint:revive // to its end
		}
		err = unknown.Err()
	}
	if err := api.FromConnect(err); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), `"laptpo"`) {
		t.Errorf("the audit log of a machine that never was: %v, want ErrNotFound with its name", err)
	}
	want := "machine.join !machine.revoke machine.revoke invite.make !machine.join"
	log := auditOf(t, admin, &floxv1.AuditRequest{Limit: 12})
	log = slices.DeleteFunc(log, func(action string) bool {
		return action == "keys.seal" || action == "!machine.connect" // when the server gets to it; when the laptop tries by itself
	})
	if got := strings.Join(log[len(log)-5:], " "); got != want {
		t.Errorf("the audit log ends with %q, want %q", got, want)
	}
}

// TestOneInviteUsedTwiceAtOnce redeems one invite at two servers at the same time.
func TestOneInviteUsedTwiceAtOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 2)
	admin := &admin{s: h.servers[0], refusals: &refusals{last: map[string]time.Time{}}}
	made, err := admin.makeInvite(within(t), &floxv1.Actor{User: "test"}, &floxv1.MakeInviteRequest{Role: members.Worker})
	if err != nil {
		t.Fatal(err)
	}
	inv, err := api.ParseJoinInvite(made.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "both servers know the invite", func() bool {
		_, ok := h.servers[1].inviteProof(inv.ID)
		return ok
	})
	var group sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		c := newComputer(t)
		group.Go(func() { _, errs[i] = c.join(h.servers[i%2], made.GetInvite(), "worker") })
	}
	group.Wait()
	in := 0
	for _, err := range errs {
		switch {
		case err == nil:
			in++
		case !errors.Is(err, flox.ErrDenied) && !errors.Is(err, flox.ErrBusy):
			t.Errorf("refused with %v, want ErrDenied", err)
		}
	}
	if in != 1 {
		t.Errorf("%d machines joined with one invite for one", in)
	}
}

func TestInvitesThatAreOverOrTaken(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	short := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, TtlSeconds: 1})
	inv, err := api.ParseJoinInvite(short)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the invite is over", func() bool { return time.Now().After(inv.Expires) })
	if _, err := newComputer(t).join(s, short, "late"); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("an expired invite: %v", err)
	}
	two := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, Uses: 2})
	first := newComputer(t)
	if _, err := first.join(s, two, "Berlin"); err != nil {
		t.Fatal(err)
	}
	if _, err := newComputer(t).join(s, two, "bERLIN"); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "bERLIN-2") {
		t.Errorf("a name that is taken: %v, want a proposal", err)
	}
	if _, err := admin.CancelInvite(within(t), connect.NewRequest(&floxv1.CancelInviteRequest{Id: mustInvite(t, two).ID})); err != nil {
		t.Fatal(err)
	}
	if _, err := newComputer(t).join(s, two, "third"); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a cancelled invite: %v", err)
	}
	// Without an invite only while the window is open.
	lan := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, Lan: true})
	if _, err := newComputer(t).join(s, lan, "guest"); err != nil {
		t.Errorf("inside the window: %v", err)
	}
	if _, err := admin.CancelInvite(within(t), connect.NewRequest(&floxv1.CancelInviteRequest{Id: mustInvite(t, lan).ID})); err != nil {
		t.Fatal(err)
	}
	if _, err := newComputer(t).join(s, lan, "guest2"); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("behind the window: %v", err)
	}
}

// What leaves soon is counted on by nobody: it neither builds for others nor serves.
func TestOnlyAgentsAreEphemeral(t *testing.T) {
	t.Parallel()
	_, admin := closedHouse(t, nil)
	for _, role := range []string{members.Server, members.Worker} {
		_, err := admin.MakeInvite(within(t), connect.NewRequest(&floxv1.MakeInviteRequest{Role: role, Ephemeral: true}))
		if err := api.FromConnect(err); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "ephemeral "+role) {
			t.Errorf("an ephemeral %s: %v, want ErrBadInput", role, err)
		}
	}
}

func mustInvite(t *testing.T, text string) *api.JoinInvite {
	t.Helper()
	inv, err := api.ParseJoinInvite(text)
	if err != nil {
		t.Fatal(err)
	}
	return inv
}

func TestEphemeralMachineIsForgottenOnceItsStreamEnds(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, func(c *Config) { c.EphemeralTTL = 3 * time.Second })
	runner := newComputer(t)
	joined, err := runner.join(s, makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, Ephemeral: true}), "runner")
	if err != nil {
		t.Fatal(err)
	}
	keep, err := api.ParseInvite(joined.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	runner.online(s, keep.Secret)
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	stream, err := floxv1connect.NewMembershipClient(runner.web(s), "http://storehouse").WatchMembers(ctx, connect.NewRequest(&floxv1.WatchMembersRequest{}))
	if err != nil || !stream.Receive() {
		t.Fatalf("watch: %v", err)
	}
	began := time.Now()
	for time.Since(began) < 2*s.cfg.EphemeralTTL && stream.Receive() { //nolint:revive // heartbeats
	}
	if _, ok := s.roster.machine(runner.id()); !ok {
		t.Fatal("it was forgotten while its stream was open")
	}
	cancel()
	eventually(t, "it is forgotten", func() bool {
		_, ok := s.roster.machine(runner.id())
		return !ok
	})
	if got := auditOf(t, admin, &floxv1.AuditRequest{Action: "machine.forget"}); len(got) != 1 {
		t.Errorf("the audit log holds %d forgotten machines", len(got))
	}
}
