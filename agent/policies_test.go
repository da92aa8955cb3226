package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// keepPath keeps one path, without its closure.
func keepPath(ctx context.Context, t *testing.T, a *Agent, info *flox.PathInfo, offline string) {
	t.Helper()
	c := &control{a: a}
	if _, err := c.Keep(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: []string{string(info.Path)}, Offline: offline})); err != nil {
		t.Fatal(err)
	}
}

// policyOf is what store info says.
func policyOf(ctx context.Context, t *testing.T, a *Agent, info *flox.PathInfo) string {
	t.Helper()
	answer, err := (&control{a: a}).path(ctx, &floxv1.PathRequest{Path: string(info.Path)})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetPaths()[0].GetOffline()
}

// root is a caller who may unkeep.
func root(ctx context.Context) context.Context { return context.WithValue(ctx, callerKey{}, 0) }

func TestKeptClosureIsCompleted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	far := someLibrary(t, h, "far", 90)
	lib := someLibrary(t, h, "lib", 80, far.Path)
	prog := someProgram(t, h, "prog", 10, lib.Path)
	dir := t.TempDir()
	a, stop := runAgent(t, h, func(cfg *Config) { cfg.StateDir, cfg.Offline = dir, policyNone }, quick)
	following(t, a)
	ctx := within(t, time.Minute)
	keepPath(ctx, t, a, prog, "")
	if got := policyOf(ctx, t, a, prog); got != policyUsed {
		t.Errorf("policy of what is new to keep: %q, want used", got)
	}
	time.Sleep(time.Second)
	if n := lacking(t, a, prog); n < 1_000_000 {
		t.Errorf("nothing of it ran, and %d bytes of it are missing only", n)
	}
	keepPath(ctx, t, a, prog, policyClosure)
	ready(t, a, 0, 1)
	for _, info := range []*flox.PathInfo{prog, lib, far} {
		if n := lacking(t, a, info); n != 0 {
			t.Errorf("of %s %d bytes are missing", info.Path, n)
		}
	}
	// A part that is not kept itself is taken away: it comes back.
	if _, err := a.cache.GC(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if n := lacking(t, a, prog); n != 0 {
		t.Errorf("%d bytes of the kept path were evicted", n)
	}
	until(t, "what was taken away is here again", func() bool { return lacking(t, a, lib) == 0 && lacking(t, a, far) == 0 })
	ready(t, a, 0, 1)
	stop()

	b, _ := runAgent(t, h, func(cfg *Config) { cfg.StateDir, cfg.Offline = dir, policyNone }, quick)
	if got := policyOf(ctx, t, b, prog); got != policyClosure {
		t.Errorf("policy after a restart: %q", got)
	}
	keepPath(ctx, t, b, prog, "")
	if got := policyOf(ctx, t, b, prog); got != policyClosure {
		t.Errorf("policy after a keep that says nothing of it: %q", got)
	}
	if _, err := (&control{a: b}).unkeep(root(ctx), &floxv1.KeepRequest{Paths: []string{string(prog.Path)}}); err != nil {
		t.Fatal(err)
	}
	if got := policyOf(ctx, t, b, prog); got != "" {
		t.Errorf("policy of what is not kept: %q", got)
	}
	keepPath(ctx, t, b, prog, "")
	if got := policyOf(ctx, t, b, prog); got != policyUsed {
		t.Errorf("policy of what is kept anew: %q, want used", got)
	}
}

