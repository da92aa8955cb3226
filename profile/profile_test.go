package profile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

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

func newLog(t *testing.T, p Processor) *log {
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
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	l.t.Cleanup(cancel)
	return ctx
}

// apply proposes a command of a user; "ADMIN" is an admin.
func (l *log) apply(user string, c *floxv1.ProfilesCommand) (*floxv1.ProfilesReply, error) {
	c.Actor, c.Admin = &floxv1.Actor{Machine: "desk", User: user}, user == "ADMIN"
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	reply, _, err := l.node.Propose(l.within(), Kind, b, raft.ProposeOptions{})
	if err != nil {
		return nil, err
	}
	r := &floxv1.ProfilesReply{}
	return r, proto.Unmarshal(reply, r)
}

// must is apply of what may not be refused; it gives the profile after it.
func (l *log) must(user string, c *floxv1.ProfilesCommand) *floxv1.Profile {
	l.t.Helper()
	r, err := l.apply(user, c)
	if err != nil || r.GetMoved() {
		l.t.Fatal(err, r.GetMoved())
	}
	return r.GetProfile()
}

func (l *log) view(f func(r *raft.Reader) error) {
	l.t.Helper()
	r, err := l.node.View(l.within(), Kind, raft.Linearizable)
	if err == nil {
		err = errors.Join(f(r), r.Close())
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

const linux = "x86_64-linux"

func create(name string, systems ...string) *floxv1.ProfilesCommand {
	if len(systems) == 0 {
		systems = []string{linux}
	}
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{Name: name, Systems: systems}}}
}

func change(p *floxv1.Profile, set []*floxv1.Package, drop ...string) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Change{Change: &floxv1.NewGeneration{
		Profile: p.GetName(), Live: p.GetLive(), Created: p.GetCreatedIndex(), Set: set, Drop: drop, Kind: "install",
	}}}
}

func rollback(p *floxv1.Profile, to uint64) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Switch{Switch: &floxv1.LiveGeneration{
		Profile: p.GetName(), Live: p.GetLive(), Created: p.GetCreatedIndex(), To: to,
	}}}
}

func grant(name, user, role string) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Grants{Grants: &floxv1.SetGrants{
		Profile: name, Grants: []*floxv1.ProfileGrant{{User: user, Role: role}},
	}}}
}

// pkg is a package for some systems, one if none is named.
func pkg(name, version string, systems ...string) *floxv1.Package {
	if len(systems) == 0 {
		systems = []string{linux}
	}
	p := &floxv1.Package{Name: name, Version: version, Priority: DefaultPriority}
	for i, s := range systems {
		hash := strings.Repeat(string("0123456789abcdfghijklmnpqrsvwxyz"[i]), 32)
		p.Paths = append(p.Paths, &floxv1.PackagePaths{System: s, Paths: []string{hash + "-" + name + "-" + version}})
	}
	return p
}

func pkgs(p ...*floxv1.Package) []*floxv1.Package { return p }

// words says what the packages of a generation are.
func words(g *floxv1.Generation) string {
	var out []string
	for _, p := range g.GetPackages() {
		out = append(out, p.GetName()+" "+p.GetVersion())
	}
	return strings.Join(out, ", ")
}

