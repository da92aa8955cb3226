package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile/environment"
)

// boundEnv is an environment of some packages, a letter each; userEnv is one that nix-env made
// of them.
func boundEnv(packages string) flox.StorePath {
	return flox.StorePath(fmt.Sprintf("%032x-environment", []byte(packages)))
}

func userEnv(packages string) flox.StorePath {
	return flox.StorePath(fmt.Sprintf("%032x-user", []byte(packages)))
}

// bindRig is a profile of the storehouse, whose generations are packages, a letter each, and
// a profile of Nix's that is bound to it.
type bindRig struct {
	*binder
	t           *testing.T
	dir         string
	generations []string // of the profile, the first is 1
	told        int      // how many of them this machine was told of
	cut         bool
	changes     []string
}

func newBindRig(t *testing.T) *bindRig {
	home := t.TempDir()
	r := &bindRig{t: t, dir: filepath.Join(home, "p")}
	r.start()
	return r
}

// start has an agent begin with what the one before wrote.
func (r *bindRig) start() {
	r.t.Helper()
	a := &Agent{cfg: Config{StoreDir: flox.DefaultStoreDir, System: "x"}, log: slog.New(slog.DiscardHandler)}
	b, err := openBinder(a, filepath.Join(filepath.Dir(r.dir), "bound.json"))
	if err != nil {
		r.t.Fatal(err)
	}
	b.change = r.doChange
	b.live = func(context.Context, string) (lives, error) {
		if r.told == 0 {
			return lives{}, fmt.Errorf("no profile: %w", flox.ErrNotFound)
		}
		return lives{generation: uint64(r.told), path: boundEnv(r.generations[r.told-1]), created: 7, index: uint64(r.told)}, nil
	}
	r.binder = b
}

func letters(text string) (out []*floxv1.Package) {
	for _, l := range text {
		out = append(out, &floxv1.Package{Name: string(l)})
	}
	return out
}

// doChange is the storehouse: changes of different packages merge.
func (r *bindRig) doChange(_ context.Context, c boundChange) (*floxv1.ChangeProfileResponse, error) {
	if r.cut {
		return nil, fmt.Errorf("the line is cut: %w", flox.ErrUnreachable)
	}
	base, live := "", ""
	if len(r.generations) > 0 {
		live = r.generations[len(r.generations)-1]
	}
	if base = live; !c.first {
		base = r.generations[c.base-1]
	}
	has := r.held(c.path)
	set, drop := whatChanged(letters(base), letters(has), letters(r.before(base, c)), c.first)
	for _, d := range drop {
		live = strings.ReplaceAll(live, d, "")
	}
	for _, p := range set {
		if !strings.Contains(live, p.GetName()) {
			live += p.GetName()
		}
	}
	if len(r.generations) == 0 || r.generations[len(r.generations)-1] != live {
		r.generations = append(r.generations, live)
	}
	r.changes = append(r.changes, has)
	n := uint64(len(r.generations))
	return &floxv1.ChangeProfileResponse{
		Profile:    &floxv1.Profile{CreatedUnixMs: 7, ChangedIndex: n},
		Generation: &floxv1.Generation{Number: n, Environments: []*floxv1.Environment{{System: "x", Path: string(boundEnv(live))}}},
	}, nil
}

func (r *bindRig) before(base string, c boundChange) string {
	if c.first || c.before == 0 {
		return base
	}
	return r.generations[c.before-1]
}

// held is what packages an environment has.
func (r *bindRig) held(p flox.StorePath) string {
	for _, text := range []string{"", "a", "b", "ab", "abc", "bc", "ac", "ad", "abd", "acd", "c"} {
		if p == boundEnv(text) || p == userEnv(text) {
			return text
		}
	}
	r.t.Fatalf("nobody knows %s", p)
	return ""
}

// set is nix-env --set.
func (r *bindRig) set(number int, to flox.StorePath) {
	r.t.Helper()
	link := fmt.Sprintf("p-%d-link", number)
	_ = os.Remove(filepath.Join(filepath.Dir(r.dir), link))
	if err := os.Symlink(flox.DefaultStoreDir.Join(to), filepath.Join(filepath.Dir(r.dir), link)); err != nil {
		r.t.Fatal(err)
	}
	r.back(number)
}

// back is nix-env --switch-generation.
func (r *bindRig) back(number int) {
	r.t.Helper()
	_ = os.Remove(r.dir)
	if err := os.Symlink(fmt.Sprintf("p-%d-link", number), r.dir); err != nil {
		r.t.Fatal(err)
	}
}

// looks has the agent look twice, and wants the profile of Nix's to be there then.
func (r *bindRig) looks(what string, number uint64, packages string, changes int) {
	r.t.Helper()
	for range 2 {
		if _, err := r.lookAll(r.t.Context()); err != nil {
			r.t.Fatal(err)
		}
	}
	is, err := r.links.NixProfile(r.t.Context(), r.dir)
	if err != nil || is.Number != number || is.Path != string(boundEnv(packages)) {
		r.t.Errorf("%s: it is generation %d, %s (%v), want %d with %q", what, is.Number, is.Path, err, number, packages)
	}
	if len(r.changes) != changes {
		r.t.Errorf("%s: %d changes of the profile, want %d: %q", what, len(r.changes), changes, r.changes)
	}
	if _, st := r.all(); st[r.dir].problem != "" {
		r.t.Errorf("%s: %s", what, st[r.dir].problem)
	}
}

