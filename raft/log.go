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
	recent    recent
	// voteTerm is the first half of a vote that raft is about to write, see Set.
	voteTerm []byte
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
	if kept := s.recent.get(index); kept != nil {
		*l = *kept
		return nil
	}
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

// lastCommand gives the index of the last command behind one index and up to another;
// 0 if the log has none there.
func (s *logStore) lastCommand(after, last uint64) (uint64, error) {
	for index := last; index > after; index-- {
		l := s.recent.get(index)
		if l == nil {
			l = &raft.Log{}
			err := s.WAL.GetLog(index, l)
			if errors.Is(err, raft.ErrLogNotFound) {
				return 0, nil
			}
			if err == nil {
				err = checkEntry(index, l)
			}
			if err != nil {
				return 0, fmt.Errorf("log entry %d: %w", index, err)
			}
		}
		if l.Type == raft.LogCommand {
			return index, nil
		}
	}
	return 0, nil
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
	if err := s.WAL.StoreLogs(summed); err != nil {
		return err
	}
	s.recent.keep(summed)
	return nil
}

// DeleteRange is raft.LogStore.
func (s *logStore) DeleteRange(first, last uint64) error {
	s.recent.clear()
	return s.WAL.DeleteRange(first, last)
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

// What raft calls the two halves of a vote. It writes them in this order.
const (
	voteTermKey = "LastVoteTerm"
	voteCandKey = "LastVoteCand"
	// voteKey is where we keep both: the term, 8 bytes, and the candidate.
	voteKey = "LastVote"
)

// Set is raft.StableStore. A vote's term waits for its candidate: in one write
// they cost one sync less, and none is ever found without the other. Raft gives
// a vote only when it has both of them written.
func (s *logStore) Set(key, value []byte) error {
	switch string(key) {
	case voteTermKey:
		s.voteTerm = bytes.Clone(value)
		return nil
	case voteCandKey:
		key, value = []byte(voteKey), append(s.voteTerm[:len(s.voteTerm):len(s.voteTerm)], value...)
	}
	return s.WAL.Set(summedKey(key), withSum(key, value))
}

// Get is raft.StableStore.
func (s *logStore) Get(key []byte) ([]byte, error) {
	if k := string(key); k == voteTermKey || k == voteCandKey {
		vote, err := s.read([]byte(voteKey))
		if err == nil && len(vote) > 0 && len(vote) < 8 {
			err = s.rot(fmt.Errorf("vote of %d bytes: %w", len(vote), flox.ErrCorrupt))
		}
		switch {
		case err != nil:
			return nil, err
		case len(vote) > 0 && k == voteTermKey:
			return vote[:8], nil
		case len(vote) > 0:
			return vote[8:], nil
		} // else from before they were one
	}
	return s.read(key)
}

// read gives what is kept at a key.
func (s *logStore) read(key []byte) ([]byte, error) {
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

// old reports whether a value was never written with a sum, if at all.
func (s *logStore) old(key []byte) (bool, error) {
	if string(key) == voteTermKey {
		if vote, err := s.WAL.Get(summedKey([]byte(voteKey))); err != nil || len(vote) > 0 {
			return false, err
		}
	}
	b, err := s.WAL.Get(summedKey(key))
	return len(b) == 0, err
}

// GetUint64 is raft.StableStore.
func (s *logStore) GetUint64(key []byte) (uint64, error) {
	old, err := s.old(key)
	if err == nil && old {
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
