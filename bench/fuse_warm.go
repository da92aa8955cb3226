package main

import (
	"context"
	"fmt"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/probe"
)

const (
	// fusePairs is how many pairs a comparison has.
	fusePairs = 31
	// undisturbed bounds how often a round is repeated because something outside
	// took pages from the kernel's cache meanwhile.
	undisturbed = 100
	// requestTries is the same for a pass over a whole closure.
	requestTries = 20
	// thinned is how many names are asked for in a round: one round and its warming
	// take a fraction of a second.
	thinned = 3000
	// warmFor is how old the warming of a round may be at its end.
	warmFor = 3 * time.Second
)

// operation is something done to many names, on either file system.
type operation struct {
	name string
	of   func(*probe.Tree) [][]byte
	do   func(*probe.Tree, [][]byte) error
}

var operations = []operation{
	{"lstat", func(t *probe.Tree) [][]byte { return t.All }, (*probe.Tree).Lstat},
	{"ENOENT", func(t *probe.Tree) [][]byte { return t.Missing }, (*probe.Tree).NotThere},
	{"readdir walk", func(t *probe.Tree) [][]byte { return t.Dirs }, (*probe.Tree).ReadDir},
	{"open+read+close, at most 32 KiB", func(t *probe.Tree) [][]byte { return t.Small }, (*probe.Tree).Read},
}

// trees lists the closure of a tool, in the plain copy and in the mount.
func (l *fuseLab) trees(name string) (ours, plain *probe.Tree, err error) {
	t, err := l.world.Tool(name)
	if err != nil {
		return nil, nil, err
	}
	if plain, err = probe.Walk(l.plainStore(), l.closure(t)...); err != nil {
		return nil, nil, err
	}
	return plain.At(l.plainStore(), string(l.world.StoreDir)), plain, nil
}

// requestRows: everything twice, and what the second pass asked of the agent. A
// pass from which pages were taken is made again.
func (l *fuseLab) requestRows(ctx context.Context) ([]Row, error) {
	ours, _, err := l.trees("git")
	if err != nil {
		return nil, err
	}
	pass := func() error {
		for _, step := range []func() error{
			func() error { return ours.Lstat(ours.All) },
			func() error { return ours.Readlink(ours.Links) },
			func() error { return ours.ReadDir(ours.Dirs) },
			func() error { return ours.Read(ours.Files) },
			func() error { _, err := ours.Map(ours.Large); return err },
			func() error { return ours.NotThere(ours.Missing) },
			func() error { return l.execAll(ctx, "git", "perl") },
		} {
			if err := step(); err != nil {
				return err
			}
		}
		return nil
	}
	least, tries := ^uint64(0), 0
	err = l.warm.Host.DoMounted(func() error {
		for ; tries < requestTries && least > 0; tries++ {
			if err := pass(); err != nil {
				return err
			}
			n, err := during(ctx, l.warm, pass)
			if err != nil {
				return err
			}
			least = min(least, n)
		}
		return nil
	})
	row := Row{
		Name:   fmt.Sprintf("FUSE requests (no file asked whether it is a terminal) in a second pass over a cached closure (%d entries, %.0f MiB)", len(ours.All), float64(ours.Bytes)/(1<<20)),
		Unit:   "requests",
		Ours:   float64(least),
		Target: "0", Met: least == 0, Rounds: tries,
	}
	return []Row{row}, err
}

