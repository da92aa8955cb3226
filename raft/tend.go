package raft

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// census is the members as the leader judges them at one moment.
type census struct {
	servers []raft.Server
	state   map[string]*floxv1.ServerFacts
	probes  map[string]probe
	self    string
}

// count reads the members from raft, the state, and what was heard.
func (n *Node) count(r *raft.Raft) (*census, error) {
	f := r.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, fmt.Errorf("read the members: %w", err)
	}
	view, err := n.View(context.Background(), memberKind, Local)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	c := &census{servers: f.Configuration().Servers, probes: map[string]probe{}, self: n.cfg.ID}
	if c.state, err = readMembers(view); err != nil {
		return nil, err
	}
	for _, s := range c.servers {
		c.probes[string(s.ID)] = n.probes.get(string(s.ID))
	}
	return c, nil
}

// healthy reports whether a server answers and keeps up.
func (c *census) healthy(id string) bool { return id == c.self || !c.probes[id].healthy.IsZero() }

// slowest gives the longest round trip to a healthy server that votes, or is to.
func (c *census) slowest() (rtt time.Duration) {
	for _, s := range c.servers {
		id := string(s.ID)
		if c.healthy(id) && (s.Suffrage == raft.Voter || known(c.state, id, false).WantsVote) {
			rtt = max(rtt, c.probes[id].rtt)
		}
	}
	return rtt
}

// find gives a member.
func (c *census) find(id string) (raft.Server, bool) {
	for _, s := range c.servers {
		if string(s.ID) == id {
			return s, true
		}
	}
	return raft.Server{}, false
}

// safe reports whether the voters without one and with another would still
// have a healthy majority; "" = none.
func (c *census) safe(without, with string) bool {
	voters, healthy := 0, 0
	for _, s := range c.servers {
		id := string(s.ID)
		if id == without || (s.Suffrage != raft.Voter && id != with) {
			continue
		}
		voters++
		if c.healthy(id) {
			healthy++
		}
	}
	return healthy > voters/2
}

// successor gives the healthy voter that is furthest and not drained.
func (c *census) successor() (best raft.Server, ok bool) {
	for _, s := range c.servers {
		id := string(s.ID)
		if id == c.self || s.Suffrage != raft.Voter || !c.healthy(id) || known(c.state, id, true).Drained {
			continue
		}
		if !ok || c.probes[id].applied > c.probes[string(best.ID)].applied {
			best, ok = s, true
		}
	}
	return best, ok
}

// replacement gives a healthy voter that came after a server went down and
// replaces nobody else yet.
func (c *census) replacement(down *floxv1.ServerFacts) string {
	for _, s := range c.servers {
		m := c.state[string(s.ID)]
		if m != nil && s.Suffrage == raft.Voter && c.healthy(m.Id) && m.AddedMs > down.DownMs && m.Replaced == "" {
			return m.Id
		}
	}
	return ""
}

// tend is what the leader does about the members at every look: at most one
// change of who votes.
func (n *Node) tend(ctx context.Context, r *raft.Raft) error {
	ctx, cancel := context.WithTimeout(ctx, enqueueTimeout)
	defer cancel()
	// Only a leader with a majority behind it may judge who is away.
	if _, err := n.readIndexHere(ctx); err != nil {
		return err
	}
	leave, err := n.alone(ctx)
	if err != nil {
		return err
	}
	defer leave()
	c, err := n.count(r)
	if err != nil {
		return err
	}
	if known(c.state, c.self, true).Drained {
		if to, ok := c.successor(); ok {
			return n.wait(ctx, r.LeadershipTransferToServer(to.ID, to.Address))
		}
	}
	if err := n.raiseLevel(ctx, c); err != nil {
		return err
	}
	if err := n.markDown(ctx, c); err != nil {
		return err
	}
	if done, err := n.promote(ctx, r, c); done || err != nil {
		return err
	}
	return n.removeDead(ctx, r, c)
}

// raiseLevel raises the cluster's level to what all members know.
func (n *Node) raiseLevel(ctx context.Context, c *census) error {
	level := n.cfg.Level
	for _, s := range c.servers {
		if id := string(s.ID); id != c.self {
			level = min(level, c.probes[id].level) // 0 = not heard yet
		}
	}
	if level <= n.level.Load() {
		return nil
	}
	n.cfg.Log.Info("every server knows a newer level", "level", level)
	_, err := n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Level{Level: level}}))
	return err
}

// markDown writes down who went away and who came back, so that the next leader
// knows since when.
func (n *Node) markDown(ctx context.Context, c *census) error {
	for _, s := range c.servers {
		id := string(s.ID)
		heard := c.probes[id].heard
		if heard.IsZero() {
			heard = n.started
		}
		down := id != c.self && time.Since(heard) > n.cfg.DeadAfter
		if down == (known(c.state, id, true).DownMs != 0) || (!down && !c.healthy(id)) {
			continue
		}
		n.cfg.Log.Warn("a server went away or came back", "server", id, "away", down)
		_, err := n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Down{Down: &floxv1.ServerDown{Id: id, Down: down}}}))
		if err != nil {
			return err
		}
	}
	// What is kept of servers that are no members any more.
	for id := range c.state {
		if _, member := c.find(id); member {
			continue
		}
		_, err := n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Forget{Forget: &floxv1.ServerForget{Id: id}}}))
		if err != nil {
			return err
		}
	}
	return nil
}

// promote gives the vote to one server that is wanted as a voter and stable.
func (n *Node) promote(ctx context.Context, r *raft.Raft, c *census) (done bool, err error) {
	for _, s := range c.servers {
		id := string(s.ID)
		since := c.probes[id].healthy
		if s.Suffrage == raft.Voter || !known(c.state, id, false).WantsVote || since.IsZero() ||
			time.Since(since) < n.cfg.PromoteAfter || !c.safe("", id) {
			continue
		}
		n.cfg.Log.Info("a stable server becomes a voter", "server", id)
		return true, n.change(ctx, r, r.AddVoter(s.ID, s.Address, 0, enqueueTimeout))
	}
	return false, nil
}

// removeDead removes one server that is down and was replaced.
func (n *Node) removeDead(ctx context.Context, r *raft.Raft, c *census) error {
	for _, s := range c.servers {
		id := string(s.ID)
		m := known(c.state, id, true)
		if m.DownMs == 0 || c.healthy(id) || s.Suffrage != raft.Voter {
			continue
		}
		by := c.replacement(m)
		if by == "" || !c.safe(id, "") {
			continue
		}
		if n.cfg.Replacing != nil {
			if err := n.cfg.Replacing(ctx, id, by); err != nil {
				return fmt.Errorf("remove %s, which %s replaces: %w", id, by, err)
			}
		}
		n.cfg.Log.Warn("a server that is away was replaced and is removed", "server", id, "replaced_by", by)
		if err := n.change(ctx, r, r.RemoveServer(s.ID, 0, enqueueTimeout)); err != nil {
			return err
		}
		_, err := n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Forget{Forget: &floxv1.ServerForget{Id: id, ReplacedBy: by}}}))
		return err
	}
	return nil
}

// alone makes the caller the only one to change the members.
func (n *Node) alone(ctx context.Context) (leave func(), err error) {
	select {
	case n.changing <- struct{}{}:
		return func() { <-n.changing }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another change of the members is under way: %w", ctx.Err())
	}
}
