package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/channel"
	"github.com/floxctl/flox/profile/upgrade"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// trackEvery is how often the leader looks for tracked channels that are due.
	trackEvery = time.Minute
	// trackWait bounds all that is done for one of them, with its evaluation.
	trackWait = 2 * time.Hour
	// trackLook is how often, at least, who waits for a fetch is told of it.
	trackLook = time.Second
)

// fetching is what this server fetches now of tracked channels: one at a time.
type fetching struct {
	turn chan struct{}
	wake bell // rings when one is due at once
	news bell // rings when it is further

	mu   sync.Mutex
	name string // folded; "" = nothing
	now  *floxv1.TrackChannelProgress
}

// is notes how far a channel is; nil = it is done.
func (f *fetching) is(name string, now *floxv1.TrackChannelProgress) {
	f.mu.Lock()
	f.name, f.now = strings.ToLower(name), now
	f.mu.Unlock()
	f.news.ring()
}

// of says how far a channel is.
func (f *fetching) of(name string) *floxv1.TrackChannelProgress {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.now == nil:
		return &floxv1.TrackChannelProgress{Doing: "waits to be fetched"}
	case f.name != strings.ToLower(name):
		return &floxv1.TrackChannelProgress{Doing: "waits until channel " + f.name + " is fetched"}
	}
	return f.now
}

// track has a channel follow a tarball, and tells of the first fetch until it is over.
func (c *channels) track(ctx context.Context, who person, q *floxv1.TrackChannelRequest, tell func(*floxv1.TrackChannelProgress)) error {
	t := &floxv1.ChannelTracking{Channel: q.GetChannel(), Url: q.GetUrl(), EveryMinutes: q.GetEveryMinutes(), Systems: q.GetSystems()}
	setDefault(&t.EveryMinutes, upgrade.Daily)
	if err := channel.CheckTracking(t); err != nil {
		return err
	}
	if err := c.s.takesFacts(ctx); err != nil {
		return fmt.Errorf("channel %s: %w", q.GetChannel(), err)
	}
	reply, err := c.propose(ctx, who, &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Track{Track: t}})
	if err == nil {
		err = c.s.note(ctx, who.Actor, actionTrack, reply.GetTracking().GetChannel(), t.GetUrl())
	}
	if err != nil {
		return err
	}
	c.fetching.wake.ring()
	return c.watchFetch(ctx, reply.GetTracking(), tell)
}

// untrack has a channel follow nothing any more. Its versions stay.
func (c *channels) untrack(ctx context.Context, who person, name string) (*floxv1.ChannelTracking, error) {
	reply, err := c.propose(freeing(ctx), who, &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Track{Track: &floxv1.ChannelTracking{Channel: name}}})
	if err == nil {
		err = c.s.note(freeing(ctx), who.Actor, actionUntrack, reply.GetTracking().GetChannel(), reply.GetTracking().GetUrl())
	}
	return reply.GetTracking(), err
}

