package upgrade

import (
	"errors"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

func minute(n uint32) *uint32 { return &n }

// What came from a channel is looked at, and nothing else, nor what is held.
func TestWhatAnUpgradeLooksAt(t *testing.T) {
	t.Parallel()
	for source, want := range map[string]bool{
		"tools.hello": true, "tools.hello@2.1": true, "hello": true, "tools.gcc-wrapper_13+x": true,
		"": false, "./default.nix": false, "default.nix": false, "nixpkgs#hello": false, "/nix/store/x": false,
		"00000000000000000000000000000007-jq-1.7": false, "hello@": false,
	} {
		if got := Looks(&floxv1.Package{Source: source}); got != want {
			t.Errorf("%q: %v, want %v", source, got, want)
		}
		if Looks(&floxv1.Package{Source: source, Held: true}) {
			t.Errorf("%q is looked at, and held", source)
		}
	}
	found := []*floxv1.CataloguePackage{
		{Channel: "tools", Attr: "a.hello", Name: "hello", Version: "2.12", System: "x86_64-linux", Paths: []string{"p", ""}, Priority: 7},
		{Channel: "tools", Attr: "a.hello", Name: "hello", Version: "2.12", System: "aarch64-linux", Paths: []string{"q"}, Priority: 7},
	}
	is := InPlaceOf(&floxv1.Package{Name: "hi", Priority: 3}, Package("hello@2", found))
	if is.GetName() != "hi" || is.GetPriority() != 3 || is.GetSource() != "tools.a.hello@2" || !slices.Equal(Systems(is), []string{"x86_64-linux", "aarch64-linux"}) || len(is.GetPaths()[0].GetPaths()) != 1 {
		t.Errorf("%v", is)
	}
}

// What is no schedule is refused; what is one is said in words.
func TestSchedules(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		every uint32
		at    *uint32
		words string // "" = refused
	}{
		{0, nil, "never"},
		{Daily, nil, "every 1 d"},
		{Daily, minute(185), "every 1 d at 03:05 UTC"},
		{7 * Daily, minute(0), "every 7 d at 00:00 UTC"},
		{90, nil, "every 1 h 30 min"},
		{366 * Daily, nil, "every 366 d"},
		{59, nil, ""},
		{366*Daily + 1, nil, ""},
		{0, minute(1), ""},
		{720, minute(1), ""},
		{Daily, minute(Daily), ""},
	} {
		s := &floxv1.ProfileSchedule{EveryMinutes: c.every, AtMinute: c.at}
		if err := Check(s); (err == nil) != (c.words != "") || err != nil && !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%v: %v", s, err)
		}
		if got := Describe(s); c.words != "" && got != c.words {
			t.Errorf("%v is %q, want %q", s, got, c.words)
		}
	}
	if err := Check(nil); err != nil || Describe(nil) != "daily (default)" {
		t.Errorf("none: %v, %q", err, Describe(nil))
	}
}

// Of a schedule with a time of the day each upgrade is at that time; of another each
// profile has a time of its own, and all of them are spread over the day.
func TestTimesOfTheDay(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	next := func(index uint64, s *floxv1.ProfileSchedule) time.Time {
		s.SinceUnixMs = now.UnixMilli()
		at := Next(&floxv1.Profile{Name: "alice/x", CreatedIndex: index, Schedule: s}, nil, now).UTC()
		if renamed := Next(&floxv1.Profile{Name: "alice/y", CreatedIndex: index, Schedule: s}, nil, now); !renamed.Equal(at) {
			t.Errorf("%v: at %v, and with another name at %v", s, at, renamed)
		}
		return at
	}
	for at, want := range map[uint32]time.Time{
		185: time.Date(2026, 3, 2, 3, 5, 0, 0, time.UTC), 721: time.Date(2026, 3, 1, 12, 1, 0, 0, time.UTC), 720: time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC),
	} {
		if got := next(7, &floxv1.ProfileSchedule{EveryMinutes: Daily, AtMinute: minute(at)}); !got.Equal(want) {
			t.Errorf("at %s: %v, want %v", Clock(at), got, want)
		}
	}
	weekdays, hours := map[time.Weekday]int{}, map[int]int{}
	for i := range uint64(1000) {
		weekly := next(i, &floxv1.ProfileSchedule{EveryMinutes: 7 * Daily, AtMinute: minute(185)})
		weekdays[weekly.Weekday()]++
		if weekly.Hour() != 3 || weekly.Minute() != 5 || weekly.Second() != 0 {
			t.Errorf("%d: %v", i, weekly)
		}
		hours[next(i, &floxv1.ProfileSchedule{EveryMinutes: Daily}).Hour()]++
	}
	for day := range time.Saturday + 1 {
		if weekdays[day] < 50 {
			t.Errorf("%d of 1000 profiles are due on a %v", weekdays[day], day)
		}
	}
	for hour := range 24 {
		if hours[hour] < 10 {
			t.Errorf("%d of 1000 profiles are due at %d o'clock", hours[hour], hour)
		}
	}
}

