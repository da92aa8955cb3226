package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/profile"
)

const linux = "x86_64-linux"

// asPackage is a package of paths that are for linux.
func asPackage(name, version string, paths ...testPath) *floxv1.Package {
	p := &floxv1.Package{Name: name, Version: version, Priority: profile.DefaultPriority}
	at := &floxv1.PackagePaths{System: linux}
	for _, path := range paths {
		at.Paths = append(at.Paths, string(path.info.Path))
	}
	p.Paths = append(p.Paths, at)
	return p
}

// makeTool makes a path with bin/NAME and nothing else; what it is called decides its hash.
func makeTool(t *testing.T, name string, calls ...string) testPath {
	t.Helper()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	err := errors.Join(w.Entry(nix.NarEntry{Kind: flox.Directory}), w.Entry(nix.NarEntry{Path: "bin", Kind: flox.Directory}))
	for _, call := range append(calls, name)[:1] {
		err = errors.Join(err, w.Entry(nix.NarEntry{Path: "bin/" + call, Kind: flox.Regular, Executable: true, Size: uint64(len(name))}))
		_, wrote := io.WriteString(w, name)
		err = errors.Join(err, wrote)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return asPath(name, b.Bytes())
}

// alice is who owns the profiles of these tests.
func alice() person { return person{Actor: &floxv1.Actor{Machine: "desk", User: "alice"}} }

// newProfile makes a profile of alice's.
func newProfile(t *testing.T, s *Server, name string) {
	t.Helper()
	_, err := s.profiles.propose(within(t), alice(), &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{
		Name: name, Systems: []string{linux},
	}}})
	if err != nil {
		t.Fatal(err)
	}
}

// install changes a profile.
func install(t *testing.T, s *Server, name string, set ...*floxv1.Package) *floxv1.ChangeProfileResponse {
	t.Helper()
	out, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: name, Set: set, Kind: "install"})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// linksOf gives where the links of a generation's environment lead.
