package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

// house is a storehouse of several servers in this process.
type house struct {
	t       *testing.T
	servers []*Server
	stops   []func()
	configs []Config
}

// clusterConfig is testConfig of one of several servers.
func clusterConfig(dir string) Config {
	c := testConfig(dir)
	c.Consensus, c.promoteAfter = "127.0.0.1:0", 200*time.Millisecond
	return c
}

// newHouse starts so many servers and waits until all of them vote.
func newHouse(t *testing.T, n int, change ...func(*Config)) *house {
	t.Helper()
	h := &house{t: t}
	for range n {
		h.add(change...)
	}
	return h
}

// add starts one more server and waits until it votes.
func (h *house) add(change ...func(*Config)) {
	h.t.Helper()
	cfg := clusterConfig(h.t.TempDir())
	for _, f := range change {
		f(&cfg)
	}
	i := len(h.servers)
	if i > 0 {
		h.tell(cfg)
	}
	h.configs = append(h.configs, cfg)
	h.servers, h.stops = append(h.servers, nil), append(h.stops, nil)
	h.start(i)
}

// tell writes what a server that joins is told of the others.
func (h *house) tell(cfg Config) {
	h.t.Helper()
	inv := *h.servers[0].Invite()
	inv.Storehouse = nil
	for _, s := range h.servers {
		inv.Storehouse = append(inv.Storehouse, api.InvitePeer{ID: string(s.id.peer), Addrs: s.swarm.Addrs()})
	}
	if err := inv.Save(filepath.Join(cfg.StateDir, joinedName)); err != nil {
		h.t.Fatal(err)
	}
}

// start runs server i, which keeps its ports when it is started again, and has
// the others take it in.
func (h *house) start(i int) {
	h.t.Helper()
	s, _ := h.run(i)
	if _, there := h.servers[0].roster.machine(s.id.peer); i > 0 && !there {
		h.admit(s, fmt.Sprint("s", i+1))
	}
	if err := s.Ready(within(h.t)); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		if h.t.Failed() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			list, err := s.node.Servers(ctx)
			h.t.Logf("server %d is %+v and is told of %+v, %v", i, s.node.Status(), list, err)
		}
	})
	eventually(h.t, "the server votes", func() bool { return h.votes(i) })
}

// run runs server i until stop is called, or the test ends.
func (h *house) run(i int) (s *Server, stop func()) {
	h.t.Helper()
	s, err := New(h.configs[i])
	if err != nil {
		h.t.Fatal(err)
	}
	h.servers[i] = s
	h.configs[i].Consensus = s.line.Addr().String()[len(s.id.peer)+1:]
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Run(ctx) }()
	done := false
	h.stops[i] = func() {
		h.t.Helper()
		if done {
			return
		}
		done = true
		cancel()
		if err := <-result; err != nil {
			h.t.Errorf("server %d: %v", i, err)
		}
	}
	h.t.Cleanup(h.stops[i])
	return s, h.stops[i]
}

// admit makes a server that runs a member.
func (h *house) admit(s *Server, name string) {
	h.t.Helper()
	_, public, err := sealKey(s.id.machine)
	if err != nil {
		h.t.Fatal(err)
	}
	_, err = h.servers[0].proposeMembers(within(h.t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: &floxv1.Machine{
		Peer: string(s.id.peer), Name: name, Role: members.Server, RaftAddress: s.line.Addr().String(), Addrs: s.swarm.Addrs(), SealKey: public[:],
	}}})
	if err != nil {
		h.t.Fatal(err)
	}
}

// votes reports whether the first server that runs takes server i for a voter.
func (h *house) votes(i int) bool {
	return slices.ContainsFunc(h.servers[0].node.Status().Members, func(m cluster.Member) bool {
		return m.ID == string(h.servers[i].id.peer) && m.Voter
	})
}

// eventually waits for something that other goroutines bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// whole reports whether every block of a path is on the disk of a server.
func whole(s *Server, p testPath) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	info, err := s.Info(ctx, p.info.Path.HashPart())
	if err != nil {
		return false
	}
	d, err := s.hurt(ctx, info, nil)
	return err == nil && d == nil
}

func TestServersShareFactsAndContent(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	first := makePath(t, "first", 300_000)
	publish(t, h.servers[0], first)
	second := makePath(t, "second", 200_000, first.info.Path)
	publish(t, h.servers[2], second) // whoever is asked, leader or not
	for i, s := range h.servers {
		eventually(t, "a server has all content", func() bool { return whole(s, first) && whole(s, second) })
		checkWhole(t, s, second)
		if stat := s.packs.Stat(); stat.Blocks == 0 {
			t.Errorf("server %d keeps no block of its own", i)
		}
	}
}

func TestPathIsValidOnlyWithItsContentOnAMajority(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	h.stops[2]()
	away := makePath(t, "away", 400_000)
	publish(t, h.servers[1], away)
	if !whole(h.servers[0], away) || !whole(h.servers[1], away) {
		t.Error("a path is valid and its content not on two of three servers")
	}
	// Without a majority nothing becomes valid, and the caller hears of it.
	h.stops[1]()
	alone := makePath(t, "alone", 1000)
	if _, _, err := h.servers[0].Publish(within(t), alone.info, alone.reader(), "tester"); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a single server of three made a path valid, or does not say why not: %v", err)
	}
	// They come back: the one that was away brings what it missed.
	h.start(1)
	h.start(2)
	eventually(t, "the server that was away has the content", func() bool { return whole(h.servers[2], away) })
	publish(t, h.servers[2], makePath(t, "later", 1000))
}

