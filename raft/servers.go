package raft

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// errNoPeers: a server without a Layer asked for another one.
var errNoPeers = fmt.Errorf("this server runs without a connection to others: %w", flox.ErrBadInput)

// ServerStatus is one member as the leader sees it.
type ServerStatus struct {
	ID, Address string
	Leader      bool
	Voter       bool
	WantsVote   bool          // becomes a voter once it is stable
	Drained     bool          // does not lead
	Contact     time.Time     // when it last answered; zero = never to this leader
	RTT         time.Duration // of the last answers, 0 = unknown
	Applied     uint64        // log index of its state
	Healthy     bool          // it answers and keeps up
	HealthySince,
	DownSince time.Time // zero = it is not
	Level   uint32
	Version string // Config.Version
}

// AddServer makes a server a member: the leader looks whether the server at
// address has that ID and knows the cluster's level, and adds it without a vote.
// If voter, it gets one as soon as it is stable (Config.PromoteAfter). For a
// member it changes address and role. The server must run without Bootstrap.
// Errors: ErrUnreachable, ErrLevel, ErrBadInput for another ID, ErrBusy when a
// vote cannot be taken away now.
func (n *Node) AddServer(ctx context.Context, id, address string, voter bool) error {
	_, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_AddServer{AddServer: &floxv1.AddServerCall{Id: id, Address: address, Voter: voter}}}, true)
	if err != nil {
		return fmt.Errorf("add server %s: %w", id, err)
	}
	return nil
}

// RemoveServer takes a server out of the cluster. It is refused with ErrBusy
// while the voters that stay would have no healthy majority, and for a voter that
// does not answer: see ForceRemoveServer. A leader hands over first. Errors:
// ErrNotFound.
func (n *Node) RemoveServer(ctx context.Context, id string) error { return n.remove(ctx, id, false) }

// ForceRemoveServer is RemoveServer for a server that is away, by an operator
// who knows that it never comes back. It, too, is refused without a healthy
// majority of the voters that stay: nobody can say then what was acknowledged.
func (n *Node) ForceRemoveServer(ctx context.Context, id string) error {
	return n.remove(ctx, id, true)
}

func (n *Node) remove(ctx context.Context, id string, force bool) error {
	_, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_RemoveServer{RemoveServer: &floxv1.RemoveServerCall{Id: id, Force: force}}}, true)
	if errors.Is(err, ErrNotLeader) {
		err = fmt.Errorf("%w; without a leader nobody can be removed: %s", err, noMajority)
	}
	if err != nil {
		return fmt.Errorf("remove server %s: %w", id, err)
	}
	return nil
}

// noMajority is what an operator can do when a majority of the voters is away.
const noMajority = "bring a majority of the voters back; if they are lost for good, restore a backup into a new cluster"

// Transfer hands leadership to a healthy voter, or to the one that is furthest
// if to is "". Errors: ErrNotFound, ErrBusy when it cannot take over now.
func (n *Node) Transfer(ctx context.Context, to string) error {
	before := n.Status().Leader
	_, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_Transfer{Transfer: &floxv1.TransferCall{To: to}}}, false)
	if now := n.Status().Leader; errors.Is(err, ErrUnknownOutcome) && now != "" && (now == to || (to == "" && now != before)) {
		return nil // the new leader was quicker than the old one's answer
	}
	if err != nil {
		return fmt.Errorf("transfer leadership: %w", err)
	}
	return nil
}

// Drain makes a server give leadership away and not stand for it again, for
// example before maintenance; it goes on voting and answering. If nobody else
// stands for ten heartbeats it leads after all, until somebody else can. It
// lasts, over restarts too, until Undrain. Errors: ErrNotFound, ErrBusy when nobody else
// could lead.
func (n *Node) Drain(ctx context.Context, id string) error { return n.drainCall(ctx, id, true) }

// Undrain undoes Drain.
func (n *Node) Undrain(ctx context.Context, id string) error { return n.drainCall(ctx, id, false) }

func (n *Node) drainCall(ctx context.Context, id string, on bool) error {
	_, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_Drain{Drain: &floxv1.DrainCall{Id: id, On: on}}}, true)
	if err != nil {
		return fmt.Errorf("drain server %s: %w", id, err)
	}
	return nil
}

