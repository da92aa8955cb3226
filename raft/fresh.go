package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/floxctl/flox"
)

// freshness is since when this server's state is known to miss nothing.
type freshness struct {
	mu        sync.Mutex
	confirmed time.Time // the state holds all that was answered before
	// A leader was asked at this time and gave this index, which was not applied
	// here yet. Kept until it is: a newer one might never be reached.
	asked time.Time
	index uint64
}

// note records that all that was answered before at is in a state that holds index.
func (f *freshness) note(at time.Time, index, applied uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.settle(applied)
	switch {
	case index <= applied:
		if at.After(f.confirmed) {
			f.confirmed = at
		}
	case f.asked.IsZero():
		f.asked, f.index = at, index
	}
}

func (f *freshness) settle(applied uint64) {
	if f.asked.IsZero() || f.index > applied {
		return
	}
	if f.asked.After(f.confirmed) {
		f.confirmed = f.asked
	}
	f.asked = time.Time{}
}

// since gives the moment up to which the state is known to miss nothing.
func (f *freshness) since(applied uint64) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.settle(applied)
	return f.confirmed
}

// ViewWithin gives the state of a kind, at most maxAge old: it holds every
// command answered longer ago than that. It asks the leader only if this server
// has not heard from one for maxAge, or has not applied what it heard of then.
// Errors: ErrUnreachable, saying how old the state may be. It must be closed soon.
func (n *Node) ViewWithin(ctx context.Context, kind uint32, maxAge time.Duration) (*Reader, error) {
	if maxAge < 0 {
		return nil, fmt.Errorf("read: age %v, want 0 or more: %w", maxAge, flox.ErrBadInput)
	}
	if age, known := n.age(); !known || age > maxAge {
		ask, cancel := context.WithTimeout(ctx, 4*n.cfg.Heartbeat)
		defer cancel()
		err := n.current(ask)
		if age, known = n.age(); err != nil && (!known || age > maxAge) {
			return nil, errors.Join(fmt.Errorf("read: the state may be %s old, want at most %v: %w", ageString(age, known), maxAge, flox.ErrUnreachable), err)
		}
	}
	return n.View(ctx, kind, Local)
}

// age is how old the state here may be; not known = no leader was heard yet.
func (n *Node) age() (age time.Duration, known bool) {
	at := n.fresh.since(n.machine.applied())
	return time.Since(at), !at.IsZero()
}

func ageString(age time.Duration, known bool) string {
	if !known {
		return "any time"
	}
	return age.Round(time.Millisecond).String()
}

// current waits until the state here holds all that was answered before.
func (n *Node) current(ctx context.Context) error {
	at := time.Now()
	index, err := n.ReadIndex(ctx)
	if err != nil {
		return err
	}
	if _, err := n.Wait(ctx, index); err != nil {
		return err
	}
	n.fresh.note(at, index, n.machine.applied())
	return nil
}
