package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// unreached is how far servers are that nobody is connected to.
func unreached(p2p.PeerID) (time.Duration, bool) { return 0, false }

// roll is a storehouse's end of the member list: what a test says, message by
// message, to one watcher.
type roll struct {
	mu    sync.Mutex
	asked []uint64 // indexes that streams were asked to go on behind
	send  chan *floxv1.MembersEvent
	cut   chan struct{} // ends the stream
}

func newRoll() *roll {
	return &roll{send: make(chan *floxv1.MembersEvent), cut: make(chan struct{})}
}

func (r *roll) watch(ctx context.Context, req *floxv1.WatchMembersRequest, send func(*floxv1.MembersEvent) error) error {
	r.mu.Lock()
	r.asked = append(r.asked, req.GetAfterIndex())
	r.mu.Unlock()
	for {
		select {
		case e := <-r.send:
			if err := send(e); err != nil {
				return err
			}
		case <-r.cut:
			return connect.NewError(connect.CodeUnavailable, errors.New("cut"))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tell sends messages, each once the one before is on its way.
func (r *roll) tell(t *testing.T, list ...*floxv1.MembersEvent) {
	t.Helper()
	for _, e := range list {
		select {
		case r.send <- e:
		case <-within(t, time.Minute).Done():
			t.Fatal("nobody follows the member list")
		}
	}
}

func (r *roll) behind() []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.asked)
}

func agentMember(id p2p.PeerID, name string) *floxv1.Member {
	return &floxv1.Member{Peer: string(id), Name: name, Role: "agent"}
}

// houseMember is the test's storehouse in its own list.
func houseMember(h *house) *floxv1.Member {
	return &floxv1.Member{Peer: string(h.host.ID()), Name: "s1", Role: roleServer, Addrs: h.host.Addrs()}
}

func stateDir(a *Agent) func(*Config) { return func(c *Config) { c.StateDir = a.cfg.StateDir } }

// A set of changes counts when its last message came, a stream goes on behind what
// was applied, and the list is there after a restart without anybody to ask.
func TestMemberListIsAppliedWholeAndKept(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.book.roll = newRoll()
	a, stop := runAgent(t, h, nil, nil)
	following(t, a)
	self := a.host.ID()
	allowed := func(id p2p.PeerID) bool { return a.members.allowed(id) }
	if !allowed("anybody") {
		t.Error("before there is a list, who knows the invite's secret is refused")
	}
	first := &floxv1.MembersEvent{Index: 50, Put: []*floxv1.Member{agentMember("b", "bob")}, SwarmSecrets: [][]byte{testSecret}}
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 5, Put: []*floxv1.Member{agentMember("x", "nobody")}, Revoked: []string{"y"}})
	until(t, "changes of a list that never came are refused", func() bool { return slices.Equal(h.book.roll.behind(), []uint64{0, 0}) })
	if a.members.now.Load().known {
		t.Error("they are in force")
	}
	half := &floxv1.MembersEvent{Reset_: true, Put: []*floxv1.Member{houseMember(h), agentMember(self, "me")}}
	h.book.roll.tell(t, half)
	h.book.roll.cut <- struct{}{}
	until(t, "the stream begins anew", func() bool { return slices.Equal(h.book.roll.behind(), []uint64{0, 0, 0}) })
	if !allowed("anybody") || a.members.count() != 0 {
		t.Error("half a list is in force")
	}
	h.book.roll.tell(t, half, first)
	until(t, "the list is in force", func() bool { return a.members.count() == 3 })
	if allowed("anybody") || !allowed("b") || !allowed(h.host.ID()) || !a.members.isHouse(h.host.ID()) || a.members.isHouse("b") {
		t.Error("not exactly the members are members")
	}
	// The rest of a set never comes: nothing of it counts.
	h.book.roll.tell(t, &floxv1.MembersEvent{Put: []*floxv1.Member{agentMember("c", "carol")}})
	h.book.roll.cut <- struct{}{}
	until(t, "the stream goes on behind what was applied", func() bool { return slices.Equal(h.book.roll.behind(), []uint64{0, 0, 0, 50}) })
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 60, Gone: []string{"b"}, Put: []*floxv1.Member{agentMember("d", "dora")}})
	until(t, "changes are in force", func() bool { return !allowed("b") && allowed("d") })
	if allowed("c") {
		t.Error("a part of a set that never came whole is in force")
	}
	// An index alone is no news for the disk, and a lower one of the same epoch is refused.
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 65, Heartbeat: true}, &floxv1.MembersEvent{Index: 40, Reset_: true})
	until(t, "a storehouse that went back is not believed", func() bool { return len(h.book.roll.behind()) == 5 })
	if !allowed("d") || h.book.roll.behind()[4] != 65 {
		t.Errorf("the stream goes on behind %v", h.book.roll.behind())
	}
	file := filepath.Join(a.cfg.StateDir, membersFile)
	until(t, "the list is on disk", func() bool {
		s, err := loadMembers(file, h.invite)
		return err == nil && s.index >= 60
	})
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file with the secrets: %v, %v, want mode 0600", st.Mode(), err)
	}
	stop()

	away := *h.invite // nobody answers there
	away.Storehouse = []api.InvitePeer{{ID: string(h.host.ID()), Addrs: []string{"/ip4/127.0.0.1/tcp/1"}}}
	b, stop := runAgent(t, h, func(c *Config) { stateDir(a)(c); c.Invite = &away }, nil)
	if b.members.allowed("anybody") || !b.members.allowed("d") || b.members.member("d").GetName() != "dora" {
		t.Error("an agent that starts with nobody to ask does not know the members")
	}
	stop()

	// A file that was torn is as good as none.
	if err := os.Truncate(file, 100); err != nil {
		t.Fatal(err)
	}
	asked := len(h.book.roll.behind())
	c, _ := runAgent(t, h, stateDir(a), nil)
	until(t, "the list is asked for from its beginning", func() bool { return len(h.book.roll.behind()) > asked })
	if got := h.book.roll.behind(); got[len(got)-1] != 0 {
		t.Errorf("it is asked for behind %d", got[len(got)-1])
	}
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 70, Reset_: true, Put: []*floxv1.Member{houseMember(h), agentMember(self, "me")}})
	until(t, "it is in force", func() bool { return c.members.count() == 2 && !c.members.allowed("d") })
}

