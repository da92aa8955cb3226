package storehouse

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/upgrade"
	cluster "github.com/floxctl/flox/raft"
)

// scheduledHouse is a server with a channel, and profiles that have hello of it.
type scheduledHouse struct {
	t *testing.T
	*Server
	admin floxv1connect.AdminClient
}

func (h *scheduledHouse) channel(version string) {
	h.t.Helper()
	if _, err := publishChannel(h.t, h.Server, adminPerson(), "tools", expressionOf(h.t, h.Server, tools(version))); err != nil {
		h.t.Fatal(err)
	}
}

// profile makes a profile with a package of the channel, upgraded every so many minutes; 0 =
// never.
func (h *scheduledHouse) profile(name string, every uint32, set *floxv1.Package) {
	h.t.Helper()
	newProfile(h.t, h.Server, name)
	install(h.t, h.Server, name, set)
	schedule := &floxv1.ProfileSchedule{EveryMinutes: every}
	if every > 0 { // not while the test runs: the server looks as well
		later := time.Now().UTC().Add(12 * time.Hour)
		schedule.AtMinute = proto.Uint32(uint32(later.Hour()*60 + later.Minute())) //nolint:gosec // of a day
	}
	out, err := h.admin.SetProfileSchedule(within(h.t), connect.NewRequest(&floxv1.SetProfileScheduleRequest{Name: name, Schedule: schedule}))
	if err != nil || every > 0 && out.Msg.GetNextRunUnixMs() <= time.Now().UnixMilli() || every == 0 && out.Msg.GetNextRunUnixMs() != 0 {
		h.t.Fatal(out, err)
	}
}

func (h *scheduledHouse) show(name string) *floxv1.ShowProfileResponse {
	h.t.Helper()
	out, err := h.admin.ShowProfile(within(h.t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: name}))
	if err != nil {
		h.t.Fatal(err)
	}
	return out.Msg
}

// has looks at which generation of a profile lives, with which hello, and what its last
// upgrade by schedule came to.
func (h *scheduledHouse) has(name string, live uint64, version, result, detail string) {
	h.t.Helper()
	at := h.show(name)
	pkgs, run := at.GetGeneration().GetPackages(), at.GetLastRun()
	if at.GetProfile().GetLive() != live || len(pkgs) != 1 || pkgs[0].GetVersion() != version || run.GetResult() != result || !strings.Contains(run.GetDetail(), detail) {
		h.t.Errorf("%s: %v, want generation %d with hello %s, %q: %q", name, at, live, version, result, detail)
	}
}

