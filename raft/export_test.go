package raft

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
)

// A state that was frozen says what was so then, whatever is applied meanwhile. A
// node founded on it holds exactly that, goes on behind its index, and takes part under its
// own name.
func TestFoundOnAFrozenState(t *testing.T) {
	t.Parallel()
	n, stop := single(t, t.TempDir())
	for i := range 100 {
		add(t, n, fmt.Sprint("key-", i%7), ProposeOptions{})
	}
	frozen, err := n.Freeze(within(t))
	if err != nil {
		t.Fatal(err)
	}
	was := frozen.Index()
	add(t, n, "later", ProposeOptions{})
	add(t, n, "key-1", ProposeOptions{})

	copied := filepath.Join(t.TempDir(), "copy")
	built, err := BuildState(copied, nil, func(put func(key, value []byte) error) error {
		return frozen.Each(context.Background(), put)
	})
	if err != nil {
		t.Fatal(err)
	}
	if built.Index() != was || was == 0 {
		t.Errorf("the copy is at %d, want %d", built.Index(), was)
	}
	if err := errors.Join(frozen.Close(), stop()); err != nil {
		t.Fatal(err)
	}

	dir := filepath.Join(t.TempDir(), "new")
	if err := built.Found(dir, "another"); err != nil {
		t.Fatal(err)
	}
	if err := built.Found(dir, "another"); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("founded twice in one directory: %v, want ErrBusy", err)
	}
	if err := built.Close(); err != nil {
		t.Fatal(err)
	}
	next, stop := start(t, Config{Dir: dir, ID: "another", Bootstrap: true})
	if err := next.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := count(t, next, Linearizable, "key-1"); got != 15 {
		t.Errorf("key-1 is counted %d times, want 15", got)
	}
	if got := count(t, next, Linearizable, "later"); got != 0 {
		t.Errorf("what came after the state is in it %d times", got)
	}
	st := next.Status()
	if len(st.Members) != 1 || st.Members[0].ID != "another" || !st.Members[0].Voter {
		t.Errorf("members %+v, want only the new server", st.Members)
	}
	add(t, next, "key-1", ProposeOptions{})
	if next.Applied() <= was {
		t.Errorf("the log went on at %d, behind a state at %d", next.Applied(), was)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	// It is all on disk, also without the snapshot's state.
	next, _ = start(t, Config{Dir: dir, ID: "another", Bootstrap: true})
	if err := next.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := count(t, next, Linearizable, "key-1"); got != 16 {
		t.Errorf("key-1 is counted %d times after a restart, want 16", got)
	}
}

// Records that are none of a state make no state.
func TestBuildStateRefuses(t *testing.T) {
	t.Parallel()
	for name, records := range map[string][]string{
		"nothing":       {},
		"no index":      {"\x01\x00\x00\x00\x01a"},
		"another space": {"\x02a"},
		"out of order":  {"\x01\x00\x00\x00\x01b", "\x01\x00\x00\x00\x01a"},
		"twice":         {"\x01\x00\x00\x00\x01a", "\x01\x00\x00\x00\x01a"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := BuildState(filepath.Join(t.TempDir(), "s"), nil, func(put func(key, value []byte) error) error {
				for _, r := range records {
					if err := put([]byte(r), []byte("v")); err != nil {
						return err
					}
				}
				return nil
			})
			if !errors.Is(err, flox.ErrCorrupt) {
				t.Errorf("got %v, want ErrCorrupt", err)
			}
		})
	}
}