// TestKeptWithPolicyNone: nothing of it is fetched, whatever runs.
func TestKeptWithPolicyNone(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	never, used := someProgram(t, h, "never", 10), someProgram(t, h, "used", 40)
	a, _ := runAgent(t, h, nil, quick)
	ctx := within(t, time.Minute)
	keepPath(ctx, t, a, never, policyNone)
	keepPath(ctx, t, a, used, policyUsed)
	start(ctx, t, a, never, "bin/tool")
	kept(t, a.fetcher)
	before := lacking(t, a, never)
	start(ctx, t, a, used, "bin/tool")
	until(t, "what is kept with the policy used is complete", func() bool { return lacking(t, a, used) == 0 })
	lacks(t, a, never, "offline policy is none")
	until(t, "the used path is ready, and both kept paths are as they should be", func() bool {
		s := a.complete.state(ctx)
		return s.GetUsed() == 2 && s.GetUsedComplete() == 1 && s.GetKept() == 2 && s.GetKeptComplete() == 2
	})
	time.Sleep(time.Second)
	if n := lacking(t, a, never); n != before || n == 0 {
		t.Errorf("%d bytes of it are missing, %d when it was read", n, before)
	}
}

// TestDefaultPolicyClosure: with it the closure of what ran comes whole.
func TestDefaultPolicyClosure(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	far := someLibrary(t, h, "far", 90)
	lib := someLibrary(t, h, "lib", 80, far.Path)
	prog := someProgram(t, h, "prog", 10, lib.Path)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.Offline = policyClosure }, quick)
	start(within(t, time.Minute), t, a, prog, "bin/tool")
	ready(t, a, 1, 0)
	for _, info := range []*flox.PathInfo{prog, lib, far} {
		if n := lacking(t, a, info); n != 0 {
			t.Errorf("of %s %d bytes are missing", info.Path, n)
		}
	}
}

func TestBadPolicies(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	ctx := within(t, time.Minute)
	_, err := (&control{a: a}).Keep(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: []string{string(prog.Path)}, Offline: "some"}))
	if !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("a policy there is not: %v", err)
	}
	if kept, err := a.keptOwners(ctx); err != nil || len(kept) != 0 {
		t.Errorf("kept all the same: %v %v", kept, err)
	}
	if _, err := New(Config{StateDir: t.TempDir(), Socket: "s", Invite: h.invite, Offline: "some"}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("default policy there is not: %v", err)
	}
	file := filepath.Join(t.TempDir(), "offline.json")
	for _, text := range []string{"{", `{"x":{"policy":"some"}}`} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadPolicies(file); err == nil {
			t.Errorf("%s: taken", text)
		}
	}
}

// TestPoliciesOfNobody: an owner that is gone leaves no policy behind, and too
// many are refused as a whole.
func TestPoliciesOfNobody(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "offline.json")
	p, err := loadPolicies(file)
	if err != nil {
		t.Fatal(err)
	}
	many := make(map[string]ownedPolicy)
	for i := range maxPolicies {
		many[fmt.Sprint(i)] = ownedPolicy{Policy: policyNone}
	}
	if err := p.set(map[string]ownedPolicy{"gone": {Policy: policyClosure}, "here": {Policy: policyClosure}}, 0); err != nil {
		t.Fatal(err)
	}
	if err := p.set(many, 0); !errors.Is(err, flox.ErrFull) {
		t.Errorf("%d policies: %v", len(many)+2, err)
	}
	if err := p.retain(func(owner string) bool { return owner == "here" }); err != nil {
		t.Fatal(err)
	}
	if p, err = loadPolicies(file); err != nil || len(p.owners) != 1 || p.of("here").Policy != policyClosure || p.of("gone").Policy != policyUsed {
		t.Errorf("%+v %v", p, err)
	}
}

