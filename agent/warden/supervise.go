package warden

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
)

// supervise keeps a child running until ctx is done.
func (w *warden) supervise(ctx context.Context) error {
	defer w.dropSpare()
	delay := time.Duration(0)
	var c *change // nil: no reload is under way
	for {
		began := time.Now()
		ready, next, err := w.runChild(ctx, c)
		if ctx.Err() != nil {
			next.drop(w.program)
			return nil
		}
		w.before = nil
		if silent := (*silentError)(nil); errors.As(err, &silent) {
			w.before = &Ended{Why: silent.Error(), At: time.Now()}
		}
		if !w.connected() {
			next.drop(w.program)
			return fmt.Errorf("%s was unmounted by somebody else; start the agent again to mount it: %w", w.cfg.MountDir, flox.ErrClosed)
		}
		if errors.Is(err, errReplaced) {
			c, delay = next, 0
			continue
		}
		if c = next; c != nil {
			if c = w.ended(c, err); c != nil {
				continue
			}
		}
		if time.Since(began) > settled || !ready.IsZero() && time.Since(ready) > useful {
			delay = 0
		}
		w.log.Error("the child ended, starting it again", "after", time.Since(began).Round(time.Millisecond), "pause", delay, "error", err)
		if delay > 0 { // a child that died for the first time is missed
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(delay):
			case c = <-w.changes:
				w.begin(ctx, c, nil)
			}
		}
		delay = min(max(2*delay, 50*time.Millisecond), maxDelay)
	}
}

// runChild starts one child and stays with it until it is gone, or is replaced
// (errReplaced). It gives when the child became ready, if it did, and the change
// that is under way then.
func (w *warden) runChild(ctx context.Context, under *change) (ready time.Time, next *change, err error) {
	c, err := w.startChild()
	if err != nil {
		return ready, under, err
	}
	defer c.release()
	w.log.Info("the child runs", "pid", c.pid, "uid", w.cfg.UID)
	answering, stop := context.WithCancel(context.WithoutCancel(ctx))
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		w.clerk.serve(answering, c.line, c.heard)
	}()
	defer func() {
		stop()
		// Not for an answer that waits: it ends when it can.
		select {
		case <-answered:
		case <-time.After(time.Second):
		}
	}()
	next, err = w.stay(ctx, c, under)
	ready = c.readySince()
	switch {
	case ctx.Err() != nil:
		// While the child serves, the mount can go without anybody waiting.
		w.unmount()
		c.stop(w.cfg.StopTimeout)
		return ready, next, nil
	case err != nil:
		return ready, next, err
	}
	return ready, next, c.ending()
}

// stay returns when the child is gone (nil), was killed for another or because
// it does not serve or says nothing any more, or ctx is done. under is the change it is the child of; it
// gives the one that is not over then.
func (w *warden) stay(ctx context.Context, c *child, under *change) (*change, error) {
	waiting, cancel := context.WithCancel(ctx)
	gone, silent, watched := make(chan struct{}), make(chan error, 1), make(chan struct{})
	defer func() { cancel(); <-gone; <-watched }()
	go func() {
		defer close(gone)
		_ = c.wait(waiting)
	}()
	go func() {
		defer close(watched)
		if err := w.watch(waiting, c); err != nil {
			silent <- err
		}
	}()
	late := time.NewTimer(w.cfg.ReadyTimeout)
	defer late.Stop()
	for ready := c.ready; ; {
		changes, tooLate := w.changes, late.C
		if under != nil {
			changes = nil
		} else {
			tooLate = nil
		}
		select {
		case <-gone:
			return under, context.Cause(ctx)
		case err := <-silent:
			c.kill()
			return under, err
		case <-ready:
			ready = nil
			if under != nil {
				w.served(under, c)
				under = nil
			}
			w.prepareSpare()
		case <-tooLate:
			c.kill()
			return under, fmt.Errorf("it was not ready within %v", w.cfg.ReadyTimeout)
		case next := <-changes:
			if err := next.older(c); err != nil {
				next.to.close()
				next.done <- unchanged(err)
				continue
			}
			w.begin(ctx, next, c)
			return next, errReplaced
		}
	}
}
