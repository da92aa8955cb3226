package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Nearly all of these tests wait most of their time: for a clock, a time-out, a
// disk. Where FLOX_HALVES is set and no test is chosen, two processes run at once, each with
// a lab of its own; this one is what the first runs, the other has the rest.
// They take about as long as each other.
var firstHalf = []string{
	"TestServers", "TestAllServersLost", "TestAgentPowerCut", "TestSurvives", "TestSurvivesWithoutResend",
	"TestKilled", "TestImpostor", "TestKeysRotateUnderAgents", "TestStartTraces",
	"TestOperator", "TestKeepAndCollect",
}

const halvesEnv = "FLOX_HALVES"

// halved reports whether this process ran both halves, and how they ended.
func halved() (code int, done bool) {
	if os.Getenv(halvesEnv) == "" || flag.Lookup("test.run").Value.String() != "" || flag.Lookup("test.list").Value.String() != "" {
		return 0, false
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	first := "^(" + strings.Join(firstHalf, "|") + ")$"
	var wait sync.WaitGroup
	var failed [2]error
	for i, choice := range []string{"-test.run=" + first, "-test.skip=" + first} {
		wait.Go(func() { failed[i] = half(ctx, choice) })
	}
	wait.Wait()
	// A half that was killed has left its directory.
	if err := errors.Join(failed[0], failed[1], sweep()); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1, true
	}
	return 0, true
}

// half runs the tests of a choice in a process of its own.
func half(ctx context.Context, choice string) error {
	// The log of what was opened is go test's, and one process can write it.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(a string) bool { return strings.HasPrefix(a, "-test.testlogfile") })
	cmd := exec.CommandContext(ctx, os.Args[0], append(args, choice)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	// It ends with this one, which is the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, halvesEnv+"=") }), halfEnv+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the tests of %s: %w", choice, err)
	}
	return nil
}
