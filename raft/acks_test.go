package raft

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
)

// Only answers to what was sent since say that a server leads.
func TestAcks(t *testing.T) {
	t.Parallel()
	now := time.Now()
	servers := []raft.Server{{ID: "a"}, {ID: "b"}, {ID: "c"}, {ID: "d", Suffrage: raft.Nonvoter}}
	for name, c := range map[string]struct {
		sent map[raft.ServerID]time.Duration // before now
		want bool
	}{
		"nobody answered":              {nil, false},
		"one did a moment ago":         {map[raft.ServerID]time.Duration{"b": time.Millisecond}, false},
		"one did since":                {map[raft.ServerID]time.Duration{"c": -time.Hour}, true},
		"long before":                  {map[raft.ServerID]time.Duration{"b": time.Hour, "c": time.Hour}, false},
		"one that does not vote":       {map[raft.ServerID]time.Duration{"d": 0}, false},
		"one that is no member":        {map[raft.ServerID]time.Duration{"x": 0, "y": 0}, false},
		"the last of several messages": {map[raft.ServerID]time.Duration{"b": -time.Second, "c": time.Hour}, true},
	} {
		a := &acks{}
		for id, age := range c.sent {
			a.note(id, now.Add(-age))
			a.note(id, now.Add(-age-time.Hour)) // an older answer that came later
		}
		if got := a.majority(servers, "a", now); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		if _, ok := a.sent["x"]; ok {
			t.Errorf("%s: who is no member is remembered", name)
		}
	}
}

// A leader whose followers' answers are all old does not answer a read, although raft
// takes it for the leader.
func TestReadsNeedFreshAnswers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	late := func(by time.Duration) {
		for _, n := range c.nodes {
			n.acks.mu.Lock()
			n.acks.late, n.acks.sent = by, nil
			n.acks.mu.Unlock()
		}
	}
	late(time.Hour)
	for i, n := range c.nodes {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if _, err := n.View(ctx, testKind, Linearizable); !errors.Is(err, flox.ErrUnreachable) {
			t.Errorf("server %d reads on old answers alone: %v", i, err)
		}
		cancel()
	}
	late(0)
	for _, n := range c.nodes {
		count(t, n, Linearizable, "x")
	}
}