// TestPoliciesOfUsers: no user, nor all of them together, takes what is root's, and
// who is refused has nothing kept.
func TestPoliciesOfUsers(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	prog := someProgram(t, h, "prog", 10)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	c := &control{a: a}
	by := func(uid int) context.Context { return context.WithValue(within(t, time.Minute), callerKey{}, uid) }
	fill := func(n int, user func(int) int) {
		a.policies.mu.Lock()
		defer a.policies.mu.Unlock()
		a.policies.owners = make(map[string]ownedPolicy, n)
		for i := range n {
			a.policies.owners[fmt.Sprint(i)] = ownedPolicy{Policy: policyNone, User: user(i)}
		}
	}
	keep := &floxv1.KeepRequest{Paths: []string{string(prog.Path)}, Offline: policyNone}
	refused := func(uid int, says ...string) {
		t.Helper()
		_, err := c.keep(by(uid), keep)
		if !errors.Is(err, flox.ErrFull) {
			t.Fatalf("one more of user %d: %v", uid, err)
		}
		for _, part := range append(says, "floxctl keep --list", "floxctl unkeep") {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%v does not say %q", err, part)
			}
		}
		if kept, err := a.keptOwners(by(uid)); err != nil || len(kept) != 0 {
			t.Errorf("kept all the same: %v %v", kept, err)
		}
	}
	fill(maxPoliciesOf, func(int) int { return 1000 })
	refused(1000, "user 1000", fmt.Sprint(maxPoliciesOf), "sudo")
	fill(maxPoliciesOfUsers, func(i int) int { return 1000 + i%8 })
	refused(7, "root's", fmt.Sprint(maxPoliciesOfUsers), "sudo")
	fill(maxPolicies, func(int) int { return 0 })
	refused(0, fmt.Sprint(maxPolicies))

	fill(maxPoliciesOf-1, func(int) int { return 1000 })
	if _, err := c.keep(by(1000), keep); err != nil {
		t.Fatalf("the last of a user's share: %v", err)
	}
	for _, uid := range []int{1000, 1001} { // it stays the first one's
		if _, err := c.keep(by(uid), keep); err != nil {
			t.Errorf("what has a policy already: %v", err)
		}
		if p := a.policies.of(string(prog.Path)); p.User != 1000 {
			t.Errorf("chosen by %d: %+v", uid, p)
		}
	}
	if _, err := c.keep(by(0), keep); err != nil || a.policies.of(string(prog.Path)).User != 0 {
		t.Errorf("root takes over: %v, %+v", err, a.policies.of(string(prog.Path)))
	}
}

// TestPoliciesWithoutUser: what was written before policies had users is root's.
func TestPoliciesWithoutUser(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "offline.json")
	if err := os.WriteFile(file, []byte(`{"x":{"policy":"closure","paths":["x"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := loadPolicies(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.set(map[string]ownedPolicy{"y": {Policy: policyUsed}}, 1000); err != nil {
		t.Fatal(err)
	}
	if p, err = loadPolicies(file); err != nil || p.of("x").User != 0 || p.of("x").Policy != policyClosure || p.of("y").User != 1000 {
		t.Errorf("%+v %v", p, err)
	}
}

func TestRanIsBounded(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ran.json")
	r := loadRan(file)
	path := func(i int) flox.StorePath { return flox.StorePath(fmt.Sprintf("%032d-p", i)) }
	for i := range maxRan + 50 {
		r.saw(path(i), 1, true)
	}
	for i := range uint32(maxRanFiles + 50) {
		r.saw(path(maxRan+49), maxRanFiles+50-i, false)
	}
	before := r.changed()
	r.saw(path(maxRan+49), 50, false)
	list, after := r.list()
	if len(list) != maxRan || len(list[0].Files) != maxRanFiles || list[0].Path != path(maxRan+49) || !list[0].Program || before != after {
		t.Errorf("%d paths, %d files of the newest %s; %d changes by what was known", len(list), len(list[0].Files), list[0].Path, after-before)
	}
	if err := r.save(); err != nil {
		t.Fatal(err)
	}
	again, _ := loadRan(file).list()
	if len(again) == 0 || again[0].Path != list[0].Path || len(again[0].Files) != len(list[0].Files) {
		t.Errorf("%d of %d paths are known to the next process", len(again), len(list))
	}
	if err := os.WriteFile(file, []byte("[{]"), 0o600); err != nil {
		t.Fatal(err)
	}
	if list, _ := loadRan(file).list(); len(list) != 0 {
		t.Errorf("of a damaged file: %v", list)
	}
}
