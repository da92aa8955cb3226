package raft

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// enqueueTimeout bounds how long a proposal waits for the leader's loop.
const enqueueTimeout = 5 * time.Second

// ProposeOptions make a proposal safe to repeat.
type ProposeOptions struct {
	// Session is the client's name, chosen at random, at most 64 bytes; "" = the
	// command may be applied twice if it is proposed twice.
	Session string
	// Sequence numbers the session's commands from 1; the first must be answered
	// before others are proposed, and at most KeptReplies may be under way.
	Sequence uint64
}

// Propose puts a command into the log and waits until it is applied here. It
// gives the processor's reply and the log index at which the change is visible.
// A refusal wraps ErrRefused. Other errors: ErrNotLeader (not proposed),
// ErrUnknownOutcome (propose again with the same options), ErrFull, ErrBusy (not
// proposed), ErrBadInput.
func (n *Node) Propose(ctx context.Context, kind uint32, command []byte, opt ProposeOptions) (reply []byte, index uint64, err error) {
	r, err := n.active()
	if err != nil {
		return nil, 0, err
	}
	// What this server could not apply itself must not get into the log.
	if n.machine.processors[kind] == nil {
		return nil, 0, fmt.Errorf("propose: no processor for kind %d: %w", kind, flox.ErrBadInput)
	}
	if len(command) > MaxCommand {
		return nil, 0, fmt.Errorf("propose: command of %d bytes, want at most %d: %w", len(command), MaxCommand, flox.ErrBadInput)
	}
	free, err := freeBytes(n.cfg.Dir)
	if err != nil {
		return nil, 0, err
	}
	if free < n.cfg.ReserveBytes {
		return nil, 0, fmt.Errorf("%s has %d MiB free and %d MiB are kept for the log: make room on that disk: %w",
			n.cfg.Dir, free>>20, n.cfg.ReserveBytes>>20, flox.ErrFull)
	}
	entry, err := encodeEntry(&floxv1.Envelope{
		Version: EnvelopeVersion, Session: opt.Session, Sequence: opt.Sequence,
		TimeUnixMs: n.now(), Kind: kind, Command: command,
	})
	if err != nil {
		return nil, 0, err
	}
	if err := n.enter(ctx); err != nil {
		return nil, 0, err
	}
	f := r.Apply(entry, enqueueTimeout)
	if err := n.await(ctx, f); err != nil {
		return nil, 0, proposeError(err)
	}
	a, ok := f.Response().(answer)
	switch {
	case !ok:
		return nil, 0, fmt.Errorf("propose: no answer: %w", ErrUnknownOutcome)
	case a.err != nil:
		return nil, 0, a.err
	case a.refused != nil:
		return nil, f.Index(), a.refused
	}
	return a.reply, f.Index(), nil
}

// now is the clock of proposals: the machine's, but never going back.
func (n *Node) now() int64 {
	for {
		last := n.lastTime.Load()
		t := max(time.Now().UnixMilli(), last)
		if n.lastTime.CompareAndSwap(last, t) {
			return t
		}
	}
}

// enter takes one of the slots for waiting on raft; await gives it back.
func (n *Node) enter(ctx context.Context) error {
	select {
	case n.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d proposals and reads are waiting already: %w: %w", cap(n.slots), ctx.Err(), flox.ErrBusy)
	}
}

// await waits for a future or for ctx. The slot is given back when the future
// is done: raft settles every future in the time of an election.
func (n *Node) await(ctx context.Context, f raft.Future) error {
	done := make(chan error, 1)
	go func() {
		err := f.Error()
		<-n.slots
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ctx.Err(), ErrUnknownOutcome)
	}
}

// wait is await with a slot of its own, for calls that change nothing.
func (n *Node) wait(ctx context.Context, f raft.Future) error {
	if err := n.enter(ctx); err != nil {
		return err
	}
	return n.await(ctx, f)
}

// proposeError says in our words why a proposal was not answered.
func proposeError(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return fmt.Errorf("propose: %w", ErrNotLeader)
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("propose: the leader did not take it within %v: %w", enqueueTimeout, flox.ErrBusy)
	case errors.Is(err, ErrUnknownOutcome):
		return fmt.Errorf("propose: %w", err)
	case isFull(err):
		return fmt.Errorf("propose: %w: %w: %w", err, ErrUnknownOutcome, flox.ErrFull)
	}
	// Leadership lost, shut down, a failed write: the entry may be in the log.
	return fmt.Errorf("propose: %w: %w", err, ErrUnknownOutcome)
}

// Session proposes commands one after the other so that each is applied once,
// however often it has to be proposed.
type Session struct {
	node *Node
	turn chan struct{} // holds one token
	name string
	next uint64
}

// NewSession begins a session of a random name. Sessions that are not used for
// SessionTTL are forgotten by the log and begun again by the next Propose.
func (n *Node) NewSession() *Session {
	s := &Session{node: n, turn: make(chan struct{}, 1)}
	s.begin()
	s.turn <- struct{}{}
	return s
}

func (s *Session) begin() { s.name, s.next = rand.Text(), 1 }

// retryEvery is the pause before a command is proposed again, at first and at most.
const (
	retryFirst = 10 * time.Millisecond
	retryMost  = 500 * time.Millisecond
)

// Propose is Node.Propose, repeated until the outcome is known or ctx ends.
func (s *Session) Propose(ctx context.Context, kind uint32, command []byte) (reply []byte, index uint64, err error) {
	select {
	case <-s.turn:
	case <-ctx.Done():
		return nil, 0, fmt.Errorf("propose: %w: %w", ctx.Err(), flox.ErrBusy)
	}
	defer func() { s.turn <- struct{}{} }()
	sequence := s.next
	s.next++
	pause, unknown := retryFirst, false
	for {
		reply, index, err = s.node.Propose(ctx, kind, command, ProposeOptions{Session: s.name, Sequence: sequence})
		switch {
		case err == nil:
			return reply, index, nil
		case errors.Is(err, ErrSessionExpired) && unknown:
			s.begin()
			return nil, 0, fmt.Errorf("propose: the session expired before its answer was known: %w", ErrUnknownOutcome)
		case errors.Is(err, ErrSessionExpired):
			s.begin()
			sequence = s.next
			s.next++
			continue
		case errors.Is(err, ErrUnknownOutcome):
			unknown = true
		case errors.Is(err, ErrNotLeader):
		default:
			if !unknown && !errors.Is(err, ErrRefused) {
				s.next = sequence // never proposed: the number is free
			}
			return nil, index, err
		}
		if s.node.machine.stopped.Load() != nil {
			return nil, 0, err
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, retryMost)
		case <-ctx.Done():
			return nil, 0, err
		}
	}
}