// watchFetch tells how far the first fetch of a tracked channel is, until it is over.
func (c *channels) watchFetch(ctx context.Context, t *floxv1.ChannelTracking, tell func(*floxv1.TrackChannelProgress)) error {
	look := time.NewTicker(trackLook)
	defer look.Stop()
	for {
		news := c.fetching.news.wait()
		var now *floxv1.ChannelState
		err := c.view(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
			now, err = stateOf(r, t.GetChannel())
			return err
		})
		switch {
		case err != nil:
			return err
		case now.GetTracking().GetIndex() != t.GetIndex():
			return fmt.Errorf("channel %s: somebody changed meanwhile what it tracks; see: floxctl channel show %s: %w", t.GetChannel(), t.GetChannel(), flox.ErrBusy)
		case now.GetTracking().GetLast() != nil:
			tell(&floxv1.TrackChannelProgress{State: now})
			return nil
		}
		tell(c.fetching.of(t.GetChannel()))
		select {
		case <-news:
		case <-look.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// stateOf gives a channel with its newest version and what it tracks. One that is tracked
// and was not fetched yet has a name alone. ErrNotFound if it is neither.
func stateOf(r *cluster.Reader, name string) (*floxv1.ChannelState, error) {
	t, err := channel.Tracking(r, name)
	if err != nil {
		return nil, err
	}
	s := &floxv1.ChannelState{Tracking: t}
	if t != nil {
		s.NextFetchUnixMs = channel.NextFetch(t, time.Now()).UnixMilli()
	}
	if s.Channel, err = channel.Find(r, name); errors.Is(err, flox.ErrNotFound) && t != nil {
		s.Channel = &floxv1.Channel{Name: t.GetChannel(), CreatedUnixMs: t.GetSinceUnixMs(), CreatedBy: t.GetActor().GetUser()}
		return s, nil
	}
	if err == nil {
		s.Newest, err = channel.Version(r, s.GetChannel().GetName(), s.GetChannel().GetLast())
	}
	return s, err
}

// list gives all channels, and those that are tracked and have no version yet.
func (c *channels) list(ctx context.Context) (states []*floxv1.ChannelState, err error) {
	err = c.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		all, err := channel.List(r)
		tracked, err2 := channel.Tracked(r)
		names := make([]string, 0, len(all)+len(tracked))
		for _, ch := range all {
			names = append(names, strings.ToLower(ch.GetName()))
		}
		for _, t := range tracked {
			names = append(names, strings.ToLower(t.GetChannel()))
		}
		slices.Sort(names)
		err = errors.Join(err, err2)
		for _, name := range slices.Compact(names) {
			if err != nil {
				break
			}
			var s *floxv1.ChannelState
			s, err = stateOf(r, name)
			states = append(states, s)
		}
		return err
	})
	return states, err
}

// trackLoop fetches on the leader what channels track, until ctx ends.
func (c *channels) trackLoop(ctx context.Context) error {
	return c.s.asLeader(ctx, trackEvery, &c.fetching.wake, "fetch channels that are tracked", c.fetchDue)
}

// fetchDue fetches the channels that are due at a time, one after another.
func (c *channels) fetchDue(ctx context.Context, now time.Time) error {
	var due []*floxv1.ChannelTracking
	err := c.view(ctx, cluster.Local, func(r *cluster.Reader) error {
		all, err := channel.Tracked(r)
		for _, t := range all {
			if err == nil && !channel.NextFetch(t, now).After(now) {
				due = append(due, t)
			}
		}
		return err
	})
	slices.SortStableFunc(due, func(x, y *floxv1.ChannelTracking) int { // who waits longest comes first
		return channel.NextFetch(x, now).Compare(channel.NextFetch(y, now))
	})
	for _, t := range due {
		if ctx.Err() != nil || c.s.node.Status().State != "leader" {
			break // whoever leads now goes on
		}
		if failed := c.fetchOne(ctx, t); failed != nil {
			err = errors.Join(err, fmt.Errorf("channel %s: %w", t.GetChannel(), failed))
		}
	}
	return err
}

// fetchOne fetches a channel, and notes what that came to. What it gives is to be tried
// again: somebody changed what is tracked in this moment, or the server stops.
func (c *channels) fetchOne(ctx context.Context, t *floxv1.ChannelTracking) error {
	select {
	case c.fetching.turn <- struct{}{}:
		defer func() { <-c.fetching.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	defer c.fetching.is("", nil)
	f, err := c.follow(ctx, t, func(p *floxv1.TrackChannelProgress) { c.fetching.is(t.GetChannel(), p) })
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, errTrackedElse):
		return nil
	case err != nil:
		c.s.cfg.Log.Warn("a channel could not be fetched, trying again later", "channel", t.GetChannel(), "error", err)
		last := t.GetLast()
		f = &floxv1.ChannelFetch{
			Result: channel.FetchFailed, Detail: err.Error(), Etag: last.GetEtag(), LastModified: last.GetLastModified(), Source: last.GetSource(), Version: last.GetVersion(),
		}
	}
	f.Detail = profile.Cut(f.GetDetail())
	_, err = c.propose(ctx, c.s.itself(), &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Fetched{Fetched: &floxv1.NoteFetch{
		Channel: t.GetChannel(), Tracking: t.GetIndex(), Fetch: f,
	}}})
	return err
}

// errTrackedElse: what was fetched is not what the channel tracks any more.
var errTrackedElse = errors.New("it tracks something else by now, or nothing")

