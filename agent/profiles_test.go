package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// leads makes a link point elsewhere, as a change of generation does.
func leads(t *testing.T, link, target string) {
	t.Helper()
	if err := errors.Join(os.Symlink(target, link+".new"), os.Rename(link+".new", link)); err != nil {
		t.Fatal(err)
	}
}

// followsFast is quick, and looks after profiles all the time.
func followsFast(a *Agent) {
	quick(a)
	a.profiles.every = 20 * time.Millisecond
}

// profileIs waits until state says that the only profile is complete and leads to
// info, with a reason or none.
func profileIs(t *testing.T, a *Agent, info *flox.PathInfo, reason string) {
	t.Helper()
	var p *floxv1.KeptProfile
	defer func() {
		if t.Failed() {
			t.Logf("profile: %v", p)
		}
	}()
	until(t, fmt.Sprintf("the profile is %s, and ready", info.Path), func() bool {
		list := a.complete.state(t.Context()).GetProfiles()
		if len(list) != 1 {
			return false
		}
		p = list[0]
		return p.GetPath() == testStore.Join(info.Path) && p.GetComplete() && strings.Contains(p.GetReason(), reason) && (reason != "" || p.GetReason() == "")
	})
}

// The policy of a profile is that of what it leads to, with all that refers to:
// it goes with the link from generation to generation, over restarts, and what
// the link has left may be evicted again.
func TestPolicyFollowsProfile(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	both := someLibrary(t, h, "both", 80)
	one := someProgram(t, h, "one", 10, both.Path)
	two := someProgram(t, h, "two", 40, both.Path)
	three := someProgram(t, h, "three", 60)
	tmp := t.TempDir()
	dir, real := filepath.Join(tmp, "state"), filepath.Join(tmp, "real")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	leads(t, filepath.Join(tmp, "profiles"), real) // over a directory that is a link
	link := filepath.Join(tmp, "profiles/default")
	leads(t, filepath.Join(real, "default-1-link"), testStore.Join(one.Path))
	leads(t, filepath.Join(real, "default-2-link"), testStore.Join(two.Path))
	leads(t, filepath.Join(tmp, "third"), testStore.Join(three.Path)+"/bin")
	leads(t, link, "default-1-link")
	change := func(cfg *Config) { cfg.StateDir, cfg.Offline = dir, policyNone }
	a, stop := runAgent(t, h, change, followsFast)
	following(t, a)
	ctx := within(t, time.Minute)
	keep := func(a *Agent, policy string) *floxv1.KeptProfile {
		t.Helper()
		answer, err := (&control{a: a}).keep(ctx, &floxv1.KeepRequest{Profiles: []string{link}, Offline: policy})
		if err != nil {
			t.Fatal(err)
		}
		return answer.GetProfiles()[0]
	}
	if p := keep(a, ""); p.GetOffline() != policyUsed || p.GetPath() != testStore.Join(one.Path) || !p.GetComplete() {
		t.Errorf("new, and nothing said of it: %v", p)
	}
	if n := lacking(t, a, one); n == 0 {
		t.Error("nothing of it ran, and all of it is here")
	}
	if p := keep(a, policyClosure); p.GetOffline() != policyClosure {
		t.Errorf("%v", p)
	}
	profileIs(t, a, one, "")
	if lacking(t, a, one) != 0 || lacking(t, a, both) != 0 || policyOf(ctx, t, a, both) != policyClosure || policyOf(ctx, t, a, two) != "" {
		t.Error("what the profile leads to is not here whole, or has another policy")
	}
	set, err := a.roots.set(ctx)
	if err != nil || !set.Has(one.Path.HashPart()) {
		t.Errorf("the storehouse is not told of it: %v", err)
	}

	leads(t, link, "default-2-link")
	profileIs(t, a, two, "")
	gone := func(a *Agent, info *flox.PathInfo) {
		t.Helper()
		until(t, string(info.Path)+" may be evicted", func() bool {
			if _, err := a.cache.GC(ctx, 0); err != nil {
				t.Fatal(err)
			}
			return lacking(t, a, info) > 0
		})
	}
	gone(a, one)
	if lacking(t, a, two) != 0 || lacking(t, a, both) != 0 || policyOf(ctx, t, a, one) != "" {
		t.Error("the generation there is was evicted, or the one before has its policy still")
	}
	stop()

	leads(t, link, "../third") // while no agent runs
	b, stop := runAgent(t, h, change, followsFast)
	profileIs(t, b, three, "")
	gone(b, two)
	gone(b, both)
	if p := keep(b, ""); p.GetOffline() != policyClosure {
		t.Errorf("policy after a keep that says nothing of it: %v", p)
	}
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	profileIs(t, b, three, "leads into the store no more")
	stop()

	c, _ := runAgent(t, h, change, followsFast)
	profileIs(t, c, three, "leads into the store no more")
	if _, err := c.cache.GC(ctx, 0); err != nil || lacking(t, c, three) != 0 {
		t.Errorf("what the link led to was evicted: %v", err)
	}
	answer, err := (&control{a: c}).unkeep(root(ctx), &floxv1.KeepRequest{Profiles: []string{link}})
	if err != nil || answer.GetProfiles()[0].GetPath() != testStore.Join(three.Path) {
		t.Fatalf("%v %v", answer, err)
	}
	gone(c, three)
	if owners, err := c.cache.Owners(ctx); err != nil || len(owners) != 0 || len(c.complete.state(ctx).GetProfiles()) != 0 {
		t.Errorf("left of it: %q, %v", owners, err)
	}
}

