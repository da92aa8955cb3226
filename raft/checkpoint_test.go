package raft

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
)

// Commands are applied while a snapshot is being kept: it may hold them, and a
// server that restores it applies them once all the same.
func TestSnapshotHoldsNothingBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n, stop := single(t, dir)
	add(t, n, "x", ProposeOptions{})
	asked := n.Applied()
	snap, err := n.machine.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if made, err := filepath.Glob(filepath.Join(dir, "snapshots", "*")); err != nil || len(made) > 0 {
		t.Errorf("%v, %v: made while nothing was applied", made, err)
	}
	for range 3 { // answered before a byte of the snapshot is written
		add(t, n, "x", ProposeOptions{})
	}
	var only raft.Configuration
	for _, m := range n.Status().Members {
		only.Servers = append(only.Servers, raft.Server{ID: raft.ServerID(m.ID), Address: raft.ServerAddress(m.Address)})
	}
	to, err := n.snapshots.Create(raft.SnapshotVersionMax, asked, n.Status().Term, only, 1, nil)
	if err == nil {
		err = errors.Join(snap.Persist(to), to.Close())
	}
	snap.Release()
	if err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	// The state is lost: the snapshot is restored and the log follows.
	if err := os.RemoveAll(filepath.Join(dir, "state")); err != nil {
		t.Fatal(err)
	}
	n, stop = single(t, dir)
	if got := count(t, n, Linearizable, "x"); got != 4 {
		t.Errorf("x was added %d times, want 4", got)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "snapshots", tmpPrefix+"*")); err != nil || len(left) > 0 {
		t.Errorf("%v, %v left beside the snapshots", left, err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	found, err := n.snapshots.all()
	if err != nil || len(found) == 0 || found[0].Applied < found[0].Raft.Index {
		t.Errorf("%d snapshots, %v: want one that holds the entry at its index", len(found), err)
	}

	// So is a server that was sent the snapshot and ended before the entries behind
	// its index came: others send them again, and nothing is lost.
	for _, gone := range []string{"state", "log"} {
		if err := os.RemoveAll(filepath.Join(dir, gone)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time with the state that the first restored
		n, err := Open(Config{Dir: dir, ID: "a", Bootstrap: true, ReserveBytes: 1})
		if err != nil {
			t.Fatal(err)
		}
		if n.Applied() <= asked {
			t.Errorf("the state is at entry %d, the snapshot's index is %d: it shows nothing", n.Applied(), asked)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