// Every byte of the file counts: one that is not as it was written is not used.
func TestDamagedMemberFileIsNotUsed(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	dir := t.TempDir()
	file := filepath.Join(dir, membersFile)
	if err := SaveMembers(dir, h.invite, []*floxv1.Member{agentMember("a", "alice"), houseMember(h)}); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := loadMembers(file, h.invite)
	if err != nil || !s.known || len(s.machines) != 2 || len(s.secrets) != 1 {
		t.Fatalf("what was written: %+v, %v", s, err)
	}
	for at := range good {
		bad := slices.Clone(good)
		bad[at] ^= 1
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadMembers(file, h.invite); !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("byte %d: %v, want ErrCorrupt", at, err)
		}
		if err := os.WriteFile(file, good[:at], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadMembers(file, h.invite); !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("%d bytes: %v, want ErrCorrupt", at, err)
		}
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*api.Invite){
		"another secret": func(i *api.Invite) { i.Secret = []byte("another secret of the swarm, 32.") },
		"other servers":  func(i *api.Invite) { i.Storehouse = append(slices.Clone(i.Storehouse), api.InvitePeer{ID: "x"}) },
	} {
		other := *h.invite
		change(&other)
		if _, err := loadMembers(file, &other); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("a list of an invite with %s: %v, want ErrBadInput", name, err)
		}
	}
}

