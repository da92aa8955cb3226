package storehouse

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// collectLook is how often, at least, a server looks whether a collection is due.
	collectLook = time.Minute
	// collectRetry is the part of the interval after which one that failed is tried again.
	collectRetry = 24
)

// collectBook knows when a collection last ended. The audit log says so, on every
// server and to whoever leads next.
type collectBook struct {
	mu     sync.Mutex
	upTo   uint64    // log index up to which the audit log was read
	first  time.Time // of its first record, about when the storehouse began
	newest collectedAt
}

// collectedAt is a collection that ended.
type collectedAt struct {
	at    time.Time // zero = none did
	words string    // what it did
}

// lastCollected gives the last collection this server knows of.
func (s *Server) lastCollected(ctx context.Context) (collectedAt, error) {
	b := &s.collected
	b.mu.Lock()
	defer b.mu.Unlock()
	err := s.viewMembers(ctx, cluster.Local, func(r *cluster.Reader) error {
		return members.Audit(r, b.upTo, func(rec *floxv1.AuditRecord) bool {
			b.upTo = rec.GetIndex()
			at := time.UnixMilli(rec.GetTimeUnixMs())
			if b.first.IsZero() {
				b.first = at
			}
			if rec.GetAction() == actionCollected {
				b.newest = collectedAt{at, rec.GetDetail()}
			}
			return ctx.Err() == nil
		})
	})
	return b.newest, errors.Join(err, ctx.Err())
}

// collectLoop collects on the leader, every Config.CollectEvery and a little, until
// ctx ends. A storehouse that never collected begins that long after it was made.
func (s *Server) collectLoop(ctx context.Context) error {
	every := s.cfg.CollectEvery
	if every == 0 || s.Ready(ctx) != nil {
		return nil // ctx ended
	}
	// Storehouses that were started together do not all collect together.
	late := rand.N(every/10 + 1) //nolint:gosec // spreads a load
	tick := time.NewTicker(max(min(collectLook, every/4), time.Millisecond))
	defer tick.Stop()
	var notBefore time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if s.node.Status().State != "leader" || time.Now().Before(notBefore) {
			continue
		}
		due, err := s.collectDue(ctx, every+late)
		if err == nil && due {
			err = s.collectFor(ctx, s.actor(), CollectOptions{}, nil)
		}
		if err != nil && ctx.Err() == nil {
			notBefore = time.Now().Add(every / collectRetry)
			if !errors.Is(err, flox.ErrBusy) { // somebody collects by hand
				s.cfg.Log.Warn("the collection that was due did not come to its end, trying again later", "error", err)
			}
		}
	}
}

// collectDue reports whether the last collection ended that long ago.
func (s *Server) collectDue(ctx context.Context, every time.Duration) (bool, error) {
	last, err := s.lastCollected(ctx)
	if err != nil {
		return false, err
	}
	s.collected.mu.Lock()
	first := s.collected.first
	s.collected.mu.Unlock()
	if last.at.IsZero() {
		return !first.IsZero() && time.Since(first) > every, nil
	}
	return time.Since(last.at) > every, nil
}