// Servers gives all members as the leader sees them.
func (n *Node) Servers(ctx context.Context) ([]ServerStatus, error) {
	a, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_Servers{Servers: &floxv1.ServersCall{}}}, true)
	if err != nil {
		return nil, fmt.Errorf("list servers: %w", err)
	}
	list := make([]ServerStatus, len(a.Servers))
	for i, s := range a.Servers {
		list[i] = ServerStatus{
			ID: s.Id, Address: s.Address, Leader: s.Leader, Voter: s.Voter, WantsVote: s.State.GetWantsVote(), Drained: s.State.GetDrained(),
			RTT: time.Duration(s.RttUs) * time.Microsecond, Applied: s.Applied, Healthy: s.HealthyMs > 0, Level: s.Level, Version: s.Version,
			Contact: fromMilli(s.ContactMs), HealthySince: fromMilli(s.HealthyMs), DownSince: fromMilli(s.State.GetDownMs()),
		}
	}
	return list, nil
}

func fromMilli(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

func toMilli(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// ClusterLevel is the level of commands that every member knows, as far as
// this server has applied the log. It never falls.
func (n *Node) ClusterLevel() uint32 { return n.level.Load() }

// Heartbeat is Config.Heartbeat.
func (n *Node) Heartbeat() time.Duration { return n.cfg.Heartbeat }

// Level is the newest level of commands that this server's program knows.
func (n *Node) Level() uint32 { return n.cfg.Level }

// leading gives raft on the leader and the members as it sees them.
func (n *Node) leading() (*raft.Raft, *census, error) {
	r, err := n.active()
	if err != nil {
		return nil, nil, err
	}
	if r.State() != raft.Leader {
		return nil, nil, fmt.Errorf("this server follows: %w", ErrNotLeader)
	}
	c, err := n.count(r)
	return r, c, err
}

// changeError says in our words why a change of the members failed.
func changeError(err error) error {
	if err == nil {
		return nil
	}
	return proposeError(err)
}

func (n *Node) addHere(ctx context.Context, q *floxv1.AddServerCall) error {
	if q.Id == "" || len(q.Id) > maxServerID || q.Address == "" {
		return fmt.Errorf("ID %q and address %q, want both set: %w", q.Id, q.Address, flox.ErrBadInput)
	}
	leave, err := n.alone(ctx)
	if err != nil {
		return err
	}
	defer leave()
	r, c, err := n.leading()
	if err != nil {
		return err
	}
	if err := n.inspect(ctx, q); err != nil {
		return err
	}
	if _, err := n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Add{Add: &floxv1.ServerAdd{Id: q.Id, Voter: q.Voter}}})); err != nil {
		return err
	}
	if s, ok := c.find(q.Id); ok && s.Suffrage == raft.Voter && !q.Voter {
		if q.Id == n.cfg.ID || !c.safe(q.Id, "") {
			return fmt.Errorf("the voters that stay would have no healthy majority, or it leads: %w", flox.ErrBusy)
		}
		if err := changeError(n.change(ctx, r, r.DemoteVoter(s.ID, 0, enqueueTimeout))); err != nil {
			return err
		}
	}
	err = changeError(n.change(ctx, r, r.AddNonvoter(raft.ServerID(q.Id), raft.ServerAddress(q.Address), 0, enqueueTimeout)))
	n.hurry()
	return err
}

// inspect looks whether the right server answers at the address.
func (n *Node) inspect(ctx context.Context, q *floxv1.AddServerCall) error {
	if q.Id == n.cfg.ID {
		return nil
	}
	a, err := n.greet(ctx, q.Address)
	switch {
	case err != nil: // the sentinels in err are about that server, not about this one
		return fmt.Errorf("%s does not answer: %v: %w", q.Address, err, flox.ErrUnreachable) //nolint:errorlint // see above
	case a.GetId() != q.Id:
		return fmt.Errorf("at %s answers server %q: %w", q.Address, a.GetId(), flox.ErrBadInput)
	case a.Level < n.level.Load():
		return fmt.Errorf("it runs level %d (version %q) and the cluster is at level %d: upgrade it: %w", a.Level, a.Version, n.level.Load(), ErrLevel)
	}
	return nil
}

func (n *Node) removeHere(ctx context.Context, q *floxv1.RemoveServerCall) error {
	leave, err := n.alone(ctx)
	if err != nil {
		return err
	}
	defer leave()
	r, c, err := n.leading()
	if err != nil {
		return err
	}
	s, ok := c.find(q.Id)
	switch {
	case !ok:
		return fmt.Errorf("no such member: %w", flox.ErrNotFound)
	case s.Suffrage == raft.Voter && !c.safe(q.Id, ""):
		return fmt.Errorf("the voters that stay would have no healthy majority: %s: %w", noMajority, flox.ErrBusy)
	case s.Suffrage == raft.Voter && !c.healthy(q.Id) && !q.Force:
		return fmt.Errorf("it does not answer or is far behind, and may come back: remove it with force if it never will: %w", flox.ErrBusy)
	case q.Id == n.cfg.ID:
		if err := n.transferHere(ctx, ""); err != nil {
			return err
		}
		return fmt.Errorf("handed over, ask the next leader: %w", ErrNotLeader)
	}
	if err := changeError(n.change(ctx, r, r.RemoveServer(s.ID, 0, enqueueTimeout))); err != nil {
		return err
	}
	_, err = n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Forget{Forget: &floxv1.ServerForget{Id: q.Id}}}))
	return err
}