// What nix-env does is one change of the profile, and what the profile does is one new
// generation of Nix's; neither is taken for the other.
func TestBoundProfilesGoTogether(t *testing.T) {
	r := newBindRig(t)
	r.set(1, userEnv("a"))
	if err := r.bind(t.Context(), r.dir, "root/p", 0); err != nil {
		t.Fatal(err)
	}
	r.told = 1
	r.looks("bound", 2, "a", 1) // its own generation stays
	r.set(3, userEnv("ab"))
	r.looks("nix-env -i b", 3, "ab", 2)
	r.told = 2
	r.looks("told again", 3, "ab", 2)

	r.generations = append(r.generations, "abc") // on another machine
	r.told = 3
	r.looks("the profile went", 4, "abc", 2)
	r.back(3)
	r.looks("rollback", 3, "ab", 3)
	r.told = 4

	r.generations = append(r.generations, "abc")
	r.set(5, userEnv("a")) // and before it is told of that, nix-env -e b
	r.looks("merged", 5, "ac", 4)
	if got := strings.Join(r.generations, " "); got != "a ab abc ab abc ac" {
		t.Errorf("the profile was %s", got)
	}
}

// What is done without a network stays, is said, and is done when there is one, merged.
func TestBoundProfileWithoutANetwork(t *testing.T) {
	r := newBindRig(t)
	r.generations, r.told = []string{"a"}, 1
	r.set(1, boundEnv("a"))
	if err := r.bind(t.Context(), r.dir, "root/p", 0); err != nil {
		t.Fatal(err)
	}
	r.looks("bound", 1, "a", 0)
	r.cut = true
	r.set(2, userEnv("ad"))
	for range 3 {
		if _, err := r.lookAll(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if m := r.messages(""); len(m) != 1 || !strings.Contains(m[0].GetProblem(), "tried again") || m[0].GetNumber() != 2 || m[0].GetPath() != flox.DefaultStoreDir.Join(userEnv("ad")) {
		t.Errorf("said of it: %v", m)
	}
	r.generations = append(r.generations, "ab", "abc")
	r.start() // another process
	r.cut, r.told = false, 2
	r.looks("with a network again", 2, "abcd", 1)
}

// A move that was begun and not written down is not taken for somebody's doing.
func TestBoundProfileAfterAKill(t *testing.T) {
	for _, done := range []bool{false, true} {
		r := newBindRig(t)
		r.generations, r.told = []string{"a", "ab"}, 2
		r.set(1, boundEnv("a"))
		b := binding{Profile: "root/p", Path: boundEnv("a"), Generation: 1, Created: 7, Next: &boundMove{From: boundEnv("a"), To: boundEnv("ab"), Generation: 2}}
		if err := r.put(r.dir, &b); err != nil {
			t.Fatal(err)
		}
		if done {
			r.set(2, boundEnv("ab"))
		}
		r.start()
		r.generations, r.told = append(r.generations, "abc"), 3
		r.looks(fmt.Sprintf("moved before: %v", done), 3, "abc", 0)
	}
}

// Only whose the directory is and root bind a profile, and nobody more than there is room for.
func TestWhoBindsAProfile(t *testing.T) {
	r := newBindRig(t)
	if err := r.bind(t.Context(), r.dir, "root/p", os.Geteuid()+1); err == nil || !strings.Contains(err.Error(), "only they and root") {
		t.Errorf("another user's: %v", err)
	}
	for _, bad := range [][2]string{{"p", "root/p"}, {"/x/../p", "root/p"}, {r.dir, "p"}} {
		if err := r.bind(t.Context(), bad[0], bad[1], 0); err == nil {
			t.Errorf("%q is bound", bad)
		}
	}
	for n := range maxBindings {
		if err := r.put(fmt.Sprintf("/p%d", n), &binding{Profile: "root/p"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.bind(t.Context(), r.dir, "root/p", 0); err == nil || !strings.Contains(err.Error(), "no more may be") {
		t.Errorf("one too many: %v", err)
	}
}

// What others brought while Nix was at work is not dropped by what Nix makes of what it read
// before; dropping it alone is, and so is anything once that is a while ago.
func TestWhatNixDidNotSeeStays(t *testing.T) {
	for _, c := range []struct{ base, before, has, set, drop string }{
		{"ab", "a", "ac", "c", ""},     // b came meanwhile, c was installed
		{"ab", "a", "a", "", "b"},      // b was removed
		{"abc", "ac", "a", "", "c"},    // b came meanwhile, c was removed
		{"ab", "ab", "ac", "c", "b"},   // b had been there
		{"ab", "a", "ab", "", ""},      // nothing
		{"abc", "a", "ad", "d", ""},    // b and c came meanwhile
		{"abc", "ab", "cd", "d", "ab"}, // another environment
	} {
		set, drop := whatChanged(letters(c.base), letters(c.has), letters(c.before), false)
		got := ""
		for _, p := range set {
			got += p.GetName()
		}
		if got != c.set || strings.Join(drop, "") != c.drop {
			t.Errorf("%+v: set %q, dropped %q", c, got, drop)
		}
	}
}

// A profile of another Nix of this machine is refused: what the storehouse makes is not there.
func TestProfilesOfAnotherNixAreNotBound(t *testing.T) {
	r := newBindRig(t)
	r.set(1, userEnv("a"))
	r.elsewhere = func(p flox.StorePath) bool { return p == userEnv("a") }
	if err := r.bind(t.Context(), r.dir, "root/p", 0); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "this machine's own Nix") {
		t.Errorf("bound: %v", err)
	}
	r.set(2, userEnv("b"))
	if err := r.bind(t.Context(), r.dir, "root/p", 0); err != nil {
		t.Errorf("made with ours: %v", err)
	}
	r.set(3, userEnv("a"))
	list, _ := r.all()
	r.look(t.Context(), r.dir, list[r.dir])
	if _, states := r.all(); !strings.Contains(states[r.dir].problem, "this machine's own Nix") {
		t.Errorf("led there later: %+v", states[r.dir])
	}
}

// What is bound by the configuration is so as long as that says so.
func TestConfiguredBindingsEnd(t *testing.T) {
	home := t.TempDir()
	dir, file := filepath.Join(home, "p"), filepath.Join(home, "bound.json")
	a := &Agent{cfg: Config{StoreDir: flox.DefaultStoreDir, System: "x", Bind: map[string]string{dir: "root/p"}}, log: slog.New(slog.DiscardHandler)}
	b, err := openBinder(a, file)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.put("/other/p", &binding{Profile: "root/q"}); err != nil { // writes them all
		t.Fatal(err)
	}
	a.cfg.Bind = nil
	if b, err = openBinder(a, file); err != nil {
		t.Fatal(err)
	}
	if list, _ := b.all(); len(list) != 1 || list["/other/p"].Profile != "root/q" {
		t.Errorf("bound: %+v", list)
	}
}

// A package that is as it was stays what the profile says of it; one that is not keeps what it
// is for other systems.
func TestPackagesOfABoundProfile(t *testing.T) {
	at := func(n int, name string) flox.StorePath { return flox.StorePath(fmt.Sprintf("%032d-%s", n, name)) }
	pkg := func(name, version, source string, x, y flox.StorePath) *floxv1.Package {
		p := &floxv1.Package{Name: name, Version: version, Source: source, Priority: 5, Paths: []*floxv1.PackagePaths{{System: "x", Paths: []string{string(x)}}}}
		if y != "" {
			p.Paths = append(p.Paths, &floxv1.PackagePaths{System: "y", Paths: []string{string(y)}})
		}
		return p
	}
	base := []*floxv1.Package{pkg("fd", "8", "nixpkgs.fd", at(1, "fd-8"), at(2, "fd-8")), pkg("jq", "1.6", "nixpkgs.jq", at(3, "jq-1.6"), at(4, "jq-1.6")), pkg("rg", "13", "rg", at(5, "rg-13"), at(6, "rg-13"))}
	has := []environment.Package{
		{Name: "fd", Priority: 5, Active: true, Paths: []flox.StorePath{at(1, "fd-8")}},
		{Name: "hello", Priority: 5, Active: true, Paths: []flox.StorePath{at(8, "hello-2.12-man"), at(9, "hello-2.12")}},
		{Name: "jq", Priority: 5, Active: true, Paths: []flox.StorePath{at(7, "jq-1.7")}},
		{Name: "off", Priority: 5, Paths: []flox.StorePath{at(7, "off-1")}},
	}
	set, drop := whatChanged(base, asPackages(base, has, "x"), base, false)
	hello := pkg("hello", "2.12", string(at(9, "hello-2.12")), at(8, "hello-2.12-man"), "")
	hello.Paths[0].Paths = append(hello.Paths[0].Paths, string(at(9, "hello-2.12")))
	want := []*floxv1.Package{hello, pkg("jq", "1.7", string(at(7, "jq-1.7")), at(7, "jq-1.7"), at(4, "jq-1.6"))}
	if d := cmp.Diff(want, set, protocmp.Transform()); d != "" || len(drop) != 1 || drop[0] != "rg" {
		t.Errorf("dropped %q, set -want +got\n%s", drop, d)
	}
	if set, drop = whatChanged(base, asPackages(base, has, "x"), base, true); len(drop) != 0 || len(set) != 1 || set[0].GetName() != "hello" {
		t.Errorf("what is bound first drops %q and sets %v", drop, set)
	}
	has[0].Name, has[1].Name = "other", "fd" // Nix keeps no names
	if set, _ = whatChanged(base, asPackages(base, has[:2], "x"), base, true); len(set) != 1 || set[0].GetName() != "fd-2" {
		t.Errorf("what has the paths of fd is another package: %v", set)
	}
}

var (
	_ nixLinks = ownLinks{}
	_ nixLinks = (*warden.Conn)(nil)
)
