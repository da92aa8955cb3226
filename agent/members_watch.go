package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	// keepMembersEvery is how often the list is written, if it changed: a machine
	// that comes back hears of what it missed.
	keepMembersEvery = time.Second
	// noListPause is how long a storehouse that does not tell its members is left alone.
	noListPause = time.Minute
)

// memberWatch follows the member list of the storehouse.
type memberWatch struct {
	list   *memberList
	calls  *calls
	houses *houses
	epoch  func() uint64 // of the trust list
	settle func()        // has the rest of the agent do what the list says
}

// runMembers follows the member list until ctx ends.
func (a *Agent) runMembers(ctx context.Context) error {
	w := &memberWatch{list: a.members, calls: a.calls, houses: a.houses, epoch: func() uint64 { _, epoch := a.facts.trustAt(); return epoch }, settle: a.settleMembers}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return w.follow(ctx) })
	group.Go(func() error { return w.keep(ctx) })
	return group.Wait()
}

// follow follows one stream after the other, at whichever server answers.
func (w *memberWatch) follow(ctx context.Context) error {
	for pause := retryMin; ctx.Err() == nil; pause = min(2*pause, 2*retryMax) {
		house := w.houses.first()
		heard, err := w.once(ctx, house)
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
			w.list.log.Debug("the member list is not followed", "server", string(house), "error", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	return nil
}

// once follows one stream to its end, and says whether anything came.
func (w *memberWatch) once(ctx context.Context, house p2p.PeerID) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(streamSilence, func() {
		cancel(fmt.Errorf("the storehouse was silent for %s: %w", streamSilence, flox.ErrUnreachable))
	})
	defer silence.Stop()
	have, epoch := w.list.now.Load(), w.epoch()
	after := have.index
	if have.epoch != epoch { // the storehouse was restored: its log is another
		after = 0
	}
	stream, err := w.calls.members(house).WatchMembers(ctx, connect.NewRequest(&floxv1.WatchMembersRequest{AfterIndex: after}))
	if err != nil {
		return false, err
	}
	defer func() {
		cancel(nil) // Close would wait for the rest of a stream that has no end
		_ = stream.Close()
	}()
	var set memberSet
	for stream.Receive() {
		silence.Reset(streamSilence)
		e := stream.Msg()
		if err := set.add(e); err != nil {
			return heard, err
		}
		if e.GetIndex() == 0 {
			continue // the rest follows
		}
		if !set.reset && !w.list.now.Load().known {
			return heard, fmt.Errorf("the storehouse tells changes of a member list that it never told: %w", flox.ErrCorrupt)
		}
		if now := w.epoch(); epoch != 0 && now != epoch {
			return heard, fmt.Errorf("the storehouse was restored: %w", flox.ErrClosed)
		} else if epoch == 0 { // the first contact: the trust list came meanwhile
			epoch = now
		}
		if was := w.list.now.Load(); e.GetIndex() < was.index && was.epoch == epoch {
			return heard, fmt.Errorf("the member list is at index %d and was at %d in the same epoch: the storehouse went back; restored from a backup it has to begin a new epoch: %w",
				e.GetIndex(), was.index, flox.ErrUntrusted)
		}
		w.list.apply(&set, e, epoch)
		set, heard = memberSet{}, true
	}
	if cause := context.Cause(ctx); cause != nil {
		return heard, cause
	}
	if connect.CodeOf(stream.Err()) == connect.CodeUnimplemented {
		return heard, stream.Err()
	}
	return heard, because(errors.New("the stream of members ended"), api.FromConnect(stream.Err()))
}

// keep has the agent do what the list says, at once, and writes it down.
func (w *memberWatch) keep(ctx context.Context) error {
	for {
		select {
		case <-w.list.changed:
		case <-ctx.Done():
			return nil
		}
		w.settle()
		if err := w.list.now.Load().save(w.list.file, w.list.invite); err != nil {
			w.list.log.Warn("the member list is not kept", "file", w.list.file, "error", err)
		}
		select {
		case <-time.After(keepMembersEvery):
		case <-ctx.Done():
			// What came meanwhile is not lost: the stream resumes behind what was written.
			return nil
		}
	}
}

// settleMembers does what the member list says: meets the storehouse's servers,
// cuts off who is a member no more, and leaves the DHT to others if this machine
// is here for a short while only.
func (a *Agent) settleMembers() {
	servers := a.members.houses()
	a.houses.set(idsOf(servers))
	if err := a.host.SetStorehouses(servers); err != nil {
		a.log.Warn("the servers that the member list names cannot be used", "error", err)
	}
	a.host.SetDHTClient(a.members.member(a.host.ID()).GetEphemeral())
	a.host.Kick()
}
