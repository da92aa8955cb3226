package storehouse

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// watchHeartbeat is how often a watcher hears something at least; it takes
	// its answers for current no longer than a few of these.
	watchHeartbeat = 2 * time.Second
	// watchBatch is how many changes are read at once: what a slow watcher makes
	// us keep in memory.
	watchBatch = 256
	// maxWatchers is how many streams are served at once.
	maxWatchers = 1 << 14
)

// Watch is floxv1connect.StorehouseHandler. A watcher reads the replicated list
// of changes at its own pace, so there is no queue per watcher; one that is too
// far behind is told to forget what it knew.
func (s *rpc) Watch(ctx context.Context, req *connect.Request[floxv1.WatchRequest], stream *connect.ServerStream[floxv1.WatchEvent]) error {
	select {
	case s.watchers <- struct{}{}:
		defer func() { <-s.watchers }()
	default:
		return api.ToConnect(fmt.Errorf("%d watchers are served already: %w", maxWatchers, flox.ErrFull))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	if err := s.ready(ctx); err != nil {
		return api.ToConnect(err)
	}
	err := s.watch(ctx, req.Msg.GetAfterIndex(), stream.Send)
	if s.stop.Err() != nil {
		err = errStopping
	}
	return api.ToConnect(err)
}

// watch sends what changes after an index until ctx ends.
func (s *Server) watch(ctx context.Context, after uint64, send func(*floxv1.WatchEvent) error) error {
	// The start is read as of now: what was answered to anybody before this call
	// is in the stream or before it.
	at, err := s.watchStart(ctx, after, send)
	for err == nil {
		at, err = s.watchNext(ctx, at, send)
	}
	return err
}

// watchStart sends the first message and says where the stream begins.
func (s *Server) watchStart(ctx context.Context, after uint64, send func(*floxv1.WatchEvent) error) (at uint64, err error) {
	reset := false
	err = s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		counts, err := readCounts(r)
		// An index from another life of the log, or from before what is kept.
		reset = after == 0 || after > r.Index() || after < counts.dropped
		if at = after; reset {
			at = r.Index()
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return at, send(&floxv1.WatchEvent{Index: at, Reset_: reset, Heartbeat: !reset})
}

// watchNext sends the changes behind at, or a heartbeat if there are none for a while.
func (s *Server) watchNext(ctx context.Context, at uint64, send func(*floxv1.WatchEvent) error) (uint64, error) {
	wait, cancel := context.WithTimeout(ctx, watchHeartbeat)
	_, err := s.node.Follow(wait, at)
	cancel()
	if ctx.Err() != nil {
		return at, ctx.Err()
	}
	if err != nil && wait.Err() == nil {
		return at, err
	}
	events, upTo, reset, err := s.changes(ctx, at)
	if err != nil {
		return at, err
	}
	if reset {
		return upTo, send(&floxv1.WatchEvent{Index: upTo, Reset_: true})
	}
	for _, e := range events {
		if err := send(e); err != nil {
			return at, err
		}
	}
	if len(events) == 0 {
		err = send(&floxv1.WatchEvent{Index: upTo, Heartbeat: true})
	}
	return upTo, err
}

// changes reads the next changes behind at, and up to which index the caller
// then knows all of them. A heartbeat says that it is current, so this server
// must know that it still leads.
func (s *Server) changes(ctx context.Context, at uint64) (events []*floxv1.WatchEvent, upTo uint64, reset bool, err error) {
	err = s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) (err error) {
		events, upTo, reset, err = readChanges(r, at)
		return err
	})
	return events, upTo, reset, err
}
