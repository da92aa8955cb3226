package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/integration/world"
)

// swarmParts are the groups of rows, in order; SWARM_PARTS=egress runs only some.
var swarmParts = []part[*swarmLab]{
	{"egress", (*swarmLab).egressRows},
	{"slow", (*swarmLab).slowRows},
}

const (
	// crowdSize agents want the same in the same second, or as many as SWARM_AGENTS
	// says; a quarter of them is what they are compared with.
	crowdSize   = 32
	crowdRounds = 3
	// slowLine is every machine's line in bits per second, each way, where half of the
	// agents want the same.
	slowLine = 25e6
)

// swarmLab is a fuseLab of which only the storehouse is used, and an office of agents.
type swarmLab struct {
	fuseLab
	agents []*hosts.Agent
	size   int // of the whole crowd
}

// swarmBench measures machines that fetch from each other.
func swarmBench(ctx context.Context) (rows []Row, err error) {
	l := &swarmLab{}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.start(ctx); err != nil {
		return nil, err
	}
	return runParts(ctx, l, func() *hosts.Agent { return l.agents[0] }, "SWARM_PARTS", swarmParts)
}

func (l *swarmLab) start(ctx context.Context) (err error) {
	if l.world, err = world.Tools(ctx); err != nil {
		return err
	}
	if err := l.open(ctx); err != nil {
		return err
	}
	cellar, err := l.host(ctx, "house")
	if err != nil {
		return err
	}
	if l.house, err = hosts.StartStorehouse(ctx, l.programs, cellar, l.dir); err != nil {
		return err
	}
	if err := l.nixCopy(ctx, l.world.Nix(), l.world.Abs()...); err != nil {
		return err
	}
	office, err := l.net.Subnet(ctx, "office", netip.Prefix{})
	if err != nil {
		return err
	}
	l.size = crowdSize
	if n, err := strconv.Atoi(os.Getenv("SWARM_AGENTS")); err == nil && n >= 4 {
		l.size = n
	}
	for i := range l.size {
		host, err := l.net.Host(ctx, fmt.Sprint("desk", i+1), office)
		if err != nil {
			return err
		}
		a, err := hosts.StartAgent(ctx, l.programs, host, l.dir, l.house.Invite(), quiet...)
		if err != nil {
			return err
		}
		l.agents = append(l.agents, a)
	}
	return nil
}

func (l *swarmLab) close() error {
	var group errgroup.Group
	for _, a := range l.agents {
		group.Go(a.Stop)
	}
	return errors.Join(group.Wait(), l.fuseLab.close())
}

// crowdRun is what a crowd took.
type crowdRun struct {
	sent  uint64 // by the storehouse, as its interface counts
	times []time.Duration
}

// crowd has agents that have nothing fetch a closure in the same second. The others
// are stopped.
func (l *swarmLab) crowd(ctx context.Context, n int, path string, rate int64) (run crowdRun, err error) {
	for _, a := range l.agents[n:] {
		if err := a.Stop(); err != nil {
			return run, err
		}
	}
	for _, a := range l.agents[:n] {
		if err := errors.Join(a.RestartCold(ctx, quiet...), connected(ctx, a)); err != nil {
			return run, err
		}
	}
	lines := []*netns.Host{l.house.Host}
	for _, a := range l.agents[:n] {
		lines = append(lines, a.Host)
	}
	for _, h := range lines {
		if err := h.Rate(ctx, rate); err != nil {
			return run, err
		}
		defer func() { err = errors.Join(err, h.Rate(ctx, 0)) }()
	}
	before, err := l.house.Host.Counters()
	if err != nil {
		return run, err
	}
	began := time.Now()
	run.times = make([]time.Duration, n)
	group, together := errgroup.WithContext(ctx)
	for i, a := range l.agents[:n] {
		group.Go(func() error {
			out, err := a.Ctl(together, "download", path)
			if err != nil {
				return fmt.Errorf("%s: %w: %s", a.Host.Name, err, out)
			}
			run.times[i] = time.Since(began)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return run, err
	}
	after, err := l.house.Host.Counters()
	run.sent = after.Sub(before).TxBytes
	slices.Sort(run.times)
	return run, err
}

// tool is the one whose closure is nearest to so many bytes.
func (l *swarmLab) tool(bytes uint64) world.Tool {
	far := func(t world.Tool) uint64 { return max(t.ClosureBytes, bytes) - min(t.ClosureBytes, bytes) }
	return slices.MinFunc(l.world.Tools, func(a, b world.Tool) int { return int(far(a)) - int(far(b)) }) //nolint:gosec // some GiB
}

// egressRows: what a storehouse sends to a crowd, by the bytes of what it wants.
func (l *swarmLab) egressRows(ctx context.Context) ([]Row, error) {
	t := l.tool(64 << 20)
	var rows []Row
	for _, n := range []int{1, l.size / 4, l.size} {
		var p pairs
		var slowest []float64
		for range capped(crowdRounds) {
			run, err := l.crowd(ctx, n, l.world.StoreDir.Join(t.Path), 0)
			if err != nil {
				return rows, err
			}
			p.add(float64(run.sent), float64(t.ClosureBytes))
			slowest = append(slowest, run.times[n-1].Seconds())
		}
		row := p.row(fmt.Sprintf("storehouse to %d cold agents, all of %s (%.0f MiB), slowest %.1f s", n, t.Name, float64(t.ClosureBytes)/(1<<20), median(slowest)), "B", "closure")
		if n > 1 {
			row.Target, row.Met = "<= 1.10x", row.Ratio <= 1.10
		}
		if n == l.size {
			row.Target += fmt.Sprintf(", no more than at %d", l.size/4)
			row.Met = row.Met && row.Ratio <= rows[len(rows)-1].Ratio*1.02
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// slowRows: how long a crowd takes where every line is slow, by the least that it can
// take: the closure over the storehouse's line, over its own, or all that is sent
// over all lines (Kumar and Ross, Peer-Assisted File Distribution, 2006).
func (l *swarmLab) slowRows(ctx context.Context) ([]Row, error) {
	t, size := l.tool(16<<20), l.size/2
	bits := float64(t.ClosureBytes) * 8
	bound := max(bits/slowLine, float64(size)*bits/(slowLine+float64(size)*slowLine))
	var p50, p99, worst pairs
	for range capped(crowdRounds) {
		run, err := l.crowd(ctx, size, l.world.StoreDir.Join(t.Path), slowLine)
		if err != nil {
			return nil, err
		}
		p50.add(run.times[size/2].Seconds(), bound)
		p99.add(run.times[size*99/100].Seconds(), bound)
		worst.add(run.times[size-1].Seconds(), bound)
	}
	var rows []Row
	for _, q := range []struct {
		name string
		pairs
		most float64
	}{{"p50", p50, 1.15}, {"p99", p99, 1.4}, {"max", worst, 1.6}} {
		row := q.row(fmt.Sprintf("%d agents, all of %s (%.0f MiB), lines of 25 Mb/s: %s", size, t.Name, float64(t.ClosureBytes)/(1<<20), q.name), "s", "least possible")
		row.Target, row.Met = fmt.Sprintf("<= %.2fx", q.most), row.Ratio <= q.most
		rows = append(rows, row)
	}
	return rows, nil
}
