// Command demo runs the main job and shows what happened; see package scenario.
// With KEEP=1 it leaves the hosts running and says how to look around.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/scenario"
	"github.com/floxctl/flox/integration/world"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	w, err := world.Ensure(ctx)
	if err != nil {
		return err
	}
	bin, err := filepath.Abs("bin")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "flox-demo-")
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = os.RemoveAll(dir)
		} else {
			fmt.Fprintln(os.Stderr, "demo: the logs are in", dir)
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // the unprivileged processes go through it
		return err
	}
	s, report, err := scenario.Start(ctx, scenario.Config{
		Programs: hosts.Programs{Floxd: filepath.Join(bin, "floxd"), Floxctl: filepath.Join(bin, "floxctl")},
		World:    w, Dir: dir, Out: os.Stdout,
	})
	if err != nil {
		return err
	}
	defer func() {
		if cerr := s.Close(); err == nil {
			err = cerr
		}
	}()
	if err := s.MainJob(ctx, report); err != nil {
		return err
	}
	report.Table(os.Stdout)
	if err := write(report); err != nil {
		return err
	}
	if os.Getenv("KEEP") != "" {
		keep(ctx, s)
	}
	return nil
}

func write(report *scenario.Report) error {
	b, err := json.MarshalIndent(report.Rows(), "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll("bench/out", 0o755); err != nil { //nolint:gosec // results are for everybody
		return err
	}
	return os.WriteFile("bench/out/demo.json", append(b, '\n'), 0o644) //nolint:gosec // results are for everybody
}

// keep waits for Ctrl-C with everything running.
func keep(ctx context.Context, s *scenario.Scenario) {
	if err := s.House.Host.Plug(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo: plug the storehouse in again:", err)
	}
	fmt.Printf("\nThe hosts go on running, the storehouse is plugged in again. Look around in other terminals:\n\n")
	for _, a := range []struct {
		what  string
		shell string
	}{{"agent A", s.A.Host.Shell()}, {"agent B", s.B.Host.Shell()}, {"storehouse", s.House.Host.Shell()}} {
		fmt.Printf("  %-11s sudo %s\n", a.what+":", a.shell)
	}
	fmt.Printf("\n  in there:   ls /nix/store; bin/floxctl status; bin/floxctl watch; bin/floxctl peers\n")
	fmt.Printf("\nCtrl-C here stops everything and removes it.\n")
	<-ctx.Done()
}
