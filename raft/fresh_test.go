package raft

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// A bounded-stale read is answered by a server that was cut off as long as its
// state is young enough, and refused with its age after that; the leader is not
// asked while there is no need.
func TestViewWithin(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	leader := c.leader()
	follower := (leader + 1) % 3
	add(t, c.nodes[leader], "x", ProposeOptions{})
	read := func(maxAge time.Duration) (uint64, error) {
		v, err := c.nodes[follower].ViewWithin(within(t), testKind, maxAge)
		if err != nil {
			return 0, err
		}
		defer v.Close()
		b, err := v.Get([]byte("x"))
		if err != nil {
			return 0, err
		}
		return uint64(b[7]), nil
	}
	if got, err := read(0); err != nil || got != 1 {
		t.Fatalf("read of no age: %d %v, want 1", got, err)
	}
	for _, i := range []int{leader, (leader + 2) % 3} {
		if err := c.stop[i](); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := read(time.Hour); err != nil || got != 1 {
		t.Errorf("cut off: %d %v, want 1 from the state here", got, err)
	}
	if _, err := read(time.Nanosecond); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("cut off, too old: %v, want ErrUnreachable", err)
	}
	if _, err := c.nodes[follower].ViewWithin(context.Background(), testKind, -1); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("negative age: %v, want ErrBadInput", err)
	}
}

// Lagging behind counts as age, however often the leader is heard.
func TestFreshness(t *testing.T) {
	t.Parallel()
	f, start := freshness{}, time.Now()
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	f.note(at(1), 10, 10)
	f.note(at(2), 12, 10)
	f.note(at(3), 14, 11)
	if got := f.since(11); !got.Equal(at(1)) {
		t.Errorf("behind: %v, want second 1", got.Sub(start))
	}
	if got := f.since(13); !got.Equal(at(2)) {
		t.Errorf("reached what was heard at second 2: %v", got.Sub(start))
	}
	f.note(at(4), 15, 15)
	f.note(at(3), 15, 15)
	if got := f.since(15); !got.Equal(at(4)) {
		t.Errorf("reached all: %v, want second 4", got.Sub(start))
	}
}