// A profile's life: generations keep their true parent, a rollback goes to what was live
// before and holds, and the history says who did what.
func TestProfile(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("Alice/default"))
	p = l.must("alice", change(p, pkgs(pkg("git", "2.50"), pkg("curl", "8"))))
	p = l.must("alice", change(p, pkgs(pkg("git", "2.51")), "curl"))
	if p.GetLive() != 2 || p.GetHeld() {
		t.Errorf("after two changes: %v", p)
	}
	p = l.must("alice", rollback(p, 1))
	if p.GetLive() != 1 || !p.GetHeld() || p.GetLast() != 2 {
		t.Errorf("rolled back: %v", p)
	}
	p = l.must("alice", change(p, pkgs(pkg("jq", "1.7"))))
	if p.GetLive() != 3 || p.GetHeld() {
		t.Errorf("changed after that: %v", p)
	}
	l.view(func(r *raft.Reader) error {
		for number, want := range map[uint64]struct {
			parent uint64
			words  string
		}{1: {0, "curl 8, git 2.50"}, 2: {1, "git 2.51"}, 3: {1, "curl 8, git 2.50, jq 1.7"}} {
			g, err := ReadGeneration(r, "alice/DEFAULT", number)
			if err != nil {
				return err
			}
			if g.GetParent() != want.parent || words(g) != want.words || g.GetNumber() != number || g.GetActor().GetUser() != "alice" {
				t.Errorf("generation %d: %v", number, g)
			}
		}
		events, more, err := Events(r, "alice/default", 0, 10)
		if err != nil || more {
			t.Errorf("more than there is: %v", more)
			return err
		}
		var said []string
		for _, e := range events {
			said = append(said, fmt.Sprint(e.GetKind(), " ", e.GetFrom(), ">", e.GetTo(), " ", e.GetDetail()))
		}
		want := []string{"install 1>3 +jq 1.7", "rollback 2>1 ", "install 1>2 -curl 8, git 2.50 -> 2.51", "install 0>1 +curl 8, +git 2.50", "create 0>0 x86_64-linux"}
		if !slices.Equal(said, want) {
			t.Errorf("history: %q, want %q", said, want)
		}
		if events, more, err = Events(r, "alice/default", events[1].GetIndex(), 2); err != nil || len(events) != 2 || !more || events[0].GetTo() != 2 {
			t.Errorf("a part of it: %v %v %v", events, more, err)
		}
		return nil
	})
	if _, err := l.apply("alice", rollback(p, 4)); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("to a generation that is none: %v", err)
	}
}

// A change made on another generation than the one that lives does nothing.
func TestChangesAreMadeOnWhatLives(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("alice/x"))
	first := l.must("alice", change(p, pkgs(pkg("git", "1"))))
	for name, c := range map[string]*floxv1.ProfilesCommand{"change": change(p, pkgs(pkg("jq", "1"))), "rollback": rollback(p, 1)} {
		r, err := l.apply("alice", c)
		if err != nil || !r.GetMoved() || !proto.Equal(r.GetProfile(), first) {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
}

// A profile that was deleted and made again is another one: what was made on a generation
// of the first, with the environment of its packages, is not done to the second.
func TestChangesAreMadeOnTheProfileThatWasSeen(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	lives := func() *floxv1.Profile {
		p := l.must("alice", create("alice/x"))
		p = l.must("alice", change(p, pkgs(pkg("git", "1"))))
		return l.must("alice", change(p, pkgs(pkg("jq", "1"))))
	}
	seen := lives()
	l.must("alice", &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Delete{Delete: "alice/x"}})
	again := lives()
	for name, c := range map[string]*floxv1.ProfilesCommand{"change": change(seen, pkgs(pkg("fd", "1"))), "rollback": rollback(seen, 1)} {
		r, err := l.apply("alice", c)
		if err != nil || !r.GetMoved() || !proto.Equal(r.GetProfile(), again) {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
}

// All systems of a profile or none.
func TestAllSystemsOrNone(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("alice/x", linux, "aarch64-linux", linux))
	_, err := l.apply("alice", change(p, pkgs(pkg("both", "1", linux, "aarch64-linux"), pkg("one", "1"))))
	if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), `"one"`) || !strings.Contains(err.Error(), "aarch64-linux") {
		t.Errorf("one lacks a system: %v", err)
	}
	if _, err = l.apply("alice", change(p, pkgs(pkg("odd", "1", linux, "aarch64-linux", "riscv64-linux")))); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("another system: %v", err)
	}
	p = l.must("alice", change(p, pkgs(pkg("both", "1", linux, "aarch64-linux"))))
	if p.GetLive() != 1 {
		t.Errorf("refused changes left something: %v", p)
	}
}

