package members

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// log is a replicated log of one server with the processor.
type log struct {
	t    *testing.T
	node *raft.Node
}

func newLog(t *testing.T) *log {
	t.Helper()
	return newLogOf(t, Processor{})
}

func newLogOf(t *testing.T, p Processor) *log {
	t.Helper()
	node, err := raft.Open(raft.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	node.Register(Kind, p)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- node.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	l := &log{t, node}
	if err := node.Ready(l.within()); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *log) within() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	l.t.Cleanup(cancel)
	return ctx
}

var tester = &floxv1.Actor{Machine: "desk", User: "alice"}

// apply proposes a command.
func (l *log) apply(c *floxv1.MembersCommand) (*floxv1.MembersReply, error) {
	if c.Actor == nil {
		c.Actor = tester
	}
	b, err := proto.Marshal(c)
	if err != nil {
		l.t.Fatal(err)
	}
	reply, _, err := l.node.Propose(l.within(), Kind, b, raft.ProposeOptions{})
	if err != nil {
		return nil, err
	}
	r := &floxv1.MembersReply{}
	return r, proto.Unmarshal(reply, r)
}

// must is apply of what may not be refused.
func (l *log) must(c *floxv1.MembersCommand) *floxv1.MembersReply {
	l.t.Helper()
	r, err := l.apply(c)
	if err != nil {
		l.t.Fatal(err)
	}
	if r.GetRefused() != "" {
		l.t.Fatal(r.GetRefused())
	}
	return r
}

func (l *log) view(f func(r *raft.Reader)) {
	l.t.Helper()
	r, err := l.node.View(l.within(), Kind, raft.Linearizable)
	if err != nil {
		l.t.Fatal(err)
	}
	f(r)
	if err := r.Close(); err != nil {
		l.t.Fatal(err)
	}
}

func (l *log) audit() (lines []string) {
	l.view(func(r *raft.Reader) {
		err := Audit(r, 0, func(a *floxv1.AuditRecord) bool {
			line := a.GetAction() + " " + a.GetSubject()
			if a.GetRefused() {
				line += " refused"
			}
			lines = append(lines, line)
			return true
		})
		if err != nil {
			l.t.Fatal(err)
		}
	})
	return lines
}

func invite(id string, change func(*floxv1.InviteRecord)) *floxv1.MembersCommand {
	inv := &floxv1.InviteRecord{
		Id: id, Verifier: bytes.Repeat([]byte{7}, verifierBytes), Role: Agent, Uses: 1,
		ExpiresUnixMs: time.Now().Add(time.Hour).UnixMilli(),
	}
	if change != nil {
		change(inv)
	}
	return &floxv1.MembersCommand{Command: &floxv1.MembersCommand_MakeInvite{MakeInvite: inv}}
}

func redeem(id, peer, name string) *floxv1.MembersCommand {
	return &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Redeem{Redeem: &floxv1.Redeem{
		Invite: id, User: "bob", Machine: &floxv1.Machine{Peer: peer, Name: name, SealKey: make([]byte, 32), RaftAddress: "x@h:1"},
	}}}
}

func add(peer, name, role string) *floxv1.MembersCommand {
	return &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: &floxv1.Machine{Peer: peer, Name: name, Role: role, SealKey: make([]byte, 32)}}}
}

func remove(peer string, revoked bool) *floxv1.MembersCommand {
	return &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: peer, Reason: "lost", Revoked: revoked}}}
}

func TestInviteLetsExactlyAsManyInAsItSays(t *testing.T) {
	l := newLog(t)
	l.must(invite("invite-1", func(i *floxv1.InviteRecord) { i.Uses = 3 }))
	var group sync.WaitGroup
	var mu sync.Mutex
	in, out := 0, 0
	for i := range 8 {
		group.Go(func() {
			r, err := l.apply(redeem("invite-1", fmt.Sprint("peer-", i), fmt.Sprint("m", i)))
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				t.Error(err)
			case r.GetRefused() == "":
				in++
			default:
				out++
			}
		})
	}
	group.Wait()
	if in != 3 || out != 5 {
		t.Errorf("%d machines got in and %d were refused, want 3 and 5", in, out)
	}
	refused := 0
	for _, line := range l.audit() {
		if strings.HasSuffix(line, "refused") {
			refused++
		}
	}
	if refused != 5 {
		t.Errorf("the audit log holds %d refusals, want 5", refused)
	}
	// Who lost the answer asks again, and nothing is used up by that.
	l.must(invite("invite-2", nil))
	first := l.must(redeem("invite-2", "peer-x", "mx"))
	again := l.must(redeem("invite-2", "peer-x", "mx"))
	if !proto.Equal(first.GetMachine(), again.GetMachine()) {
		t.Error("the same machine joined twice")
	}
}