func (n *Node) transferAlone(ctx context.Context, to string) error {
	leave, err := n.alone(ctx)
	if err != nil {
		return err
	}
	defer leave()
	return n.transferHere(ctx, to)
}

// transferTries is how often a hand-over is tried before its caller hears of it.
const transferTries = 5

func (n *Node) transferHere(ctx context.Context, to string) error {
	r, c, err := n.leading()
	if err != nil {
		return err
	}
	s, ok := c.successor()
	if to != "" {
		if s, ok = c.find(to); !ok {
			return fmt.Errorf("no such member as %s: %w", to, flox.ErrNotFound)
		}
		if to == n.cfg.ID {
			return nil
		}
		ok = s.Suffrage == raft.Voter && c.healthy(to) && !known(c.state, to, true).Drained
	}
	if !ok {
		return fmt.Errorf("no healthy voter, not drained, that could lead: %w", flox.ErrBusy)
	}
	// Raft gives up after one election timeout, which is short for a busy machine.
	for tries := 1; ; tries++ {
		err := n.wait(ctx, r.LeadershipTransferToServer(s.ID, s.Address))
		switch {
		case err == nil:
			return nil
		case r.State() != raft.Leader:
			return fmt.Errorf("handed over, ask the next leader: %w", ErrNotLeader)
		case tries == transferTries || ctx.Err() != nil:
			return fmt.Errorf("%s did not take over: %v: %w", s.ID, err, flox.ErrBusy) //nolint:errorlint // raft's words
		}
		select {
		case <-time.After(n.cfg.Heartbeat):
		case <-ctx.Done():
		}
	}
}

func (n *Node) drainHere(ctx context.Context, q *floxv1.DrainCall) error {
	leave, err := n.alone(ctx)
	if err != nil {
		return err
	}
	defer leave()
	_, c, err := n.leading()
	if err != nil {
		return err
	}
	s, ok := c.find(q.Id)
	if !ok {
		return fmt.Errorf("no such member: %w", flox.ErrNotFound)
	}
	if q.On && s.Suffrage == raft.Voter {
		other := q.Id != n.cfg.ID && !known(c.state, n.cfg.ID, true).Drained
		if _, next := c.successor(); !next && !other {
			return fmt.Errorf("no other healthy voter could lead: %w", flox.ErrBusy)
		}
	}
	drain := func(on bool) error {
		_, err := n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Drain{Drain: &floxv1.ServerDrain{Id: q.Id, On: on}}}))
		return err
	}
	if err := drain(q.On); err != nil {
		return err
	}
	if q.On && q.Id == n.cfg.ID {
		if err := n.transferHere(ctx, ""); err != nil {
			return errors.Join(err, drain(false)) // it leads on, and says so
		}
	}
	return nil
}

func (n *Node) serversHere() (*floxv1.ClusterAnswer, error) {
	_, c, err := n.leading()
	if err != nil {
		return nil, err
	}
	a := &floxv1.ClusterAnswer{}
	for _, s := range c.servers {
		id := string(s.ID)
		p := c.probes[id]
		m := &floxv1.RaftServer{
			Id: id, Address: string(s.Address), Leader: id == c.self, Voter: s.Suffrage == raft.Voter,
			State: known(c.state, id, s.Suffrage == raft.Voter), Level: p.level, Version: p.version, Applied: p.applied,
			ContactMs: toMilli(p.heard), HealthyMs: toMilli(p.healthy), RttUs: uint32(min(p.rtt.Microseconds(), 1<<31)),
		}
		if m.Leader {
			m.Level, m.Version, m.Applied = n.cfg.Level, n.cfg.Version, n.machine.applied()
			m.ContactMs, m.HealthyMs = toMilli(time.Now()), toMilli(n.started)
		}
		a.Servers = append(a.Servers, m)
	}
	return a, nil
}

// hurry has the members looked at now.
func (n *Node) hurry() {
	select {
	case n.lookNow <- struct{}{}:
	default: // about to be
	}
}