func linksOf(t *testing.T, s *Server, g *floxv1.Generation) map[string]string {
	t.Helper()
	if len(g.GetEnvironments()) != 1 {
		t.Fatalf("environments %v", g.GetEnvironments())
	}
	info, err := s.Info(within(t), flox.StorePath(g.GetEnvironments()[0].GetPath()).HashPart())
	if err != nil {
		t.Fatal(err)
	}
	m, err := content.OpenManifest(within(t), info.Manifest, s.Blocks())
	if err != nil {
		t.Fatal(err)
	}
	links := map[string]string{}
	err = m.Walk(within(t), 0, func(_ uint32, path string, e flox.Entry) bool {
		if e.Kind == flox.Symlink {
			links[path] = e.Target
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return links
}

// A change makes an environment, a store path like any other, whose links lead to the
// packages; what a kept generation has is not collected, what none has is.
func TestProfilesHaveEnvironments(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, func(c *Config) { c.CollectGrace, c.touchEvery = 20*time.Millisecond, time.Millisecond })
	git, jq, unused := makeTool(t, "git"), makeTool(t, "jq"), makeTool(t, "unused")
	for _, p := range []testPath{git, jq, unused} {
		publish(t, s, p)
	}
	newProfile(t, s, "alice/default")
	first := install(t, s, "alice/default", asPackage("git", "2.50", git))
	second := install(t, s, "ALICE/default", asPackage("jq", "1.7", jq))
	if first.GetGeneration().GetNumber() != 1 || second.GetGeneration().GetNumber() != 2 || second.GetProfile().GetLive() != 2 {
		t.Errorf("generations %v, %v", first.GetGeneration(), second.GetGeneration())
	}
	dir := s.cfg.StoreDir
	links := linksOf(t, s, second.GetGeneration())
	for name, p := range map[string]testPath{"bin/git": git, "bin/jq": jq} {
		if want := dir.Join(p.info.Path) + "/" + name; links[name] != want {
			t.Errorf("%s leads to %q, want %q", name, links[name], want)
		}
	}
	if again := install(t, s, "alice/default", asPackage("jq", "1.7", jq)); again.GetGeneration().GetNumber() != 2 {
		t.Errorf("what is so already makes a generation: %v", again.GetGeneration())
	}
	agedMore()
	_, dead, err := collectOver(t, admin, &floxv1.CollectRequest{KeepRecentSeconds: 1, DryRun: true})
	if err != nil || !slices.Equal(dead, []string{string(unused.info.Path)}) {
		t.Errorf("%q would be collected, %v; want what no generation has", dead, err)
	}
	back, err := s.profiles.rollback(within(t), alice(), &floxv1.RollbackProfileRequest{Name: "alice/default"})
	if err != nil || back.GetProfile().GetLive() != 1 || back.GetFrom() != 2 {
		t.Errorf("rollback: %v, %v", back, err)
	}
	if _, err := s.profiles.rollback(within(t), alice(), &floxv1.RollbackProfileRequest{Name: "alice/default"}); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("beyond the first: %v", err)
	}
	if _, err := admin.DeleteProfile(within(t), connect.NewRequest(&floxv1.DeleteProfileRequest{Name: "alice/default"})); err != nil {
		t.Fatal(err)
	}
	agedMore()
	if last, _, err := collectOver(t, admin, &floxv1.CollectRequest{KeepRecentSeconds: 1}); err != nil || last.GetDeadPaths() != 5 {
		t.Errorf("collected %v, %v; want all packages and both environments", last, err)
	}
}

// What cannot be done changes nothing, and says what was wrong.
func TestProfileChangesThatAreRefused(t *testing.T) {
	t.Parallel()
	s, _ := closedHouse(t, nil)
	git, other, absent := makeTool(t, "git"), makeTool(t, "other", "git"), makeTool(t, "absent")
	publish(t, s, git)
	publish(t, s, other)
	newProfile(t, s, "alice/x")
	install(t, s, "alice/x", asPackage("git", "1", git))
	bob := person{Actor: &floxv1.Actor{Machine: "desk", User: "bob"}}
	for name, c := range map[string]struct {
		who   person
		q     *floxv1.ChangeProfileRequest
		want  error
		words string
	}{
		"what is not valid":   {alice(), &floxv1.ChangeProfileRequest{Set: []*floxv1.Package{asPackage("absent", "1", absent)}}, flox.ErrNotFound, string(absent.info.Path)},
		"the same file twice": {alice(), &floxv1.ChangeProfileRequest{Set: []*floxv1.Package{asPackage("other", "1", other)}}, flox.ErrBadInput, "bin/git"},
		"what is not there":   {alice(), &floxv1.ChangeProfileRequest{Drop: []string{"gi"}}, flox.ErrNotFound, "it has git"},
		"somebody else":       {bob, &floxv1.ChangeProfileRequest{Drop: []string{"git"}}, flox.ErrDenied, "writer"},
	} {
		c.q.Name, c.q.Kind = "alice/x", "install"
		if _, err := s.profiles.change(within(t), c.who, c.q); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: got %v, want %v with %q", name, err, c.want, c.words)
		}
	}
	dry, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/x", Set: []*floxv1.Package{asPackage("absent", "1", absent)}, Kind: "install", DryRun: true})
	if err != nil || len(dry.GetGeneration().GetPackages()) != 2 || !slices.Equal(dry.GetMissing(), []string{string(absent.info.Path)}) {
		t.Errorf("dry run of what is not valid: %v, %v", dry, err)
	}
	dry, err = s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/x", Drop: []string{"git"}, Kind: "uninstall", DryRun: true})
	if err != nil || len(dry.GetGeneration().GetPackages()) != 0 || len(dry.GetBefore().GetPackages()) != 1 {
		t.Errorf("dry run: %v, %v", dry, err)
	}
	if out := install(t, s, "alice/x"); out.GetProfile().GetLive() != 1 {
		t.Errorf("something was changed: %v", out.GetProfile())
	}
}

