package raft

import (
	"errors"
	"testing"

	"github.com/hashicorp/raft"
)

// reopened gives the log of a server that starts again in the directory.
func reopened(t *testing.T, n *Node) *Node {
	t.Helper()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	n, err := Open(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// A vote is on disk when raft has written both halves of it, and only then: a
// term without its candidate would be a vote for whoever had the last one.
func TestVoteIsWrittenWhole(t *testing.T) {
	t.Parallel()
	n, err := Open(Config{Dir: t.TempDir(), ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	vote := func(term uint64, candidate string) {
		t.Helper()
		got, err1 := n.log.GetUint64([]byte(voteTermKey))
		who, err2 := n.log.Get([]byte(voteCandKey))
		if err := errors.Join(err1, err2); err != nil || got != term || string(who) != candidate {
			t.Fatalf("vote in term %d for %q (%v), want %d for %q", got, who, err, term, candidate)
		}
	}
	write := func(term uint64, candidate string) {
		t.Helper()
		err := n.log.SetUint64([]byte(voteTermKey), term)
		if err == nil && candidate != "" {
			err = n.log.Set([]byte(voteCandKey), []byte(candidate))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	vote(0, "")
	// As programs before wrote it, in two.
	for key, value := range map[string]string{voteTermKey: "\x00\x00\x00\x00\x00\x00\x00\x03", voteCandKey: "old"} {
		if err := n.log.WAL.Set(summedKey([]byte(key)), withSum([]byte(key), []byte(value))); err != nil {
			t.Fatal(err)
		}
	}
	vote(3, "old")
	write(4, "b")
	vote(4, "b")
	write(5, "")
	n = reopened(t, n)
	vote(4, "b")
	write(6, "c")
	n = reopened(t, n)
	vote(6, "c")
}

// Entries kept in memory are those of the log: one that another leader replaced,
// or that was dropped, is not given any more.
func TestRecentEntriesAreTheLogs(t *testing.T) {
	t.Parallel()
	n, err := Open(Config{Dir: t.TempDir(), ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	store := func(first, last, term uint64) {
		t.Helper()
		for i := first; i <= last; i++ {
			l := &raft.Log{Index: i, Term: term, Data: make([]byte, 10+i%2*recentBytes)}
			if err := n.log.StoreLog(l); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := func(index, term uint64) {
		t.Helper()
		var l raft.Log
		err := n.log.GetLog(index, &l)
		if term == 0 && !errors.Is(err, raft.ErrLogNotFound) {
			t.Errorf("entry %d: %v, want none", index, err)
		}
		if term != 0 && (err != nil || l.Term != term || l.Index != index || checkEntry(index, &l) != nil) {
			t.Errorf("entry %d of term %d: %+v %v", index, term, l.Term, err)
		}
	}
	store(1, 20, 1)
	want(20, 1)
	if err := n.log.DeleteRange(11, 20); err != nil {
		t.Fatal(err)
	}
	want(20, 0)
	store(11, 12, 2)
	for i := uint64(1); i <= 12; i++ {
		want(i, 1+i/11)
	}
	want(13, 0)
	if err := n.log.DeleteRange(1, 3); err != nil {
		t.Fatal(err)
	}
	want(2, 0)
	store(13, 13+2*recentEntries, 3)
	want(12, 2)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}
