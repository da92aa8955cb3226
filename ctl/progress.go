package ctl

import (
	"fmt"
	"strings"
	"time"

	"github.com/floxctl/flox/ctl/cli"
)

// How often progress is drawn: often enough to look alive on a terminal,
// seldom enough for a log.
const (
	drawEvery = 100 * time.Millisecond
	logEvery  = 5 * time.Second
)

// progress shows how far something is: a bar on a terminal, now and then a line
// elsewhere, nothing with --json (the command prints its own lines there).
type progress struct {
	out   *output
	start time.Time
	last  time.Time
	drawn bool // a bar stands on the current line
}

// newProgress begins now; rates are reckoned from here.
func newProgress(out *output) *progress {
	p := &progress{out: out, start: time.Now()}
	if out.terminal == nil {
		p.last = p.start // a log need not hear of what is over at once
	}
	return p
}

// step is one state of progress. Total 0 means that it is not known yet.
type step struct {
	done, total    uint64 // bytes
	bytesPerSecond uint64 // 0 = work it out from the start
	what           string // what is being worked on
	extra          string // "12 of 31 paths"
	says           string // what is done, where it is not bytes: instead of all the other words
}

// show draws a state, or skips it when the last one is young. It may be called
// for every message.
func (p *progress) show(s step) {
	now := time.Now()
	every := logEvery
	if p.out.terminal != nil {
		every = drawEvery
	}
	if p.out.json || now.Sub(p.last) < every {
		return
	}
	p.last = now
	if s.bytesPerSecond == 0 {
		if spent := now.Sub(p.start).Seconds(); spent > 0.5 {
			s.bytesPerSecond = uint64(float64(s.done) / spent)
		}
	}
	if p.out.terminal == nil {
		p.out.printf("%s\n", s.words())
		return
	}
	p.drawn = true
	p.out.printf("\r%s\x1b[K", s.line(p.out.width()-1))
}

// end takes the bar away, so that what is printed next starts on a clean line.
func (p *progress) end() {
	if p.drawn {
		p.out.printf("\r\x1b[K")
		p.drawn = false
	}
}

// words gives "34 % (12.0 MiB of 35.0 MiB), 4.00 MiB/s, 6 s left, 12 of 31 paths: git-2.39".
func (s step) words() string {
	if s.says != "" {
		return clean(s.says)
	}
	text := cli.FormatBytes(s.done)
	if s.total > 0 {
		text = fmt.Sprintf("%d %% (%s of %s)", s.percent(), cli.FormatBytes(s.done), cli.FormatBytes(s.total))
	}
	if s.bytesPerSecond > 0 {
		text += ", " + cli.FormatRate(s.bytesPerSecond)
	}
	if left := s.left(); left >= 0 {
		text += ", " + cli.FormatDuration(left) + " left"
	}
	if s.extra != "" {
		text += ", " + s.extra
	}
	if s.what != "" {
		text += ": " + clean(s.what)
	}
	return text
}

// line is words with a bar in front, cut to a terminal's width.
func (s step) line(width int) string {
	const barWidth = 20
	text := s.words()
	if s.total > 0 && width >= 60 {
		full := min(int(s.percent())*barWidth/100, barWidth)
		text = "[" + strings.Repeat("=", full) + strings.Repeat(" ", barWidth-full) + "] " + text
	}
	r := []rune(text)
	if len(r) > width && width > 0 {
		return string(r[:width-1]) + "…"
	}
	return text
}

// percent rounds down: 100 % means all of it.
func (s step) percent() uint64 {
	if s.total == 0 {
		return 0
	}
	return uint64(float64(min(s.done, s.total)) / float64(s.total) * 100)
}

// left estimates the time to the end; -1 when nothing can be said.
func (s step) left() time.Duration {
	if s.total == 0 || s.bytesPerSecond == 0 || s.done > s.total {
		return -1
	}
	seconds := (s.total - s.done) / s.bytesPerSecond
	return time.Duration(min(seconds, 99*24*3600)) * time.Second
}