// What a person installs in place of a held package is held, too.
func TestHoldsStay(t *testing.T) {
	t.Parallel()
	s, _ := closedHouse(t, nil)
	one, two := makeTool(t, "one"), makeTool(t, "two")
	publish(t, s, one)
	publish(t, s, two)
	newProfile(t, s, "alice/x")
	held := asPackage("tool", "1", one)
	held.Held = true
	if _, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/x", Set: []*floxv1.Package{held}, Kind: "hold"}); err != nil {
		t.Fatal(err)
	}
	out := install(t, s, "alice/x", asPackage("tool", "2", two))
	if p := out.GetGeneration().GetPackages(); len(p) != 1 || !p[0].GetHeld() || p[0].GetVersion() != "2" {
		t.Errorf("%v, want the new version, held", p)
	}
	freed, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/x", Set: []*floxv1.Package{asPackage("tool", "2", two)}, Kind: "unhold"})
	if p := freed.GetGeneration().GetPackages(); err != nil || len(p) != 1 || p[0].GetHeld() {
		t.Errorf("%v, %v, want it held no more", p, err)
	}
}

// An open storehouse has no members: machines speak for whom they say, and still nobody
// changes what is somebody else's.
func TestProfilesOfAnOpenStorehouse(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	guest := newComputer(t)
	guest.online(s, s.Invite().Secret)
	a := floxv1connect.NewAdminClient(guest.web(s), "http://storehouse")
	ask := func(user, name string) error {
		r := connect.NewRequest(&floxv1.CreateProfileRequest{Name: name, Systems: []string{linux}})
		r.Header().Set(UserHeader, user)
		_, err := a.CreateProfile(within(t), r)
		return api.FromConnect(err)
	}
	if err := ask("alice", "alice/x"); err != nil {
		t.Error(err)
	}
	for user, name := range map[string]string{"bob": "alice/y", "": "/z"} {
		if err := ask(user, name); !errors.Is(err, flox.ErrDenied) && !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q makes %s: %v", user, name, err)
		}
	}
}

// Changes made on one generation merge where they are of different packages; others are
// refused with both sides.
func TestProfileChangesMerge(t *testing.T) {
	t.Parallel()
	s, _ := closedHouse(t, nil)
	paths := map[string]testPath{}
	for _, name := range []string{"a", "b", "c", "d"} {
		paths[name] = makeTool(t, name)
		publish(t, s, paths[name])
	}
	newProfile(t, s, "alice/x")
	base := install(t, s, "alice/x", asPackage("a", "1", paths["a"]), asPackage("b", "1", paths["b"])).GetGeneration().GetNumber()
	install(t, s, "alice/x", asPackage("a", "2", paths["c"]))
	on := func(q *floxv1.ChangeProfileRequest) (*floxv1.ChangeProfileResponse, error) {
		q.Name, q.Kind, q.Parent = "alice/x", "install", base
		return s.profiles.change(within(t), alice(), q)
	}
	out, err := on(&floxv1.ChangeProfileRequest{Drop: []string{"b"}, Set: []*floxv1.Package{asPackage("d", "1", paths["d"])}})
	if err != nil || !out.GetMerged() || profile.Describe(nil, out.GetGeneration().GetPackages()) != "+a 2, +d 1" {
		t.Errorf("different packages: %v, %v", out, err)
	}
	_, err = on(&floxv1.ChangeProfileRequest{Drop: []string{"a"}})
	if !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "theirs is a 2, yours not there") {
		t.Errorf("the same package: %v", err)
	}
	if out, err = on(&floxv1.ChangeProfileRequest{Drop: []string{"b"}}); err != nil || out.GetGeneration().GetNumber() != 3 {
		t.Errorf("what both dropped: %v, %v", out, err)
	}
}