func TestWhatAMachineMayBeComesFromTheInvite(t *testing.T) {
	l := newLog(t)
	l.must(invite("invite-1", func(i *floxv1.InviteRecord) {
		i.Labels = []*floxv1.Label{{Key: "site", Value: "berlin"}}
		i.User, i.Ephemeral = &floxv1.UserGrant{Name: "carol", Role: Publisher}, true
	}))
	c := redeem("invite-1", "peer-1", "Laptop")
	c.GetRedeem().Machine.Role = Server
	c.GetRedeem().Machine.Users = []*floxv1.UserGrant{{Name: "mallory", Role: Admin}}
	m := l.must(c).GetMachine()
	if m.GetRole() != Agent || !m.GetEphemeral() || Label(m, "site") != "berlin" || UserRole(m, "carol") != Publisher || UserRole(m, "mallory") != "" || UserRole(m, "bob") != "" {
		t.Errorf("it became %v", m)
	}
	l.must(invite("invite-2", nil))
	if m := l.must(redeem("invite-2", "peer-2", "other")).GetMachine(); UserRole(m, "bob") != Member {
		t.Errorf("who redeemed it is no member there: %v", m)
	}
}

func TestInvitesThatLetNobodyIn(t *testing.T) {
	l := newLog(t)
	l.must(invite("expires-soon", func(i *floxv1.InviteRecord) { i.ExpiresUnixMs = time.Now().Add(50 * time.Millisecond).UnixMilli() }))
	l.must(invite("cancelled", nil))
	l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_CancelInvite{CancelInvite: "cancelled"}})
	l.must(invite("is-fine-1", nil))
	l.must(add("peer-s", "s1", Server))
	time.Sleep(60 * time.Millisecond)
	for id, want := range map[string]string{"expires-soon": "expired", "cancelled": "cancelled", "made-up-id": "never made"} {
		r, err := l.apply(redeem(id, "peer-"+id, "n"))
		if err != nil || !strings.Contains(r.GetRefused(), want) {
			t.Errorf("%s: %q, %v, want %q", id, r.GetRefused(), err, want)
		}
	}
	if r, err := l.apply(redeem("is-fine-1", "peer-s", "s1")); err != nil || !strings.Contains(r.GetRefused(), "leave") {
		t.Errorf("a server became an agent: %q, %v", r.GetRefused(), err)
	}
	if r, err := l.apply(redeem("is-fine-1", "peer-2", "S1")); err != nil || !strings.Contains(r.GetRefused(), "S1-2") {
		t.Errorf("a name that is taken: %q, %v, want another one proposed", r.GetRefused(), err)
	}
	l.must(redeem("is-fine-1", "peer-2", "s2")) // no refusal used it up
	for name, c := range map[string]*floxv1.MembersCommand{
		"no uses":          invite("bad-invite", func(i *floxv1.InviteRecord) { i.Uses = 0 }),
		"no verifier":      invite("bad-invite", func(i *floxv1.InviteRecord) { i.Verifier = nil }),
		"over":             invite("bad-invite", func(i *floxv1.InviteRecord) { i.ExpiresUnixMs = 1 }),
		"role":             invite("bad-invite", func(i *floxv1.InviteRecord) { i.Role = "king" }),
		"ephemeral server": invite("bad-invite", func(i *floxv1.InviteRecord) { i.Role, i.Ephemeral = Server, true }),
		"server by LAN":    invite("bad-invite", func(i *floxv1.InviteRecord) { i.Role, i.Lan, i.Verifier = Server, true, nil }),
		"label":            invite("bad-invite", func(i *floxv1.InviteRecord) { i.Labels = []*floxv1.Label{{Key: "a b"}} }),
		"user":             invite("bad-invite", func(i *floxv1.InviteRecord) { i.User = &floxv1.UserGrant{Name: "x", Role: "root"} }),
	} {
		if _, err := l.apply(c); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", name, err)
		}
	}
}

