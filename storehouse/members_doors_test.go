package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// raised waits until the servers take commands of the newest level.
func raised(t *testing.T, s *Server) {
	t.Helper()
	eventually(t, "the cluster is at the newest level", func() bool { return s.node.Status().Level == level })
}

// hasRoots reports whether a server knows roots of a machine.
func hasRoots(t *testing.T, s *Server, peer string) bool {
	t.Helper()
	err := s.read(within(t), cluster.Linearizable, func(r *cluster.Reader) error {
		_, err := readMachineRoots(r, peer)
		return err
	})
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestRootsGoWithTheirMachine(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	p := makePath(t, "precious", 1000)
	publish(t, s, p)
	laptop, desk := newComputer(t), newComputer(t)
	for c, name := range map[*computer]string{laptop: "laptop", desk: "desk"} {
		if _, err := c.join(s, makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent}), name); err != nil {
			t.Fatal(err)
		}
		setRoots(t, s, string(c.id()), p)
	}
	if _, err := admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "laptop"})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the roots of the revoked machine are gone", func() bool { return !hasRoots(t, s, string(laptop.id())) })
	if !hasRoots(t, s, string(desk.id())) {
		t.Error("those of another machine went, too")
	}
}

func TestRootsOfOpenMembersGoWithARevocation(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, func(c *Config) { c.OpenMembership = true })
	raised(t, s)
	p := makePath(t, "precious", 1000)
	publish(t, s, p)
	visitor, other := newComputer(t), newComputer(t)
	setRoots(t, s, string(visitor.id()), p)
	setRoots(t, s, string(other.id()), p)
	visitor.online(s, s.id.ring.secrets()[0])
	stream, err := floxv1connect.NewMembershipClient(visitor.web(s), "http://storehouse").WatchMembers(within(t), connect.NewRequest(&floxv1.WatchMembersRequest{}))
	if err != nil || !stream.Receive() || !stream.Msg().GetOpen() {
		t.Fatalf("watch: %v, %v, want an open storehouse", err, stream.Msg())
	}
	revoke := func(c *computer) {
		t.Helper()
		if _, err := admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: string(c.id()), Reason: "stolen"})); err != nil {
			t.Fatal(err)
		}
	}
	revoke(other)
	for stream.Receive() && len(stream.Msg().GetRevoked()) == 0 {
	}
	if got := stream.Msg().GetRevoked(); len(got) != 1 || got[0] != string(other.id()) {
		t.Errorf("the others hear that %v were revoked, %v", got, stream.Err())
	}
	revoke(visitor)
	for stream.Receive() {
	}
	if _, err := visitor.host.Dial(within(t), s.id.peer, rpcProtocol); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a revoked machine comes as everybody does: %v", err)
	}
	// The leader looks for them now and then; here at once.
	if err := s.dropRootless(within(t)); err != nil {
		t.Fatal(err)
	}
	if hasRoots(t, s, string(visitor.id())) || hasRoots(t, s, string(other.id())) {
		t.Error("the roots of revoked machines are still there")
	}
	third := newComputer(t)
	setRoots(t, s, string(third.id()), p)
	if err := s.dropRootless(within(t)); err != nil || !hasRoots(t, s, string(third.id())) {
		t.Errorf("those of a machine that may come are gone: %v", err)
	}
}

func TestLostAnswerOfAJoinIsGivenAgain(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	raised(t, s)
	text := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent})
	laptop := newComputer(t)
	first, err := laptop.join(s, text, "laptop")
	if err != nil {
		t.Fatal(err)
	}
	again, err := laptop.join(s, text, "laptop")
	if err != nil || string(again.GetInvite()) != string(first.GetInvite()) || again.GetMachine().GetChangedIndex() != first.GetMachine().GetChangedIndex() {
		t.Errorf("asked again: %v, %v", again.GetMachine(), err)
	}
	thief := newComputer(t)
	if _, err := thief.join(s, text, "thief"); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "used up") {
		t.Errorf("another machine with the same invite: %v", err)
	}
	if _, err := thief.door(s, text).Look(within(t), connect.NewRequest(&floxv1.LookRequest{})); !errors.Is(api.FromConnect(err), flox.ErrDenied) {
		t.Errorf("another machine looks with a used invite: %v", err)
	}
}

