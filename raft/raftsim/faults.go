package raftsim

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/raft"
)

// harm does one thing that goes wrong in real life.
func (c *Cluster) harm(ctx context.Context) {
	ids := make([]string, len(c.servers))
	for i, v := range c.servers {
		ids[i] = v.cfg.Address
	}
	c.rng.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	leader := ""
	for _, v := range c.servers {
		if v.node != nil && v.node.Status().State == "leader" {
			leader = v.cfg.Address
		}
	}
	switch what := c.rng.IntN(12); {
	case what < 2: // a minority, or two, alone
		c.faults["partition"]++
		for _, a := range ids[:1+c.rng.IntN(2)] {
			for _, b := range ids[2:] {
				c.net.sever(a, b)
				c.net.sever(b, a)
			}
		}
	case what < 4: // one way
		c.faults["one way"]++
		for range 1 + c.rng.IntN(6) {
			a, b := c.rng.IntN(len(ids)), c.rng.IntN(len(ids))
			c.net.sever(ids[a], ids[b])
		}
	case what < 6 && leader != "": // the leader is not heard, or hears nobody
		c.faults["leader half deaf"]++
		deaf := c.rng.IntN(2) == 0
		for _, b := range ids {
			if deaf {
				c.net.sever(b, leader)
			} else {
				c.net.sever(leader, b)
			}
		}
	case what < 9: // the leader or another one crashes, perhaps two
		for _, i := range c.rng.Perm(len(c.servers))[:1+c.rng.IntN(2)] {
			if v := c.servers[i]; v.node != nil {
				c.faults["crash"]++
				c.crash(v)
			}
		}
	case what < 10:
		c.faults["transfer"]++
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		_ = c.Any(c.rng).Transfer(short, "") // may fail, as everything now
		cancel()
	default:
		c.replace(ctx)
	}
}

// replace loses a server with its disk; the operator removes it and adds another,
// beside what else goes wrong if that lets it be.
func (c *Cluster) replace(ctx context.Context) {
	i := c.rng.IntN(len(c.servers))
	v := c.servers[i]
	if v.node != nil {
		c.crash(v)
	}
	if err := os.RemoveAll(v.cfg.Dir); err != nil {
		c.t.Error(err)
	}
	fresh := &server{cfg: c.config(false)}
	c.operate(ctx, "remove a server that is gone", func(ctx context.Context, by *raft.Node) error {
		err := by.ForceRemoveServer(ctx, v.cfg.ID)
		if errors.Is(err, flox.ErrNotFound) {
			return nil // an earlier try did it
		}
		return err
	})
	by := c.Any(c.rng)
	c.mu.Lock()
	c.servers[i] = fresh
	c.mu.Unlock()
	c.boot(fresh)
	c.operate(ctx, "add a server", func(ctx context.Context, _ *raft.Node) error {
		return by.AddServer(ctx, fresh.cfg.ID, fresh.cfg.Address, true)
	})
	c.faults["replaced"]++
}

// operate has a change of the members made: at once if possible, and else when
// all that goes wrong is mended.
func (c *Cluster) operate(ctx context.Context, what string, change func(context.Context, *raft.Node) error) {
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	err := change(short, c.Any(c.rng))
	cancel()
	if err == nil {
		return
	}
	c.mend()
	long, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := change(long, c.Any(c.rng)); err != nil {
		c.t.Errorf("%s: %v", what, err)
	}
}

// mend ends what goes wrong and gives the servers time to agree.
func (c *Cluster) mend() {
	c.net.heal()
	for _, v := range c.servers {
		if v.node == nil && v.result != nil {
			if _, err := os.Stat(v.cfg.Dir); err == nil {
				c.boot(v)
			}
		}
	}
	time.Sleep(10 * time.Second)
}
