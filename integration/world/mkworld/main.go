// Command mkworld builds the demo world if this machine has none yet and
// prints what it holds. `make world` runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/floxctl/flox/integration/world"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	w, err := world.Ensure(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkworld:", err)
		os.Exit(1)
	}
	fmt.Printf("demo world: %d store paths in %s (built in %.0f s)\n", len(w.Paths), w.Dir, w.BuildSeconds)
	for _, p := range []world.Program{w.Git, w.Ripgrep, w.Python, w.Unused} {
		fmt.Printf("  %4d paths %7.1f MB  %s\n", p.ClosurePaths, float64(p.ClosureBytes)/1e6, p.Exe)
	}
}
