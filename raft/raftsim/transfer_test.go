package raftsim

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/floxctl/flox/raft"
)

// A server that is to lead and does not take over at once, as on a busy machine, is given
// the time for it: nobody has to ask again.
func TestHandOverIsTriedAgain(t *testing.T) {
	dir := Dir(t)
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Config{Dir: dir, Seed: 1, Register: func(n *raft.Node) { n.Register(simKind, counter{}) }})
		var leader, next *server
		for _, v := range c.servers {
			if v.node.Status().State == "leader" {
				leader = v
			} else {
				next = v
			}
		}
		c.net.sever(leader.cfg.Address, next.cfg.Address)
		heal := time.AfterFunc(3*time.Second, c.net.heal)
		defer heal.Stop()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := leader.node.Transfer(ctx, next.cfg.ID); err != nil {
			t.Fatal(err)
		}
		for next.node.Status().State != "leader" && ctx.Err() == nil {
			time.Sleep(100 * time.Millisecond)
		}
		if got := next.node.Status(); got.State != "leader" {
			t.Errorf("it is %s, and %s leads", got.State, got.Leader)
		}
		c.Stop()
	})
}
