package raft

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/hashicorp/raft"
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