// What makes a path valid is its content on a majority, not that servers bring
// later what they lack: here they do not.
func TestPublishingPlacesContentOnAMajority(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3, func(c *Config) { c.noCatchUp = true })
	for i, s := range h.servers {
		p := makePath(t, fmt.Sprint("placed-", i), 300_000)
		publish(t, s, p)
		on := 0
		for _, s := range h.servers {
			if whole(s, p) {
				on++
			}
		}
		if on < 2 {
			t.Errorf("a path published at server %d is valid and its content on %d of three servers", i, on)
		}
	}
}

func TestServerThatLostItsDiskBringsEverythingAgain(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	var paths []testPath
	for _, name := range []string{"one", "two", "three"} {
		paths = append(paths, makePath(t, name, 100_000))
		publish(t, h.servers[0], paths[len(paths)-1])
	}
	has := func(s *Server) bool {
		return !slices.ContainsFunc(paths, func(p testPath) bool { return !whole(s, p) })
	}
	eventually(t, "the third has everything", func() bool { return has(h.servers[2]) })
	h.stops[2]()
	if err := os.RemoveAll(stateFile(h.servers[2], "packs")); err != nil {
		t.Fatal(err)
	}
	h.start(2)
	eventually(t, "the third has everything again", func() bool { return has(h.servers[2]) })
}

func TestOnlyServersFetchFromServers(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	calls := &houses{Server: s, slots: make(chan struct{}, 1)}
	if err := calls.caller("12D3KooWJRSrypvnpHgc6ZAgyCni4KcSmbV7uGRaMw5LgMKT18fq"); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a stranger may have a server fetch blocks: %v", err)
	}
	if err := calls.caller(string(s.id.peer)); err != nil {
		t.Errorf("a server may not: %v", err)
	}
}

func TestServerThatIsRemovedIsCutOff(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	gone := h.servers[2]
	version := h.servers[0].sealed.Load()
	_, err := h.servers[1].proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{
		Peer: string(gone.id.peer), Reason: "stolen", Revoked: true,
	}}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it takes part no more", func() bool { return !h.votes(2) })
	eventually(t, "the keys are sealed anew", func() bool { return h.servers[0].sealed.Load() > version && h.servers[1].sealed.Load() > version })
	if _, err := openSecrets(h.servers[0].roster.now.Load().secrets, gone.id.peer, gone.id.machine); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("the removed server opens the new box: %v", err)
	}
	if h.servers[0].servers.allowed(gone.id.peer) {
		t.Error("the removed server is let in")
	}
	eventually(t, "the trust list names those that are left", func() bool {
		lists, err := h.servers[1].trustLists(within(t), 0)
		if err != nil {
			t.Fatal(err)
		}
		list, err := content.ParseTrustList(lists[len(lists)-1])
		return err == nil && len(list.Voters) == 2 && !slices.Contains(list.Voters, string(gone.id.peer))
	})
	publish(t, h.servers[1], makePath(t, "after", 1000))
}

// Whoever takes the server that leads out of the member list, it is out of the log and
// cut off then: it leads no more, and is not believed meanwhile.
func TestLeaderThatIsNoMemberAnyMoreHandsOver(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	gone, left := h.servers[0], h.servers[1:]
	if err := left[0].node.Transfer(within(t), string(gone.id.peer)); err != nil {
		t.Fatal(err)
	}
	version := left[0].sealed.Load()
	_, err := left[0].proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{
		Peer: string(gone.id.peer), Reason: "stolen", Revoked: true,
	}}})
	if err != nil {
		t.Fatal(err)
	}
	header, err := forWhom(&floxv1.Actor{User: "thief"})
	if err != nil {
		t.Fatal(err)
	}
	if who, err := (&admin{s: left[0]}).passedOn(gone.id.peer, header); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("what a revoked server passes on is believed to come from %v, %v", who, err)
	}
	for _, s := range left {
		eventually(t, "another server leads, and the one that is gone is let in no more", func() bool {
			st := s.node.Status()
			return st.Leader != "" && st.Leader != string(gone.id.peer) && len(st.Members) == 2 && !s.servers.allowed(gone.id.peer)
		})
		eventually(t, "the keys are sealed anew", func() bool { return s.sealed.Load() > version && !s.keysKnownTo(string(gone.id.peer)) })
	}
	publish(t, left[1], makePath(t, "after", 1000))
}

func TestRotIsRepairedFromAnotherServer(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	p := makePath(t, "precious", 2_000_000)
	publish(t, h.servers[0], p)
	eventually(t, "the third has it", func() bool { return whole(h.servers[2], p) })
	rot := func(from, every int) {
		t.Helper()
		h.stops[2]()
		packs, err := filepath.Glob(stateFile(h.servers[2], "packs/packs/*.pack"))
		if err != nil || len(packs) == 0 {
			t.Fatalf("packs %v, %v", packs, err)
		}
		for _, f := range packs {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for at := from; at < len(b); at += every {
				b[at] ^= 0x10
			}
			if err := os.WriteFile(f, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	// All of it, manifests as well, which a server reads when it does not know what it has.
	rot(16, 32)
	if err := os.Remove(stateFile(h.servers[2], "placed.json")); err != nil {
		t.Fatal(err)
	}
	h.start(2)
	eventually(t, "it has what it read again", func() bool {
		info, err := h.servers[2].Info(within(t), p.info.Path.HashPart())
		if err != nil {
			return false
		}
		_, err = content.OpenManifest(within(t), info.Manifest, h.servers[2].packs)
		return err == nil
	})
	h.configs[2].scrubEvery = 10 * time.Millisecond
	rot(4096, 100_000)
	h.start(2)
	eventually(t, "what rotted is whole again", func() bool {
		bad := 0
		err := h.servers[2].packs.Scrub(within(t), func(flox.CID, error) { bad++ })
		return err == nil && bad == 0
	})
	checkWhole(t, h.servers[2], p)
}
