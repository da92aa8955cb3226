package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// leaderRounds is how often leadership is taken, and handed over.
const leaderRounds = 15

// leaderBench measures what a client notices when the leader vanishes, and
// when it hands over. It writes through a server that stays, one command after
// the other, in a session.
func leaderBench(ctx context.Context, dir string) (rows []Row, err error) {
	c, err := startOurs(ctx, filepath.Join(dir, "leader"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.end()) }()
	var killed, handed []time.Duration
	for range leaderRounds {
		d, err := c.stall(ctx, c.killLeader)
		if err != nil {
			return nil, err
		}
		killed = append(killed, d)
		if d, err = c.stall(ctx, func(ctx context.Context, _ *ourServer) error { return c[0].node.Transfer(ctx, "") }); err != nil {
			return nil, err
		}
		handed = append(handed, d)
	}
	ms := func(d time.Duration) float64 { return d.Seconds() * 1e3 }
	slices.Sort(killed)
	slices.Sort(handed)
	k50, kMax, h50, hMax := killed[len(killed)/2], killed[len(killed)-1], handed[len(handed)/2], handed[len(handed)-1]
	return []Row{
		{Name: "leader gone to next acknowledged write, p50", Unit: "ms", Ours: ms(k50), Target: "<= 500 ms", Met: k50 <= 500*time.Millisecond, Rounds: leaderRounds},
		{Name: "leader gone to next acknowledged write, max", Unit: "ms", Ours: ms(kMax), Target: "<= 1200 ms", Met: kMax <= 1200*time.Millisecond, Rounds: leaderRounds},
		{Name: "planned hand-over, longest wait for a write, p50", Unit: "ms", Ours: ms(h50), Target: "<= 50 ms", Met: h50 <= 50*time.Millisecond, Rounds: leaderRounds},
		{Name: "planned hand-over, longest wait for a write, max", Unit: "ms", Ours: ms(hMax), Target: "publish", Met: true, Rounds: leaderRounds},
	}, nil
}

// killLeader cuts the leader off as a kill does.
func (c ourCluster) killLeader(_ context.Context, leader *ourServer) error {
	return leader.layer.kill()
}

// stallWindow is how long after a change, once it returned, a write may begin
// and still count as held up by it: others wait for the disk as any write does.
const stallWindow = 300 * time.Millisecond

// stall gives the longest that a write took which was under way while change
// happened to the leader, or began just after it, and mends what is broken
// afterwards.
func (c ourCluster) stall(ctx context.Context, change func(context.Context, *ourServer) error) (longest time.Duration, err error) {
	if err := c.healthy(ctx); err != nil {
		return 0, err
	}
	leader, err := c.leader(ctx)
	if err != nil {
		return 0, err
	}
	through := c[0]
	if through == leader {
		through = c[1]
	}
	writing, stop := context.WithCancel(ctx)
	var writer sync.WaitGroup
	var writeErr error
	type write struct{ from, to time.Time }
	var writes []write
	writer.Go(func() {
		s := through.node.NewSession()
		for writing.Err() == nil {
			from := time.Now()
			if _, _, writeErr = s.Propose(ctx, clusterKind, []byte("key value")); writeErr != nil {
				return
			}
			writes = append(writes, write{from, time.Now()})
		}
	})
	time.Sleep(200 * time.Millisecond)
	begin := time.Now()
	err = change(ctx, leader)
	end := time.Now().Add(stallWindow)
	time.Sleep(1500 * time.Millisecond)
	stop()
	writer.Wait()
	if err = errors.Join(err, writeErr); err != nil {
		return 0, fmt.Errorf("writing while the leader changes: %w", err)
	}
	for _, w := range writes {
		if w.to.After(begin) && w.from.Before(end) {
			longest = max(longest, w.to.Sub(w.from))
		}
	}
	if leader.layer.gone() {
		address := leader.cfg.Address
		if err := leader.end(); err != nil {
			return 0, err
		}
		return longest, leader.start(address)
	}
	return longest, nil
}
