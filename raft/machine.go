package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/hashicorp/raft"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// machine is the state machine of the log. Raft calls Apply, Snapshot and
// Restore from one goroutine.
type machine struct {
	state      *state
	snapshots  *snapshots
	processors map[uint32]Processor // fixed before the first entry

	members func() error // called when the members' part of the state may have changed; nil while opening

	time   int64 // Unix milliseconds of the last entry in the state
	oldest int64 // see sessions

	// stopped is why this node applies nothing more; closed is closed with it.
	stopped atomic.Pointer[error]
	closed  chan struct{}
	once    sync.Once

	mu      sync.Mutex
	index   uint64        // last entry in the state
	changed chan struct{} // closed when index moves; nil = nobody waits
}

var _ raft.BatchingFSM = (*machine)(nil)

// Apply is raft.FSM.
func (m *machine) Apply(l *raft.Log) any { return m.apply(l) }

// ApplyBatch is raft.BatchingFSM: committed entries in order, some of them not ours.
func (m *machine) ApplyBatch(logs []*raft.Log) []any {
	answers := make([]any, len(logs))
	for i, l := range logs {
		answers[i] = m.apply(l)
	}
	m.notify()
	return answers
}

// Snapshot is raft.FSM: it takes a checkpoint, which links files and copies next to nothing.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) { return m.snapshot() }

// Restore is raft.FSM: it replaces the state by a snapshot's.
//
// A server that could not do so stops: the next start tries again.
func (m *machine) Restore(rc io.ReadCloser) error {
	err := m.restore(rc)
	if err != nil {
		m.stop(err)
	}
	return err
}

// answer is what Apply gives to the proposer's future.
type answer struct {
	outcome
	err error // the node stopped; not part of the replicated state
}

// stop makes the node apply nothing more. The first reason counts.
func (m *machine) stop(err error) {
	m.once.Do(func() {
		m.stopped.Store(&err)
		close(m.closed)
	})
}

// apply carries out one committed entry.
func (m *machine) apply(l *raft.Log) answer {
	if err := m.stopped.Load(); err != nil {
		return answer{err: *err}
	}
	if l.Type != raft.LogCommand || l.Index <= m.applied() {
		return answer{} // a change of members, or replayed after a restart: nobody waits for it
	}
	o, err := m.applyEntry(l)
	if err != nil {
		err = fmt.Errorf("log entry %d cannot be applied, the state is as before it: %w", l.Index, err)
		m.stop(err)
		return answer{err: err}
	}
	return answer{outcome: o}
}

// applyEntry applies one entry in one batch. An error means that nothing of it
// was written and that the node must stop.
func (m *machine) applyEntry(l *raft.Log) (outcome, error) {
	e, err := decodeEntry(l.Data)
	if err != nil {
		return outcome{}, err
	}
	p := m.processors[e.Kind]
	if p == nil {
		return outcome{}, fmt.Errorf("kind %d: %w", e.Kind, ErrUnknownCommand)
	}
	db, err := m.state.acquire()
	if err != nil {
		return outcome{}, err
	}
	defer db.release()
	batch := db.NewIndexedBatch()
	defer batch.Close()

	at := max(e.TimeUnixMs, m.time) // whoever led before may have had a faster clock
	o, err := m.applyOnce(batch, p, e, at, l.Index)
	if err != nil {
		return outcome{}, err
	}
	err = errors.Join(
		batch.Set(keyApplied, binary.BigEndian.AppendUint64(nil, l.Index), nil),
		batch.Set(keyTime, binary.BigEndian.AppendUint64(nil, uint64(at)), nil))
	if err == nil {
		// Not synced: the log is, and what the state lost of its end is applied again.
		err = batch.Commit(pebble.NoSync)
	}
	if err != nil {
		return outcome{}, fmt.Errorf("write state: %w", err)
	}
	m.time = at
	m.mu.Lock()
	m.index = l.Index
	m.mu.Unlock()
	if e.Kind == memberKind {
		err = m.members()
	}
	return o, err
}

// applyOnce hands the command to its processor unless its session has the
// answer already, and fills batch with what follows.
func (m *machine) applyOnce(batch *pebble.Batch, p Processor, e *floxv1.Envelope, at int64, index uint64) (outcome, error) {
	own := &Tx{batch: batch, space: []byte{ownSpace}}
	table := sessions{own, &m.oldest}
	if e.Session != "" {
		done, err := table.check(e.Session, e.Sequence, at)
		if err != nil || done != nil {
			if done == nil {
				done = &outcome{}
			}
			return *done, err
		}
	}
	tx := &Tx{batch: batch, space: kindPrefix(e.Kind)}
	reply, err := p.Apply(tx, e.Command, time.UnixMilli(at).UTC(), index)
	o := outcome{reply: reply}
	switch {
	case tx.failed != nil:
		return outcome{}, tx.failed
	case errors.Is(err, ErrUnknownCommand):
		return outcome{}, fmt.Errorf("kind %d: %w", e.Kind, err)
	case err != nil:
		batch.Reset() // a refused command changes nothing
		o = refuse(err)
	}
	if e.Session != "" {
		err = table.remember(e.Session, e.Sequence, at, o)
	} else {
		err = nil
	}
	err = errors.Join(err, table.expire(at))
	if own.failed != nil {
		err = own.failed
	}
	return o, err
}

// applied is the index of the last entry in the state.
func (m *machine) applied() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.index
}

// notify wakes everybody who waits for the index to move.
func (m *machine) notify() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
}

// next gives the applied index and a channel that is closed when it moves.
func (m *machine) next() (uint64, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.changed == nil {
		m.changed = make(chan struct{})
	}
	return m.index, m.changed
}

// load reads what the state knows of itself.
func (m *machine) load() error {
	db, err := m.state.acquire()
	if err != nil {
		return err
	}
	defer db.release()
	index, at, err := applied(db)
	if err != nil {
		return err
	}
	m.time, m.oldest = at, 0
	m.mu.Lock()
	m.index = index
	m.mu.Unlock()
	m.notify()
	if m.members != nil {
		return m.members()
	}
	return nil
}

// snapshot takes a checkpoint of the state for raft to keep.
func (m *machine) snapshot() (raft.FSMSnapshot, error) {
	if err := m.stopped.Load(); err != nil {
		return nil, *err
	}
	db, err := m.state.acquire()
	if err != nil {
		return nil, err
	}
	defer db.release()
	dir, err := m.snapshots.checkpoint(func(dir string) error {
		return db.Checkpoint(dir, pebble.WithFlushedWAL())
	})
	if err != nil {
		return nil, fmt.Errorf("checkpoint of the state: %w", err)
	}
	return &checkpoint{dir: dir, applied: m.applied()}, nil
}

// restore replaces the state by the one rc holds.
func (m *machine) restore(rc io.ReadCloser) error {
	defer rc.Close()
	err := m.state.replace(func(dir string) error {
		_, err := unpack(rc, dir)
		return err
	})
	if err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	return m.load()
}