// Who may do what; each refusal says which role is missing.
func TestRoles(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	denied := func(user string, c *floxv1.ProfilesCommand, words string) {
		t.Helper()
		if _, err := l.apply(user, c); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: got %v, want ErrDenied with %q", user, err, words)
		}
	}
	denied("bob", create("alice/x"), "bob/…")
	denied("", create("alice/x"), "nobody")
	p := l.must("Alice", create("alice/x"))
	denied("bob", change(p, pkgs(pkg("git", "1"))), "the role writer there, and bob has none")
	l.must("alice", grant("alice/x", "BOB", Writer))
	l.must("bob", change(p, pkgs(pkg("git", "1"))))
	denied("bob", grant("alice/x", "eve", Owner), "the role owner there, and bob has writer")
	denied("bob", &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Delete{Delete: "alice/x"}}, "owner")
	p = l.must("alice", grant("alice/x", "*", Reader))
	if Role(p, "eve") != Reader || Role(p, "bob") != Writer || Role(p, "ALICE") != Owner || May(p, "", Reader) != nil {
		t.Errorf("roles: %v", p.GetGrants())
	}
	if _, err := l.apply("alice", grant("alice/x", "*", Writer)); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("everybody may write: %v", err)
	}
	p = l.must("ADMIN", create("acme/base"))
	if Role(p, "ADMIN") != Owner {
		t.Errorf("who made it for an organisation: %v", p)
	}
	l.must("alice", grant("alice/x", "bob", ""))
	denied("bob", change(&floxv1.Profile{Name: "alice/x", Live: 1}, nil), "bob has reader")
}

// Names are compared without case and keep their spelling; others are refused.
func TestNames(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.must("alice", create("Alice/CI"))
	if _, err := l.apply("alice", create("alice/ci")); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "Alice/CI") {
		t.Errorf("the same in another case: %v", err)
	}
	for _, name := range []string{"", "alice", "/x", "alice/", "alice/x/y", "alice/-x", "alice/ x", "alice/..", "alice/x@1", "alice/" + strings.Repeat("x", 64), "al\x00ice/x"} {
		if _, err := l.apply("ADMIN", create(name)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "a/b", "a b", "a@1", "ä", strings.Repeat("x", 129)} {
		if packageName(name) {
			t.Errorf("package %q", name)
		}
	}
}

// What is kept is bounded; the generation that lives stays, and so do packages that a
// kept generation has. A deleted profile leaves nothing.
func TestBounds(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{maxGenerations: 4, maxEvents: 6, maxChanges: 5})
	p := l.must("alice", create("alice/x"))
	for i := range 10 {
		p = l.must("alice", change(p, pkgs(pkg("git", fmt.Sprint(i)), pkg("stays", "1"))))
		if i == 7 {
			p = l.must("alice", rollback(p, 6))
		}
	}
	l.view(func(r *raft.Reader) error {
		generations, packages := 0, map[string]bool{}
		err := errors.Join(
			Generations(r, func(string, *floxv1.Generation) bool { generations++; return true }),
			Packages(r, func(p *floxv1.Package) bool { packages[p.GetName()+" "+p.GetVersion()] = true; return true }))
		if generations != 4 || len(packages) != 5 || !packages["stays 1"] || p.GetFirst() != 7 {
			t.Errorf("%d generations and %v are kept, from %d on", generations, packages, p.GetFirst())
		}
		events, _, again := Events(r, "alice/x", 0, 100)
		if len(events) != 6 {
			t.Errorf("%d events are kept", len(events))
		}
		if _, ok, _ := Changes(r, 1); ok {
			t.Error("a change that was forgotten is not said to be")
		}
		if names, ok, err := Changes(r, r.Index()-1); !ok || err != nil || !slices.Equal(names, []string{"alice/x"}) {
			t.Errorf("the last change: %v %v %v", names, ok, err)
		}
		return errors.Join(err, again)
	})
	l.must("alice", &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Delete{Delete: "ALICE/x"}})
	l.view(func(r *raft.Reader) error {
		return r.Iterate(nil, nil, func(key, _ []byte) bool {
			if key[0] != changeKey && key[0] != countsKey {
				t.Errorf("%q is left of a deleted profile", key)
			}
			return true
		})
	})
}