func TestOpenStorehouseTakesWhoIsNotRevoked(t *testing.T) {
	t.Parallel()
	l := &memberList{invite: &api.Invite{Secret: testSecret}, changed: make(chan struct{}, 1)}
	l.now.Store(&memberState{})
	take := func(e *floxv1.MembersEvent) {
		t.Helper()
		var set memberSet
		if err := set.add(e); err != nil {
			t.Fatal(err)
		}
		l.apply(&set, e, 1)
	}
	take(&floxv1.MembersEvent{Index: 1, Reset_: true, Open: true, Put: []*floxv1.Member{agentMember("a", "alice")}, Revoked: []string{"x"}})
	if !l.allowed("a") || !l.allowed("stranger") || l.allowed("x") {
		t.Error("open: want everybody but the revoked")
	}
	take(&floxv1.MembersEvent{Index: 2, Open: true, Gone: []string{"a"}, Revoked: []string{"a"}})
	if l.allowed("a") {
		t.Error("a machine that was revoked is let in as everybody is")
	}
	<-l.changed
	take(&floxv1.MembersEvent{Index: 3, Open: true, Heartbeat: true})
	select {
	case <-l.changed:
		t.Error("a heartbeat is news")
	default:
	}
	take(&floxv1.MembersEvent{Index: 4, Heartbeat: true})
	if l.allowed("stranger") || l.allowed("x") {
		t.Error("closed again, strangers are let in")
	}
	select {
	case <-l.changed:
	default:
		t.Error("nobody hears that the storehouse is closed now: connections stay")
	}
	take(&floxv1.MembersEvent{Index: 5, SwarmSecrets: [][]byte{[]byte("new"), testSecret}})
	if got := l.secrets(); len(got) != 2 || string(got[0]) != "new" {
		t.Errorf("secrets %q", got)
	}
	var set memberSet
	for range 3 {
		many := &floxv1.MembersEvent{Gone: make([]string, maxListed)}
		if err := set.add(many); err != nil {
			if !errors.Is(err, flox.ErrFull) {
				t.Error(err)
			}
			return
		}
	}
	t.Error("a set without a bound is taken in")
}

// A machine that is a member no more is cut off, by those it is connected to and
// not just by the storehouse, and does not come back.
func TestAgentsCutOffWhoIsNoMember(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.book.roll = newRoll()
	a, _ := runAgent(t, h, nil, nil)
	h2 := newHouse(t) // its list says nothing: b believes that it is a member
	b, _ := runAgent(t, h2, nil, nil)
	mad := houseMember(h)
	mad.Addrs = append([]string{"nonsense"}, mad.GetAddrs()...) // does not keep it from being met
	list := []*floxv1.Member{mad, agentMember(a.host.ID(), "a"), agentMember(b.host.ID(), "b")}
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 10, Reset_: true, Put: list, SwarmSecrets: [][]byte{testSecret}})
	until(t, "the list is in force", func() bool { return a.members.count() == 3 })
	for _, p := range a.members.houses() {
		if slices.Contains(p.Addrs, "nonsense") {
			t.Errorf("an address that is none is used: %v", p.Addrs)
		}
	}
	meet := func() error {
		if err := b.host.AddPeer(peerAddr(a)); err != nil {
			t.Fatal(err)
		}
		conn, err := b.host.Dial(within(t, time.Minute), a.host.ID(), rpcProtocol)
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	if err := meet(); err != nil {
		t.Fatal(err)
	}
	until(t, "they are connected", func() bool { _, ok := a.host.Reach(b.host.ID()); return ok })
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 11, Gone: []string{string(b.host.ID())}})
	until(t, "it is cut off", func() bool { _, ok := a.host.Reach(b.host.ID()); return !ok })
	until(t, "it notices", func() bool { _, ok := b.host.Reach(a.host.ID()); return !ok })
	if err := meet(); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("it comes back: %v", err)
	}
	c := &control{a: a}
	status, err := c.Status(within(t, time.Minute), connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if s := status.Msg.GetStorehouse(); s.GetMembers() != 2 || len(s.GetServers()) != 1 || s.GetServers()[0].GetName() != "s1" || !s.GetServers()[0].GetConnected() {
		t.Errorf("status says %v", s)
	}
}

