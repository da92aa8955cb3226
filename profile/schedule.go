package profile

import (
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile/upgrade"
)

// What an upgrade by schedule came to.
const (
	RunUpgraded  = "upgraded"
	RunUnchanged = "unchanged" // it had all its channels have
	RunHeld      = "held"      // it was rolled back
	RunFailed    = "failed"
)

// MayByItself refuses an automatic change of a profile that somebody rolled back, and of
// packages that somebody holds. ErrDenied.
func MayByItself(p *floxv1.Profile, live, set []*floxv1.Package, drop []string) error {
	if p.GetHeld() {
		return fmt.Errorf("profile %s: somebody rolled it back to generation %d, and nothing automatic changes it before a person does: %w", p.GetName(), p.GetLive(), flox.ErrDenied)
	}
	for _, was := range live {
		if was.GetHeld() && (slices.Contains(drop, was.GetName()) || has(set, was.GetName())) {
			return fmt.Errorf("profile %s: package %s is held, and nothing automatic changes it before floxctl unhold %s -p %s: %w",
				p.GetName(), was.GetName(), was.GetName(), p.GetName(), flox.ErrDenied)
		}
	}
	return nil
}

func has(packages []*floxv1.Package, name string) bool {
	return slices.ContainsFunc(packages, func(p *floxv1.Package) bool { return p.GetName() == name })
}

// LastRun gives what the last upgrade of a profile by schedule came to; nil if there was none.
func LastRun(g getter, name string) (*floxv1.ProfileRun, error) {
	run, err := load(g, textKey(runKey, Folded(name)), &floxv1.ProfileRun{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil, nil //nolint:nilnil // its getters give what an empty one has
	}
	return run, err
}

// Cut shortens a text to what is kept of one.
func Cut(text string) string {
	if len(text) <= maxText {
		return text
	}
	end := maxText - len("…")
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}

// schedule says when a profile is upgraded by itself.
func (a *applying) schedule(c *floxv1.SetSchedule) error {
	p, err := a.profile(c.GetProfile(), Owner)
	if err != nil {
		return err
	}
	s := &floxv1.ProfileSchedule{SinceUnixMs: a.at.UnixMilli()}
	if is := c.GetSchedule(); is != nil {
		s.EveryMinutes, s.AtMinute = is.EveryMinutes, is.AtMinute
	}
	if err := upgrade.Check(s); err != nil {
		return fmt.Errorf("profile %s: %w", p.GetName(), err)
	}
	p.Schedule = s
	return a.store(p, &floxv1.ProfileEvent{Kind: "schedule", From: p.GetLive(), To: p.GetLive(), Detail: "upgraded " + upgrade.Describe(s)})
}

// ran notes what an upgrade came to, beside the profile: nothing that is shown on machines
// changed, and watchers are told nothing.
func (a *applying) ran(c *floxv1.NoteRun) error {
	if !a.admin {
		return fmt.Errorf("profile %s: only the storehouse says what its upgrades came to: %w", short(c.GetProfile()), flox.ErrDenied)
	}
	p, err := Find(a.tx, c.GetProfile())
	if err != nil {
		return err
	}
	run := c.GetRun()
	if len(run.GetDetail()) > maxText || len(run.GetResult()) > maxText {
		return fmt.Errorf("profile %s: an upgrade that is described in %d bytes, want at most %d: %w", p.GetName(), len(run.GetDetail()), maxText, flox.ErrBadInput)
	}
	a.reply.Profile = p
	last, err := LastRun(a.tx, p.GetName())
	if err != nil {
		return err
	}
	if p.GetCreatedIndex() != c.GetCreated() || last.GetDueUnixMs() == run.GetDueUnixMs() {
		a.reply.Moved = true // it is another profile, or another server was quicker
		return nil
	}
	return a.put(textKey(runKey, Folded(p.GetName())), &floxv1.ProfileRun{
		DueUnixMs: run.GetDueUnixMs(), TimeUnixMs: a.at.UnixMilli(), Result: run.GetResult(), Detail: run.GetDetail(), Generation: run.GetGeneration(),
	})
}

// moveRun lets what the last upgrade came to follow a profile to another folded name.
func (a *applying) moveRun(from, to string) error {
	run, err := LastRun(a.tx, from)
	if err != nil || run == nil {
		return err
	}
	return errors.Join(a.put(textKey(runKey, to), run), a.tx.Delete(textKey(runKey, from)))
}