// follow fetches what a channel tracks, and makes a version of it if it is new.
func (c *channels) follow(ctx context.Context, t *floxv1.ChannelTracking, tell func(*floxv1.TrackChannelProgress)) (*floxv1.ChannelFetch, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, trackWait, fmt.Errorf("it was not done within %s: %w", trackWait, flox.ErrUnreachable))
	defer cancel()
	tell(&floxv1.TrackChannelProgress{Doing: "fetches " + t.GetUrl(), Bytes: true})
	got, err := c.fetch(ctx, t, tell)
	if err != nil {
		return nil, err
	}
	last := t.GetLast()
	f := &floxv1.ChannelFetch{
		Result: channel.FetchUnchanged, Detail: got.from, Etag: got.etag, LastModified: got.modified, Source: string(got.source), Version: last.GetVersion(),
	}
	if got.source == "" {
		f.Etag, f.LastModified, f.Source = last.GetEtag(), last.GetLastModified(), last.GetSource()
	}
	if f.GetSource() == last.GetSource() {
		return f, nil
	}
	newest, err := c.stillTracks(ctx, t)
	if err != nil {
		return nil, err
	}
	if newest.GetSource() == f.GetSource() && newest.GetFile() == "" && slices.Equal(newest.GetSystems(), t.GetSystems()) {
		f.Version = newest.GetNumber()
		return f, nil
	}
	end, err := c.published(ctx, &floxv1.PublishChannelRequest{
		Channel: t.GetChannel(), Source: f.GetSource(), Systems: t.GetSystems(), Reason: profile.Cut("fetched from " + got.from),
	}, func(p *floxv1.PublishChannelProgress) {
		tell(&floxv1.TrackChannelProgress{Doing: p.GetDoing(), Done: uint64(p.GetDone()), All: uint64(p.GetAll())})
	})
	if err != nil {
		return nil, err
	}
	if f.Version = end.GetVersion().GetNumber(); end.GetChannel() != nil {
		f.Result = channel.FetchPublished
	}
	return f, nil
}

// stillTracks gives the newest version of a channel, nil if it has none. errTrackedElse.
func (c *channels) stillTracks(ctx context.Context, t *floxv1.ChannelTracking) (newest *floxv1.ChannelVersion, err error) {
	err = c.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		s, err := stateOf(r, t.GetChannel())
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return err
		}
		if s.GetTracking().GetIndex() != t.GetIndex() {
			return errTrackedElse
		}
		newest = s.GetNewest()
		return nil
	})
	return newest, err
}

// published makes a version of a channel on behalf of the storehouse. Where this server
// evaluates nothing, others are asked.
func (c *channels) published(ctx context.Context, q *floxv1.PublishChannelRequest, tell func(*floxv1.PublishChannelProgress)) (end *floxv1.PublishChannelProgress, err error) {
	err = c.publishNoted(ctx, c.s.itself(), q, func(p *floxv1.PublishChannelProgress) { end = p; tell(p) })
	if !errors.Is(err, errNoBuilder) {
		return end, err
	}
	others, _, _ := c.s.servers.others()
	for _, id := range others {
		there, failed := c.publishedBy(ctx, id, q, tell)
		if failed == nil || !errors.Is(failed, flox.ErrUnreachable) {
			return there, failed
		}
	}
	return nil, err
}

// publishedBy has another server make a version. ErrUnreachable if it evaluates nothing either.
func (c *channels) publishedBy(ctx context.Context, id p2p.PeerID, q *floxv1.PublishChannelRequest, tell func(*floxv1.PublishChannelProgress)) (end *floxv1.PublishChannelProgress, err error) {
	req, err := passedFor(c.s.actor(), q)
	if err != nil {
		return nil, err
	}
	stream, err := c.s.servers.admin(id).PublishChannel(ctx, req)
	if err != nil {
		return nil, api.FromConnect(err)
	}
	for stream.Receive() {
		end = proto.CloneOf(stream.Msg())
		tell(end)
	}
	err = errors.Join(api.FromConnect(stream.Err()), stream.Close())
	if err == nil && end.GetVersion() == nil {
		err = fmt.Errorf("the server that evaluates it ended before anything was published: %w", flox.ErrUnreachable)
	}
	return end, err
}
