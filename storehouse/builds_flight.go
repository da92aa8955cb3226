package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// buildKey is what is built once at a time.
type buildKey struct {
	drv   flox.StorePath
	check bool
}

// buildFlight is a derivation that somebody wants built.
type buildFlight struct {
	key     buildKey
	asked   string // machine that asked first
	options *floxv1.BuildOptions
	lease   *floxv1.UnderLease // under which it is built; nil = of nobody
	cancel  context.CancelFunc
	turn    chan struct{} // closed when a worker is free for it

	// Guarded by builds.mu.
	sinks   []listener
	started bool

	done     chan struct{}
	outcome  *floxv1.BuildOutcome  // once done is closed
	measured *floxv1.BuildEvidence // then, if something was started
	err      error                 // it could not be tried
}

// listener hears what happens in a build. It must not wait.
type listener interface{ put(e *floxv1.BuildEvent) }

// shownPlaces is how many of those that wait hear of every step.
const shownPlaces = 8

// want has a derivation built, or takes part in a build of it under way, and gives the
// one that has ended. When ctx ends and nobody else wants it, it is stopped first.
func (b *builds) want(ctx context.Context, is *buildFlight, to listener) (*buildFlight, error) {
	f, err := b.join(is, to)
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		b.leave(f, to)
		return nil, ctx.Err()
	}
	return f, f.err
}

// join begins a flight, or joins one of the same. One under another lease has lost that,
// and ends by itself.
func (b *builds) join(f *buildFlight, to listener) (*buildFlight, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := f.key
	if b.worker == nil {
		return nil, b.why
	}
	if is := b.flights[key]; is != nil && (f.lease == nil || is.lease == nil || is.lease.GetToken() == f.lease.GetToken()) {
		is.sinks = append(is.sinks, to)
		if is.started {
			to.put(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Start{Start: &floxv1.BuildStart{Drv: string(key.drv)}}})
		}
		return is, nil
	}
	ctx, cancel := context.WithCancel(b.ctx)
	f.cancel, f.turn, f.done, f.sinks = cancel, make(chan struct{}), make(chan struct{}), []listener{to}
	b.flights[key] = f
	b.waiting = append(b.waiting, f)
	b.next()
	if n := slices.Index(b.waiting, f); n >= 0 {
		f.place(n + 1)
	}
	b.group.Go(func() error {
		defer cancel()
		f.outcome, f.err = b.fly(ctx, f)
		b.land(f)
		return nil
	})
	return f, nil
}

// next gives free workers to who waits longest. It needs b.mu.
func (b *builds) next() {
	moved := false
	for b.free > 0 && len(b.waiting) > 0 {
		b.free--
		close(b.waiting[0].turn)
		b.waiting = slices.Delete(b.waiting, 0, 1)
		moved = true
	}
	if moved {
		for i, f := range b.waiting[:min(len(b.waiting), shownPlaces)] {
			f.place(i + 1)
		}
	}
}

// place tells who wants a flight how long the queue is. It needs builds.mu.
func (f *buildFlight) place(n int) {
	f.tell(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Wait{Wait: &floxv1.BuildWait{Drv: string(f.key.drv), Place: uint32(n)}}}) //nolint:gosec // a count
}

// tell needs builds.mu.
func (f *buildFlight) tell(e *floxv1.BuildEvent) {
	for _, to := range f.sinks {
		to.put(e)
	}
}

// leave takes one who wanted a flight off it, and stops it if that was the last.
// Then it waits for its end, so that nothing of it runs when the caller is told.
func (b *builds) leave(f *buildFlight, to listener) {
	b.mu.Lock()
	if i := slices.Index(f.sinks, to); i >= 0 {
		f.sinks = slices.Delete(f.sinks, i, i+1)
	}
	last := len(f.sinks) == 0
	if last && b.flights[f.key] == f {
		delete(b.flights, f.key) // who comes now begins anew
	}
	b.mu.Unlock()
	if last {
		f.cancel()
		<-f.done
	}
}

// fly waits for a worker and builds.
func (b *builds) fly(ctx context.Context, f *buildFlight) (*floxv1.BuildOutcome, error) {
	select {
	case <-f.turn:
	case <-ctx.Done():
		b.mu.Lock()
		i := slices.Index(b.waiting, f)
		if i >= 0 {
			b.waiting = slices.Delete(b.waiting, i, i+1)
		}
		b.mu.Unlock()
		if i >= 0 {
			return nil, ctx.Err()
		}
		<-f.turn // it was given one at this moment
	}
	defer func() {
		b.mu.Lock()
		b.free++
		b.next()
		b.mu.Unlock()
	}()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if f.lease != nil {
		ctx = underLease(ctx, f.lease)
	}
	out, err := b.buildOne(ctx, f)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) && b.ctx.Err() != nil {
		err = errStopping
	}
	return out, err
}

// land ends a flight: who wanted it is told.
func (b *builds) land(f *buildFlight) {
	b.mu.Lock()
	if b.flights[f.key] == f {
		delete(b.flights, f.key)
	}
	if f.outcome != nil {
		f.tell(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Stop{Stop: &floxv1.BuildStop{Drv: string(f.key.drv), Outcome: f.outcome}}})
	}
	b.mu.Unlock()
	close(f.done)
}

// heard passes on what a builder says.
func (b *builds) heard(f *buildFlight, e buildfarm.Event) {
	drv := string(f.key.drv) // also of what it was resolved to
	text := strings.ToValidUTF8(e.Text, "?")
	out := &floxv1.BuildEvent{}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e.Kind {
	case buildfarm.EventStart:
		f.started = true
		out.Event = &floxv1.BuildEvent_Start{Start: &floxv1.BuildStart{Drv: drv, Machine: b.s.cfg.Name}}
	case buildfarm.EventLine:
		out.Event = &floxv1.BuildEvent_Line{Line: &floxv1.BuildLine{Drv: drv, Text: text}}
	case buildfarm.EventPhase:
		out.Event = &floxv1.BuildEvent_Phase{Phase: &floxv1.BuildPhase{Drv: drv, Phase: text}}
	case buildfarm.EventMessage:
		if e.Level == 0 {
			return // it comes with the outcome
		}
		out.Event = &floxv1.BuildEvent_Note{Note: &floxv1.BuildNote{Drv: drv, Text: text, Level: uint32(e.Level)}} //nolint:gosec // 0 to 7
	default:
		return // the end is told with the outcome
	}
	f.tell(out)
}

// failedOutcome is what became of something that was not built.
func failedOutcome(status buildfarm.Status, format string, args ...any) *floxv1.BuildOutcome {
	return &floxv1.BuildOutcome{Status: uint32(status), Message: fmt.Sprintf(format, args...)}
}

// seconds is Unix time, 0 of the zero time.
func seconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