// Many change one profile at once: every change that was acknowledged is in the history
// once, and in what lives.
func TestManyWriters(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.must("alice", create("alice/x"))
	const writers, each = 20, 5
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			p := &floxv1.Profile{Name: "alice/x"}
			for n := 0; n < each; {
				r, err := l.apply("alice", change(p, pkgs(pkg(fmt.Sprintf("p-%d-%d", w, n), "1"))))
				if err != nil {
					t.Error(err)
					return
				}
				if p = r.GetProfile(); !r.GetMoved() {
					n++
				}
			}
		})
	}
	all.Wait()
	l.view(func(r *raft.Reader) error {
		p, err := Find(r, "alice/x")
		if err != nil {
			return err
		}
		g, err := ReadGeneration(r, "alice/x", p.GetLive())
		if err != nil {
			return err
		}
		if p.GetLive() != writers*each || len(g.GetPackages()) != writers*each {
			t.Errorf("generation %d lives with %d packages, want %d of both", p.GetLive(), len(g.GetPackages()), writers*each)
		}
		events, _, err := Events(r, "alice/x", 0, 1000)
		added := map[string]int{}
		for _, e := range events {
			added[e.GetDetail()]++
		}
		for w := range writers {
			for n := range each {
				if name := fmt.Sprintf("+p-%d-%d 1", w, n); added[name] != 1 {
					t.Errorf("%s is %d times in the history", name, added[name])
				}
			}
		}
		return err
	})
}

// Two changes made on one generation either conflict, whichever comes first, or give the
// same in either order.
func TestChangesMerge(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b", "c", "d"}
	version := rapid.SampledFrom([]string{"1", "2"})
	some := rapid.Custom(func(t *rapid.T) []*floxv1.Package {
		var out []*floxv1.Package
		for _, n := range names {
			if rapid.Bool().Draw(t, "has "+n) {
				out = append(out, pkg(n, version.Draw(t, n)))
			}
		}
		return out
	})
	p := &floxv1.Profile{Name: "alice/x", Systems: []string{linux}}
	rapid.Check(t, func(t *rapid.T) {
		base := some.Draw(t, "base")
		type edit struct {
			set  []*floxv1.Package
			drop []string
		}
		draw := func(label string) edit {
			e := edit{set: some.Draw(t, label)}
			for _, b := range base {
				if rapid.Bool().Draw(t, label+" drops "+b.GetName()) {
					e.drop = append(e.drop, b.GetName())
					e.set = slices.DeleteFunc(e.set, func(s *floxv1.Package) bool { return s.GetName() == b.GetName() })
				}
			}
			return e
		}
		apply := func(to []*floxv1.Package, e edit) []*floxv1.Package {
			// What both drop is gone once.
			e.drop = slices.DeleteFunc(slices.Clone(e.drop), func(name string) bool { return byName(to)[name] == nil })
			out, err := Apply(p, to, e.set, e.drop)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		x, y := draw("x"), draw("y")
		onX, onY := apply(base, x), apply(base, y)
		yx, xy := Conflicts(base, onX, y.set, y.drop), Conflicts(base, onY, x.set, x.drop)
		merged, other := apply(onX, y), apply(onY, x)
		if len(yx) == 0 && len(xy) == 0 && len(Differences(merged, other)) > 0 {
			t.Fatalf("no conflict, and the order matters: %s", Describe(merged, other))
		}
		for _, c := range yx {
			if same(byName(onX)[c.Name], byName(onY)[c.Name]) {
				t.Fatalf("%s is a conflict, and both make it alike", c.Name)
			}
			if same(byName(base)[c.Name], byName(onX)[c.Name]) {
				t.Fatalf("%s is a conflict, and the earlier change left it as it was", c.Name)
			}
		}
		if len(yx) == 0 { // then the later one has all it wanted, and the earlier one what the later did not touch
			for _, s := range y.set {
				if !same(byName(merged)[s.GetName()], s) {
					t.Fatalf("%s is not as the later change made it", s.GetName())
				}
			}
		}
	})
}
