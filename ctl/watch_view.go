package ctl

import (
	"context"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"golang.org/x/term"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// The live view is drawn by hand, because the usual library for it asks the
// terminal for its colours when the program starts, whichever command runs, and
// waits up to five seconds for a terminal that does not answer.
const (
	enterView = "\x1b[?1049h\x1b[?25l" // other screen, no cursor
	leaveView = "\x1b[?25h\x1b[?1049l"
	homeView  = "\x1b[H"
	wipeLine  = "\x1b[K"
	wipeBelow = "\x1b[J"
)

// redrawEvery keeps the waiting times running between the agent's reports.
const redrawEvery = 250 * time.Millisecond

// retryEvery is how often an agent that went away is asked again.
const retryEvery = time.Second

// watchState is what the view shows.
type watchState struct {
	last *floxv1.WatchReads // nil before the first report
	err  error              // why there are no reports now
}

// runWatchView shows the live view until q, Ctrl-C or the end of ctx. An agent
// that is restarted is waited for: that is when one wants to watch.
func runWatchView(ctx context.Context, opts watchOptions, out *output) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	states := make(chan watchState)
	go func() { // ends with ctx
		defer close(states)
		feedView(ctx, opts, states)
	}()
	first, ok := <-states
	if !ok {
		return ctx.Err()
	}
	if first.last == nil && first.err != nil {
		return first.err // nothing was ever there to watch
	}
	quit, restore := readKeys()
	defer restore()
	out.printf(enterView)
	defer out.printf(leaveView)
	tick := time.NewTicker(redrawEvery)
	defer tick.Stop()
	for state := first; ; {
		drawView(out, state)
		select {
		case s, ok := <-states:
			if !ok {
				return nil
			}
			if s.last == nil {
				s.last = state.last
			}
			state = s
		case <-tick.C:
		case <-quit:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// feedView sends a state for every report and every failure.
func feedView(ctx context.Context, opts watchOptions, states chan<- watchState) {
	send := func(s watchState) {
		select {
		case states <- s:
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil {
		err := receiveWatch(ctx, opts, func(m *floxv1.WatchReads) error {
			send(watchState{last: m})
			return ctx.Err()
		})
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = fmt.Errorf("the agent ended the stream: %w", flox.ErrUnreachable)
		}
		send(watchState{err: err})
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
		}
	}
}

// readKeys puts the terminal into raw mode and closes quit on q, Ctrl-C or
// Escape. Without a terminal to read from, signals alone end the view.
func readKeys() (quit <-chan struct{}, restore func()) {
	done := make(chan struct{})
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return done, func() {}
	}
	old, err := term.MakeRaw(fd)
	if err != nil {
		return done, func() {}
	}
	go func() { // ends with the process: a read of a terminal cannot be called off
		defer close(done)
		key := make([]byte, 1)
		for {
			if n, err := os.Stdin.Read(key); err != nil || n == 1 && strings.IndexByte("qQ\x03\x1b", key[0]) >= 0 {
				return
			}
		}
	}()
	return done, func() { _ = term.Restore(fd, old) } // nothing to be done about it when leaving
}

// drawView writes a whole screen in one piece, so that it does not flicker. The
// size is asked every time: windows change.
func drawView(out *output, s watchState) {
	width, height := 80, 24
	if w, h, err := term.GetSize(int(out.terminal.Fd())); err == nil && w > 0 && h > 0 {
		width, height = w, h
	}
	var b strings.Builder
	b.WriteString(homeView)
	lines := viewLines(out, s, width, height, time.Now())
	for i, line := range lines {
		b.WriteString(line + wipeLine)
		if i < len(lines)-1 {
			b.WriteString("\r\n")
		}
	}
	b.WriteString(wipeBelow)
	out.printf("%s", b.String())
}

// viewLines lays one state out on a screen. Columns are counted before they
// are painted.
func viewLines(out *output, s watchState, width, height int, now time.Time) []string {
	lines := []string{out.paint(bold, head("floxctl watch", now.Format("15:04:05")+"  q leaves", width))}
	if s.err != nil {
		words, _, _ := strings.Cut(s.err.Error(), "\n")
		lines = append(lines, out.paint(red, cut(words, width)), out.paint(dim, "trying again every second"))
	}
	if s.last == nil {
		return lines
	}
	m := s.last
	plain := &output{}
	lines = append(lines,
		cut("storehouse "+storehouseLine(plain, m.GetStorehouse(), now), width),
		cut(fmt.Sprintf("now %s; fetched %s", cli.FormatRate(m.GetBytesPerSecond()), fetchedLine(trafficOf(m.GetTraffic()))), width), "")
	if full := m.GetFull(); full != "" {
		lines = append(lines, out.paint(red, cut(clean(full), width)))
	}
	reads := append([]*floxv1.WaitingRead(nil), m.GetReads()...)
	sort.SliceStable(reads, func(i, j int) bool { return reads[i].GetSinceUnixMs() < reads[j].GetSinceUnixMs() })
	if len(reads) == 0 {
		return append(lines, out.paint(green, "Nobody waits for data."))
	}
	lines = append(lines, out.paint(dim, viewRow(width, "PROCESS", "WAITS", "DONE", "SPEED", "LEFT", "FROM", "FILE")))
	room := max(height-len(lines)-1, 1)
	for i, r := range reads {
		if i == room {
			return append(lines, out.paint(dim, fmt.Sprintf("and %d more", len(reads)-room)))
		}
		lines = append(lines, viewRead(r, width, now))
	}
	if r := reads[0].GetReason(); r != "" && len(lines) < height {
		lines = append(lines, out.paint(dim, cut("longest wait: "+clean(r), width)))
	}
	return lines
}

// viewRead is the line of one wait.
func viewRead(r *floxv1.WaitingRead, width int, now time.Time) string {
	done, speed := "-", "-"
	if r.GetTotalBytes() > 0 {
		done = fmt.Sprintf("%d%% of %s", step{done: r.GetDoneBytes(), total: r.GetTotalBytes()}.percent(), cli.FormatBytes(r.GetTotalBytes()))
	}
	if r.GetBytesPerSecond() > 0 {
		speed = cli.FormatRate(r.GetBytesPerSecond())
	}
	process := fmt.Sprintf("%s[%d]", clean(orDash(r.GetCommand())), r.GetPid())
	return viewRow(width, process, waited(r, now), done, speed, eta(r), clean(sourceName(r)), clean(r.GetPath()))
}

// viewRow sets the columns; what is left of the width is the file's, whose end
// is kept.
func viewRow(width int, process, waits, done, speed, left, from, file string) string {
	s := fmt.Sprintf("%-20s %9s %16s %12s %9s  %-16s ", cut(process, 20), waits, done, speed, left, cut(from, 16))
	if room := width - len([]rune(s)); room > 10 {
		return s + fit(file, room)
	}
	return cut(cut(process, 20)+" "+waits+" "+file, width)
}

// cut keeps the beginning of s.
func cut(s string, width int) string {
	r := []rune(s)
	if len(r) <= width {
		return s
	}
	return string(r[:max(width-1, 0)]) + "…"
}

// head sets left and right at the two ends of a line.
func head(left, right string, width int) string {
	gap := width - len([]rune(left)) - len([]rune(right))
	if gap < 1 {
		return cut(left, width)
	}
	return left + strings.Repeat(" ", gap) + right
}
