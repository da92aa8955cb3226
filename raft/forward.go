package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// The pause before the leader is asked again when nothing is heard of another one.
const (
	retryFirst = 5 * time.Millisecond
	retryMost  = 100 * time.Millisecond
)

// leadership wakes those who wait for another leader.
type leadership struct {
	mu      sync.Mutex
	changed chan struct{}
}

// next gives a channel that is closed when somebody else leads, or nobody.
func (l *leadership) next() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

func (l *leadership) notify() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// watchLeader wakes who waits in leadership until stop is called.
func (n *Node) watchLeader(r *raft.Raft) (stop func()) {
	seen := make(chan raft.Observation, 16)
	o := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		_, leader := o.Data.(raft.LeaderObservation)
		return leader
	})
	done := make(chan struct{})
	n.work.Go(func() {
		for {
			select {
			case <-seen: // one that did not fit tells nothing more than those that did
				n.leadership.notify()
			case <-done:
				n.leadership.notify()
				return
			}
		}
	})
	r.RegisterObserver(o)
	return func() {
		r.DeregisterObserver(o)
		close(done)
	}
}

// atLeader has a call carried out by the leader, here or over the network, and
// waits through elections until ctx ends. A call whose outcome is unknown is
// made again only if again is set; unknown says whether that happened.
func (n *Node) atLeader(ctx context.Context, q *floxv1.ClusterCall, again bool) (a *floxv1.ClusterAnswer, unknown bool, err error) {
	pause := retryFirst
	for {
		changed := n.leadership.next()
		a, err = n.askLeader(ctx, q)
		switch {
		case err == nil:
			return a, unknown, nil
		case errors.Is(err, ErrUnknownOutcome):
			unknown = true
			if !again {
				return nil, unknown, err
			}
		case errors.Is(err, ErrNotLeader):
		default:
			return a, unknown, err // a says at which index it was refused
		}
		select {
		case <-changed:
		case <-time.After(pause):
			pause = min(2*pause, retryMost)
		case <-n.machine.closed:
			return nil, unknown, giveUp(unknown, *n.machine.stopped.Load())
		case <-ctx.Done():
			return nil, unknown, giveUp(unknown, fmt.Errorf("%w: %w", ctx.Err(), err))
		}
	}
}

// giveUp makes err say that an earlier try may have succeeded.
func giveUp(unknown bool, err error) error {
	if unknown && !errors.Is(err, ErrUnknownOutcome) {
		return fmt.Errorf("%w: %w", err, ErrUnknownOutcome)
	}
	return err
}

// askLeader is one try.
func (n *Node) askLeader(ctx context.Context, q *floxv1.ClusterCall) (*floxv1.ClusterAnswer, error) {
	r, err := n.active()
	if err != nil {
		return nil, err
	}
	address, _ := r.LeaderWithID()
	peers := n.peers.Load()
	switch {
	case r.State() == raft.Leader:
		return n.carryOut(ctx, q)
	case address == "" || peers == nil || string(address) == n.cfg.Address:
		return nil, fmt.Errorf("nobody leads now: %w", ErrNotLeader)
	}
	return peers.call(ctx, string(address), q, func() (bool, <-chan struct{}) {
		changed := n.leadership.next()
		now, _ := r.LeaderWithID()
		return now != "" && now != address, changed
	})
}