// A profile with a schedule is upgraded to what its channel has once it is due, and once
// only; one that was rolled back is left alone, and so is a held package, and a profile
// without a schedule.
func TestProfilesAreUpgradedBySchedule(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	h := &scheduledHouse{t, f.Server, operatorOf(t, f.Server)}
	s := h.Server
	h.channel("2.1")
	hello, err := s.channels.made(within(t), "hello", []string{linux})
	if err != nil {
		t.Fatal(err)
	}
	h.profile("alice/x", upgrade.Daily, hello)
	h.profile("alice/people", 0, hello)
	h.profile("alice/held", upgrade.Daily, asHeld(hello))
	h.profile("alice/back", upgrade.Daily, hello)
	jq := makeTool(t, "jq")
	publish(t, s, jq)
	install(t, s, "alice/back", asPackage("jq", "1", jq))
	if _, err := s.profiles.rollback(within(t), alice(), &floxv1.RollbackProfileRequest{Name: "alice/back"}); err != nil {
		t.Fatal(err)
	}
	h.channel("2.2")
	newProfile(t, s, "alice/usual")
	install(t, s, "alice/usual", hello)
	if at := h.show("alice/usual"); at.GetProfile().GetSchedule() != nil || at.GetNextRunUnixMs() <= time.Now().UnixMilli() || at.GetNextRunUnixMs() > time.Now().Add(24*time.Hour).UnixMilli() {
		t.Errorf("of a profile of which nobody said anything: %v", at)
	}
	u := newUpgrades(s.profiles)
	upgradeAt := func(later time.Duration) {
		t.Helper()
		if err := u.begin(within(t), time.Now().Add(later)); err != nil {
			t.Fatal(err)
		}
		u.all.Wait()
	}
	upgradeAt(0)
	h.has("alice/x", 1, "2.1", "", "") // not due yet
	before := s.node.Applied()
	t.Logf("alice/usual is due at %v", time.UnixMilli(h.show("alice/usual").GetNextRunUnixMs()))
	// When each is due depends on it and on the time of the day; by then each was once.
	next := func(name string) time.Time { return time.UnixMilli(h.show(name).GetNextRunUnixMs()) }
	last := next("alice/usual")
	for _, name := range []string{"alice/x", "alice/held", "alice/back"} {
		if at := next(name); at.After(last) {
			last = at
		}
	}
	upgradeAt(time.Until(next("alice/usual")) + time.Second)
	h.has("alice/usual", 2, "2.2", profile.RunUpgraded, "hello 2.1 -> 2.2")
	upgradeAt(time.Until(last) + time.Second)
	h.has("alice/x", 2, "2.2", profile.RunUpgraded, "hello 2.1 -> 2.2")
	h.has("alice/people", 1, "2.1", "", "")
	h.has("alice/held", 1, "2.1", profile.RunUnchanged, "")
	h.has("alice/back", 1, "2.1", profile.RunHeld, "")
	if g := h.show("alice/x").GetGeneration(); g.GetKind() != "upgrade" || g.GetReason() != "schedule" || g.GetActor().GetUser() != "" || g.GetPackages()[0].GetSource() != "tools.hello" {
		t.Errorf("the new generation is %v", g)
	}
	if err := s.profiles.view(within(t), cluster.Local, func(r *cluster.Reader) error {
		names, _, err := profile.Changes(r, before)
		if slices.Sort(names); !slices.Equal(names, []string{"alice/usual", "alice/x"}) {
			t.Errorf("machines are told of %v", names)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if _, err := h.admin.DeleteChannel(within(t), connect.NewRequest(&floxv1.DeleteChannelRequest{Channel: "tools"})); err != nil {
		t.Fatal(err)
	}
	upgradeAt(time.Until(last) + time.Second) // all of that is done already
	h.has("alice/x", 2, "2.2", profile.RunUpgraded, "hello 2.1 -> 2.2")
	upgradeAt(50 * time.Hour)
	h.has("alice/x", 2, "2.2", profile.RunFailed, "there is no channel")
	h.channel("2.3")
	if _, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/back", Kind: "hold", Set: []*floxv1.Package{asHeld(hello)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.profiles.change(within(t), alice(), &floxv1.ChangeProfileRequest{Name: "alice/back", Kind: "unhold", Set: []*floxv1.Package{hello}}); err != nil {
		t.Fatal(err)
	}
	upgradeAt(75 * time.Hour)
	h.has("alice/back", 5, "2.3", profile.RunUpgraded, "") // a person changed it
	h.has("alice/x", 3, "2.3", profile.RunUpgraded, "")
	h.partly(upgradeAt, hello)
	h.channel("2.4")
	h.hangs(u, time.Now().Add(175*time.Hour), "alice/x", "alice/back")
}

// partly has upgrades of which some packages cannot be made, or do not go together: the
// others are upgraded, and what is left is said.
func (h *scheduledHouse) partly(upgradeAt func(later time.Duration), hello *floxv1.Package) {
	h.t.Helper()
	jq, err := h.channels.made(within(h.t), "jq", []string{linux})
	if err != nil {
		h.t.Fatal(err)
	}
	h.profile("alice/partly", upgrade.Daily, hello)
	install(h.t, h.Server, "alice/partly", jq)
	publishAs := func(version, jq string) {
		h.t.Helper()
		files := tools(version)
		files["default.nix"] = strings.Replace(files["default.nix"], `tool "jq-1.7" "echo jq >$out"`, jq, 1)
		if _, err := publishChannel(h.t, h.Server, adminPerson(), "tools", expressionOf(h.t, h.Server, files)); err != nil {
			h.t.Fatal(err)
		}
	}
	is := func(result string, want ...string) {
		h.t.Helper()
		at, have := h.show("alice/partly"), []string(nil)
		for _, p := range at.GetGeneration().GetPackages() {
			have = append(have, p.GetName()+" "+p.GetVersion())
		}
		if !slices.Equal(have, want) || at.GetLastRun().GetResult() != result || !strings.Contains(at.GetLastRun().GetDetail(), "left as they are: jq; jq: ") {
			h.t.Errorf("%v: %s, want %q of %v", have, at.GetLastRun(), result, want)
		}
	}
	publishAs("2.3.1", `tool "jq-1.8" "exit 3"`)
	upgradeAt(100 * time.Hour)
	is(profile.RunUpgraded, "hello 2.3.1", "jq 1.7")
	if reason := h.show("alice/partly").GetGeneration().GetReason(); !strings.HasPrefix(reason, "schedule; left as they are: jq; jq: ") {
		h.t.Errorf("the reason is %q", reason)
	}
	upgradeAt(125 * time.Hour)
	is(profile.RunFailed, "hello 2.3.1", "jq 1.7")
	other := makeTool(h.t, "other")
	publish(h.t, h.Server, other)
	install(h.t, h.Server, "alice/partly", asPackage("other", "1", other))
	publishAs("2.3.2", `tool "jq-1.9" "mkdir -p $out/bin; echo jq >$out/bin/other"`)
	upgradeAt(150 * time.Hour)
	is(profile.RunUpgraded, "hello 2.3.2", "jq 1.7", "other 1")
}

// hangs has the first of two profiles that is due hang in the middle of its upgrade: the
// other one is upgraded all the same, and the first is not begun again.
func (h *scheduledHouse) hangs(u *upgrades, now time.Time, first, second string) {
	h.t.Helper()
	due, err := u.due(within(h.t), now)
	if err != nil {
		h.t.Fatal(err)
	}
	at := map[string]time.Time{}
	for _, of := range due {
		at[of.GetName()] = of.at
	}
	if at[second].Before(at[first]) {
		first, second = second, first
	}
	leave, err := h.profiles.enter(within(h.t), first)
	if err != nil {
		h.t.Fatal(err)
	}
	leave = sync.OnceFunc(leave)
	defer leave()
	if err := u.begin(within(h.t), now); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, "the other profile is upgraded", func() bool { return h.show(second).GetGeneration().GetPackages()[0].GetVersion() == "2.4" })
	again, err := u.due(within(h.t), now)
	if err != nil || slices.ContainsFunc(again, func(of dueProfile) bool { return of.GetName() == first }) {
		h.t.Errorf("%s is being upgraded, and due are %v, %v", first, again, err)
	}
	leave()
	u.all.Wait()
	h.has(first, h.show(first).GetProfile().GetLive(), "2.4", profile.RunUpgraded, "")
}

func asHeld(p *floxv1.Package) *floxv1.Package {
	return &floxv1.Package{Name: p.GetName(), Version: p.GetVersion(), Priority: p.GetPriority(), Source: p.GetSource(), Paths: p.GetPaths(), Held: true}
}

// What is automatic is refused while a profile is rolled back, before anything is made for it.
func TestAutomaticChangesAreRefused(t *testing.T) {
	t.Parallel()
	s, _ := closedHouse(t, nil)
	tool := makeTool(t, "tool")
	publish(t, s, tool)
	newProfile(t, s, "alice/x")
	for _, version := range []string{"1", "2"} {
		install(t, s, "alice/x", asPackage("tool", version, tool))
	}
	if _, err := s.profiles.rollback(within(t), alice(), &floxv1.RollbackProfileRequest{Name: "alice/x"}); err != nil {
		t.Fatal(err)
	}
	_, err := s.profiles.change(within(t), s.itself(), &floxv1.ChangeProfileRequest{
		Name: "alice/x", Set: []*floxv1.Package{asPackage("tool", "3", makeTool(t, "absent"))}, Kind: "upgrade", Automatic: true,
	})
	if !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "rolled it back") {
		t.Errorf("got %v", err)
	}
	// The leader goes on after what failed, until it is stopped.
	ctx, stop := context.WithCancel(within(t))
	calls := 0
	err = s.asLeader(ctx, time.Millisecond, nil, "count", func(context.Context, time.Time) error {
		if calls++; calls >= 3 {
			stop()
		}
		return flox.ErrBusy
	})
	if err != nil || calls < 3 {
		t.Errorf("%d calls, %v", calls, err)
	}
}

