package warden

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// silence is how long a child that stands still may say nothing before it is
	// killed for the next one.
	silence = time.Minute
	// looksPerSilence is how often it is looked at meanwhile; it is to say that it
	// lives twice as often.
	looksPerSilence = 12
	// workFactor is how much longer one may be silent that uses the processor or
	// reads its memory from a disk: it may be slow, or turn in circles.
	workFactor = 5
)

// Ended says how the child before this one ended.
type Ended struct {
	Why string
	At  time.Time
}

// Beats tells the warden again and again, until ctx is done, that this process
// lives: it returns nil. Before each time alive is called, which must not return
// while what this process is for stands still. A warden that does not want to
// know is not told.
func (c *Conn) Beats(ctx context.Context, alive func()) error {
	if c.beat <= 0 {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(c.beat)
	defer tick.Stop()
	for {
		alive()
		_ = c.tell(tellBeat, "") // Run sees when nobody listens any more
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Before says how the child before this one ended if it was killed because it
// said nothing any more; nil if it was not.
func (c *Conn) Before() *Ended { return c.before }

// pulse is what is seen of a child from outside.
type pulse struct {
	heard  uint64 // messages on its line
	beats  bool   // it told ever that it lives
	state  byte   // of /proc/PID/stat: 'T' is stopped by a signal
	traced bool   // somebody debugs it
	work   uint64 // grows with what it computes and reads of its memory from a disk
}

// vigil judges from one pulse after another whether a child is to be killed. It
// counts its own looks instead of time: a machine that slept, or a warden that
// was stopped, is one look, however long that was.
type vigil struct {
	last             pulse
	silent, standing int // looks without a word, and those of them without work
}

// look takes the next pulse. why is "" while the child may live; quiet says that
// it has been silent for a while, and may be for a reason.
func (v *vigil) look(p pulse) (why string, quiet bool) {
	was := v.last
	v.last = p
	switch {
	case p.heard != was.heard, !p.beats && p.state != 'T':
		v.silent, v.standing = 0, 0
		return "", false
	case p.traced: // as long as somebody looks into it
		v.silent, v.standing = 0, 0
		return "", true
	}
	v.silent++
	quiet = v.silent >= looksPerSilence/2
	if v.standing++; p.work != was.work {
		v.standing = 0
	}
	switch {
	case v.standing >= looksPerSilence && p.state == 'T':
		return "it was stopped by a signal (SIGSTOP)", quiet
	case v.standing >= looksPerSilence:
		return "it stood still", quiet
	case v.silent >= workFactor*looksPerSilence:
		return "it was at work, but on nothing anybody waits for", quiet
	}
	return "", quiet
}

// silentError ends a child that said nothing any more.
type silentError struct {
	why string
	no  time.Duration // how long it said nothing, at least
}

func (e *silentError) Error() string {
	return fmt.Sprintf("killed: it said nothing for %v, %s", e.no, e.why)
}

// watch returns a *silentError when the child lives and answers nothing, and nil
// when ctx is done.
func (w *warden) watch(ctx context.Context, c *child) error {
	every := w.cfg.Silence / looksPerSilence
	tick := time.NewTicker(every) // of those it misses, the next is one
	defer tick.Stop()
	var v vigil
	said := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		p, ok := c.pulse()
		if !ok {
			continue // it is gone, which others see
		}
		why, quiet := v.look(p)
		if why != "" {
			return &silentError{why, time.Duration(v.silent) * every}
		}
		if quiet && !said {
			w.log.Warn("the child says nothing", "pid", c.pid, "state", string(p.state), "traced", p.traced)
		}
		said = quiet
	}
}

// pulse looks at the child; false if it is not there any more.
func (c *child) pulse() (pulse, bool) {
	p := pulse{heard: c.messages.Load(), beats: c.beats.Load()}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.pid))
	if err != nil {
		return p, false
	}
	// "pid (name) S …"; the name may hold anything. The others are numbered as in
	// proc_pid_stat(5), of which the first is 3 here.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 13 || fields[0] == "Z" || fields[0] == "X" {
		return p, false
	}
	p.state = fields[0][0]
	for _, n := range []int{12, 14, 15} { // majflt, utime, stime
		v, _ := strconv.ParseUint(fields[n-3], 10, 64)
		p.work += v
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.pid))
	if err != nil {
		return p, false
	}
	_, tracer, _ := strings.Cut(string(status), "\nTracerPid:")
	tracer, _, _ = strings.Cut(tracer, "\n")
	p.traced = strings.TrimSpace(tracer) != "0"
	return p, true
}