// What the member list calls ephemeral is no server of the DHT, also after a restart
// without the storehouse.
func TestEphemeralAgentsLeaveTheDHT(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.book.roll = newRoll()
	dir := ""
	a, stop := runAgent(t, h, func(c *Config) { dir = c.StateDir }, nil)
	serves := func(a *Agent) bool {
		if err := h.host.AddPeer(peerAddr(a)); err != nil {
			t.Fatal(err)
		}
		conn, err := h.host.Dial(within(t, 10*time.Second), a.host.ID(), "/flox/kad/1.0.0")
		if err == nil {
			err = conn.Close()
		}
		return err == nil
	}
	until(t, "it serves the DHT as any agent", func() bool { return serves(a) })
	me := agentMember(a.host.ID(), "runner")
	me.Ephemeral = true
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 10, Reset_: true, Put: []*floxv1.Member{houseMember(h), me}, SwarmSecrets: [][]byte{testSecret}})
	until(t, "it leaves the DHT", func() bool { return !serves(a) })
	until(t, "the list is kept", func() bool {
		s, err := loadMembers(filepath.Join(dir, membersFile), h.invite)
		return err == nil && s.known
	})
	stop()
	again, _ := runAgent(t, h, func(c *Config) { c.StateDir = dir }, nil) // the list is not told a second time
	following(t, again)
	if serves(again) {
		t.Error("it serves the DHT until it hears that it is ephemeral")
	}
}

