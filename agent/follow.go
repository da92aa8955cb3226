package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// streamSilence is how long the watch stream may be silent before what it told
// counts as old: several of the storehouse's heartbeats.
const streamSilence = 10 * time.Second

// follower keeps up with the storehouse: which paths became valid, which went,
// and the trust list. While it is current, "not valid" can be answered from memory.
type follower struct {
	facts     *facts
	negatives *negatives
	calls     *calls
	houses    *houses
	log       *slog.Logger
	condemned func() // told when a collection begins to remove paths
	renew     func() // told when the trust list may be another

	mu   sync.Mutex
	link link
}

// errNotYet is why the storehouse is not connected before the first attempt ended.
var errNotYet = errors.New("not answered yet")

// link is the state of the connection to the storehouse.
type link struct {
	connected bool
	lastSeen  time.Time
	index     uint64
	changed   uint64     // index of the newest change of what is valid that is known
	resets    uint64     // how often the stream began anew: indexes before may be of another epoch
	house     p2p.PeerID // the server that is followed, or was last
	err       error
	name      string
	httpURL   string
}

func (f *follower) state() link {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link
	if !l.connected && l.err == nil {
		l.err = errNotYet
	}
	return l
}

func (f *follower) update(change func(*link)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.link)
}

// run follows until ctx ends, reconnecting with a growing pause.
func (f *follower) run(ctx context.Context) error {
	for pause := retryMin; ctx.Err() == nil; pause = min(2*pause, 2*retryMax) {
		began := time.Now()
		house := f.houses.first()
		f.update(func(l *link) { l.house = house })
		err := f.once(ctx, house)
		f.negatives.setCurrent(false)
		was := f.state().connected
		f.update(func(l *link) { l.connected, l.err = false, err })
		if ctx.Err() != nil {
			return nil
		}
		f.houses.failed(house)
		if was || time.Since(began) > time.Minute {
			pause = retryMin
			f.log.Warn("lost the storehouse", "error", err)
		} else {
			f.log.Debug("storehouse not reached", "error", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	return nil
}

// once follows one stream to its end.
func (f *follower) once(ctx context.Context, house p2p.PeerID) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := f.introduce(ctx, house); err != nil {
		return err
	}
	silence := time.AfterFunc(streamSilence, func() {
		cancel(fmt.Errorf("the storehouse was silent for %s: %w", streamSilence, flox.ErrUnreachable))
	})
	defer silence.Stop()
	stream, err := f.calls.storehouse(house).Watch(ctx, connect.NewRequest(&floxv1.WatchRequest{AfterIndex: f.state().index}))
	if err != nil {
		return fmt.Errorf("watch: %w", api.FromConnect(err))
	}
	defer func() {
		cancel(nil) // Close would wait for the rest of a stream that has no end
		_ = stream.Close()
	}()
	for first := true; stream.Receive(); first = false {
		silence.Reset(streamSilence)
		if err := f.take(stream.Msg(), first); err != nil {
			return err
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return because(errors.New("watch stream ended"), api.FromConnect(stream.Err()))
}

// introduce fetches what a first contact needs: the trust list and who this is.
func (f *follower) introduce(ctx context.Context, house p2p.PeerID) error {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	if err := f.moveTrust(ctx, house); err != nil {
		return err
	}
	info, err := f.calls.storehouse(house).Info(ctx, connect.NewRequest(&floxv1.InfoRequest{}))
	if err != nil {
		return fmt.Errorf("info: %w", api.FromConnect(err))
	}
	f.update(func(l *link) { l.name, l.httpURL = info.Msg.GetName(), info.Msg.GetHttpUrl() })
	return nil
}

// moveTrust brings the trust list up to date. In a new epoch the storehouse's log
// is another one: what is known of its indexes is forgotten.
func (f *follower) moveTrust(ctx context.Context, house p2p.PeerID) error {
	version, epoch := f.facts.trustAt()
	// The newest one that is here is asked for as well: a storehouse that has
	// another under that version is not the one this machine joined.
	err := f.acceptBehind(ctx, house, max(version, 1)-1)
	if errors.Is(err, flox.ErrUntrusted) && version > 1 {
		// A storehouse that was restored branches off from some older one.
		err = f.acceptBehind(ctx, house, 0)
	}
	f.newEpoch(epoch)
	f.renew()
	return err
}

// acceptBehind asks for the trust lists behind a version, and accepts them.
func (f *follower) acceptBehind(ctx context.Context, house p2p.PeerID, version uint64) error {
	lists, err := f.calls.facts(house).TrustList(ctx, connect.NewRequest(&floxv1.TrustListRequest{HaveVersion: version}))
	if err != nil {
		return fmt.Errorf("trust list: %w", api.FromConnect(err))
	}
	return f.facts.accept(lists.Msg.GetLists())
}

// newEpoch forgets the log's indexes if the epoch is another than it was, and
// reports whether it is.
func (f *follower) newEpoch(was uint64) bool {
	_, epoch := f.facts.trustAt()
	if was == epoch || was == 0 {
		return false
	}
	f.log.Warn("the storehouse was restored from a backup: it begins a new epoch", "epoch", epoch, "before", was)
	f.update(func(l *link) { l.index, l.changed = 0, 0 })
	return true
}

// take applies one event. With the first one a stream goes on where the last one
// ended, which is in the past: what was not valid then may be by now, and no
// heartbeat says when the stream has caught up. So answers are asked for anew.
func (f *follower) take(e *floxv1.WatchEvent, starts bool) error {
	if at := f.state().index; e.GetIndex() < at {
		return fmt.Errorf("the storehouse's log is at index %d and was at %d in the same epoch: it went back; restored from a backup it has to begin a new epoch: %w",
			e.GetIndex(), at, flox.ErrUntrusted)
	}
	if starts || e.GetReset_() {
		f.negatives.reset(e.GetIndex())
	}
	for _, name := range e.GetAdded() {
		if p, err := flox.ParseStorePath(name); err == nil {
			f.negatives.add(p.HashPart(), e.GetIndex())
		}
	}
	for _, name := range e.GetRemoved() {
		if p, err := flox.ParseStorePath(name); err == nil {
			if err := f.facts.remove(p.HashPart()); err != nil {
				return err
			}
		}
	}
	if b := e.GetTrustList(); len(b) > 0 {
		_, epoch := f.facts.trustAt()
		if err := f.facts.accept([][]byte{b}); err != nil {
			f.log.Warn("trust list refused", "error", err)
		}
		f.renew()
		if f.newEpoch(epoch) {
			return fmt.Errorf("the storehouse began a new epoch: its stream begins anew: %w", flox.ErrUnreachable)
		}
	}
	if e.GetCondemned() || e.GetReset_() { // behind a reset there may have been one
		f.condemned()
	}
	first := false
	f.update(func(l *link) {
		first = !l.connected
		l.connected, l.err, l.lastSeen = true, nil, time.Now()
		l.index = max(l.index, e.GetIndex())
		if e.GetReset_() {
			l.resets++
		}
		if starts || e.GetReset_() || len(e.GetAdded())+len(e.GetRemoved()) > 0 {
			l.changed = e.GetIndex()
		}
	})
	if first {
		house := f.state().house
		f.houses.answered(house)
		f.log.Info("following the storehouse", "server", string(house), "index", e.GetIndex())
	}
	f.negatives.setCurrent(true)
	return nil
}