// What cannot be read keeps what it had, and its policy; who names it first hears
// why it cannot be kept.
func TestProfilesThatCannotBeRead(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	dir := t.TempDir()
	link := filepath.Join(dir, "profile")
	leads(t, link, testStore.Join(prog.Path))
	hangs := false // the file system of the link
	a, _ := runAgent(t, h, nil, func(a *Agent) {
		followsFast(a)
		read := a.profiles.read
		a.profiles.read = func(ctx context.Context, name string) (string, error) {
			if hangs {
				return "", fmt.Errorf("%s: %w", name, warden.ErrUnread)
			}
			return read(ctx, name)
		}
	})
	following(t, a)
	c, ctx := &control{a: a}, within(t, time.Minute)
	keep := func(name string) error {
		_, err := c.keep(ctx, &floxv1.KeepRequest{Profiles: []string{name}, Offline: policyClosure})
		return err
	}
	leads(t, filepath.Join(dir, "dangling"), filepath.Join(dir, "nothing"))
	leads(t, filepath.Join(dir, "circle"), "circle")
	leads(t, filepath.Join(dir, "outside"), "/etc/hostname")
	leads(t, filepath.Join(dir, "store"), string(testStore))
	leads(t, filepath.Join(dir, "invalid"), testStore.Join("00000000000000000000000000000000-nobody"))
	for name, want := range map[string]error{
		filepath.Join(dir, "none"): flox.ErrNotFound, filepath.Join(dir, "dangling"): flox.ErrNotFound, filepath.Join(dir, "circle"): flox.ErrNotFound,
		filepath.Join(dir, "outside"): flox.ErrNotFound, filepath.Join(dir, "store"): flox.ErrNotFound, filepath.Join(dir, "invalid"): flox.ErrNotFound,
		dir: flox.ErrNotFound, "relative": flox.ErrBadInput, "/a/../b": flox.ErrBadInput, "/" + strings.Repeat("x", 5000): flox.ErrBadInput,
		testStore.Join(prog.Path): flox.ErrBadInput,
	} {
		if err := keep(name); !errors.Is(err, want) {
			t.Errorf("%.80s: %v, want %v", name, err, want)
		}
		if n := len(a.profiles.list()); n != 0 {
			t.Fatalf("%.80s: %d profiles are kept all the same", name, n)
		}
	}
	if err := keep(link); err != nil {
		t.Fatal(err)
	}
	profileIs(t, a, prog, "")
	if err := a.profiles.enter(ctx); err != nil {
		t.Fatal(err)
	}
	hangs = true
	a.profiles.leave()
	profileIs(t, a, prog, "does not answer")
	if err := keep(filepath.Join(dir, "other")); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a profile that hangs: %v", err)
	}
	if _, err := c.unkeep(root(ctx), &floxv1.KeepRequest{Profiles: []string{link}}); err != nil {
		t.Errorf("one that hangs cannot be let go of: %v", err)
	}
}

// There are at most so many, a damaged list is an error, and what a crash left held
// for a profile that is kept no more is let go of.
func TestProfilesAreBounded(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	dir := t.TempDir()
	a, stop := runAgent(t, h, func(cfg *Config) { cfg.StateDir = dir }, quick)
	following(t, a)
	ctx := within(t, time.Minute)
	if err := a.keepAs(ctx, profileOwner("/kept/no/more")+string(prog.Path), prog); err != nil {
		t.Fatal(err)
	}
	p := profile{Policy: policyNone, Path: prog.Path, Held: true}
	for i := range maxProfiles {
		a.profiles.links[fmt.Sprintf("/p/%d", i)] = p
	}
	if err := a.profiles.put("/p/more", &p); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one more than %d: %v", maxProfiles, err)
	}
	if err := a.profiles.put("/p/0", nil); err != nil {
		t.Fatal(err)
	}
	usersShare(t, a, prog)
	stop()
	b, stop := runAgent(t, h, func(cfg *Config) { cfg.StateDir = dir }, quick)
	if n := len(b.profiles.list()); n != maxProfiles-1 {
		t.Errorf("%d profiles after a restart", n)
	}
	until(t, "nothing is held for one that is kept no more", func() bool {
		owners, err := b.cache.Owners(ctx)
		return err == nil && len(owners) == 0
	})
	stop()
	for _, text := range []string{"{", `{"/p":{"policy":"some","path":"` + string(prog.Path) + `"}}`, `{"/p":{"policy":"none","path":"x"}}`, "null"} {
		if err := os.WriteFile(filepath.Join(dir, "profiles.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openProfiles(b, filepath.Join(dir, "profiles.json")); err == nil {
			t.Errorf("%s: taken", text)
		}
	}
}