func TestWhoIsNotLetInIsAuditedOnce(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	stranger := newComputer(t)
	refused := func() (list []*floxv1.AuditRecord) {
		stream, err := admin.Audit(within(t), connect.NewRequest(&floxv1.AuditRequest{Action: "machine.connect"}))
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		for stream.Receive() {
			list = append(list, stream.Msg().GetRecords()...)
		}
		return list
	}
	h := stranger.online(s, s.id.ring.secrets()[0])
	for range 5 {
		if _, err := h.Dial(within(t), s.id.peer, rpcProtocol); !errors.Is(err, flox.ErrDenied) {
			t.Fatalf("a stranger: %v, want ErrDenied", err)
		}
	}
	eventually(t, "it is audited", func() bool { return len(refused()) > 0 })
	list := refused()
	if len(list) != 1 {
		t.Fatalf("%d records of one machine at one address", len(list))
	}
	if r := list[0]; !r.GetRefused() || r.GetSubject() != string(stranger.id()) || !strings.Contains(r.GetDetail(), "from 127.0.0.1:") || !strings.Contains(r.GetDetail(), "floxctl invite") {
		t.Errorf("the record says %v: want who, where from, why and what to do", r)
	}
	eventually(t, "the four others are counted", func() bool {
		s.doors.mu.Lock()
		defer s.doors.mu.Unlock()
		return s.doors.unnamed >= 4
	})
	s.doors.mu.Lock()
	clear(s.doors.last) // a minute later
	s.doors.mu.Unlock()
	if _, err := h.Dial(within(t), s.id.peer, rpcProtocol); !errors.Is(err, flox.ErrDenied) {
		t.Fatal(err)
	}
	eventually(t, "the next record says how many there were", func() bool {
		list := refused()
		return len(list) == 2 && strings.Contains(list[1].GetDetail(), "more were refused since the last such record")
	})
}

// What happened on one leader goes on at the next: an invite is redeemed, a stream
// of the members resumes at another server without a gap, and so does the audit log.
func TestMembersGoOnAcrossALeaderChange(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3, func(c *Config) { c.OpenMembership = false })
	raised(t, h.servers[0])
	lead := func() int {
		t.Helper()
		at := -1
		eventually(t, "a server leads", func() bool {
			for i, s := range h.servers {
				if s.node.Status().State == "leader" {
					at = i
				}
			}
			return at >= 0
		})
		return at
	}
	old := lead()
	other := h.servers[(old+1)%3]
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	operators := newAdmin(h.servers[old], ctx)
	made, err := operators.makeInvite(within(t), &floxv1.Actor{User: "test"}, &floxv1.MakeInviteRequest{Role: members.Agent, Uses: 3})
	if err != nil {
		t.Fatal(err)
	}
	first := newComputer(t)
	if _, err := first.join(h.servers[old], made.GetInvite(), "first"); err != nil {
		t.Fatal(err)
	}

	// A watcher that knows all the leader knows, and a follower of the audit log at
	// a server that stays.
	var seen []*floxv1.MembersEvent
	w := &memberWatch{s: h.servers[old], send: func(e *floxv1.MembersEvent) error { seen = append(seen, e); return nil }}
	if err := w.tell(within(t), true); err != nil || len(seen) != 1 || len(seen[0].GetPut()) != 4 {
		t.Fatalf("the list begins with %v, %v", seen, err)
	}
	records := make(chan *floxv1.AuditRecord, 1000)
	followed := make(chan error, 1)
	go func() {
		followed <- newAdmin(other, ctx).audit(ctx, &floxv1.AuditRequest{Follow: true, Action: "machine."}, func(m *floxv1.AuditResponse) error {
			for _, r := range m.GetRecords() {
				records <- r
			}
			return nil
		})
	}()

	h.stops[old]()
	second := newComputer(t)
	var joinErr error
	eventually(t, "the invite is redeemed at another server", func() bool {
		_, joinErr = second.join(other, made.GetInvite(), "second")
		return joinErr == nil
	})
	var later []*floxv1.MembersEvent
	resumed := &memberWatch{s: h.servers[(old+2)%3], at: seen[0].GetIndex(), send: func(e *floxv1.MembersEvent) error { later = append(later, e); return nil }}
	eventually(t, "the stream goes on at the third server", func() bool {
		if err := resumed.tell(within(t), len(later) == 0); err != nil {
			return false
		}
		for _, e := range later {
			if e.GetReset_() {
				t.Fatalf("the stream began anew with %v", e)
			}
			for _, m := range e.GetPut() {
				if m.GetPeer() == string(second.id()) {
					return true
				}
			}
		}
		return false
	})
	names := map[string]bool{}
	for !names["second"] {
		select {
		case r := <-records:
			if r.GetAction() == "machine.join" {
				names[r.GetSubject()] = true
			}
		case err := <-followed:
			t.Fatalf("following the audit log ended with %v", err)
		case <-within(t).Done():
			t.Fatal("the audit log does not go on")
		}
	}
	if !names["first"] {
		t.Error("the audit log left something out")
	}
	cancel()
	if err := <-followed; !errors.Is(err, context.Canceled) {
		t.Errorf("following ended with %v", err)
	}
}