// A hundred people change one profile through all servers at once, while the leader
// changes: each change that was acknowledged is in the history once, with what it was
// made on, and the last ones are in what lives, whichever server is asked.
func TestProfileOfManyWriters(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3, func(c *Config) { c.Socket = filepath.Join(t.TempDir(), "s.sock") })
	newProfile(t, h.servers[0], "alice/x")
	const tools = 5
	writers := 100
	if testing.Short() {
		writers = 30
	}
	var tool []testPath
	for i := range tools {
		tool = append(tool, makeTool(t, fmt.Sprint("tool", i)))
		publish(t, h.servers[i%3], tool[i])
	}
	// Each has one link of its own name, so that environments are small.
	asTool := func(w int, version string) *floxv1.Package {
		p := asPackage(fmt.Sprint("p", w), version, tool[w%tools])
		p.Priority = uint32(w) //nolint:gosec // not negative
		return p
	}
	acked := map[uint64]string{} // generations, and what made them
	var mu sync.Mutex
	var all, handing sync.WaitGroup
	over := make(chan struct{})
	led := map[string]bool{}
	handing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-over:
				return
			case <-time.After(time.Second):
			}
			led[h.servers[i%3].node.Status().Leader] = true
			if err := h.servers[i%3].node.Transfer(within(t), ""); err != nil {
				t.Log(err)
			}
		}
	})
	for w := range writers {
		all.Go(func() {
			parent := uint64(0)
			for n, set := range []*floxv1.Package{asTool(w, "1"), asTool(w, "2")}[:changesOf(w)] {
				// The second is made on what the first gave; others came between.
				out, err := h.servers[(w+n)%3].profiles.change(context.Background(), alice(), &floxv1.ChangeProfileRequest{
					Name: "alice/x", Parent: parent, Set: []*floxv1.Package{set}, Kind: "install", Reason: fmt.Sprint(w, "-", n),
				})
				if err != nil {
					t.Error(err)
					return
				}
				parent = out.GetGeneration().GetNumber()
				mu.Lock()
				acked[parent] = fmt.Sprint(w, "-", n)
				mu.Unlock()
			}
		})
	}
	all.Wait()
	close(over)
	handing.Wait()
	if want := writers + writers/writersTwice; len(led) < 2 || len(acked) != want {
		t.Errorf("%d servers led, and %d generations were acknowledged, want at least 2 and %d", len(led), len(acked), want)
	}
	for i, s := range h.servers {
		checkWriters(t, operatorOf(t, s), i, writers, acked)
	}
	for number := uint64(1); number <= uint64(len(acked)); number += 10 {
		shown, err := operatorOf(t, h.servers[0]).ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: "alice/x", Generation: number}))
		if err != nil {
			t.Fatal(api.FromConnect(err))
		}
		g := shown.Msg.GetGeneration()
		if want, err := h.servers[1].profiles.environment(within(t), linux, g.GetPackages()); err != nil || g.GetEnvironments()[0].GetPath() != string(want) {
			t.Errorf("generation %d has the environment %v, want that of its packages, %s, %v", number, g.GetEnvironments(), want, err)
		}
	}
}

// writersTwice is of how many writers one makes two changes.
const writersTwice = 5

func changesOf(writer int) int {
	if writer%writersTwice == 0 {
		return 2
	}
	return 1
}

// checkWriters looks that a server has all that was acknowledged, once, and nothing else.
func checkWriters(t *testing.T, admin floxv1connect.AdminClient, server, writers int, acked map[uint64]string) {
	t.Helper()
	history, err := admin.ProfileHistory(within(t), connect.NewRequest(&floxv1.ProfileHistoryRequest{Name: "alice/x", Limit: 1000}))
	if err != nil {
		t.Fatal(api.FromConnect(err))
	}
	events := history.Msg.GetEvents()
	slices.Reverse(events)
	have := map[string]*floxv1.Package{}
	for i, e := range events[1:] {
		number := uint64(i + 1) //nolint:gosec // not negative
		if e.GetTo() != number || e.GetFrom() != number-1 || acked[number] != e.GetReason() {
			t.Errorf("server %d: event %d is %v; generation %d was acknowledged to %s", server, i, e, number, acked[number])
		}
		shown, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: "alice/x", Generation: number}))
		if err != nil {
			t.Fatal(api.FromConnect(err))
		}
		g := shown.Msg.GetGeneration()
		changed := profile.Differences(slices.Collect(maps.Values(have)), g.GetPackages())
		if name, _, _ := strings.Cut(e.GetReason(), "-"); g.GetParent() != number-1 || len(changed) != 1 || changed[0].Name != "p"+name {
			t.Errorf("server %d: generation %d, made by %s on %d, is another than its parent in %v", server, number, e.GetReason(), g.GetParent(), changed)
		}
		for _, d := range changed {
			have[d.Name] = d.After
		}
	}
	for w := range writers {
		if p := have[fmt.Sprint("p", w)]; p.GetVersion() != fmt.Sprint(changesOf(w)) {
			t.Errorf("server %d: p%d lives as %v", server, w, p)
		}
	}
	if len(events) != len(acked)+1 {
		t.Errorf("server %d has %d events, want %d", server, len(events), len(acked)+1)
	}
}
