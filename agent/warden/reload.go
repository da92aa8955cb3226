package warden

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
)

// Reloaded is what came of a reload.
type Reloaded struct {
	// Program is the file that serves now.
	Program string `json:"program"`
	// From and To are versions, as the programs say them.
	From string `json:"from"`
	To   string `json:"to"`
	// Unchanged says that it is the very file that served before.
	Unchanged bool `json:"unchanged,omitempty"`
	// PID is the new child's.
	PID int `json:"pid"`
	// Unserved is how long nobody served the mount, in nanoseconds: requests of
	// that time waited, and none failed.
	Unserved time.Duration `json:"unservedNanoseconds"`
}

// change is a reload under way. It belongs to supervise from when it is taken
// from warden.changes.
type change struct {
	from, to *program
	format   int // of state, that to knows
	report   Reloaded
	stopped  time.Time  // when the old child was ended
	failed   error      // why to does not serve: from is started again
	done     chan error // nil: report is filled in
}

// reload puts the program of a name in the place of the one that serves: the
// one it was started from when name is "". It returns when the new one serves,
// or the old one serves again.
func (w *warden) reload(ctx context.Context, name string) (Reloaded, error) {
	if !w.reloading.TryLock() {
		return Reloaded{}, fmt.Errorf("another reload is under way, wait for its end: %w", flox.ErrBusy)
	}
	defer w.reloading.Unlock()
	if name == "" {
		name = w.cfg.Program
	}
	p, err := w.open(ctx, name)
	if err != nil {
		return Reloaded{}, unchanged(err)
	}
	said, err := w.version(ctx, p)
	if err != nil {
		p.close()
		return Reloaded{}, unchanged(err)
	}
	c := &change{to: p, format: said.StateFormat, report: Reloaded{Program: name, To: said.Version}, done: make(chan error, 1)}
	select {
	case w.changes <- c:
	case <-ctx.Done():
		p.close()
		return Reloaded{}, fmt.Errorf("the agent ends: %w", flox.ErrClosed)
	}
	select {
	case err := <-c.done:
		return c.report, err
	case <-ctx.Done():
		return Reloaded{}, fmt.Errorf("the agent ends: %w", flox.ErrClosed)
	}
}

// unchanged says that a reload never began.
func unchanged(err error) error {
	return fmt.Errorf("nothing was changed, the running program serves on: %w", err)
}

// older refuses a change to a program that would not know what the running one
// wrote; it is asked before that one is ended.
func (c *change) older(than *child) error {
	version, format := than.said()
	if format <= c.format {
		return nil
	}
	return fmt.Errorf("%s is floxd %s, which knows the agent's state up to format %d, and floxd %s, which serves, writes format %d; name a program that is as new (--program): %w",
		c.to.name, c.report.To, c.format, version, format, flox.ErrBadInput)
}

// begin makes a change the program that is started next. old is what runs, and
// is ended; nil if nothing does.
func (w *warden) begin(ctx context.Context, c *change, old *child) {
	w.dropSpare()
	c.from = w.program
	w.program = c.to
	c.report.Unchanged = c.to.sameFile(c.from)
	if old == nil {
		c.stopped = time.Now()
		return
	}
	if c.report.From = old.saidVersion(); c.report.From == "" { // it has just begun
		if said, err := w.version(ctx, c.from); err == nil {
			c.report.From = said.Version
		}
	}
	w.log.Info("the child is replaced", "program", c.to.name, "version", c.report.To)
	c.stopped = time.Now()
	// As if it had died: that loses nothing, and waits for nothing.
	old.kill()
}

// served ends a change whose child serves and has everything open.
func (w *warden) served(c *change, by *child) {
	pause := by.servingSince().Sub(c.stopped)
	if c.failed != nil {
		c.done <- fmt.Errorf("%s does not serve: %w; %s serves again, after %v in which requests waited",
			c.to.name, c.failed, c.from.name, pause.Round(time.Millisecond))
		c.to.close()
		return
	}
	c.from.close()
	c.report.To, c.report.PID, c.report.Unserved = by.saidVersion(), by.pid, pause
	w.log.Info("the child was replaced", "version", c.report.To, "from", c.report.From, "unserved", pause.Round(time.Millisecond))
	c.done <- nil
}

// ended is called when the child of a change ended before it served. It gives
// the change that goes on, nil if that is over.
func (w *warden) ended(c *change, err error) *change {
	if c.failed == nil {
		w.log.Error("the new program does not serve, going back to the old one", "program", c.to.name, "error", err)
		c.failed = err
		w.program = c.from
		return c
	}
	// The old one cannot serve either, which is no matter of programs then. It is
	// started again and again, as ever.
	c.to.close()
	c.done <- fmt.Errorf("%s does not serve: %w; and %s, which served before, does not either: %w; it is tried again, see the agent's log",
		c.to.name, c.failed, c.from.name, err)
	return nil
}

// drop lets go of a change that will never end, but not of what the warden keeps.
func (c *change) drop(kept *program) {
	for _, p := range c.programs() {
		if p != kept {
			p.close()
		}
	}
}

func (c *change) programs() []*program {
	if c == nil {
		return nil
	}
	return []*program{c.from, c.to}
}

// errReplaced ends a child for another.
var errReplaced = errors.New("replaced")
