package raft

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// probe is what this server last heard from another one.
type probe struct {
	heard   time.Time // zero = never
	rtt     time.Duration
	level   uint32
	version string
	applied uint64
	healthy time.Time // since when it answers and keeps up; zero = it does not
}

// probes are the other members as this server sees them.
type probes struct {
	mu   sync.Mutex
	byID map[string]probe
}

// get gives a copy of what is known of a server.
func (p *probes) get(id string) probe {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byID[id]
}

// edit changes what is known of a server.
func (p *probes) edit(id string, f func(*probe)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := p.byID[id]
	f(&q)
	p.byID[id] = q
}

// keep forgets all servers but these.
func (p *probes) keep(servers []raft.Server) {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := make(map[string]probe, len(servers))
	for _, s := range servers {
		if q, ok := p.byID[string(s.ID)]; ok {
			kept[string(s.ID)] = q
		}
	}
	p.byID = kept
}

// maxTrailing is how many entries a server may be behind and still keep up.
const maxTrailing = 250

// look asks every other member how it is, at regular intervals until ctx ends.
// The leader then does what follows from the answers.
func (n *Node) look(ctx context.Context, r *raft.Raft) {
	tick := time.NewTicker(n.cfg.probeEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-n.lookNow:
		case <-ctx.Done():
			return
		}
		n.spare.Tend()
		servers := r.GetConfiguration().Configuration().Servers
		n.probes.keep(servers)
		n.greetAll(ctx, servers)
		if c, err := n.count(r); err == nil {
			n.tune(r, c.slowest())
		} else if ctx.Err() == nil {
			n.cfg.Log.Warn("looking at the voters", "error", err)
		}
		if r.State() == raft.Leader && ctx.Err() == nil {
			if err := n.tend(ctx, r); err != nil && ctx.Err() == nil && !errors.Is(err, ErrNotLeader) {
				n.cfg.Log.Warn("tending the members", "error", err)
			}
		}
	}
}

// greetAll asks all other members at once.
func (n *Node) greetAll(ctx context.Context, servers []raft.Server) {
	ctx, cancel := context.WithTimeout(ctx, max(n.cfg.probeEvery, 4*n.cfg.Heartbeat))
	defer cancel()
	var all sync.WaitGroup
	for _, s := range servers {
		if string(s.ID) == n.cfg.ID {
			continue
		}
		all.Go(func() {
			asked := time.Now()
			a, err := n.greet(ctx, string(s.Address))
			if err != nil || a.Id != string(s.ID) {
				n.probes.edit(string(s.ID), func(p *probe) { n.judge(p, asked) })
				return
			}
			if a.Leads {
				n.fresh.note(asked, a.Applied, n.machine.applied())
			}
			n.probes.edit(string(s.ID), func(p *probe) {
				rtt := time.Since(asked)
				if p.rtt > 0 {
					rtt = (7*p.rtt + rtt) / 8
				}
				p.heard, p.rtt, p.level, p.version, p.applied = time.Now(), rtt, a.Level, a.Version, a.Applied
				n.judge(p, asked)
			})
		})
	}
	all.Wait()
}

// Raft asks for an election timeout far above a round trip, so that a leader's
// heartbeats come in time (Ongaro and Ousterhout, section 5.6); etcd's guide says ten of
// them. A leader misses a majority later than one of them: it needs an answer within its
// lease after it was elected, and then as often as it sends, which is all the time.
const (
	electionTrips = 10
	leaseTrips    = 3
	// heartbeatMost and leaseMost bound what round trips raise the two to.
	heartbeatMost = 5 * time.Second
	leaseMost     = heartbeatMost * leaseTrips / electionTrips
)

// Patience is how long a server waits for its leader when the slowest round trip to
// another voter takes rtt, and how long as the leader for a majority: not less than
// Config.Heartbeat, configured, and at most 5 s and 1.5 s if that is less. A leader gives
// up before anybody who waits for it does: of two servers far apart a third one is at
// least half as far from one, so it waits for electionTrips/2 of a leader's slowest.
func Patience(configured, rtt time.Duration) (wait, lease time.Duration) {
	return max(configured, min(electionTrips*rtt, heartbeatMost)), max(configured, min(leaseTrips*rtt, leaseMost))
}

// tune makes this server wait longer for its leader, and for a majority if it leads, when
// the network between the voters is slow. Small changes are let be.
func (n *Node) tune(r *raft.Raft, slowest time.Duration) {
	want, lease := Patience(n.cfg.Heartbeat, slowest)
	c := r.ReloadableConfig()
	if want > c.HeartbeatTimeout*4/5 && want < c.HeartbeatTimeout*5/4 && (want > n.cfg.Heartbeat || want == c.HeartbeatTimeout) {
		return
	}
	c.HeartbeatTimeout, c.ElectionTimeout = want, want
	// The lease must be the shorter one at any time.
	err := setLease(r, min(lease, leaseOf(r)))
	if err == nil {
		err = r.ReloadConfig(c)
	}
	if err == nil {
		err = setLease(r, lease)
	}
	if err != nil {
		n.cfg.Log.Warn("setting the heartbeat", "heartbeat", want, "lease", lease, "error", err)
		return
	}
	n.cfg.Log.Debug("heartbeat follows the round trips", "heartbeat", want, "lease", lease)
}

// judge says whether a server is healthy: it answered since it was asked, and keeps up.
func (n *Node) judge(p *probe, asked time.Time) {
	switch ok := !p.heard.Before(asked) && p.applied+maxTrailing >= n.machine.applied(); {
	case !ok && time.Since(p.heard) > 2*n.cfg.probeEvery+4*n.cfg.Heartbeat:
		p.healthy = time.Time{} // one lost answer is none of its fault
	case !ok && !p.heard.Before(asked):
		p.healthy = time.Time{}
	case ok && p.healthy.IsZero():
		p.healthy = time.Now()
	}
}

// greet asks the server at address how it is.
func (n *Node) greet(ctx context.Context, address string) (*floxv1.HelloAnswer, error) {
	p := n.peers.Load()
	if p == nil {
		return nil, errNoPeers
	}
	a, err := p.call(ctx, address, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_Hello{Hello: &floxv1.HelloCall{}}}, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		p.drop(address) // it may have gone without a word
	}
	if err != nil {
		return nil, err
	}
	return a.GetHello(), nil
}

// hello is the answer to greet.
func (n *Node) hello() *floxv1.HelloAnswer {
	a := &floxv1.HelloAnswer{Id: n.cfg.ID, Level: n.cfg.Level, Version: n.cfg.Version}
	if r := n.raft.Load(); r != nil {
		// Not before what former leaders answered is applied, see readIndexHere.
		a.Leads = r.State() == raft.Leader && n.readTerm.Load() == r.CurrentTerm()
	}
	a.Applied = n.machine.applied()
	return a
}
