package hosts

import (
	"context"
	"os"
	"path/filepath"
	"slices"
)

// kept is what an agent that lost everything else keeps: who it is and whom it
// belongs to.
var kept = []string{"key", "invite.json"}

// Restart stops the agent and starts it with other flags than it was made with.
func (a *Agent) Restart(ctx context.Context, flags ...string) error {
	if err := a.Stop(); err != nil {
		return err
	}
	a.argv = append(slices.Clone(a.base), flags...)
	return a.Start(ctx)
}

// RestartCold is Restart with nothing cached: no fact, no manifest, no byte. The
// agent stays who it was.
func (a *Agent) RestartCold(ctx context.Context, flags ...string) error {
	if err := a.Stop(); err != nil {
		return err
	}
	dir := filepath.Join(a.Host.Dir, "state", "agent")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if slices.Contains(kept, e.Name()) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return a.Restart(ctx, flags...)
}
