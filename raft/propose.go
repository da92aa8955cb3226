package raft

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/ballast"
)

const (
	// enqueueTimeout bounds how long a proposal waits for the leader's loop.
	enqueueTimeout = 5 * time.Second
	// maxBytesInFlight bounds the commands a server holds for its own callers, and
	// again those for the other servers.
	maxBytesInFlight = 64 << 20
	// levelWait is how long a command waits for its level, levelPoll how often it looks.
	levelWait = 3 * time.Second
	levelPoll = 10 * time.Millisecond
)

// ProposeOptions make a proposal safe to repeat.
type ProposeOptions struct {
	// Session is the client's name, chosen at random, at most 64 bytes; "" = the
	// command may be applied twice if it is proposed twice.
	Session string
	// Sequence numbers the session's commands from 1; the first must be answered
	// before others are proposed, and at most KeptReplies may be under way.
	Sequence uint64
	// Level the command belongs to: it is refused with ErrLevel until every member
	// of the cluster knows it; 0 = every server always did.
	Level uint32
	// Freeing marks what makes room, or must not wait until there is some: it may use
	// most of what is kept free for the log.
	Freeing bool
}

// Propose puts a command into the log and waits until it is applied here. Any
// server takes it and has it done by the leader, waiting through elections until
// ctx ends. It gives the processor's reply and the log index at which the change
// is visible. A refusal wraps ErrRefused. Other errors: ErrUnknownOutcome
// (without Session, at once; with one, when ctx ended: propose again with the
// same options), ErrNotLeader (ctx ended and it was not proposed), ErrFull,
// ErrBusy and ErrLevel (not proposed), ErrBadInput.
func (n *Node) Propose(ctx context.Context, kind uint32, command []byte, opt ProposeOptions) (reply []byte, index uint64, err error) {
	reply, index, _, err = n.propose(ctx, kind, command, opt)
	return reply, index, err
}

// propose also says whether an earlier try may have succeeded.
func (n *Node) propose(ctx context.Context, kind uint32, command []byte, opt ProposeOptions) (reply []byte, index uint64, unknown bool, err error) {
	if err := n.acceptable(kind, command); err != nil {
		return nil, 0, false, err
	}
	if err := n.bytes.Acquire(ctx, int64(len(command))); err != nil {
		return nil, 0, false, fmt.Errorf("propose: %d MiB of commands are under way already: %w: %w", maxBytesInFlight>>20, err, flox.ErrBusy)
	}
	defer n.bytes.Release(int64(len(command)))
	a, unknown, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_Propose{Propose: &floxv1.ProposeCall{
		Session: opt.Session, Sequence: opt.Sequence, Kind: kind, Command: command, Level: opt.Level, Freeing: opt.Freeing,
	}}}, opt.Session != "")
	if err != nil && (a == nil || a.Index == 0) {
		return nil, 0, unknown, err
	}
	// The leader has applied or refused it. Whoever asks this server next must
	// see that, and why, too.
	if _, err := n.Wait(ctx, a.Index); err != nil {
		return nil, a.Index, true, fmt.Errorf("propose: applied, but not yet here: %w: %w", err, ErrUnknownOutcome)
	}
	return a.Reply, a.Index, unknown, err
}

// acceptable refuses what this server could not apply itself: it must not get
// into the log.
func (n *Node) acceptable(kind uint32, command []byte) error {
	if n.machine.processors[kind] == nil {
		return fmt.Errorf("propose: no processor for kind %d: %w", kind, flox.ErrBadInput)
	}
	if len(command) > MaxCommand {
		return fmt.Errorf("propose: command of %d bytes, want at most %d: %w", len(command), MaxCommand, flox.ErrBadInput)
	}
	return nil
}

// freeingShare is which part of the reserve even what makes room leaves alone.
const freeingShare = 8

// room refuses commands that would take what is kept free of the disk.
func (n *Node) room(freeing bool) error {
	_, free, err := ballast.Disk(n.cfg.Dir)
	if err != nil {
		return err
	}
	keep := n.cfg.ReserveBytes
	if freeing {
		keep /= freeingShare
	}
	if uint64(free) < keep { //nolint:gosec // not negative
		return fmt.Errorf("%s has %d MiB free and %d MiB are kept for the log: make room on that disk: %w", n.cfg.Dir, free>>20, keep>>20, flox.ErrFull)
	}
	return nil
}

