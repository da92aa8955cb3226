package ctl

import (
	"fmt"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// readKey tells one wait from another.
type readKey struct {
	pid   uint32
	path  string
	op    string
	since int64
}

func keyOf(r *floxv1.WaitingRead) readKey {
	return readKey{r.GetPid(), r.GetPath(), r.GetOperation(), r.GetSinceUnixMs()}
}

// watchLines prints states as lines for logs and pipes: what changed, not
// everything again.
type watchLines struct {
	out   *output
	shown map[readKey]string // what stood in the last line about a wait
	idle  bool
	full  bool
	now   func() time.Time
}

// newWatchLines begins with nothing shown.
func newWatchLines(out *output) *watchLines {
	return &watchLines{out: out, shown: map[readKey]string{}, now: time.Now}
}

// show prints the waits that are new or moved, those that ended, and once when
// nobody waits any more.
func (l *watchLines) show(m *floxv1.WatchReads) error {
	now := l.now()
	if full := m.GetFull() != ""; full != l.full {
		words := "the mount has room again"
		if l.full = full; full {
			words = clean(m.GetFull())
		}
		l.out.printf("%s %s\n", l.clock(now), words)
	}
	present := make(map[readKey]string, len(m.GetReads()))
	for _, r := range m.GetReads() {
		key := keyOf(r)
		state := fmt.Sprint(r.GetDoneBytes(), r.GetSource(), r.GetReason())
		present[key] = state
		if l.shown[key] != state {
			l.out.printf("%s %s\n", l.clock(now), readWords(r, now))
		}
	}
	for key := range l.shown {
		if _, still := present[key]; !still {
			l.out.printf("%s %d no longer waits for %s\n", l.clock(now), key.pid, clean(key.path))
		}
	}
	if len(present) == 0 && !l.idle {
		l.out.printf("%s nobody waits; %s\n", l.clock(now), trafficWords(m, l.out, now))
	}
	l.idle = len(present) == 0
	l.shown = present
	return nil
}

func (l *watchLines) clock(now time.Time) string { return now.Format("15:04:05") }

// readWords says everything of one wait in one line.
func readWords(r *floxv1.WaitingRead, now time.Time) string {
	s := fmt.Sprintf("%s[%d] waits %s for %s (%s", clean(orDash(r.GetCommand())), r.GetPid(), waited(r, now), clean(r.GetPath()), clean(r.GetOperation()))
	if r.GetTotalBytes() > 0 {
		s += fmt.Sprintf(", %s of %s", cli.FormatBytes(r.GetDoneBytes()), cli.FormatBytes(r.GetTotalBytes()))
	}
	if r.GetBytesPerSecond() > 0 {
		s += ", " + cli.FormatRate(r.GetBytesPerSecond())
	}
	s += ") from " + clean(sourceName(r))
	if r.GetEtaMs() >= 0 {
		s += ", " + eta(r) + " left"
	}
	if r.GetReason() != "" {
		s += ": " + clean(r.GetReason())
	}
	return s
}

// waited is how long somebody waits; never less than nothing, should the two
// clocks differ.
func waited(r *floxv1.WaitingRead, now time.Time) string {
	return cli.FormatDuration(max(now.Sub(time.UnixMilli(r.GetSinceUnixMs())), 0))
}

// sourceName never leaves the question open who a wait is for.
func sourceName(r *floxv1.WaitingRead) string {
	if r.GetSource() == "" {
		return "nobody yet"
	}
	return r.GetSource()
}

// eta is the time left as far as it is known.
func eta(r *floxv1.WaitingRead) string {
	if r.GetEtaMs() < 0 {
		return "?"
	}
	return cli.FormatDuration(time.Duration(r.GetEtaMs()) * time.Millisecond)
}

// trafficWords sums up what a state says besides who waits.
func trafficWords(m *floxv1.WatchReads, out *output, now time.Time) string {
	s := "storehouse " + storehouseLine(out, m.GetStorehouse(), now)
	if t := trafficOf(m.GetTraffic()); t.fetched() > 0 {
		s += "; fetched " + fetchedLine(t)
	}
	return s
}