func TestRevokedKeyNeverComesBack(t *testing.T) {
	l := newLog(t)
	l.must(add("peer-1", "lost", Agent))
	if r := l.must(remove("peer-1", true)); len(r.GetRemoved()) != 1 {
		t.Errorf("removed %v", r.GetRemoved())
	}
	l.must(invite("invite-1", nil))
	if r, err := l.apply(redeem("invite-1", "peer-1", "found")); err != nil || !strings.Contains(r.GetRefused(), "revoked") {
		t.Errorf("a revoked key joined: %q, %v", r.GetRefused(), err)
	}
	if _, err := l.apply(add("peer-1", "found", Agent)); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a revoked key was added: %v", err)
	}
	// One that left may come back, and the name is free.
	l.must(redeem("invite-1", "peer-2", "LOST"))
	l.must(remove("peer-2", false))
	l.must(invite("invite-2", nil))
	l.must(redeem("invite-2", "peer-2", "lost"))
	l.view(func(r *raft.Reader) {
		if m, err := Find(r, "lOsT"); err != nil || m.GetPeer() != "peer-2" || m.GetName() != "lost" {
			t.Errorf("found %v, %v", m, err)
		}
		if rev, err := Revocation(r, "peer-1"); err != nil || rev.GetReason() != "lost" {
			t.Errorf("revocation %v, %v", rev, err)
		}
	})
}

func TestLastServerStays(t *testing.T) {
	l := newLog(t)
	l.must(add("peer-1", "s1", Server))
	if _, err := l.apply(remove("peer-1", true)); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("the only server was removed: %v", err)
	}
	l.must(add("peer-2", "s2", Server))
	l.must(remove("peer-1", false))
}

func TestWatchersHearOfEveryChange(t *testing.T) {
	l := newLog(t)
	l.must(add("peer-1", "one", Agent))
	at := l.must(add("peer-2", "two", Agent)).GetIndex()
	l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Change{Change: &floxv1.ChangeMachine{
		Peer: "peer-1", SetLabels: []*floxv1.Label{{Key: "site", Value: "x"}}, SetUsers: []*floxv1.UserGrant{{Name: "z", Role: Member}, {Name: "a", Role: Admin}},
	}}})
	l.must(remove("peer-2", true))
	l.view(func(r *raft.Reader) {
		peers, ok, err := Changes(r, at)
		if err != nil || !ok || len(peers) != 2 {
			t.Errorf("changes %v, %v, %v", peers, ok, err)
		}
		if _, ok, _ := Changes(r, r.Index()+5); ok {
			t.Error("an index of another life of the log is taken for one of this")
		}
		m, err := Machine(r, "peer-1")
		if err != nil || UserRole(m, "a") != Admin || m.GetUsers()[0].GetName() != "a" {
			t.Errorf("%v, %v", m, err)
		}
	})
}

func TestEphemeralMachinesAreForgotten(t *testing.T) {
	l := newLog(t)
	l.must(invite("invite-1", func(i *floxv1.InviteRecord) { i.Ephemeral = true }))
	l.must(redeem("invite-1", "peer-1", "ci"))
	l.must(add("peer-2", "desk", Agent))
	r := l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Forget{Forget: &floxv1.ForgetMachines{Peers: []string{"peer-1", "peer-2", "peer-1", "gone"}}}})
	if len(r.GetRemoved()) != 1 || r.GetRemoved()[0] != "peer-1" {
		t.Errorf("forgot %v, want the ephemeral one", r.GetRemoved())
	}
}

func TestSecretsAreReplacedOneByOne(t *testing.T) {
	l := newLog(t)
	set := func(after, version uint64) error {
		_, err := l.apply(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Secrets{Secrets: &floxv1.SetSecrets{
			After: after, Secrets: &floxv1.SealedSecrets{Version: version, Box: []byte{1}, Seals: []*floxv1.Seal{{Peer: "a", Box: []byte{2}}}},
		}}})
		return err
	}
	if err := set(0, 1); err != nil {
		t.Fatal(err)
	}
	if err := set(0, 1); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("secrets were replaced by somebody who had not seen them: %v", err)
	}
	if err := set(1, 3); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a version was left out: %v", err)
	}
	if err := set(1, 2); err != nil {
		t.Fatal(err)
	}
}

func TestCommandOfANewerProgramStopsTheNode(t *testing.T) {
	node, err := raft.Open(raft.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	node.Register(Kind, Processor{})
	done := make(chan error, 1)
	go func() { done <- node.Run(context.Background()) }()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := node.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	_, _, _ = node.Propose(ctx, Kind, []byte{0xfa, 0x3f, 0}, raft.ProposeOptions{}) // a field 1023: the node's end is the answer
	if err := <-done; !errors.Is(err, raft.ErrUnknownCommand) {
		t.Errorf("the node ended with %v, want ErrUnknownCommand", err)
	}
}