func TestServersOfTheStorehouseAreAskedInTurn(t *testing.T) {
	t.Parallel()
	at := map[p2p.PeerID]time.Duration{}
	h := newHouses([]p2p.PeerID{"a", "b", "c"}, func(id p2p.PeerID) (time.Duration, bool) { rtt, ok := at[id]; return rtt, ok })
	order := func() string {
		var s []string
		for _, id := range h.order() {
			s = append(s, string(id))
		}
		return strings.Join(s, "")
	}
	at["b"] = 40 * time.Millisecond
	if got := order(); got[0] != 'b' {
		t.Errorf("order %s: want who is connected first", got)
	}
	at["a"], at["c"] = time.Millisecond, 5*time.Millisecond
	if got := order(); got[2] != 'b' {
		t.Errorf("order %s: want who is far last", got)
	}
	h.answered("c")
	if got := order(); got != "cab" {
		t.Errorf("order %s: want who answered last before one as near", got)
	}
	h.failed("c")
	if got := order(); got != "abc" {
		t.Errorf("order %s: want who does not answer last", got)
	}
	var asked []p2p.PeerID
	err := h.call(t.Context(), func(_ context.Context, id p2p.PeerID) error {
		if asked = append(asked, id); id == "a" {
			return connect.NewError(connect.CodeUnavailable, errors.New("no majority"))
		}
		return connect.NewError(connect.CodeNotFound, errors.New("no such thing"))
	})
	if !errors.Is(err, flox.ErrNotFound) || len(asked) != 2 || order() != "bac" && order() != "bca" {
		t.Errorf("asked %v: %v, then %s; want an answer to end it, and who gave none to be last", asked, err, order())
	}
	// One that says nothing does not keep the others from being asked.
	asked = nil
	err = h.call(within(t, time.Minute), func(ctx context.Context, id p2p.PeerID) error {
		if asked = append(asked, id); id == "b" {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	if err != nil || len(asked) != 2 {
		t.Errorf("asked %v: %v", asked, err)
	}
	h.set([]p2p.PeerID{"d"})
	if got := order(); got != "d" || h.is("a") {
		t.Errorf("order %s of the new servers", got)
	}
	h.set(nil)
	if err := h.call(t.Context(), func(context.Context, p2p.PeerID) error { return nil }); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("without a server: %v", err)
	}
}

// A look-up goes on to the next server when one is away, and does not wait for one
// that says nothing.
func TestLookupFailsOverToAnotherServer(t *testing.T) {
	t.Parallel()
	for name, answers := range map[string]bool{"refuses": true, "is silent": false} {
		t.Run(name, func(t *testing.T) {
			w := newTown(t)
			info := w.fact(1)
			r := w.resolver()
			r.houses = newHouses([]p2p.PeerID{"one", "two"}, func(id p2p.PeerID) (time.Duration, bool) { return 0, id == "one" })
			w.houses["one"] = nil
			if answers {
				w.houses["one"] = knowing{fails: connect.NewError(connect.CodeUnavailable, errors.New("no majority"))}
			}
			w.houses["two"] = knowing{info: info}
			got, err := r.askStorehouse(within(t, time.Minute), info.Path)
			if err != nil || got.Manifest != info.Manifest {
				t.Errorf("%v, %v", got, err)
			}
			if r.houses.first() != "two" {
				t.Error("it is asked first again")
			}
		})
	}
}

// When the server that an agent follows dies, another one is asked and followed:
// what became valid meanwhile is found and read.
func TestAnotherServerGoesOnWhenOneDies(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	twin, stopTwin := h.twin(t)
	h.book.roll = newRoll()
	before := h.make(t, "before", nil, testFile{name: "bin/before", data: randomBytes(1, 40_000)})
	after := h.make(t, "after", nil, testFile{name: "bin/after", data: randomBytes(2, 40_000)})
	h.publish(before)
	a, _ := runAgent(t, h, nil, nil) // its invite names the first alone
	following(t, a)
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 10, Reset_: true, SwarmSecrets: [][]byte{testSecret}, Put: []*floxv1.Member{
		houseMember(h), {Peer: string(twin.ID()), Name: "s2", Role: roleServer, Addrs: twin.Addrs()}, agentMember(a.host.ID(), "me"),
	}})
	until(t, "the second server is connected", func() bool { _, ok := a.host.Reach(twin.ID()); return ok })
	if _, err := a.resolver.lookup(within(t, time.Minute), before.Path); err != nil {
		t.Fatal(err)
	}
	read := func(info *flox.PathInfo) {
		t.Helper()
		if _, err := a.resolver.lookup(within(t, time.Minute), info.Path); err != nil {
			t.Fatalf("%s: %v", info.Path, err)
		}
		err := a.host.Fetch(within(t, time.Minute), []p2p.Want{{ID: info.Manifest}}, p2p.Hints{}, func(int, []byte, p2p.Source) {})
		if err != nil {
			t.Fatalf("content of %s: %v", info.Path, err)
		}
	}
	if got := a.follower.state().house; got != h.host.ID() {
		t.Fatalf("it follows %s, want the invite's server", got)
	}
	h.stop()
	h.publish(after)
	read(after)
	until(t, "the other server is followed", func() bool {
		l := a.follower.state()
		return l.connected && l.house == twin.ID() && l.index == h.newest()
	})
	until(t, "the member list goes on at the other server", func() bool { return len(h.book.roll.behind()) > 1 })
	if got := h.book.roll.behind(); got[len(got)-1] != 10 {
		t.Errorf("it goes on behind %d, want 10", got[len(got)-1])
	}
	// And back, to a server at another address.
	third, _ := h.twin(t)
	h.book.roll.tell(t, &floxv1.MembersEvent{Index: 20, Gone: []string{string(h.host.ID())}, Put: []*floxv1.Member{
		{Peer: string(third.ID()), Name: "s3", Role: roleServer, Addrs: third.Addrs()},
	}})
	until(t, "the new server is connected", func() bool { _, ok := a.host.Reach(third.ID()); return ok })
	stopTwin()
	last := h.make(t, "last", nil, testFile{name: "bin/last", data: randomBytes(3, 40_000)})
	h.publish(last)
	read(last)
	until(t, "the third server is followed", func() bool { l := a.follower.state(); return l.connected && l.house == third.ID() })
}

// newest is the index of the newest change.
func (h *house) newest() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.index
}
