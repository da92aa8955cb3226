// Command bench measures us against peers, interleaved in one run, and writes
// bench/out/NAME.json beside a table for people. It must not hold code that the
// programs need: only harnesses and the peers' fixed command lines.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/floxctl/flox/integration/scenario"
)

// Row is one comparison; the scenario of the demo makes the same ones.
type Row = scenario.Row

// benchmarks are what `make bench BENCH=name` names.
var benchmarks = map[string]func(context.Context) ([]Row, error){
	"buildfarm": buildfarmBench,
	"cluster":   clusterBench,
	"content":   contentBench,
	"daemon":    daemonBench,
	"demo":      demoBench,
	"fuse":      fuseBench,
	"profiles":  profilesBench,
	"swarm":     swarmBench,
}

func main() {
	if how := os.Getenv(touchEnv); how != "" {
		if err := touchMain(how, os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", how, os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, names []string) error {
	if len(names) == 0 {
		for name := range benchmarks {
			names = append(names, name)
		}
		slices.Sort(names)
	}
	for _, name := range names {
		bench, ok := benchmarks[name]
		if !ok {
			var known []string
			for n := range benchmarks {
				known = append(known, n)
			}
			slices.Sort(known)
			return fmt.Errorf("no benchmark %q; there are: %s", name, strings.Join(known, ", "))
		}
		fmt.Printf("== %s\n", name)
		rows, err := bench(ctx)
		show(rows)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := write(name, rows); err != nil {
			return err
		}
	}
	return nil
}

func show(rows []Row) {
	fmt.Printf("%-52s %12s %12s %7s  %-34s %s\n", "what", "ours", "peer", "ratio", "target", "")
	for _, r := range rows {
		met := "met"
		switch {
		case r.Target == "publish":
			met = ""
		case !r.Met:
			met = "NOT MET"
		}
		peer, ratio := "-", "-"
		if r.Peer != 0 {
			peer, ratio = fmt.Sprintf("%.1f", r.Peer), fmt.Sprintf("%.2f", r.Ratio)
		}
		if r.High != 0 {
			ratio += fmt.Sprintf(" [%.2f, %.2f]", r.Low, r.High)
		}
		fmt.Printf("%-52s %12.1f %12s %7s  %-34s %s\n", r.Name+" ("+r.Unit+")", r.Ours, peer, ratio, r.Target, met)
	}
}

// write keeps rows of an earlier run that this one did not measure if it was told
// to measure some parts only.
func write(name string, rows []Row) error {
	dir := filepath.Join("bench", "out")
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // results are for everybody
		return err
	}
	if os.Getenv("FUSE_PARTS")+os.Getenv("DAEMON_PARTS")+os.Getenv("SWARM_PARTS")+os.Getenv("PROFILES_PARTS") != "" {
		var before []Row
		if b, err := os.ReadFile(filepath.Join(dir, name+".json")); err == nil && json.Unmarshal(b, &before) == nil {
			rows = append(slices.DeleteFunc(before, func(old Row) bool {
				return slices.ContainsFunc(rows, func(r Row) bool { return r.Name == old.Name })
			}), rows...)
		}
	}
	b, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".json"), append(b, '\n'), 0o644) //nolint:gosec // results are for everybody
}
