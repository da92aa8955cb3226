package storehouse

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

// Many people change one profile through all servers at once: each change that was
// acknowledged is there, once, whichever server is asked.
func TestProfileOfManyWriters(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3, func(c *Config) { c.Socket = filepath.Join(t.TempDir(), "s.sock") })
	newProfile(t, h.servers[0], "alice/x")
	const writers, each = 9, 4
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			s := h.servers[w%3]
			for n := range each {
				name := fmt.Sprintf("p%d-%d", w, n)
				p := makeTool(t, name)
				if _, _, err := s.Publish(within(t), p.info, p.reader(), "tester"); err != nil {
					t.Error(err)
					return
				}
				_, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/x", Set: []*floxv1.Package{asPackage(name, "1", p)}, Kind: "install"})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for i, s := range h.servers {
		out, err := operatorOf(t, s).ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: "alice/x"}))
		if err != nil {
			t.Fatal(api.FromConnect(err))
		}
		if g := out.Msg.GetGeneration(); g.GetNumber() != writers*each || len(g.GetPackages()) != writers*each {
			t.Errorf("server %d: generation %d lives with %d packages, want %d of both", i, g.GetNumber(), len(g.GetPackages()), writers*each)
		}
	}
	history, err := operatorOf(t, h.servers[1]).ProfileHistory(within(t), connect.NewRequest(&floxv1.ProfileHistoryRequest{Name: "alice/x"}))
	if err != nil {
		t.Fatal(api.FromConnect(err))
	}
	said := map[string]int{}
	for _, e := range history.Msg.GetEvents() {
		said[e.GetDetail()]++
	}
	for w := range writers {
		for n := range each {
			if name := fmt.Sprintf("+p%d-%d 1", w, n); said[name] != 1 {
				t.Errorf("%s is %d times in the history", name, said[name])
			}
		}
	}
}
