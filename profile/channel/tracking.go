package channel

import (
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile/tarball"
	"github.com/floxctl/flox/profile/upgrade"
	"github.com/floxctl/flox/raft"
)

// What fetching a tracked channel came to.
const (
	FetchPublished = "published"
	FetchUnchanged = "unchanged"
	FetchFailed    = "failed"
)

// firstRetry is when a fetch that failed is tried again; each further time it is twice as
// long, up to how often the channel is fetched.
const firstRetry = 5 * time.Minute

func trackingKeyOf(name string) []byte { return append([]byte{trackingKey}, folded(name)...) }

// Tracking gives what a channel tracks; nil if nothing.
func Tracking(g raft.Getter, name string) (*floxv1.ChannelTracking, error) {
	t, err := raft.LoadRecord(g, processorName, trackingKeyOf(name), &floxv1.ChannelTracking{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil, nil //nolint:nilnil // its getters give what an empty one has
	}
	return t, err
}

// Tracked gives what all channels track, in the order of their names.
func Tracked(g raft.Getter) (all []*floxv1.ChannelTracking, err error) {
	var bad error
	err = g.Iterate([]byte{trackingKey}, nil, func(key, value []byte) bool {
		t := &floxv1.ChannelTracking{}
		bad = raft.DecodeRecord(processorName, key, value, t)
		all = append(all, t)
		return bad == nil
	})
	return all, errors.Join(bad, err)
}

// NextFetch is when a tracked channel is to be fetched: not behind now if it is due already.
func NextFetch(t *floxv1.ChannelTracking, now time.Time) time.Time {
	last := t.GetLast()
	if last == nil {
		return time.UnixMilli(t.GetSinceUnixMs())
	}
	at := time.UnixMilli(last.GetTimeUnixMs())
	if at.After(now) {
		return now // it was of a wrong clock
	}
	wait := time.Duration(t.GetEveryMinutes()) * time.Minute
	if n := last.GetFailures(); n > 0 && n < 16 {
		wait = min(wait, firstRetry<<(n-1))
	}
	return at.Add(wait)
}

// CheckTracking refuses what cannot be tracked. ErrBadInput.
func CheckTracking(t *floxv1.ChannelTracking) error {
	err := Check(t.GetChannel())
	if err == nil {
		err = tarball.CheckURL(t.GetUrl())
	}
	if every := t.GetEveryMinutes(); err == nil && every == 0 {
		err = fmt.Errorf("fetched every 0 minutes, want every hour to every 366 days: %w", flox.ErrBadInput)
	}
	if err == nil {
		err = upgrade.Check(&floxv1.ProfileSchedule{EveryMinutes: t.GetEveryMinutes()})
	}
	if err == nil {
		err = checkSystems(t.GetSystems())
	}
	if err != nil {
		return fmt.Errorf("channel %.80s: %w", t.GetChannel(), err)
	}
	return nil
}

// track has a channel follow a tarball, or no more.
func (a *applying) track(t *floxv1.ChannelTracking) error {
	if err := Check(t.GetChannel()); err != nil {
		return err
	}
	if !a.admin {
		return fmt.Errorf("channel %s: only an admin of the storehouse says what it tracks: %w", t.GetChannel(), flox.ErrDenied)
	}
	was, err := Tracking(a.tx, t.GetChannel())
	if err != nil {
		return err
	}
	if t.GetUrl() == "" {
		if was == nil {
			return fmt.Errorf("channel %s tracks nothing: %w", t.GetChannel(), flox.ErrNotFound)
		}
		a.reply.Tracking = was
		return a.tx.Delete(trackingKeyOf(t.GetChannel()))
	}
	if err := CheckTracking(t); err != nil {
		return err
	}
	all, err := Tracked(a.tx)
	if err != nil {
		return err
	}
	if was == nil && len(all) >= maxTracked {
		return fmt.Errorf("%d channels track something already, which is all that may: %w", len(all), flox.ErrFull)
	}
	name := t.GetChannel()
	switch is, err := Find(a.tx, name); {
	case err == nil:
		name = is.GetName()
	case !errors.Is(err, flox.ErrNotFound):
		return err
	}
	now := &floxv1.ChannelTracking{
		Channel: name, Url: t.GetUrl(), EveryMinutes: t.GetEveryMinutes(), Systems: t.GetSystems(),
		Index: a.index, SinceUnixMs: a.at.UnixMilli(), Actor: a.actor,
	}
	a.reply.Tracking = now
	return put(a.tx, trackingKeyOf(name), now)
}

// fetched notes what a fetch came to.
func (a *applying) fetched(n *floxv1.NoteFetch) error {
	f := n.GetFetch()
	if !a.admin {
		return fmt.Errorf("channel %s: only the storehouse says what fetching it came to: %w", n.GetChannel(), flox.ErrDenied)
	}
	for _, text := range []string{f.GetResult(), f.GetDetail(), f.GetEtag(), f.GetLastModified(), f.GetSource()} {
		if len(text) > maxText {
			return fmt.Errorf("channel %s: a fetch that is described in %d bytes, want at most %d: %w", n.GetChannel(), len(text), maxText, flox.ErrBadInput)
		}
	}
	t, err := Tracking(a.tx, n.GetChannel())
	if err != nil {
		return err
	}
	if t == nil || t.GetIndex() != n.GetTracking() {
		a.reply.Moved = true
		return nil
	}
	f.TimeUnixMs, f.Failures = a.at.UnixMilli(), 0
	if f.GetResult() == FetchFailed {
		f.Failures = t.GetLast().GetFailures() + 1
	}
	t.Last = f
	a.reply.Tracking = t
	return put(a.tx, trackingKeyOf(t.GetChannel()), t)
}
