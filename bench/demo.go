package main

import (
	"context"
	"io"
	"os"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/scenario"
	"github.com/floxctl/flox/integration/world"
)

// demoBench runs the main job and gives its figures.
func demoBench(ctx context.Context) ([]Row, error) {
	w, err := world.Ensure(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "flox-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // the unprivileged processes go through it
		return nil, err
	}
	programs, err := hosts.Build(ctx, dir)
	if err != nil {
		return nil, err
	}
	s, report, err := scenario.Start(ctx, scenario.Config{Programs: programs, World: w, Dir: dir, Out: io.Discard})
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.Close() }()
	if err := s.MainJob(ctx, report); err != nil {
		return nil, err
	}
	return report.Rows(), nil
}
