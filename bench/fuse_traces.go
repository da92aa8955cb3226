package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/probe"
	"github.com/floxctl/flox/integration/world"
)

const (
	// farAway is the round trip of the host that starts something cold.
	farAway = 50 * time.Millisecond
	// traceRounds is how often each tool of traced is started, with traces and without.
	traceRounds = 5
	// traceWait bounds the wait for a trace to be accepted.
	traceWait = time.Minute
)

// traced are the tools that are started far away.
var traced = []string{"python3", "git", "gcc", "vim", "perl", "ruby3.1"}

// tracing are the flags of agents that record and replay starts.
var tracing = []string{"--start-traces=true", "--offline", "none"}

// traceRows: cold starts far away from the storehouse, with traces that two warm
// machines recorded and without. Rows that this version of the agent cannot be
// measured for are left out.
func (l *fuseLab) traceRows(ctx context.Context) (rows []Row, err error) {
	tools, err := l.record(ctx)
	if err != nil {
		return nil, err
	}
	ok, err := l.replays(ctx, tools[0])
	if err != nil {
		return nil, err
	}
	if !ok {
		fmt.Println("   traces: no start was replayed: left out")
		return nil, nil
	}
	if rows, err = l.nearTraceRows(ctx, tools); err != nil {
		return nil, err
	}
	if err := l.cold.Host.Delay(ctx, farAway); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.cold.Host.Delay(ctx, 0)) }()
	var times pairs
	var waits []float64
	for range traceRounds {
		for _, t := range tools {
			without, _, err := l.lazily(ctx, t, quiet...)
			if err != nil {
				return nil, err
			}
			with, trips, err := l.replayed(ctx, t)
			if err != nil {
				return nil, err
			}
			times.add(with.first.Seconds()*1e3, without.first.Seconds()*1e3)
			waits = append(waits, float64(trips))
		}
	}
	row := times.row("cold start at 50 ms RTT with a trace recorded on warm machines", "ms", "without a trace")
	row.Target, row.Met = "<= 0.25x (4x faster)", row.Ratio <= 0.25
	return append(rows, Row{
		Name: "network round trips of a cold start with a trace: median", Unit: "round trips", Ours: median(waits), Rounds: len(waits),
		Target: "<= 4", Met: median(waits) <= 4,
	}, row), nil
}

// replayed starts a tool on an agent that has nothing and replays traces, and
// gives the round trips its start waited for.
func (l *fuseLab) replayed(ctx context.Context, t world.Tool) (s started, trips uint64, err error) {
	before, err := l.freshStatus(ctx)
	if err != nil {
		return s, 0, err
	}
	if s, err = l.run(ctx, l.cold.Host, t); err != nil {
		return s, 0, err
	}
	after, err := l.cold.Status(ctx)
	if err != nil {
		return s, 0, err
	}
	return s, after.Traffic.RoundTrips - before.Traffic.RoundTrips, nil
}

// nearTraceRows: cold starts next to the storehouse with such traces, which is
// what everybody has but the first two, against stock Nix copying the closure.
func (l *fuseLab) nearTraceRows(ctx context.Context, tools []world.Tool) (rows []Row, err error) {
	if err := l.cold.Host.Rate(ctx, gigabit); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.cold.Host.Rate(ctx, 0)) }()
	var times pairs
	for range traceRounds {
		for _, t := range tools {
			s, _, err := l.replayed(ctx, t)
			if err != nil {
				return nil, err
			}
			copied, _, err := l.copied(ctx, t)
			if err != nil {
				return nil, err
			}
			times.add(s.first.Seconds()*1e3, copied.Seconds()*1e3)
		}
	}
	return []Row{times.row("cold start with a trace, on 1 Gb/s: median", "ms", "nix copy of the closure, then start")}, nil
}

// freshStatus restarts the cold agent with traces on and nothing cached.
func (l *fuseLab) freshStatus(ctx context.Context) (*hosts.Status, error) {
	if err := l.cold.RestartCold(ctx, tracing...); err != nil {
		return nil, err
	}
	if err := connected(ctx, l.cold); err != nil {
		return nil, err
	}
	return l.cold.Status(ctx)
}

// record starts the traced tools on two warm machines: see startWarm.
func (l *fuseLab) record(ctx context.Context) (tools []world.Tool, err error) {
	for _, name := range traced {
		t, err := l.world.Tool(name)
		if err != nil {
			return nil, err
		}
		tools = append(tools, t)
	}
	if l.second == nil {
		if l.second, err = l.agent(ctx, "second", tracing...); err != nil {
			return nil, err
		}
	}
	if err := l.warm.Restart(ctx, tracing...); err != nil {
		return nil, err
	}
	for _, a := range []*hosts.Agent{l.warm, l.second} {
		if err := connected(ctx, a); err != nil {
			return nil, err
		}
		for _, t := range tools {
			if err := l.startWarm(ctx, a, t); err != nil {
				return nil, err
			}
		}
	}
	return tools, nil
}

// startWarm reads all of a tool's closure that holds no programs, so that the
// kernel has every page of its libraries, and starts it right after that, for the
// first time on that machine. A start of which the kernel has everything asks
// nothing, so nobody could record it.
func (l *fuseLab) startWarm(ctx context.Context, a *hosts.Agent, t world.Tool) error {
	shared := slices.DeleteFunc(l.closure(t), func(name string) bool {
		_, err := os.Stat(filepath.Join(l.plainStore(), name, "bin"))
		return err == nil || name == string(t.Path)
	})
	plain, err := probe.Walk(l.plainStore(), shared...)
	if err != nil {
		return err
	}
	ours := plain.At(l.plainStore(), string(l.world.StoreDir))
	return a.Host.DoMounted(func() error {
		for range 2 { // the second time from the cache, at once
			if err := ours.Read(ours.Files); err != nil {
				return err
			}
		}
		_, err := l.exec(ctx, t)
		return err
	})
}

// replays says whether a cold start replays a trace; it takes a while until what
// two machines recorded is accepted.
func (l *fuseLab) replays(ctx context.Context, t world.Tool) (bool, error) {
	for until := time.Now().Add(traceWait); time.Now().Before(until); {
		if _, err := l.freshStatus(ctx); err != nil {
			return false, err
		}
		if _, err := l.run(ctx, l.cold.Host, t); err != nil {
			return false, err
		}
		s, err := l.cold.Status(ctx)
		if err != nil || s.Prefetch.StartsReplayed > 0 {
			return err == nil, err
		}
	}
	return false, nil
}
