package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/floxctl/flox"
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
//
// It also puts a sum on every entry, term and vote, since the WAL checks nothing
// when it reads them back. Rot ends the server: raft itself would panic, or go on
// with another term or members than it had.
type logStore struct {
	*wal.WAL
	snapshots *snapshots
	rotten    func(error) // told of damage; nil while the directory is being opened
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
	if err == nil {
		err = checkEntry(index, l)
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return s.rot(fmt.Errorf("log entry %d: %w", index, err))
	}
	if err == nil || index <= 1 {
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
	summed := make([]*raft.Log, len(logs))
	for i, l := range logs {
		// Another server's sum, if there is one, must hold before it is replaced.
		if err := checkEntry(l.Index, l); err != nil {
			return fmt.Errorf("entry %d as it came: %w", l.Index, err)
		}
		c := *l
		c.Extensions = sumEntry(l)
		summed[i] = &c
	}
	return s.WAL.StoreLogs(summed)
}

// rot ends the server, and whoever in raft was about to believe what was read.
func (s *logStore) rot(err error) error {
	err = fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
	if s.rotten == nil {
		return err
	}
	s.rotten(err)
	runtime.Goexit() // raft panics on errors here
	return err
}

// sumEntry is CRC-32C over all of an entry that must not change on disk.
func sumEntry(l *raft.Log) []byte {
	head := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, l.Index), l.Term)
	sum := crc32.Update(crc32.Checksum(append(head, byte(l.Type)), castagnoli), castagnoli, l.Data)
	return binary.BigEndian.AppendUint32(nil, sum)
}

// checkEntry compares an entry with its sum. Entries of before there was one are believed.
func checkEntry(index uint64, l *raft.Log) error {
	switch {
	case l.Index != index:
		return fmt.Errorf("holds entry %d: %w", l.Index, flox.ErrCorrupt)
	case len(l.Extensions) > 0 && !bytes.Equal(l.Extensions, sumEntry(l)):
		return fmt.Errorf("does not match its sum: %w", flox.ErrCorrupt)
	}
	return nil
}

// summedKey is where a value of raft's is kept with its sum behind it.
func summedKey(key []byte) []byte { return append([]byte("sum "), key...) }

func withSum(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(bytes.Clone(value), crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value))
}

// Set is raft.StableStore.
func (s *logStore) Set(key, value []byte) error {
	return s.WAL.Set(summedKey(key), withSum(key, value))
}

// Get is raft.StableStore.
func (s *logStore) Get(key []byte) ([]byte, error) {
	b, err := s.WAL.Get(summedKey(key))
	switch {
	case err != nil:
		return nil, err
	case len(b) == 0:
		return s.WAL.Get(key) // from before there were sums
	case len(b) < 4 || !bytes.Equal(b, withSum(key, b[:len(b)-4])):
		return nil, s.rot(fmt.Errorf("%s does not match its sum: %w", key, flox.ErrCorrupt))
	}
	return b[:len(b)-4], nil
}

// SetUint64 is raft.StableStore.
func (s *logStore) SetUint64(key []byte, value uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

// GetUint64 is raft.StableStore.
func (s *logStore) GetUint64(key []byte) (uint64, error) {
	old, err := s.WAL.Get(summedKey(key))
	if err == nil && len(old) == 0 {
		return s.WAL.GetUint64(key)
	}
	b, err := s.Get(key)
	if err == nil && len(b) != 8 {
		err = s.rot(fmt.Errorf("%s of %d bytes: %w", key, len(b), flox.ErrCorrupt))
	}
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}
