package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
	shared "github.com/floxctl/flox/profile"
)

// keepViewEvery is how often what is shown is written durably, if it changed.
const keepViewEvery = time.Second

// errAgain ends a stream of profiles that is to begin with others.
var errAgain = errors.New("other profiles are asked for")

// viewWatch follows the profiles of the storehouse.
type viewWatch struct {
	*view
	calls  *calls
	houses *houses
	epoch  func() uint64                   // of the trust list
	settle func(ctx context.Context) error // has the rest of the agent do what is shown
	roll   func(ctx context.Context, user string, q *floxv1.RollbackProfileRequest) error
}

// runView follows the storehouse's profiles until ctx ends.
func (a *Agent) runView(ctx context.Context) error {
	w := &viewWatch{view: a.view, calls: a.calls, houses: a.houses, epoch: func() uint64 { _, epoch := a.facts.trustAt(); return epoch }, settle: a.settleView, roll: a.rollFor}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return w.follow(ctx) })
	group.Go(func() error { return w.keep(ctx) })
	group.Go(func() error { return w.passRollbacks(ctx) })
	return group.Wait()
}

// follow follows one stream after the other, at whichever server answers.
func (w *viewWatch) follow(ctx context.Context) error {
	for pause := retryMin; ctx.Err() == nil; pause = min(2*pause, 2*retryMax) {
		house := w.houses.first()
		heard, err := w.once(ctx, house)
		if errors.Is(err, errAgain) {
			pause = retryMin
			continue
		}
		w.connected.Store(false)
		if ctx.Err() != nil {
			return nil
		}
		wait := pause
		switch {
		case connect.CodeOf(err) == connect.CodeUnimplemented:
			wait = noListPause
		case heard:
			pause, wait = retryMin, retryMin
			fallthrough
		default:
			w.houses.failed(house)
			w.log.Debug("profiles are not followed", "server", string(house), "error", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	return nil
}

// request says what is known here.
func (w *viewWatch) request(epoch uint64) *floxv1.WatchProfilesRequest {
	s := w.now.Load()
	q := &floxv1.WatchProfilesRequest{AfterIndex: s.index, Users: s.users, Labels: s.labels}
	if s.epoch != epoch { // the storehouse was restored: its log is another
		q.AfterIndex = 0
	}
	for key, p := range s.profiles {
		q.Names = append(q.Names, key)
		if !p.GetNews().GetListed() && len(q.GetAsked()) < maxAsked {
			q.Asked = append(q.Asked, key)
		}
	}
	return q
}

// restarts ends a stream with errAgain once it has begun and others are asked for.
func (w *viewWatch) restarts(ctx context.Context, begun <-chan struct{}, end context.CancelCauseFunc) {
	select {
	case <-begun:
	case <-ctx.Done():
		return
	}
	select {
	case <-w.again:
		end(errAgain)
	case <-ctx.Done():
	}
}

// once follows one stream to its end, and says whether anything came.
func (w *viewWatch) once(ctx context.Context, house p2p.PeerID) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(streamSilence, func() {
		cancel(fmt.Errorf("the storehouse was silent for %s: %w", streamSilence, flox.ErrUnreachable))
	})
	defer silence.Stop()
	select {
	case <-w.again:
	default:
	}
	epoch := w.epoch()
	stream, err := w.calls.storehouse(house).WatchProfiles(ctx, connect.NewRequest(w.request(epoch)))
	if err != nil {
		return false, err
	}
	begun, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		w.restarts(ctx, begun, cancel)
	}()
	defer func() {
		cancel(nil) // Close would wait for the rest of a stream that has no end
		_ = stream.Close()
		<-ended
	}()
	var parts []*floxv1.ProfilesEvent
	for told := 0; stream.Receive(); {
		silence.Reset(streamSilence)
		e := stream.Msg()
		parts = append(parts, e)
		if told += len(e.GetPut()) + len(e.GetGone()); told > 2*maxViewed {
			return heard, fmt.Errorf("%d profiles at once, want at most %d: %w", told, 2*maxViewed, flox.ErrFull)
		}
		if e.GetIndex() == 0 {
			continue // the rest follows
		}
		if now := w.epoch(); epoch == 0 { // the first contact: the trust list came meanwhile
			epoch = now
		} else if now != epoch {
			return heard, fmt.Errorf("the storehouse was restored: %w", flox.ErrClosed)
		}
		if err := w.take(ctx, parts, epoch); err != nil {
			return heard, err
		}
		if !heard {
			close(begun)
			poke(w.rolled)
		}
		parts, told, heard = nil, 0, true
		w.connected.Store(true)
	}
	if cause := context.Cause(ctx); cause != nil {
		return heard, cause
	}
	if connect.CodeOf(stream.Err()) == connect.CodeUnimplemented {
		return heard, stream.Err()
	}
	return heard, because(errors.New("the stream of profiles ended"), api.FromConnect(stream.Err()))
}

// take applies one event, in the messages it came in.
func (w *viewWatch) take(ctx context.Context, parts []*floxv1.ProfilesEvent, epoch uint64) error {
	last := parts[len(parts)-1]
	reset := parts[0].GetReset_()
	told := make(map[string]bool)
	for _, e := range parts {
		for _, n := range e.GetPut() {
			told[shared.Folded(n.GetName())] = true
		}
	}
	return w.change(ctx, func(next *viewState) error {
		if last.GetIndex() < next.index && next.epoch == epoch {
			return fmt.Errorf("the storehouse's profiles are at index %d and were at %d in the same epoch: it went back; restored from a backup it has to begin a new epoch: %w",
				last.GetIndex(), next.index, flox.ErrUntrusted)
		}
		if reset {
			maps.DeleteFunc(next.profiles, func(key string, _ viewed) bool { return !told[key] || next.epoch != epoch })
		}
		for _, e := range parts {
			for _, n := range e.GetPut() {
				if err := next.put(n); err != nil {
					return err
				}
			}
			for _, name := range e.GetGone() {
				delete(next.profiles, shared.Folded(name))
			}
		}
		if users := last.GetUsers(); len(users) > 0 || reset {
			next.users, next.labels = slices.Clone(users), slices.Clone(last.GetLabels())
		}
		next.index, next.epoch = last.GetIndex(), epoch
		return nil
	})
}

// keep has the agent do what the profiles say, and writes them down durably.
func (w *viewWatch) keep(ctx context.Context) error {
	poke(w.changed) // what an earlier process began may not be done
	for {
		select {
		case <-w.changed:
		case <-ctx.Done():
			return nil
		}
		if err := w.write(w.now.Load(), true); err != nil {
			w.log.Warn("where profiles are is not kept", "file", w.file, "error", err)
		}
		if err := w.settle(ctx); err != nil && ctx.Err() == nil {
			w.log.Warn("what profiles lead to is not all held", "error", err)
		}
		select {
		case <-time.After(keepViewEvery):
		case <-ctx.Done():
			return nil
		}
	}
}
