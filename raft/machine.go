package raft

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

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

	time   int64             // Unix milliseconds of the last entry in the state
	oldest int64             // see sessions
	known  map[string]record // see sessions

	// stopped is why this node applies nothing more; closed is closed with it.
	stopped atomic.Pointer[error]
	closed  chan struct{}
	once    sync.Once
	held    atomic.Int64 // longest that a snapshot held applies back, nanoseconds

	mu      sync.Mutex
	index   uint64        // last entry in the state
	changed chan struct{} // closed when index moves; nil = nobody waits
}

var _ raft.BatchingFSM = (*machine)(nil)

// Snapshot is raft.FSM.
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
	m.time, m.oldest, m.known = at, 0, map[string]record{}
	m.mu.Lock()
	m.index = index
	m.mu.Unlock()
	m.notify()
	if m.members != nil {
		return m.members()
	}
	return nil
}

// snapshot gives the state for raft to keep. Nothing is applied meanwhile, so the
// checkpoint itself is made later, beside what goes on: it may hold more than was
// applied by now, which is then not applied again.
func (m *machine) snapshot() (raft.FSMSnapshot, error) {
	begin := time.Now()
	defer func() { m.held.Store(max(m.held.Load(), int64(time.Since(begin)))) }()
	if err := m.stopped.Load(); err != nil {
		return nil, *err
	}
	db, err := m.state.acquire()
	if err != nil {
		return nil, err
	}
	return &checkpoint{db: db, applied: m.applied()}, nil
}

// restored is the last entry in the state when it was restored, 0 if it never was.
func (m *machine) restored() (uint64, error) {
	db, err := m.state.acquire()
	if err != nil {
		return 0, err
	}
	defer db.release()
	return number(db, keyRestored)
}

// restore replaces the state by the one rc holds.
func (m *machine) restore(rc io.ReadCloser) error {
	defer rc.Close()
	err := m.state.replace(func(dir string) error {
		_, err := unpack(rc, dir)
		return err
	}, func(db *database) error {
		index, _, err := applied(db)
		if err != nil {
			return err
		}
		return db.Set(keyRestored, binary.BigEndian.AppendUint64(nil, index), pebble.Sync)
	})
	if err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	return m.load()
}
