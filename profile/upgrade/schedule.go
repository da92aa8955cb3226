package upgrade

import (
	"fmt"
	"hash/fnv"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Bounds of how often a profile is upgraded, in minutes.
const (
	Daily    = 24 * 60
	minEvery = 60
	maxEvery = 366 * Daily
)

// firstWithin is how long after its time a profile of whose schedule nobody said anything
// is upgraded for the first time; later it waits for the next one: a storehouse whose
// program learns of schedules does not upgrade all it has at once.
const firstWithin = time.Hour

// Of gives the schedule of a profile: daily, at a time of its own, if nobody ever said
// when, or that it is never.
func Of(p *floxv1.Profile) *floxv1.ProfileSchedule {
	if s := p.GetSchedule(); s != nil {
		return s
	}
	return &floxv1.ProfileSchedule{EveryMinutes: Daily, SinceUnixMs: p.GetCreatedUnixMs()}
}

// Check refuses what is no schedule. ErrBadInput.
func Check(s *floxv1.ProfileSchedule) error {
	every, at := s.GetEveryMinutes(), s.GetAtMinute()
	switch {
	case s == nil || every == 0 && s.AtMinute == nil:
		return nil
	case every < minEvery || every > maxEvery:
		return fmt.Errorf("a schedule of every %d minutes, want every hour to every 366 days: %w", every, flox.ErrBadInput)
	case s.AtMinute != nil && (at >= Daily || every%Daily != 0):
		return fmt.Errorf("a schedule of every %d minutes at minute %d of the day, want whole days, and a time from 00:00 to 23:59: %w", every, at, flox.ErrBadInput)
	}
	return nil
}

// Describe says a schedule in words: "every 7 d at 03:00 UTC", "never"; nil is
// "daily (default)".
func Describe(s *floxv1.ProfileSchedule) string {
	every := s.GetEveryMinutes()
	switch {
	case s == nil:
		return "daily (default)"
	case every == 0:
		return "never"
	}
	words := "every"
	for _, unit := range []struct {
		minutes uint32
		name    string
	}{{Daily, "d"}, {60, "h"}, {1, "min"}} {
		if n := every / unit.minutes; n > 0 {
			words += fmt.Sprintf(" %d %s", n, unit.name)
		}
		every %= unit.minutes
	}
	if s.AtMinute != nil {
		words += " at " + Clock(s.GetAtMinute()) + " UTC"
	}
	return words
}

// Clock writes a minute of the day as 03:00.
func Clock(minute uint32) string { return fmt.Sprintf("%02d:%02d", minute/60, minute%60) }

// Next is when a profile is due to be upgraded: not behind now if it is due already, which
// it is once for all times that were missed; zero = never. last is what its schedule did
// last, nil if nothing. Where the schedule names no time of the day, the profile has one of
// its own, so that not all are due at once.
func Next(p *floxv1.Profile, last *floxv1.ProfileRun, now time.Time) time.Time {
	s := Of(p)
	every := int64(s.GetEveryMinutes()) * 60
	if every == 0 {
		return time.Time{}
	}
	own := int64(spread(p) % uint64(every)) //nolint:gosec // below every
	if s.AtMinute != nil {
		day := int64(Daily * 60)
		own = own/day*day + int64(s.GetAtMinute())*60
	}
	n := now.Unix() - own
	latest := now.Unix() - (n%every+every)%every
	due := time.Unix(latest, 0)
	done := last.GetDueUnixMs() >= due.UnixMilli() && last.GetDueUnixMs() <= now.UnixMilli() // one that is to come was of a wrong clock
	late := p.GetSchedule() == nil && last == nil && now.Sub(due) > firstWithin
	if done || late || due.UnixMilli() <= s.GetSinceUnixMs() {
		due = time.Unix(latest+every, 0)
	}
	return due
}

// spread is a number that is another one for each profile, whatever its name becomes, and
// the same on every server.
func spread(p *floxv1.Profile) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "profile %d", p.GetCreatedIndex())
	return h.Sum64()
}
