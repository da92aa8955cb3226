package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// envName is the environment of a generation for a system, as tests name it.
func envName(number uint64, system string) string {
	return fmt.Sprintf("%032d-environment", number*10+uint64(len(system)%10))
}

// generationNews is a generation for two systems.
func generationNews(number uint64) *floxv1.GenerationNews {
	g := &floxv1.GenerationNews{Number: number}
	for _, system := range []string{"x86_64-linux", "aarch64-linux"} {
		g.Environments = append(g.Environments, &floxv1.Environment{System: system, Path: envName(number, system)})
	}
	return g
}

// news is a profile whose generation lives since a log index.
func news(name string, number, index uint64, listed bool) *floxv1.ProfileNews {
	n := &floxv1.ProfileNews{Name: name, CreatedUnixMs: 1, ChangedIndex: index, Listed: listed, Live: generationNews(number)}
	if number > 1 {
		n.Before = generationNews(number - 1)
	}
	return n
}

// viewRig is a view and what it told the kernel.
type viewRig struct {
	*view
	watch *viewWatch
	shown []string
	asked []string
	there map[string]*floxv1.FindProfileResponse // by NAME@GENERATION; else ErrNotFound
}

func newViewRig(t *testing.T, dir, system string) *viewRig {
	t.Helper()
	v := newView(filepath.Join(dir, viewFile), system, "/nix/store", slog.New(slog.DiscardHandler))
	v.invite = []byte("invite")
	r := &viewRig{view: v, there: map[string]*floxv1.FindProfileResponse{}}
	r.watch = &viewWatch{view: v, roll: func(context.Context, string, *floxv1.RollbackProfileRequest) error { return flox.ErrUnreachable }}
	v.shown = func(_ context.Context, owner, name string) { r.shown = append(r.shown, owner+"/"+name) }
	v.find = func(_ context.Context, q *floxv1.FindProfileRequest) (*floxv1.FindProfileResponse, error) {
		key := fmt.Sprintf("%s@%d", q.GetName(), q.GetGeneration())
		r.asked = append(r.asked, key)
		if resp := r.there[key]; resp != nil {
			return resp, nil
		}
		return nil, flox.ErrNotFound
	}
	v.load()
	return r
}

// take is one event of the stream.
func (r *viewRig) take(t *testing.T, e *floxv1.ProfilesEvent) {
	t.Helper()
	r.shown = nil
	if err := r.watch.take(t.Context(), []*floxv1.ProfilesEvent{e}, 1); err != nil {
		t.Fatal(err)
	}
	slices.Sort(r.shown)
}

// leads checks where a link leads; number 0 is nowhere, with an error.
func (r *viewRig) leads(t *testing.T, path string, number uint64, kind error) {
	t.Helper()
	owner, name, _ := strings.Cut(path, "/")
	spelled, err := r.Owner(t.Context(), owner)
	target := ""
	if err == nil {
		if _, target, err = r.Link(t.Context(), spelled, name); err == nil {
			if again, err := r.Target(spelled, name); err != nil || again != target {
				t.Errorf("%s leads to %q when it is looked up, and then to %q, %v", path, target, again, err)
			}
		}
	}
	want := ""
	if number > 0 {
		want = "/nix/store/" + envName(number, r.system)
	}
	if target != want || !errors.Is(err, kind) {
		t.Errorf("%s leads to %q, %v; want %q, %v", path, target, err, want, kind)
	}
}