// A server that builds nothing has another one make what an upgrade brings.
func TestUpgradesAreBuiltElsewhere(t *testing.T) {
	t.Parallel()
	n := evaluator(t)
	h := newHouse(t, 1, func(c *Config) { c.StoreDir = flox.StoreDir(n.storeDir) })
	h.add(func(c *Config) {
		c.StoreDir, c.Builds = flox.StoreDir(n.storeDir), farmConfig(n, c.StateDir, 1).Builds
		t.Cleanup(func() { unprotect(filepath.Join(c.StateDir, "builder", "inputs")) })
	})
	if _, err := publishChannel(t, h.servers[1], adminPerson(), "tools", expressionOf(t, h.servers[1], tools("2.1"))); err != nil {
		t.Fatal(err)
	}
	hello, err := h.servers[0].channels.made(within(t), "hello", []string{linux})
	if err != nil {
		t.Fatal(err)
	}
	if valid, err := h.servers[0].isValid(within(t), flox.StorePath(hello.GetPaths()[0].GetPaths()[0])); err != nil || !valid || hello.GetSource() != "tools.hello" {
		t.Errorf("%v, valid: %v, %v", hello, valid, err)
	}
	if _, err := h.servers[0].channels.made(within(t), "fails", []string{linux}); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "could not be made") {
		t.Errorf("what fails there: %v", err)
	}
	// And evaluate what a channel that it fetched tracks.
	q := &floxv1.PublishChannelRequest{Channel: "tools", Source: expressionOf(t, h.servers[0], tools("2.2")), Systems: []string{linux}, Reason: "fetched"}
	end, err := h.servers[0].channels.published(within(t), q, func(*floxv1.PublishChannelProgress) {})
	if v := end.GetVersion(); err != nil || v.GetNumber() != 2 || v.GetActor().GetMachine() != h.servers[0].machineName() || v.GetReason() != "fetched" {
		t.Errorf("evaluated there: %v, %v", end, err)
	}
}
