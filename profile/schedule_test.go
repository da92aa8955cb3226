package profile

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

func scheduled(name string, s *floxv1.ProfileSchedule) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Schedule{Schedule: &floxv1.SetSchedule{Profile: name, Schedule: s}}}
}

func ran(p *floxv1.Profile, due int64, detail string) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Run{Run: &floxv1.NoteRun{
		Profile: p.GetName(), Created: p.GetCreatedIndex(), Run: &floxv1.ProfileRun{DueUnixMs: due, Result: RunUnchanged, Detail: detail, Generation: p.GetLive()},
	}}}
}

func automatic(c *floxv1.ProfilesCommand) *floxv1.ProfilesCommand {
	c.GetChange().Automatic = true
	return c
}

// lastRun gives what the last upgrade of a profile is said to have come to.
func (l *log) lastRun(name string) (run *floxv1.ProfileRun) {
	l.t.Helper()
	l.view(func(r *raft.Reader) (err error) {
		run, err = LastRun(r, name)
		return err
	})
	return run
}

// Owners say when a profile is upgraded by itself; it counts from then on.
func TestSchedule(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.must("alice", create("alice/x"))
	l.must("alice", grant("alice/x", "bob", Writer))
	at := uint32(180)
	daily := &floxv1.ProfileSchedule{EveryMinutes: 1440, AtMinute: &at, SinceUnixMs: 1}
	p := l.must("alice", scheduled("alice/x", daily))
	if s := p.GetSchedule(); s.GetEveryMinutes() != 1440 || s.GetAtMinute() != 180 || s.GetSinceUnixMs() != p.GetChangedUnixMs() {
		t.Errorf("schedule %v of %v", s, p)
	}
	if _, err := l.apply("bob", scheduled("alice/x", nil)); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "needs the role owner") {
		t.Errorf("a writer: %v", err)
	}
	if _, err := l.apply("alice", scheduled("alice/x", &floxv1.ProfileSchedule{EveryMinutes: 5})); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("every five minutes: %v", err)
	}
	p = l.must("alice", scheduled("alice/x", nil))
	if p.GetSchedule() == nil || p.GetSchedule().GetEveryMinutes() != 0 {
		t.Errorf("off: %v", p)
	}
	l.view(func(r *raft.Reader) error {
		events, _, err := Events(r, "alice/x", 0, 2)
		if err == nil && (events[0].GetDetail() != "upgraded never" || events[1].GetDetail() != "upgraded every 1 d at 03:00 UTC" || events[1].GetKind() != "schedule") {
			t.Errorf("history %v", events)
		}
		return err
	})
}

// What an upgrade came to is noted once, by the storehouse, beside the profile: watchers
// are told nothing. It goes with the profile to another name, and away.
func TestRunsAreNoted(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("alice/x"))
	if run := l.lastRun("alice/x"); run != nil {
		t.Errorf("before any: %v", run)
	}
	if _, err := l.apply("alice", ran(p, 5, "")); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("by a person: %v", err)
	}
	if _, err := l.apply("ADMIN", ran(p, 5, strings.Repeat("x", maxText+1))); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("in too many words: %v", err)
	}
	if after := l.must("ADMIN", ran(p, 5, "first")); !proto.Equal(after, p) {
		t.Errorf("the profile changed: %v, it was %v", after, p)
	}
	l.view(func(r *raft.Reader) error {
		names, ok, err := Changes(r, p.GetChangedIndex())
		if len(names) != 0 || !ok {
			t.Errorf("watchers are told of %v, %v", names, ok)
		}
		return err
	})
	other := proto.CloneOf(p)
	other.CreatedIndex++
	for what, c := range map[string]*floxv1.ProfilesCommand{"another server": ran(p, 5, "second"), "another profile of the name": ran(other, 6, "other")} {
		if r, err := l.apply("ADMIN", c); err != nil || !r.GetMoved() {
			t.Errorf("%s: %v, %v", what, r, err)
		}
	}
	if run := l.lastRun("ALICE/x"); run.GetDetail() != "first" || run.GetDueUnixMs() != 5 || run.GetTimeUnixMs() == 0 || run.GetResult() != RunUnchanged {
		t.Errorf("noted is %v", run)
	}
	p = l.must("alice", rename("alice/x", "alice/y"))
	if old, run := l.lastRun("alice/x"), l.lastRun("alice/y"); old != nil || run.GetDetail() != "first" {
		t.Errorf("renamed: %v and %v", old, run)
	}
	l.must("ADMIN", ran(p, 6, "next"))
	if run := l.lastRun("alice/y"); run.GetDetail() != "next" {
		t.Errorf("the next: %v", run)
	}
	l.must("alice", remove("alice/y"))
	if run := l.lastRun("alice/y"); run != nil {
		t.Errorf("left of a deleted profile: %v", run)
	}
}

// What is automatic leaves alone a profile that was rolled back, until a person changes
// it, and packages that are held.
func TestAutomaticChanges(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("alice/x"))
	held := pkg("held", "1")
	held.Held = true
	p = l.must("alice", change(p, pkgs(pkg("git", "1"), held)))
	denied := func(c *floxv1.ProfilesCommand, words string) {
		t.Helper()
		if _, err := l.apply("ADMIN", automatic(c)); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), words) {
			t.Errorf("got %v, want ErrDenied with %q", err, words)
		}
	}
	p = l.must("ADMIN", automatic(change(p, pkgs(pkg("git", "2")))))
	denied(change(p, pkgs(pkg("git", "3"), pkg("held", "2"))), "held is held")
	denied(change(p, pkgs(pkg("git", "3")), "held"), "held is held")
	p = l.must("alice", rollback(p, 1))
	denied(change(p, pkgs(pkg("git", "3"))), "rolled it back to generation 1")
	l.view(func(r *raft.Reader) error {
		now, err := Find(r, "alice/x")
		if !proto.Equal(now, p) {
			t.Errorf("what was refused changed %v to %v", p, now)
		}
		return err
	})
	p = l.must("alice", change(p, pkgs(pkg("git", "3"), pkg("held", "2"))))
	p = l.must("ADMIN", automatic(change(p, pkgs(pkg("git", "4")))))
	if p.GetLive() != 4 || p.GetHeld() {
		t.Errorf("after a person's change: %v", p)
	}
}

// Programs that do not know schedules are not asked to apply what has to do with them.
func TestLevelsOfSchedules(t *testing.T) {
	t.Parallel()
	p := &floxv1.Profile{Name: "alice/x"}
	levels := []uint32{Level(change(p, nil)), Level(automatic(change(p, nil))), Level(scheduled("alice/x", nil)), Level(ran(p, 1, ""))}
	if !slices.Equal(levels, []uint32{5, 6, 6, 6}) {
		t.Errorf("levels %v", levels)
	}
}

// A long text is cut between letters.
func TestCut(t *testing.T) {
	t.Parallel()
	for n := range 4 {
		text := strings.Repeat("x", n) + strings.Repeat("ä", maxText)
		if got := Cut(text); len(got) > maxText || len(got) < maxText-2 || !utf8.ValidString(got) || !strings.HasSuffix(got, "ä…") {
			t.Errorf("%d bytes: %q", len(got), got)
		}
	}
	if Cut("short") != "short" {
		t.Error("a short text was cut")
	}
}
