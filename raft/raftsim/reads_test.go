package raftsim

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/floxctl/flox/raft"
)

// late is a counter that takes a second on one server.
type late struct {
	counter
	node *raft.Node
	on   *atomic.Pointer[raft.Node]
}

func (l late) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	if l.on.Load() == l.node {
		time.Sleep(time.Second)
	}
	return l.counter.Apply(tx, command, at, index)
}

// What one server showed, every other one shows to whoever asks it later: also the
// leader, which may apply an entry after the others.
func TestReadsNeverGoBack(t *testing.T) {
	dir := Dir(t)
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Pointer[raft.Node]
		c := New(t, Config{Dir: dir, Seed: 1, Register: func(n *raft.Node) { n.Register(simKind, late{node: n, on: &slow}) }})
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		var leader, other *raft.Node
		for _, n := range c.Nodes() {
			if n.Status().State == "leader" {
				leader = n
			} else {
				other = n
			}
		}
		slow.Store(leader)
		answered := make(chan Answer, 1)
		before := leader.Applied()
		go func() {
			answered <- c.Propose(ctx, rand.New(rand.NewPCG(1, 1)), simKind, []byte("k"), raft.ProposeOptions{})
		}()
		shown, err := other.Follow(ctx, before)
		if err != nil {
			t.Fatal(err)
		}
		if leader.Applied() >= shown {
			t.Fatalf("the leader has applied entry %d already", shown)
		}
		v, err := leader.View(ctx, simKind, raft.Linearizable)
		if err != nil {
			t.Fatal(err)
		}
		if v.Index() < shown {
			t.Errorf("the leader shows the state at entry %d, another server had shown that at %d", v.Index(), shown)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
		if a := <-answered; a.Unknown || a.Refused != nil {
			t.Errorf("answer %+v", a)
		}
		c.Stop()
	})
}
