package raft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
)

// State is all that the log had led to at one moment, apart from the node that
// goes on: what a backup holds. It keeps old files alive and must be closed.
type State struct {
	db    *database
	snap  *pebble.Snapshot
	index uint64
}

// Freeze gives the state as of now: it holds every command answered before, by
// any server.
func (n *Node) Freeze(ctx context.Context) (*State, error) {
	if err := n.current(ctx); err != nil {
		return nil, err
	}
	db, err := n.machine.state.acquire()
	if err != nil {
		return nil, err
	}
	return freeze(db)
}

// freeze takes over a reference to db.
func freeze(db *database) (*State, error) {
	s := &State{db: db, snap: db.NewSnapshot()}
	var err error
	if s.index, _, err = applied(s.snap); err == nil && s.index == 0 {
		err = fmt.Errorf("a state that holds no command: %w", flox.ErrCorrupt)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Index is the log index of the last command in the state.
func (s *State) Index() uint64 { return s.index }

// View gives the state of a kind. It must be closed before s is.
func (s *State) View(kind uint32) *Reader {
	return &Reader{db: s.db, snap: s.snap, space: kindPrefix(kind), index: s.index, lent: true}
}

// Each calls f with every record, in the order of their keys. Key and value are
// valid during the call only. RecordKind says what a key is.
func (s *State) Each(ctx context.Context, f func(key, value []byte) error) (err error) {
	it, err := s.snap.NewIterWithContext(ctx, &pebble.IterOptions{})
	if err != nil {
		return readError(err)
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return readError(err)
		}
		if err := f(it.Key(), value); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if err := it.Error(); err != nil {
		return readError(err)
	}
	return nil
}

// Close lets go of the state.
func (s *State) Close() error {
	if s.snap == nil {
		return nil
	}
	err := s.snap.Close()
	s.snap = nil
	return errors.Join(err, s.db.release())
}

// RecordKind says which kind a record of a State belongs to, and the Processor's
// own key of it; false for what is the node's.
func RecordKind(record []byte) (kind uint32, key []byte, ok bool) {
	if len(record) < 5 || record[0] != kindSpace {
		return 0, nil, false
	}
	return binary.BigEndian.Uint32(record[1:]), record[5:], true
}

// IsLocal reports whether a record of a State is about this server's copy of it, so
// that it differs from other servers' records at the same index.
func IsLocal(record []byte) bool { return bytes.Equal(record, keyRestored) }

// maxBuildBatch is how many bytes of records are written at once.
const maxBuildBatch = 4 << 20

// BuildState makes a state of records as Each gave them, in dir, which must not
// exist. load calls put with each in turn. The directory may be removed when the
// State is closed. ErrCorrupt when the records are none of a state.
func BuildState(dir string, log *slog.Logger, load func(put func(key, value []byte) error) error) (*State, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("build state: %w", err)
	}
	db, err := (&state{dir: dir, cache: 64 << 20, fs: vfs.Default, log: log}).openDB(filepath.Join(dir, "db"))
	if err != nil {
		return nil, err
	}
	if err := guarded(func() error { return fill(db, load) }); err != nil { // a full disk makes Pebble give up
		if isFull(err) {
			err = fmt.Errorf("%w: %w", err, flox.ErrFull)
		}
		return nil, errors.Join(fmt.Errorf("build state in %s: %w", dir, err), db.release())
	}
	return freeze(db)
}

// fill writes records into an empty database.
func fill(db *database, load func(put func(key, value []byte) error) error) error {
	batch := db.NewBatch()
	defer func() { _ = batch.Close() }() // what was not committed is given up
	var last []byte
	commit := func() error {
		err := batch.Commit(pebble.NoSync)
		_ = batch.Close() // committed, or given up
		batch = db.NewBatch()
		return err
	}
	err := load(func(key, value []byte) error {
		if len(key) == 0 || key[0] != ownSpace && key[0] != kindSpace || bytes.Compare(key, last) <= 0 {
			return fmt.Errorf("a record %q behind %q: %w", shorten(key), shorten(last), flox.ErrCorrupt)
		}
		last = append(last[:0], key...)
		if err := batch.Set(key, value, nil); err != nil {
			return err
		}
		if batch.Len() < maxBuildBatch {
			return nil
		}
		return commit()
	})
	if err == nil {
		err = commit()
	}
	if err == nil {
		err = db.Flush()
	}
	return err
}

// Found makes dir the directory of a Node that is alone in its cluster, called id,
// and goes on from the state. Nothing of the log before is in it: what the state
// knows of other servers they are members no more. ErrBusy if there is something
// in dir.
func (s *State) Found(dir, id string) error {
	if err := makeDir(dir); err != nil {
		return err
	}
	if there, err := os.ReadDir(dir); err != nil || len(there) > 0 {
		return fmt.Errorf("%s holds something: want an empty directory: %w", dir, errors.Join(err, flox.ErrBusy))
	}
	store, err := openSnapshots(filepath.Join(dir, "snapshots"), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	checkpoint, err := store.checkpoint(func(dir string) error { return s.db.Checkpoint(dir, pebble.WithFlushedWAL()) })
	if err != nil {
		return fmt.Errorf("checkpoint of the state: %w", err)
	}
	defer os.RemoveAll(checkpoint) //nolint:errcheck // moved already when all went well
	only := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(id), Address: raft.ServerAddress(id)}}}
	to, err := store.Create(raft.SnapshotVersionMax, s.index, 1, only, s.index, nil)
	if err != nil {
		return err
	}
	k, _ := to.(*sink)
	if err := k.adopt(checkpoint, s.index); err != nil {
		return errors.Join(err, k.Cancel())
	}
	return k.Close()
}
