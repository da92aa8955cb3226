package raft

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Consistency says how old a View may be.
type Consistency uint8

const (
	// Local is what this server has applied: never wrong, perhaps old.
	Local Consistency = iota
	// Linearizable holds every command that was answered, anywhere, before the View was
	// asked for, and every one that an earlier View held, of any server. It needs a
	// leader with a majority behind it, which may be another server.
	Linearizable
)

// View gives the state of a kind. It must be closed soon: it keeps old files alive.
func (n *Node) View(ctx context.Context, kind uint32, c Consistency) (*Reader, error) {
	if c == Linearizable {
		if err := n.current(ctx); err != nil {
			return nil, err
		}
	}
	db, err := n.machine.state.acquire()
	if err != nil {
		return nil, err
	}
	r := &Reader{db: db, snap: db.NewSnapshot(), space: kindPrefix(kind)}
	if r.index, _, err = applied(r.snap); err != nil {
		r.Close() //nolint:errcheck // the first error counts
		return nil, err
	}
	return r, nil
}

// ReadIndex gives an index: a state that holds it, on any server, holds every
// command answered so far, and every one that any server's state held. It costs the leader one round of heartbeats, not an
// entry. While nobody leads it waits, until ctx ends: ErrUnreachable.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	a, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_ReadIndex{ReadIndex: &floxv1.ReadIndexCall{}}}, true)
	if err != nil {
		return 0, err
	}
	return a.Index, nil
}

// readIndexHere is ReadIndex on the leader; ErrNotLeader elsewhere.
func (n *Node) readIndexHere(ctx context.Context) (uint64, error) {
	r, err := n.active()
	if err != nil {
		return 0, err
	}
	term := r.CurrentTerm()
	if r.State() != raft.Leader {
		return 0, fmt.Errorf("read: %w", ErrNotLeader)
	}
	// A new leader may not have applied yet what its forerunners answered: the
	// first read of a term waits for an entry of its own.
	if n.readTerm.Load() != term {
		if err := n.wait(ctx, r.Barrier(enqueueTimeout)); err != nil {
			return 0, fmt.Errorf("read: %w: %w", err, ErrNotLeader)
		}
		if r.CurrentTerm() != term {
			return 0, fmt.Errorf("read: leadership changed: %w", ErrNotLeader)
		}
		n.readTerm.Store(term)
	}
	// What is committed holds all that was answered, and all that another server may
	// have applied and shown already, which can be more than the state here: provided
	// that this server still leads after this was read.
	index, err := n.committed(r)
	if err != nil {
		return 0, err
	}
	if err := n.verify(ctx, r); err != nil {
		return 0, fmt.Errorf("read: %w: %w", err, ErrNotLeader)
	}
	if r.CurrentTerm() != term {
		return 0, fmt.Errorf("read: leadership changed: %w", ErrNotLeader)
	}
	return index, nil
}

// committed is the index of the last command that is committed, as this server knows.
func (n *Node) committed(r *raft.Raft) (uint64, error) {
	commit, applied := r.CommitIndex(), n.machine.applied()
	index, err := n.log.lastCommand(applied, commit)
	if err != nil {
		return 0, fmt.Errorf("read: %w", err)
	}
	// What a snapshot took out of the log was applied before.
	return max(index, n.machine.applied()), nil
}

// verifyPause is before the third question whether this server leads, and those after it.
// The first may be answered by a heartbeat that was under way; the second is not.
const verifyPause = 5 * time.Millisecond

// verify waits until it is certain that this server leads still, when it begins or later.
func (n *Node) verify(ctx context.Context, r *raft.Raft) error {
	asked := time.Now()
	for tries := 1; ; tries++ {
		if err := n.verifyOnce(ctx, r); err != nil {
			return err
		}
		f := r.GetConfiguration()
		if err := f.Error(); err != nil {
			return err
		}
		if n.acks.majority(f.Configuration().Servers, n.cfg.ID, asked) {
			return nil
		}
		if tries == 1 {
			continue
		}
		select {
		case <-time.After(verifyPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// verifyOnce waits until raft believes that it leads still. What is asked of it must not reach
// it behind drain: it keeps such questions in a queue, and never answers those that are
// left there when it ends.
func (n *Node) verifyOnce(ctx context.Context, r *raft.Raft) error {
	if err := n.enter(ctx); err != nil {
		return err
	}
	if n.raft.Load() != r {
		<-n.slots
		return fmt.Errorf("raft ends: %w", ErrNotLeader)
	}
	return n.await(ctx, r.VerifyLeader())
}

// Applied is the log index of the last command in this server's state.
func (n *Node) Applied() uint64 { return n.machine.applied() }

// Wait waits until the state holds index and gives the index it holds then.
func (n *Node) Wait(ctx context.Context, index uint64) (uint64, error) {
	for {
		have, changed := n.machine.next()
		if have >= index {
			return have, nil
		}
		select {
		case <-changed:
		case <-n.machine.closed:
			return have, *n.machine.stopped.Load()
		case <-ctx.Done():
			return have, fmt.Errorf("waiting for log index %d, at %d: %w", index, have, ctx.Err())
		}
	}
}

// Follow is a subscription to the applied index for streams: it waits until
// the state holds more than after. It is Wait for the next index.
func (n *Node) Follow(ctx context.Context, after uint64) (uint64, error) { return n.Wait(ctx, after+1) }

// Status is how a server stands in its cluster.
type Status struct {
	State   string // leader, follower, candidate, stopped
	Leader  string // ID of the leader, "" = unknown
	Term    uint64
	Applied uint64 // index of the last command in the state
	Last    uint64 // index of the last entry in the log
	Level   uint32 // of the cluster: commands of it are taken
	Members []Member
	// SnapshotHold is the longest that a snapshot kept commands from being applied
	// since this node was opened.
	SnapshotHold time.Duration
}

// Member is one server of a cluster.
type Member struct {
	ID, Address string
	Voter       bool
}

// Status describes this server.
func (n *Node) Status() Status {
	s := Status{
		State: "stopped", Applied: n.Applied(), Level: n.level.Load(),
		SnapshotHold: time.Duration(n.machine.held.Load()),
	}
	r := n.raft.Load()
	if r == nil {
		return s
	}
	switch r.State() {
	case raft.Leader:
		s.State = "leader"
	case raft.Follower:
		s.State = "follower"
	case raft.Candidate:
		s.State = "candidate"
	}
	_, leader := r.LeaderWithID()
	s.Leader, s.Term, s.Last = string(leader), r.CurrentTerm(), r.LastIndex()
	f := r.GetConfiguration()
	if f.Error() != nil {
		return s
	}
	for _, m := range f.Configuration().Servers {
		s.Members = append(s.Members, Member{string(m.ID), string(m.Address), m.Suffrage == raft.Voter})
	}
	return s
}
