package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/floxctl/flox/integration/hosts"
)

const (
	// graphSize and infoSize are how many derivations a graph has.
	graphSize, infoSize = 5000, 1000
	// graphRounds, infoRounds and copyRounds are how many pairs a row has.
	graphRounds, infoRounds, copyRounds, noopRounds = 5, 9, 5, 9
)

// graphExpr is a graph of n derivations, the last of which needs all others; each
// is of the size of those of Nixpkgs. No two salts have a derivation in common.
func graphExpr(n int, salt string) string {
	return fmt.Sprintf(`let
  n = %d;
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo > $out" ]; salt = %q; } // attrs);
  all = builtins.genList (i: make {
    name = "g${toString i}";
    inputs = if i == 0 then [ ] else [ (builtins.elemAt all (i / 2)) (builtins.elemAt all (i * 2 / 3)) ];
    pad = %q;
  }) (n - 1);
in make { name = "all"; inputs = all; }
`, n, salt, strings.Repeat("what packages have in their environment ", 30))
}

// graph writes such an expression and gives the file.
func (l *daemonLab) graph(n int, salt string) (string, error) {
	file := filepath.Join(l.dir, "graph-"+salt+".nix")
	return file, os.WriteFile(file, []byte(graphExpr(n, salt)), 0o644) //nolint:gosec // Nix on all hosts reads it
}

// publish has an agent upload what a build needs, which is then refused: nobody
// builds here.
func (l *daemonLab) publish(ctx context.Context, a *hosts.Agent, file string) error {
	_, err := l.nix(ctx, a, "nix-build", "--no-out-link", file)
	if err == nil || !strings.Contains(err.Error(), "builds nothing") {
		return fmt.Errorf("nix-build where nobody builds: %w", err)
	}
	return nil
}

// graphRows: derivations are written down far away from the storehouse, which does
// not matter; and when a build needs them they are sent once.
func (l *daemonLab) graphRows(ctx context.Context) ([]Row, error) {
	var first, second, bytes pairs
	for round := range capped(graphRounds) {
		file, err := l.graph(graphSize, fmt.Sprint("graph", round))
		if err != nil {
			return nil, err
		}
		made, err := l.pair(ctx, l.cold, round, &first, "nix-instantiate", file)
		if err != nil {
			return nil, err
		}
		if _, err := l.pair(ctx, l.cold, round+1, &second, "nix-instantiate", file); err != nil {
			return nil, err
		}
		need, err := l.derivationBytes(ctx, made.last())
		if err != nil {
			return nil, err
		}
		before, err := sent(ctx, l.cold)
		if err != nil {
			return nil, err
		}
		if err := l.publish(ctx, l.cold, file); err != nil {
			return nil, err
		}
		after, err := sent(ctx, l.cold)
		if err != nil {
			return nil, err
		}
		bytes.add(after-before, need)
	}
	upload := bytes.row("first nix-build of it: bytes the machine sent", "bytes", "bytes of its derivations")
	upload.Target, upload.Met = "<= 1.1x", upload.Ratio <= 1.1
	return []Row{
		first.atMost(fmt.Sprintf("nix-instantiate of %d derivations, storehouse 50 ms away", graphSize), "ms", 1.5),
		second.atMost("the same a second time", "ms", 1.1),
		upload,
	}, nil
}

// derivationBytes are those of a derivation and all it needs.
func (l *daemonLab) derivationBytes(ctx context.Context, drv string) (n float64, err error) {
	closure, err := l.nix(ctx, nil, "nix-store", "-qR", drv)
	if err != nil {
		return 0, err
	}
	for p := range strings.FieldsSeq(closure.out) {
		info, err := os.Stat(filepath.Join(l.plain.Dir, p)) // Dir/nix is its /nix
		if err != nil {
			return 0, err
		}
		n += float64(info.Size())
	}
	return n, nil
}

// sent is how many bytes an agent's host has sent so far, frames and all.
func sent(ctx context.Context, a *hosts.Agent) (float64, error) {
	table, err := a.Host.Run(ctx, "cat", "/proc/self/net/dev")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(table) {
		name, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		var skip [8]float64
		var n float64
		if name != "eth0" {
			continue
		}
		_, err := fmt.Sscan(rest, &skip[0], &skip[1], &skip[2], &skip[3], &skip[4], &skip[5], &skip[6], &skip[7], &n)
		return n, err
	}
	return 0, fmt.Errorf("%s has no eth0: %s", a.Host.Name, table)
}

// infoRows: a closure of which an agent knows nothing, far away and on the LAN; and
// on the LAN once more.
func (l *daemonLab) infoRows(ctx context.Context) ([]Row, error) {
	var lan, again pairs
	var trips []float64
	for round := range capped(infoRounds) {
		file, err := l.graph(infoSize, fmt.Sprint("info", round))
		if err != nil {
			return nil, err
		}
		made, err := l.nix(ctx, l.warm, "nix-instantiate", file)
		if err != nil {
			return nil, err
		}
		if _, err := l.nix(ctx, nil, "nix-instantiate", file); err != nil {
			return nil, err
		}
		if err := l.publish(ctx, l.warm, file); err != nil {
			return nil, err
		}
		info := []string{"nix", "path-info", "--derivation", "-r", made.last()}
		if _, err := l.pair(ctx, l.second, round, &lan, info...); err != nil {
			return nil, err
		}
		if _, err := l.pair(ctx, l.second, round+1, &again, info...); err != nil {
			return nil, err
		}
		far, err := l.nix(ctx, l.cold, info...)
		if err != nil {
			return nil, err
		}
		near := time.Duration(lan.ours[len(lan.ours)-1] * float64(time.Millisecond))
		trips = append(trips, (far.took-near).Seconds()/farAway.Seconds())
	}
	low, high := interval(trips)
	return []Row{
		{
			Name: fmt.Sprintf("nix path-info -r of %d paths nobody here knows, 50 ms away: time above the LAN's (95 %% interval %.1f to %.1f)", infoSize, low, high),
			Unit: "round trips", Ours: median(trips), Rounds: len(trips), Target: "<= 5", Met: median(trips) <= 5,
		},
		lan.atMost("the same on the LAN", "ms", 1.2),
		again.atMost("the same on the LAN, a second time", "ms", 1.2),
	}, nil
}