func TestProfilesAreShownAsTheyWereToldLast(t *testing.T) {
	dir := t.TempDir()
	r := newViewRig(t, dir, "x86_64-linux")
	r.leads(t, "anna/default", 0, flox.ErrUnreachable)
	r.take(t, &floxv1.ProfilesEvent{Index: 10, Reset_: true, Users: []string{"anna"}, Put: []*floxv1.ProfileNews{news("Anna/default", 41, 9, true), news("acme/ci", 3, 8, true)}})
	r.take(t, &floxv1.ProfilesEvent{Index: 11, Put: []*floxv1.ProfileNews{news("Anna/default", 42, 11, true)}})
	if !slices.Equal(r.shown, []string{"Anna/default"}) {
		t.Errorf("the kernel was told of %q", r.shown)
	}
	check := func(r *viewRig) {
		t.Helper()
		r.leads(t, "anna/DEFAULT", 42, nil)
		r.leads(t, "anna/default@42", 42, nil)
		r.leads(t, "anna/default@41", 41, nil)
		r.leads(t, "anna/default@40", 40, nil)
		r.leads(t, "acme/ci", 3, nil)
		r.leads(t, "anna/none", 0, flox.ErrNotFound) // all of hers is told
		r.leads(t, "anna/default@041", 0, flox.ErrNotFound)
		r.leads(t, "bob/tools", 0, flox.ErrUnreachable)
		r.leads(t, ".git/x", 0, flox.ErrNotFound)
		if diff := cmp.Diff([]string{"Anna", "acme"}, r.Listed("")); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"default"}, r.Listed("Anna")); diff != "" {
			t.Error(diff)
		}
	}
	check(r)
	if len(r.asked) > 0 {
		t.Errorf("asked for %q without a network", r.asked)
	}
	// The process after this one shows the same, and what was written half is not believed.
	check(newViewRig(t, dir, "x86_64-linux"))
	if err := r.write(r.now.Load(), true); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.file, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(newViewRig(t, dir, "x86_64-linux"))

	// Another system is shown its own, and nothing where there is none.
	other := newViewRig(t, dir, "aarch64-linux")
	other.leads(t, "anna/default", 42, nil)
	if got := envName(42, "aarch64-linux"); got == envName(42, "x86_64-linux") {
		t.Fatalf("the systems have one environment %s", got)
	}
	newViewRig(t, dir, "riscv64-linux").leads(t, "anna/default", 0, flox.ErrNotFound)

	// A rollback, an answer that was overtaken, the end of a profile.
	back := news("Anna/default", 41, 13, true)
	r.take(t, &floxv1.ProfilesEvent{Index: 13, Put: []*floxv1.ProfileNews{back}})
	r.leads(t, "anna/default", 41, nil)
	r.leads(t, "anna/default@42", 42, nil)
	r.take(t, &floxv1.ProfilesEvent{Index: 14, Put: []*floxv1.ProfileNews{news("Anna/default", 42, 11, true)}})
	r.leads(t, "anna/default", 41, nil)
	r.take(t, &floxv1.ProfilesEvent{Index: 15, Gone: []string{"anna/default"}})
	r.leads(t, "anna/default", 0, flox.ErrNotFound)
	if !slices.Contains(r.shown, "Anna/default") {
		t.Errorf("the kernel was not told: %q", r.shown)
	}
	anew := news("anna/default", 1, 16, true)
	anew.CreatedUnixMs = 2
	r.take(t, &floxv1.ProfilesEvent{Index: 16, Put: []*floxv1.ProfileNews{anew}})
	r.leads(t, "anna/default", 1, nil)
	r.leads(t, "anna/default@42", 0, flox.ErrUnreachable)
	if err := r.watch.take(t.Context(), []*floxv1.ProfilesEvent{{Index: 3}}, 1); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("a storehouse that went back: %v", err)
	}
}

func TestOtherProfilesAreAskedForByName(t *testing.T) {
	dir := t.TempDir()
	r := newViewRig(t, dir, "x86_64-linux")
	r.take(t, &floxv1.ProfilesEvent{Index: 10, Reset_: true, Users: []string{"anna"}, Put: []*floxv1.ProfileNews{news("anna/default", 41, 9, true)}})
	r.connected.Store(true)
	r.there["bob@0"] = &floxv1.FindProfileResponse{Owner: "Bob"}
	r.there["Bob/tools@7"] = &floxv1.FindProfileResponse{Owner: "Bob", Profile: news("Bob/tools", 9, 8, false), Generation: generationNews(7)}
	r.there["anna/default@12"] = &floxv1.FindProfileResponse{Owner: "anna", Profile: news("anna/default", 41, 9, true), Generation: generationNews(12)}
	r.leads(t, "bob/tools@7", 7, nil)
	r.leads(t, "bob/tools", 9, nil)
	r.leads(t, "anna/default@12", 12, nil)
	r.leads(t, "anna/default@13", 0, flox.ErrNotFound)
	r.leads(t, "anna/default@13", 0, flox.ErrNotFound) // is not asked for again at once
	if diff := cmp.Diff([]string{"bob@0", "Bob/tools@7", "anna/default@12", "anna/default@13"}, r.asked); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"anna"}, r.Listed("")); diff != "" {
		t.Errorf("listed: %s", diff)
	}
	if len(r.again) == 0 || !slices.Equal(r.watch.request(1).GetAsked(), []string{"bob/tools"}) {
		t.Errorf("the stream does not begin anew with it: %v", r.watch.request(1))
	}
	// What was asked for once is there without a network.
	after := newViewRig(t, dir, "x86_64-linux")
	after.leads(t, "bob/tools", 9, nil)
	after.leads(t, "anna/default@12", 12, nil)
	// An answer about something else is not believed.
	r.there["bob/evil@0"] = &floxv1.FindProfileResponse{Owner: "Bob", Profile: news("anna/default", 66, 99, true)}
	if _, err := r.lookUp(t.Context(), "bob/evil", 0); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("an answer about another profile: %v", err)
	}
	r.leads(t, "anna/default", 41, nil)
}

func TestWhatProfilesLeadToIsHeld(t *testing.T) {
	r := newViewRig(t, t.TempDir(), "x86_64-linux")
	r.take(t, &floxv1.ProfilesEvent{Index: 10, Reset_: true, Users: []string{"anna"}, Put: []*floxv1.ProfileNews{
		news("anna/default", 41, 9, true), news("acme/ci", 1, 9, true), news("bob/tools", 1, 9, false),
	}})
	path := func(n uint64) flox.StorePath { return flox.StorePath(envName(n, "x86_64-linux")) }
	want := map[string]profileLead{
		viewMark + "anna/default":        {path(41), policyClosure},
		viewMark + "anna/default@before": {path(40), policyClosure},
		viewMark + "acme/ci":             {path(1), policyUsed},
	}
	if diff := cmp.Diff(want, r.held(policyUsed), cmp.AllowUnexported(profileLead{})); diff != "" {
		t.Error(diff)
	}
}

