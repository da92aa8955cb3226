package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// figureTarget is what is asked of a figure measured inside package storehouse, by the
// beginning of its name.
type figureTarget struct {
	name, target, peer string
	met                func(Row) bool
}

var clusterTargets = []figureTarget{
	{"path infos from one server", ">= 50000", "", func(r Row) bool { return r.Ours >= 50_000 }},
	{"start with", "<= 5 s", "", func(r Row) bool { return r.Ours <= 5 }},
	{"longest write while snapshots", "<= 50 ms", "without snapshots", func(r Row) bool { return r.Ours <= 50 }},
	{"new server of a store", ">= 0.7x", "the slower of a 1 Gb/s link and a synced copy of the packs", func(r Row) bool { return r.Ratio >= 0.7 }},
	{"round of heartbeats", "<= 10 ms", "", func(r Row) bool { return r.Ours <= 10 }},
}

// figuresBench has package storehouse measure what only it can reach, such as facts
// without content by the million, and a server that joins.
func figuresBench(ctx context.Context, dir string, targets []figureTarget, figures ...string) (rows []Row, err error) {
	file := filepath.Join(dir, "figures")
	var out []byte
	var runErr error
	// Each in a process of its own: what one has needed would count as the other's memory.
	for _, figure := range figures {
		cmd := exec.CommandContext(ctx, "go", "test", "./storehouse", "-run", "^TestFigure"+figure+"$", "-count=1", "-timeout=60m", "-v")
		cmd.Env = append(os.Environ(), "FLOX_FIGURES="+file, "TMPDIR="+dir)
		said, err := cmd.CombinedOutput()
		out, runErr = append(out, said...), errors.Join(runErr, err)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, errors.Join(runErr, fmt.Errorf("no figures of the storehouse: %w\n%s", err, out))
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for d := json.NewDecoder(f); ; {
		r := Row{Target: "publish", Met: true, Rounds: 1}
		if err := d.Decode(&r); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if r.Peer != 0 {
			r.Ratio = r.Ours / r.Peer
		}
		for _, t := range targets {
			if strings.HasPrefix(r.Name, t.name) {
				r.Target, r.PeerName, r.Met = t.target, t.peer, t.met(r)
			}
		}
		rows = append(rows, r)
	}
	if runErr != nil {
		fmt.Fprintf(os.Stderr, "not all figures of the storehouse were measured: %v\n%s\n", runErr, out)
	}
	for _, t := range targets {
		if !slices.ContainsFunc(rows, func(r Row) bool { return strings.HasPrefix(r.Name, t.name) }) {
			rows = append(rows, Row{Name: t.name + ": not measured", Target: t.target})
		}
	}
	return rows, nil
}
