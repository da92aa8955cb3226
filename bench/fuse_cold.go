package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/world"
)

// gigabit is the link of the hosts that start something cold.
const gigabit = 1e9

// coldStart is what one cold start of a tool cost.
type coldStart struct {
	tool  world.Tool
	first time.Duration // to the first output, lazily
	copy  time.Duration // of the closure with stock Nix, and then to the first output
	plain uint64        // uncompressed bytes fetched, facts and manifests included
	wire  uint64
	pages uint64        // bytes of the pages that the start touched
	alone time.Duration // to the first output where the closure was copied before: nobody who has to fetch is faster
}

// coldRows: what a first start fetches and how long it takes, of every tool, on
// an agent that has nothing, against stock Nix copying the closure first.
func (l *fuseLab) coldRows(ctx context.Context) (rows []Row, err error) {
	if err := l.cold.Host.Rate(ctx, gigabit); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.cold.Host.Rate(ctx, 0)) }()
	var share, wire, overPages, least []float64
	var times, bound pairs
	for _, t := range l.world.Tools {
		c, err := l.coldStart(ctx, t)
		if err != nil {
			return nil, err
		}
		closure := float64(t.ClosureBytes)
		share = append(share, 100*float64(c.plain)/closure)
		wire = append(wire, 100*float64(c.wire)/closure)
		overPages = append(overPages, float64(c.plain)/float64(c.pages))
		least = append(least, 100*float64(c.pages)/closure)
		times.add(c.first.Seconds()*1e3, c.copy.Seconds()*1e3)
		bound.add(c.alone.Seconds()*1e3, c.copy.Seconds()*1e3)
		rows = append(rows, c.rows()...)
	}
	speed := times.row("cold start, lazy, on 1 Gb/s: median", "ms", "nix copy of the closure, then start")
	speed.Target, speed.Met = "<= 0.05x (20x faster)", speed.Ratio <= 1.0/20
	return append([]Row{
		percent("bytes fetched / closure at first output, no trace: median", share, 6.4),
		percent("wire bytes / closure at first output, no trace: median", wire, 0),
		{
			Name: "bytes fetched / 4 KiB pages touched: median", Unit: "x", Ours: median(overPages), Rounds: len(overPages),
			Target: "<= 2.5x", Met: median(overPages) <= 2.5,
		},
		percent("bound of the first: 4 KiB pages touched / closure: median", least, 0),
		speed,
		bound.row("bound of that: a start that fetches nothing: median", "ms", "nix copy of the closure, then start"),
	}, rows...), nil
}

// percent makes a row of percentages; no most is no target.
func percent(name string, v []float64, most float64) Row {
	row := Row{Name: name, Unit: "%", Ours: median(v), Rounds: len(v), Target: "publish", Met: true}
	if most > 0 {
		row.Target, row.Met = fmt.Sprintf("<= %.1f %%", most), row.Ours <= most
	}
	return row
}

// rows are the figures of one tool.
func (c *coldStart) rows() []Row {
	name, closure := "cold start of "+c.tool.Name+": ", float64(c.tool.ClosureBytes)
	row := func(what, unit string, ours, peer float64, peerName string) Row {
		return Row{Name: name + what, Unit: unit, Ours: ours, Peer: peer, PeerName: peerName, Ratio: ours / peer, Target: "publish", Met: true}
	}
	return []Row{
		row("fetched", "bytes", float64(c.plain), closure, "closure"),
		row("on the wire", "bytes", float64(c.wire), closure, "closure"),
		row("fetched / pages", "bytes", float64(c.plain), float64(c.pages), "4 KiB pages touched"),
		row("pages", "bytes", float64(c.pages), closure, "closure"),
		row("time", "ms", c.first.Seconds()*1e3, c.copy.Seconds()*1e3, "nix copy, then start"),
		row("time where nothing is fetched", "ms", c.alone.Seconds()*1e3, c.copy.Seconds()*1e3, "nix copy, then start"),
	}
}

// coldStart measures one tool.
func (l *fuseLab) coldStart(ctx context.Context, t world.Tool) (*coldStart, error) {
	c := &coldStart{tool: t}
	s, traffic, err := l.lazily(ctx, t, quiet...)
	if err != nil {
		return nil, err
	}
	c.first, c.plain, c.wire = s.first, traffic.Plain(), traffic.Wire
	if c.pages, err = l.pages(ctx, t); err != nil {
		return nil, err
	}
	c.copy, c.alone, err = l.copied(ctx, t)
	return c, err
}

// lazily starts a tool on an agent that has nothing, and says what was fetched.
func (l *fuseLab) lazily(ctx context.Context, t world.Tool, flags ...string) (s started, traffic hosts.Traffic, err error) {
	if err := l.cold.RestartCold(ctx, flags...); err != nil {
		return s, traffic, err
	}
	if err := connected(ctx, l.cold); err != nil {
		return s, traffic, err
	}
	before, err := l.cold.Status(ctx)
	if err != nil {
		return s, traffic, err
	}
	if s, err = l.run(ctx, l.cold.Host, t); err != nil {
		return s, traffic, err
	}
	after, err := l.cold.Status(ctx)
	if err != nil {
		return s, traffic, err
	}
	return s, after.Traffic.Sub(before.Traffic), nil
}

// pages are the bytes of the pages a start touches: the agent has all it needs,
// a new mount has nothing in the kernel's cache, and the kernel asks for no page
// ahead.
func (l *fuseLab) pages(ctx context.Context, t world.Tool) (uint64, error) {
	if err := l.cold.Restart(ctx, append([]string{"--read-ahead", "4KiB"}, quiet...)...); err != nil {
		return 0, err
	}
	before, err := l.cold.Status(ctx)
	if err != nil {
		return 0, err
	}
	if _, err := l.run(ctx, l.cold.Host, t); err != nil {
		return 0, err
	}
	after, err := l.cold.Status(ctx)
	if err != nil {
		return 0, err
	}
	if after.FuseRead == before.FuseRead {
		return 0, fmt.Errorf("%s read nothing on a new mount", t.Name)
	}
	return after.FuseRead - before.FuseRead, nil
}

// copied copies the closure of a tool into an empty stock store on the same host,
// and starts it from there. It gives how long both took, and the start alone.
func (l *fuseLab) copied(ctx context.Context, t world.Tool) (both, alone time.Duration, err error) {
	n, took, err := l.copyAll(ctx, t)
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = os.RemoveAll(n.Dir) }()
	argv := append([]string{"sh", "-c", `cd "$1"; shift; exec "$@"`, "sh", l.files, t.Exe}, t.Args...)
	s, err := finish(n.Command(ctx, argv...), t)
	return took + s.first, s.first, err
}

// copyAll copies the closure of a tool from the storehouse into a new store, which
// the caller removes.
func (l *fuseLab) copyAll(ctx context.Context, t world.Tool) (world.Nix, time.Duration, error) {
	n := world.Nix{Dir: filepath.Join(l.dir, "copied"), NetNS: l.cold.Host.NetNS()}
	cmd := n.Command(ctx, "nix", "copy", "--no-check-sigs", "--from", l.house.URL(), strings.TrimSuffix(t.Exe, "/bin/"+filepath.Base(t.Exe)))
	began := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(began)
	if err != nil {
		return n, took, errors.Join(fmt.Errorf("nix copy of %s: %w: %s", t.Name, err, out), os.RemoveAll(n.Dir))
	}
	return n, took, nil
}