// A profile of which nobody said anything is upgraded daily, at a time of its own, from
// when it was made on; for the first time soon after such a time or at the next one, so
// that not all there are begin at once. "never" is remembered.
func TestDailyByDefault(t *testing.T) {
	t.Parallel()
	made := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	atOnce := 0
	for i := range uint64(1000) {
		p := &floxv1.Profile{Name: "alice/x", CreatedIndex: i, CreatedUnixMs: made.UnixMilli()}
		first := Next(p, nil, made)
		if !first.After(made) || first.Sub(made) > 24*time.Hour {
			t.Fatalf("made at %v, first at %v", made, first)
		}
		for _, c := range []struct{ now, want time.Time }{
			{first, first}, {first.Add(time.Hour), first}, {first.Add(time.Hour + 1), first.Add(24 * time.Hour)}, {first.Add(24 * time.Hour), first.Add(24 * time.Hour)},
		} {
			if at := Next(p, nil, c.now); !at.Equal(c.want) {
				t.Fatalf("first at %v, looked %v later: %v", first, c.now.Sub(first), at)
			}
		}
		learned := made.Add(100 * 24 * time.Hour)
		if !Next(p, nil, learned).After(learned) {
			atOnce++
		}
		missed := first.Add(10 * 24 * time.Hour)
		if at := Next(p, &floxv1.ProfileRun{DueUnixMs: first.UnixMilli()}, missed.Add(5*time.Hour)); !at.Equal(missed) {
			t.Fatalf("last at %v, missed is %v, now due %v", first, missed, at)
		}
		p.Schedule = &floxv1.ProfileSchedule{SinceUnixMs: made.UnixMilli()}
		if at := Next(p, nil, learned); !at.IsZero() || Of(p).GetEveryMinutes() != 0 {
			t.Fatalf("never, and due at %v", at)
		}
	}
	if atOnce == 0 || atOnce > 100 {
		t.Errorf("%d of 1000 profiles are due when their storehouse learns of schedules, want about one hour's", atOnce)
	}
}

// However often somebody looks, and whatever was missed meanwhile: a profile is upgraded
// once in each interval in which somebody looked after its time, never before the schedule
// was made, and again only after a whole interval's end.
func TestNext(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := &floxv1.ProfileSchedule{EveryMinutes: rapid.Uint32Range(1, 10).Draw(t, "days") * Daily}
		if rapid.Bool().Draw(t, "has a time") {
			s.AtMinute = minute(rapid.Uint32Range(0, Daily-1).Draw(t, "at"))
		} else {
			s.EveryMinutes = rapid.Uint32Range(minEvery, 3*Daily).Draw(t, "every")
		}
		every := time.Duration(s.GetEveryMinutes()) * time.Minute
		since := time.UnixMilli(rapid.Int64Range(0, 1<<41).Draw(t, "since"))
		s.SinceUnixMs = since.UnixMilli()
		p := &floxv1.Profile{Name: "alice/x", CreatedIndex: rapid.Uint64().Draw(t, "created"), Schedule: s}
		var last *floxv1.ProfileRun
		first := Next(p, nil, since)
		if !first.After(since) || first.Sub(since) > every {
			t.Fatalf("first at %v, set at %v", first, since)
		}
		now, runs := since, 0
		for range rapid.IntRange(1, 40).Draw(t, "looks") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(3*every)).Draw(t, "later")))
			at := Next(p, last, now)
			missed := int64(-1) // the last time that is not after now, counted from the first
			if !first.After(now) {
				missed = int64(now.Sub(first) / every)
			}
			want := first.Add(time.Duration(missed) * every)
			if missed < 0 || last.GetDueUnixMs() == want.UnixMilli() {
				want = want.Add(every)
			}
			if !at.Equal(want) {
				t.Fatalf("at %v: %v, want %v; the last was %v", now, at, want, last)
			}
			if !at.After(now) {
				last = &floxv1.ProfileRun{DueUnixMs: at.UnixMilli()}
				runs++
			}
		}
		if most := int(now.Sub(since)/every) + 1; runs > most {
			t.Fatalf("%d upgrades, at most %d intervals", runs, most)
		}
		// What was noted by a clock that was ahead does not stop upgrades.
		last = &floxv1.ProfileRun{DueUnixMs: now.Add(1000 * every).UnixMilli()}
		if at := Next(p, last, now); at.Sub(now) > every {
			t.Fatalf("after a wrong clock: %v, now %v", at, now)
		}
		p.Schedule = &floxv1.ProfileSchedule{SinceUnixMs: s.GetSinceUnixMs()}
		if at := Next(p, last, now); !at.IsZero() {
			t.Fatalf("never: %v", at)
		}
	})
}