// execAll runs tools with the mounts of the calling thread.
func (l *fuseLab) execAll(ctx context.Context, names ...string) error {
	for _, name := range names {
		t, err := l.world.Tool(name)
		if err != nil {
			return err
		}
		if _, err := l.exec(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// during is how many requests an agent got while do ran.
func during(ctx context.Context, a *hosts.Agent, do func() error) (uint64, error) {
	before, err := asked(ctx, a)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := asked(ctx, a)
	return after - before, err
}

// warmRows: single operations, warm, against the plain copy.
func (l *fuseLab) warmRows(ctx context.Context) ([]Row, error) {
	ours, plain, err := l.trees("python3")
	if err != nil {
		return nil, err
	}
	var rows []Row
	for _, op := range operations {
		mine, theirs := probe.Thin(op.of(ours), thinned), probe.Thin(op.of(plain), thinned)
		var p pairs
		err := l.warm.Host.DoMounted(func() error {
			return l.warmPairs(ctx, &p, float64(len(mine)),
				func() error { return op.do(ours, mine) }, func() error { return op.do(plain, theirs) })
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", op.name, err)
		}
		row := p.row("warm "+op.name, "ns", "ext4")
		row.Target, row.Met = "<= 1.40x", row.Ratio <= 1.4
		rows = append(rows, row)
	}
	return rows, nil
}

// warmPairs takes fusePairs pairs of nanoseconds per name, each measurement right
// behind the same without a clock. One that asked the agent, or the disk, for
// anything was not warm and is made again.
func (l *fuseLab) warmPairs(ctx context.Context, p *pairs, names float64, mine, theirs func() error) error {
	for tries := 0; len(p.ours) < fusePairs; tries++ {
		if tries == undisturbed {
			return fmt.Errorf("only %d of %d rounds were warm", len(p.ours), tries)
		}
		var took [2]time.Duration
		warm := true
		for i := range 2 {
			which := (i + tries) % 2 // who is first takes turns
			t, ok, err := l.warmOnce(ctx, [2]func() error{mine, theirs}[which])
			if err != nil {
				return err
			}
			took[which], warm = t, warm && ok
		}
		if warm {
			p.add(float64(took[0].Nanoseconds())/names, float64(took[1].Nanoseconds())/names)
		}
	}
	return nil
}

// warmOnce times do right after it ran once; ok: it was warm all the way.
func (l *fuseLab) warmOnce(ctx context.Context, do func() error) (took time.Duration, ok bool, err error) {
	warmed := time.Now()
	if err := do(); err != nil {
		return 0, false, err
	}
	var blocks int64
	n, err := during(ctx, l.warm, func() error {
		blocks = probe.BlocksRead()
		began := time.Now()
		err := do()
		took = time.Since(began)
		blocks = probe.BlocksRead() - blocks
		return err
	})
	return took, n == 0 && blocks == 0 && time.Since(warmed) < warmFor, err
}

// nameRows: names asked for the first time that are not there, in directories
// whose manifest is here.
func (l *fuseLab) nameRows(ctx context.Context) ([]Row, error) {
	const batch = 500
	ours, _, err := l.trees("git")
	if err != nil {
		return nil, err
	}
	var took []float64
	before, err := l.warm.Status(ctx)
	if err != nil {
		return nil, err
	}
	err = l.warm.Host.DoMounted(func() error {
		if err := ours.ReadDir(ours.Dirs); err != nil {
			return err
		}
		for round := range fusePairs {
			var names [][]byte
			for i := range batch {
				dir := ours.Dirs[(round*batch+i)%len(ours.Dirs)]
				names = append(names, fmt.Appendf(nil, "%s/no-%d-%d\x00", dir[:len(dir)-1], round, i))
			}
			began := time.Now()
			if err := ours.NotThere(names); err != nil {
				return err
			}
			took = append(took, float64(time.Since(began).Nanoseconds())/1e3/batch)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	after, err := l.warm.Status(ctx)
	if err != nil {
		return nil, err
	}
	traffic := after.Traffic.Sub(before.Traffic)
	lookups := after.FuseRequests["LOOKUP"] - before.FuseRequests["LOOKUP"]
	if lookups < fusePairs*batch {
		return nil, fmt.Errorf("%d names made %d look-ups: they were not new", fusePairs*batch, lookups)
	}
	low, high := interval(took)
	return []Row{{
		Name: fmt.Sprintf("first ENOENT, manifest here (95 %% interval %.0f to %.0f)", low, high), Unit: "µs", Ours: median(took), Rounds: len(took),
		Target: "<= 75 µs", Met: median(took) <= 75,
	}, {
		Name: "first ENOENT, manifest here: bytes from the network", Unit: "bytes", Ours: float64(traffic.Wire),
		Target: "0", Met: traffic.Wire == 0,
	}}, nil
}