// proposeHere is one try on the leader; ErrNotLeader elsewhere.
func (n *Node) proposeHere(ctx context.Context, c *floxv1.ProposeCall) (*floxv1.ClusterAnswer, error) {
	r, err := n.active()
	if err != nil {
		return nil, err
	}
	if err := n.acceptable(c.Kind, c.Command); err != nil {
		return nil, err
	}
	if err := n.reachLevel(ctx, r, c.Level); err != nil {
		return nil, err
	}
	if err := n.room(c.Freeing); err != nil {
		return nil, err
	}
	entry, err := encodeEntry(&floxv1.Envelope{
		Version: EnvelopeVersion, Session: c.Session, Sequence: c.Sequence,
		TimeUnixMs: n.now(), Kind: c.Kind, Command: c.Command,
	})
	if err != nil {
		return nil, err
	}
	if err := n.enter(ctx); err != nil {
		return nil, err
	}
	f := r.Apply(entry, enqueueTimeout)
	if err := n.await(ctx, f); err != nil {
		return nil, proposeError(err)
	}
	a, ok := f.Response().(answer)
	switch {
	case !ok:
		return nil, fmt.Errorf("propose: no answer: %w", ErrUnknownOutcome)
	case errors.Is(a.err, ErrUnknownCommand):
		return nil, a.err // on every server
	case a.err != nil:
		return nil, fmt.Errorf("propose: %w: %w", a.err, ErrUnknownOutcome) // the others apply it
	case a.refused != nil:
		return &floxv1.ClusterAnswer{Index: f.Index()}, a.refused
	}
	return &floxv1.ClusterAnswer{Reply: a.reply, Index: f.Index()}, nil
}

// reachLevel waits a moment for a level that nobody is known to keep the cluster
// from: a new leader has not yet heard from the others, or raised it.
func (n *Node) reachLevel(ctx context.Context, r *raft.Raft, level uint32) error {
	end := time.NewTimer(levelWait)
	defer end.Stop()
	for level > n.level.Load() {
		older, why := n.tooNew(r, level)
		if older {
			return why
		}
		select {
		case <-time.After(levelPoll):
		case <-end.C:
			return why
		case <-ctx.Done():
			return why
		}
	}
	return nil
}

// tooNew says which server keeps the cluster from a level, and whether one is known to.
func (n *Node) tooNew(r *raft.Raft, level uint32) (older bool, err error) {
	who := "this leader has not yet heard from every server"
	if n.cfg.Level < level {
		older = true
		who = fmt.Sprintf("the leader %s knows level %d (version %q): upgrade it", n.cfg.ID, n.cfg.Level, n.cfg.Version)
	}
	for _, s := range r.GetConfiguration().Configuration().Servers {
		id := string(s.ID)
		switch p := n.probes.get(id); {
		case id == n.cfg.ID:
		case p.heard.IsZero():
			who = fmt.Sprintf("server %s has not been heard since the leader started", id)
		case p.level < level:
			older = true
			who = fmt.Sprintf("server %s knows level %d (version %q): upgrade it", id, p.level, p.version)
		}
	}
	return older, fmt.Errorf("propose: a command of level %d while the cluster is at level %d; %s: %w", level, n.level.Load(), who, ErrLevel)
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
	case <-n.machine.closed: // raft itself may not answer any more
		select {
		case err := <-done:
			return err
		default:
			return fmt.Errorf("%w: %w", *n.machine.stopped.Load(), ErrUnknownOutcome)
		}
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

// change waits for a change of the members. While it is not settled, entries
// follow it: raft does not count what a server has stored before the leader's
// own list says that it votes, so a quick answer of a new voter is lost, and if
// every other vote is needed, nothing is agreed on until it answers for a later entry.
func (n *Node) change(ctx context.Context, r *raft.Raft, f raft.Future) error {
	ctx, cancel := context.WithCancel(ctx)
	var follow sync.WaitGroup
	follow.Go(func() {
		tick := time.NewTicker(n.cfg.Heartbeat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				n.wait(ctx, r.Barrier(enqueueTimeout)) //nolint:errcheck // what it is for says how it ended
			case <-ctx.Done():
				return
			}
		}
	})
	defer follow.Wait()
	defer cancel()
	return n.wait(ctx, f)
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

// Propose is Node.Propose with this session: it is repeated until the outcome is
// known or ctx ends, whoever leads meanwhile. Errors as there.
func (s *Session) Propose(ctx context.Context, kind uint32, command []byte) (reply []byte, index uint64, err error) {
	return s.ProposeWith(ctx, kind, command, ProposeOptions{})
}

// ProposeWith is Propose with options; those of the session are its own.
func (s *Session) ProposeWith(ctx context.Context, kind uint32, command []byte, opt ProposeOptions) (reply []byte, index uint64, err error) {
	select {
	case <-s.turn:
	case <-ctx.Done():
		return nil, 0, fmt.Errorf("propose: %w: %w", ctx.Err(), flox.ErrBusy)
	}
	defer func() { s.turn <- struct{}{} }()
	for {
		sequence, unknown := s.next, false
		s.next++
		opt.Session, opt.Sequence = s.name, sequence
		reply, index, unknown, err = s.node.propose(ctx, kind, command, opt)
		switch {
		case err == nil:
		case errors.Is(err, ErrSessionExpired) && unknown:
			s.begin()
			err = fmt.Errorf("propose: the session expired before its answer was known: %w", ErrUnknownOutcome)
		case errors.Is(err, ErrSessionExpired):
			s.begin()
			continue
		case !unknown && !errors.Is(err, ErrRefused):
			s.next = sequence // never proposed: the number is free
		}
		return reply, index, err
	}
}