// A server that knows less than the watcher, whom another one told more, catches
// up first: it does not send an older list. An index that nobody has is of another
// life of the log.
func TestMembersStreamNeverGoesBack(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	for i := range 60 {
		from, to := h.servers[i%3], h.servers[(i+1)%3]
		reply, err := from.proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Note{Note: &floxv1.AuditRecord{Action: "test"}}})
		if err != nil {
			t.Fatal(err)
		}
		var got []*floxv1.MembersEvent
		w := &memberWatch{s: to, at: reply.GetIndex(), send: func(e *floxv1.MembersEvent) error { got = append(got, e); return nil }}
		if err := w.tell(within(t), true); err != nil || len(got) != 1 || got[0].GetReset_() || got[0].GetIndex() < reply.GetIndex() {
			t.Fatalf("at %d the stream goes on with %v, %v", reply.GetIndex(), got, err)
		}
		got, w.at = nil, reply.GetIndex()+1000
		if err := w.tell(within(t), true); err != nil || len(got) != 1 || !got[0].GetReset_() {
			t.Fatalf("an index of another life of the log: %v, %v, want the whole list", got, err)
		}
	}
}

// A machine that was away while the swarm's secret changed, and knows none of those
// in force, comes back with its key, and hears of them.
func TestMemberThatMissedARotationComesBack(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	laptop, desk := newComputer(t), newComputer(t)
	for c, name := range map[*computer]string{laptop: "laptop", desk: "desk"} {
		if _, err := c.join(s, makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent}), name); err != nil {
			t.Fatal(err)
		}
	}
	old := s.id.ring.secrets()[0]
	watch := func(c *computer) func() *floxv1.MembersEvent {
		t.Helper()
		stream, err := floxv1connect.NewMembershipClient(c.web(s), "http://storehouse").WatchMembers(within(t), connect.NewRequest(&floxv1.WatchMembersRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return func() *floxv1.MembersEvent {
			t.Helper()
			for stream.Receive() {
				if len(stream.Msg().GetSwarmSecrets()) > 0 {
					return stream.Msg()
				}
			}
			t.Fatalf("no secrets came: %v", stream.Err())
			return nil
		}
	}
	rotate := func(secrets ...[]byte) {
		have, err := s.id.ring.get()
		if err != nil {
			t.Fatal(err)
		}
		next := have.message()
		next.SwarmSecrets = secrets
		changed, err := parseKeys(next)
		if err != nil {
			t.Fatal(err)
		}
		s.id.ring.set(changed)
	}
	desk.online(s, old)
	next := watch(desk)
	next()
	fresh := []byte("the secret that comes after it, 32")
	rotate(fresh, old)
	if got := next().GetSwarmSecrets(); len(got) != 2 || string(got[0]) != string(fresh) {
		t.Errorf("who watches hears of %d secrets in the overlap", len(got))
	}
	rotate(fresh)
	if got := next().GetSwarmSecrets(); len(got) != 1 || string(got[0]) != string(fresh) {
		t.Errorf("who watches hears of %d secrets behind it", len(got))
	}
	laptop.vouched = func(id p2p.PeerID) bool { return id == s.id.peer }
	laptop.online(s, old)
	if got := watch(laptop)().GetSwarmSecrets(); len(got) != 1 || string(got[0]) != string(fresh) {
		t.Errorf("who was away hears of %d secrets", len(got))
	}
	stranger := newComputer(t)
	stranger.vouched = laptop.vouched
	if _, err := stranger.online(s, old).Dial(within(t), s.id.peer, rpcProtocol); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a stranger with the old secret: %v", err)
	}
}

// Whoever shows an invite that is over leaves a refused record that says why, and
// says it again a minute later at the earliest.
func TestInvitesThatAreOverAreAudited(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	raised(t, s)
	used := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent})
	if _, err := newComputer(t).join(s, used, "first"); err != nil {
		t.Fatal(err)
	}
	cancelled := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent})
	if _, err := admin.CancelInvite(within(t), connect.NewRequest(&floxv1.CancelInviteRequest{Id: mustInvite(t, cancelled).ID})); err != nil {
		t.Fatal(err)
	}
	expired := makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, TtlSeconds: 1})
	eventually(t, "the invite is over", func() bool { return time.Now().After(mustInvite(t, expired).Expires) })
	knocks := func() int { return len(auditOf(t, admin, &floxv1.AuditRequest{Action: "machine.connect"})) }
	for i, text := range []string{used, cancelled, expired} {
		late := newComputer(t)
		for range 3 {
			if _, err := late.join(s, text, "late"); !errors.Is(err, flox.ErrDenied) {
				t.Fatalf("invite %d of used, cancelled, expired: %v", i, err)
			}
		}
		eventually(t, fmt.Sprintf("invite %d of used, cancelled, expired: it is audited", i), func() bool { return knocks() > i })
		if got := knocks(); got != i+1 {
			t.Errorf("three visits with invite %d left %d records, want one", i, got-i)
		}
		s.doors.mu.Lock()
		clear(s.doors.last) // a minute later
		s.doors.mu.Unlock()
	}
	if log := auditOf(t, admin, &floxv1.AuditRequest{Action: "machine.connect"}); strings.Join(log, " ") != "!machine.connect !machine.connect !machine.connect" {
		t.Errorf("the audit log has %v, want refused records alone", log)
	}
}
