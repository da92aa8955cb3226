package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/world"
)

// copyRows: the demo world, from a binary cache in a directory, uncompressed. In
// between both collect their garbage, which is all of it.
func (l *daemonLab) copyRows(ctx context.Context) ([]Row, error) {
	cache := "file://" + filepath.Join(l.dir, "cache")
	fill := l.world.Command(ctx, append([]string{"nix", "copy", "--to", cache + "?compression=none"}, l.world.Abs()...)...)
	if out, err := fill.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("nix copy to a directory: %w: %s", err, out)
	}
	copyAll := append([]string{"nix", "copy", "--no-check-sigs", "--from", cache}, l.world.Abs()...)
	var p pairs
	for round := range capped(copyRounds) {
		if _, err := l.pair(ctx, l.warm, round, &p, copyAll...); err != nil {
			return nil, err
		}
		for _, a := range []*hosts.Agent{l.warm, nil} {
			if _, err := l.nix(ctx, a, "nix-store", "--gc"); err != nil {
				return nil, err
			}
		}
	}
	var size uint64
	for _, path := range l.world.Paths {
		size += path.NarSize
	}
	row := p.row(fmt.Sprintf("nix copy of the demo world (%d paths, %.0f MiB)", len(l.world.Paths), float64(size)/(1<<20)), "ms", "stock nix-daemon")
	row.Target, row.Met = "<= 1.25x (0.8 of the speed)", row.Ratio <= 1.25
	return []Row{row}, nil
}

// noopRows: nix-build of the demo world's expression, whose outputs are all valid.
func (l *daemonLab) noopRows(ctx context.Context) ([]Row, error) {
	if err := l.nixCopy(ctx, l.world.Nix(), l.world.Abs()...); err != nil {
		return nil, err
	}
	dir := filepath.Join(l.dir, "expression")
	file, err := world.Expression(ctx, dir)
	if err != nil {
		return nil, err
	}
	copyAll := append([]string{"nix", "copy", "--no-check-sigs", "--from", "file://" + filepath.Join(l.dir, "cache")}, l.world.Abs()...)
	if _, err := os.Stat(filepath.Join(l.dir, "cache")); err != nil { // only this part is run
		copyAll[4] = l.house.URL()
	}
	if _, err := l.nix(ctx, nil, copyAll...); err != nil {
		return nil, err
	}
	build := []string{"nix-build", "--no-out-link", file}
	for _, a := range []*hosts.Agent{l.warm, nil} {
		if _, err := l.nix(ctx, a, build...); err != nil { // its sources are new
			return nil, err
		}
	}
	var p pairs
	for round := range capped(noopRounds) {
		if _, err := l.pair(ctx, l.warm, round, &p, build...); err != nil {
			return nil, err
		}
	}
	return []Row{p.atMost("nix-build of the demo world, of which everything is valid", "ms", 1.2)}, nil
}