// Shells put on somebody's paths what is assigned to the machine and one's own profile,
// which need not be there yet; not what others of the machine have, nor what one may read.
func TestShellsAreToldWhoHasWhatOnPath(t *testing.T) {
	r := newViewRig(t, t.TempDir(), "x86_64-linux")
	if got := r.shellList("/flox"); got != "" {
		t.Errorf("before anything is told: %q", got)
	}
	base := news("acme/Base", 3, 8, true)
	base.Assigned = true
	r.take(t, &floxv1.ProfilesEvent{Index: 10, Reset_: true, Users: []string{"anna", "o'hara x"}, Put: []*floxv1.ProfileNews{base, news("acme/ci", 3, 8, true), news("anna/trial", 1, 9, true)}})
	if got, want := r.shellList("/flox"), "* /flox/acme/Base\nanna /flox/anna/default\n"; got != want {
		t.Errorf("shells are told %q, want %q", got, want)
	}
	r.asked = nil
	r.leads(t, "anna/default", 0, flox.ErrNotFound)
	if len(r.asked) > 0 {
		t.Errorf("looking for a program asked for %q", r.asked)
	}
}

// A generation that the storehouse dropped is not shown any more, one with a tag is.
func TestDroppedGenerationsAreForgotten(t *testing.T) {
	r := newViewRig(t, t.TempDir(), "x86_64-linux")
	for i := range uint64(5) {
		r.take(t, &floxv1.ProfilesEvent{Index: 10 + i, Reset_: i == 0, Users: []string{"anna"}, Put: []*floxv1.ProfileNews{news("anna/default", 1+i, 10+i, true)}})
	}
	r.leads(t, "anna/default@1", 1, nil)
	now := news("anna/default", 5, 15, true)
	now.First, now.Tags = 5, []*floxv1.ProfileTag{{Name: "kept", Generation: 2}}
	r.take(t, &floxv1.ProfilesEvent{Index: 15, Put: []*floxv1.ProfileNews{now}})
	if !slices.Equal(r.shown, []string{"anna/default@1", "anna/default@3"}) {
		t.Errorf("the kernel was told of %q", r.shown)
	}
	r.leads(t, "anna/default@2", 2, nil)
	r.leads(t, "anna/default@4", 4, nil) // what the one that lives was made on
	r.connected.Store(true)
	r.leads(t, "anna/default@1", 0, flox.ErrNotFound)
	r.leads(t, "anna/default@3", 0, flox.ErrNotFound)
}

// A tag is a link to the generation that has it, and moves with it, also where nobody can
// be asked.
func TestTagsAreLinks(t *testing.T) {
	r := newViewRig(t, t.TempDir(), "x86_64-linux")
	told := news("Alice/x", 5, 50, true)
	told.Tags = []*floxv1.ProfileTag{{Name: "Stable", Generation: 4}, {Name: "v1", Generation: 2}}
	r.take(t, &floxv1.ProfilesEvent{Index: 50, Reset_: true, Users: []string{"alice"}, Put: []*floxv1.ProfileNews{told}})
	r.leads(t, "alice/X@stable", 4, nil)
	if spelling, _, err := r.Link(t.Context(), "alice", "X@STABLE"); err != nil || spelling != "x@Stable" {
		t.Errorf("it is spelled %q, %v", spelling, err)
	}
	r.leads(t, "alice/x@none", 0, flox.ErrNotFound)
	r.leads(t, "alice/x@-", 0, flox.ErrNotFound)
	// What is not known here is asked for, once.
	r.connected.Store(true)
	r.there["Alice/x@2"] = &floxv1.FindProfileResponse{Owner: "Alice", Profile: told, Generation: generationNews(2)}
	r.leads(t, "Alice/x@v1", 2, nil)
	r.connected.Store(false)
	r.leads(t, "Alice/x@v1", 2, nil)
	known := map[string]bool{}
	r.Known(func(owner, name string) bool { known[owner+"/"+name] = true; return true })
	if !known["Alice/x@Stable"] || !known["Alice/x@v1"] {
		t.Errorf("the next process forgets none of %v", known)
	}
	moved := news("Alice/x", 5, 51, true)
	moved.Tags = []*floxv1.ProfileTag{{Name: "stable", Generation: 5}}
	r.take(t, &floxv1.ProfilesEvent{Index: 51, Put: []*floxv1.ProfileNews{moved}})
	if d := cmp.Diff([]string{"Alice/x@Stable", "Alice/x@v1"}, r.shown); d != "" {
		t.Errorf("links that lead elsewhere: -want +got\n%s", d)
	}
	r.leads(t, "alice/x@stable", 5, nil)
	r.leads(t, "alice/x@v1", 0, flox.ErrNotFound)
	if _, err := r.Target("Alice", "x@v1"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a tag that is no more: %v", err)
	}
}
