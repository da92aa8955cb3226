package main

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/floxctl/flox"
)

// goBenchmark runs a benchmark of a package so many times and gives what it reports, by unit.
func goBenchmark(ctx context.Context, pkg, name string, runs int) (map[string]float64, error) {
	out, err := exec.CommandContext(ctx, "go", "test", pkg, "-run", "^$", "-bench", "^Benchmark"+name+"$", "-benchtime", fmt.Sprint(runs, "x")).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("benchmark %s of %s: %w: %s", name, pkg, err, out)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark"+name) {
			continue
		}
		figures := map[string]float64{}
		for i := 2; i+1 < len(f); i += 2 {
			var v float64
			if _, err := fmt.Sscan(f[i], &v); err != nil {
				return nil, fmt.Errorf("%q: %w", line, err)
			}
			figures[f[i+1]] = v
		}
		return figures, nil
	}
	return nil, fmt.Errorf("benchmark %s of %s: no figure in %q: %w", name, pkg, out, flox.ErrCorrupt)
}

// farmFigure is a row made of what a benchmark reports.
type farmFigure struct {
	benchmark string
	pkg       string
	runs      int
	key       string // unit it is reported in
	name      string
	unit      string
	least     bool // target is the least it may be, not the most
	target    float64
}

const schedulePkg, queuePkg = "./buildfarm/schedule", "./buildfarm/queue"

var farmFigures = []farmFigure{
	{"Makespan", schedulePkg, 8, "of-least", "10,000 builds on 200 workers: time / the least there can be, mean of 8 graphs", "%", false, 110},
	{"Makespan", schedulePkg, 8, "of-least-worst", "the same, of the worst graph", "%", false, 0},
	{"Makespan", schedulePkg, 8, "of-fifo", "10,000 builds on 200 workers: time / first in, first out, mean of 8 graphs", "%", false, 95},
	{"Makespan", schedulePkg, 8, "of-fifo-worst", "of these, the worst graph", "%", false, 0},
	{"Queue", schedulePkg, 3, "enqueued/s", "scheduler: builds taken in, 100,000 in all", "/s", true, 5000},
	{"Queue", schedulePkg, 3, "decision-p50-ms", "scheduler: decision with 100,000 builds, p50", "ms", false, 0},
	{"Queue", schedulePkg, 3, "decision-p99-ms", "scheduler: decision with 100,000 builds, p99", "ms", false, 5},
	{"Queue", queuePkg, 1, "enqueued/s", "queue: builds taken into the log, 100,000 in all, 1,000 with a command", "/s", true, 5000},
	{"Queue", queuePkg, 1, "command-p50-ms", "queue: a lease or the end of one with 100,000 builds, p50", "ms", false, 0},
	{"Queue", queuePkg, 1, "command-p99-ms", "queue: a lease or the end of one with 100,000 builds, p99", "ms", false, 0},
}

// buildfarmBench measures the queue of builds and who builds what. The workers are simulated.
func buildfarmBench(ctx context.Context) (rows []Row, err error) {
	ran := map[string]map[string]float64{}
	for _, f := range farmFigures {
		id := f.pkg + " " + f.benchmark
		if ran[id] == nil {
			if ran[id], err = goBenchmark(ctx, f.pkg, f.benchmark, f.runs); err != nil {
				return rows, err
			}
		}
		v, ok := ran[id][f.key]
		if !ok {
			return rows, fmt.Errorf("benchmark %s reports nothing in %s: %w", id, f.key, flox.ErrCorrupt)
		}
		if f.unit == "%" {
			v *= 100
		}
		row := Row{Name: f.name, Unit: f.unit, Ours: v, Rounds: f.runs, Target: "publish", Met: true}
		switch {
		case f.target == 0:
		case f.least:
			row.Target, row.Met = fmt.Sprintf(">= %g%s", f.target, f.unit), v >= f.target
		default:
			row.Target, row.Met = fmt.Sprintf("<= %g %s", f.target, f.unit), v <= f.target
		}
		rows = append(rows, row)
	}
	return rows, nil
}
