package raft

import (
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
)

// logStore is the log as raft sees it. It mends what raft and a log without
// gaps do to each other around another server's snapshot (raft v1.7.3):
//
//   - Raft looks the entry before new ones up in the log even when it is the last
//     one of a snapshot. A server that restarted right behind a snapshot refused
//     every entry for that, got the snapshot again, and so on.
//   - For a log that says it is monotonic, raft empties it when a snapshot is
//     taken in, but goes on believing in the last entry it had, and panics when
//     that one is committed. So this log does not say so. It keeps what it has,
//     which is what the Raft paper does, and drops it when the gap behind it
//     would show.
type logStore struct {
	*wal.WAL
	snapshots *snapshots
}

var (
	_ raft.LogStore    = (*logStore)(nil)
	_ raft.StableStore = (*logStore)(nil)
)

// IsMonotonic hides the WAL's: see logStore.
func (s *logStore) IsMonotonic() bool { return false }

// GetLog is raft.LogStore. For the last entry of the newest snapshot it gives
// one with the right term and nothing inside. Raft asks for that one only to
// compare terms: a leader sends an entry only with the one before it at hand, and
// a follower applies only what is behind its snapshot.
func (s *logStore) GetLog(index uint64, l *raft.Log) error {
	err := s.WAL.GetLog(index, l)
	if !errors.Is(err, raft.ErrLogNotFound) || index <= 1 {
		return err
	}
	if newest := s.snapshots.newest.Load(); newest != nil && newest.Index == index {
		*l = raft.Log{Index: index, Term: newest.Term, Type: raft.LogNoop}
		return nil
	}
	return err
}

// StoreLog is raft.LogStore.
func (s *logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs is raft.LogStore. Entries behind a gap follow a snapshot: all that
// the log holds is older than that.
func (s *logStore) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if last > 0 && logs[0].Index > last+1 {
		if newest := s.snapshots.newest.Load(); newest == nil || newest.Index+1 < logs[0].Index {
			return fmt.Errorf("log ends at entry %d and no snapshot reaches to entry %d", last, logs[0].Index) //nolint:err113 // cannot be
		}
		if err := s.DeleteRange(first, last); err != nil {
			return fmt.Errorf("drop the log before a snapshot: %w", err)
		}
	}
	return s.WAL.StoreLogs(logs)
}