// usersShare checks that no user, nor all of them together, takes what is root's,
// and that each lets go of their own only.
func usersShare(t *testing.T, a *Agent, prog *flox.PathInfo) {
	t.Helper()
	before := a.profiles.list()
	c, dir := &control{a: a}, t.TempDir()
	by := func(uid int) context.Context { return context.WithValue(within(t, time.Minute), callerKey{}, uid) }
	if err := a.profiles.put("/p/1", nil); err != nil {
		t.Fatal(err)
	}
	one := filepath.Join(dir, "one")
	leads(t, one, testStore.Join(prog.Path))
	keep := &floxv1.KeepRequest{Profiles: []string{one}, Offline: policyNone}
	if _, err := c.keep(by(1000), keep); err != nil {
		t.Fatal(err)
	}
	lists := map[string]profile{one: a.profiles.list()[one]}
	if p := lists[one]; p.User != 1000 {
		t.Errorf("kept by %d: %+v", p.User, p)
	}
	if _, err := c.keep(by(1001), &floxv1.KeepRequest{Profiles: []string{one}, Offline: policyUsed}); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("another user's policy was changed: %v", err)
	}
	for _, ctx := range []context.Context{by(1001), context.Background()} {
		if _, err := c.unkeep(ctx, keep); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("somebody else let go of it: %v", err)
		}
	}
	fill := func(n int, user func(int) int) {
		a.profiles.mu.Lock()
		defer a.profiles.mu.Unlock()
		a.profiles.links = maps.Clone(lists)
		for i := 1; i < n; i++ {
			a.profiles.links[fmt.Sprintf("/q/%d", i)] = profile{Policy: policyNone, Path: prog.Path, User: user(i)}
		}
	}
	fill(maxProfilesOf, func(int) int { return 1000 })
	two := filepath.Join(dir, "two")
	leads(t, two, testStore.Join(prog.Path))
	other := &floxv1.KeepRequest{Profiles: []string{two}, Offline: policyNone}
	if _, err := c.keep(by(1000), other); !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), "user 1000 keeps 32") {
		t.Errorf("one more than a user may: %v", err)
	}
	if _, err := c.keep(by(1000), keep); err != nil {
		t.Errorf("one that is kept already: %v", err)
	}
	fill(maxProfilesOfUsers, func(i int) int { return 1000 + i })
	if _, err := c.keep(by(7), other); !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), "the others are root's") {
		t.Errorf("one more than users may: %v", err)
	}
	if _, err := c.keep(by(0), other); err != nil {
		t.Errorf("one of root's: %v", err)
	}
	if _, err := c.unkeep(by(1000), keep); err != nil {
		t.Errorf("their own: %v", err)
	}
	if err := storeKept(a.profiles.file, "kept profiles", before); err != nil {
		t.Fatal(err)
	}
}

// A generation that was built here is kept where it lies, and what it refers to as
// any other; once the storehouse has it, it is held in the cache.
func TestProfileOfWhatIsStaged(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	a, _ := runAgent(t, h, nil, followsFast)
	following(t, a)
	ctx, c := within(t, time.Minute), &control{a: a}
	env := addText(t, a, "env", randomBytes(3, 300_000), prog.Path)
	link := filepath.Join(t.TempDir(), "profile")
	leads(t, link, testStore.Join(env.Info.Path))
	if _, err := c.keep(ctx, &floxv1.KeepRequest{Profiles: []string{link}, Offline: policyClosure}); err != nil {
		t.Fatal(err)
	}
	profileIs(t, a, env.Info, "")
	held := func() bool {
		owners, err := a.profiles.owners(ctx, profileOwner(link)+string(env.Info.Path))
		if err != nil {
			t.Fatal(err)
		}
		return len(owners) > 0
	}
	if lacking(t, a, prog) != 0 || held() {
		t.Error("what it refers to is not here, or what is staged is held in the cache")
	}
	if _, err := a.PublishStaged(ctx, env.Info.Path); err != nil {
		t.Fatal(err)
	}
	if err := a.tidyStaged(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.profiles.enter(ctx); err != nil {
		t.Fatal(err)
	}
	st := a.profiles.state(link)
	st.pause, st.until = 0, time.Time{} // it was tried in vain meanwhile
	a.profiles.leave()
	until(t, "it is held once the storehouse has it", held)
	profileIs(t, a, env.Info, "")
}
