package daemon

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

// sleeper is a service whose program does nothing, until the test ends.
func sleeper(t *testing.T, script string) *service {
	t.Helper()
	cfg := DefaultConfig()
	cfg.StateDir = t.TempDir()
	program := filepath.Join(cfg.StateDir, "floxd")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := &service{part: "agent", cfg: cfg, config: "/etc/floxd/config.toml", program: program}
	s.answers = func(context.Context) bool {
		b, err := os.ReadFile(s.logPath())
		return err == nil && strings.Contains(string(b), "ready --config /etc/floxd/config.toml agent\n")
	}
	t.Cleanup(func() {
		if err := s.stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

const sleeps = "echo ready $*; exec sleep 1000"

// However often a service is started, one process runs, and that knows nobody who
// started it.
func TestDetachedServiceRunsOnce(t *testing.T) {
	s := sleeper(t, sleeps)
	start := func(changed bool) int {
		t.Helper()
		r, err := s.start(t.Context(), changed)
		if err != nil {
			t.Fatal(err)
		}
		return r.PID
	}
	first := start(false)
	if group, err := syscall.Getpgid(first); err != nil || group != first {
		t.Errorf("process %d is in group %d (%v): a Ctrl-C here would reach it", first, group, err)
	}
	if again := start(false); again != first {
		t.Errorf("started again while process %d runs: process %d", first, again)
	}
	second := start(true)
	if second == first || !gone(first) {
		t.Errorf("configured anew: process %d, before %d, which has ended: %v", second, first, gone(first))
	}
	// Its lock went with it, whatever the file says.
	if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for !gone(second) {
		time.Sleep(5 * time.Millisecond)
	}
	third := start(false)
	if third == second || gone(third) {
		t.Errorf("after a kill -9 of process %d: process %d", second, third)
	}
	for range 2 {
		if err := s.stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if !gone(third) {
		t.Errorf("process %d runs after stop", third)
	}
}

// gone reports whether a process has ended.
func gone(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	return err != nil || strings.Contains(string(b), ") Z ")
}

// A service that dies is not waited for, and its last words are said.
func TestDetachedServiceThatDies(t *testing.T) {
	s := sleeper(t, "echo the disk is full; exit 7")
	_, err := s.start(t.Context(), false)
	if !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("got %v, want its last words", err)
	}
}

// Units are written, enabled and removed; others' are left alone.
func TestUnits(t *testing.T) {
	s := sleeper(t, sleeps)
	var called []string
	s.units = t.TempDir()
	s.answers = func(context.Context) bool { return true }
	s.control = func(_ context.Context, args ...string) error {
		called = append(called, strings.Join(args, " "))
		return nil
	}
	calls := func(what string, do func() error, want ...string) {
		t.Helper()
		called = nil
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if diff := cmp.Diff(want, called); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	start := func(changed bool) func() error {
		return func() error {
			_, err := s.start(t.Context(), changed)
			return err
		}
	}
	stop := func() error { return s.stop(t.Context()) }
	const unit = "floxd-agent.service"
	calls("the first start", start(false), "daemon-reload", "enable "+unit, "restart "+unit)
	calls("the second start", start(false), "enable "+unit, "start "+unit)
	calls("configured anew", start(true), "enable "+unit, "restart "+unit)
	s.program = "/opt/new/floxd"
	calls("another program", start(false), "daemon-reload", "enable "+unit, "restart "+unit)
	calls("stop", stop, "disable --now "+unit, "daemon-reload")
	calls("stop again", stop)

	write(t, filepath.Join(s.units, unit), "[Service]\nExecStart=/mine\n")
	if err := start(false)(); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("over somebody's unit: %v", err)
	}
	calls("stop with somebody's unit", stop)
	if b, err := os.ReadFile(filepath.Join(s.units, unit)); err != nil || !strings.Contains(string(b), "/mine") {
		t.Errorf("somebody's unit: %q, %v", b, err)
	}
}

// systemd itself takes the units.
func TestUnitsVerify(t *testing.T) {
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze here")
	}
	s := sleeper(t, sleeps)
	s.config = `/etc/flo xd/100%"$x".toml`
	for _, part := range []string{"agent", "storehouse"} {
		s.part = part
		name := filepath.Join(t.TempDir(), s.unitName())
		write(t, name, s.unit())
		out, err := exec.CommandContext(t.Context(), verify, "verify", name).CombinedOutput()
		// What this machine lacks of systemd is not the unit's.
		lines := slices.DeleteFunc(strings.Split(string(out), "\n"), func(l string) bool { return !strings.Contains(l, s.unitName()) })
		if len(lines) > 0 {
			t.Errorf("%v: %s\n%s", err, strings.Join(lines, "\n"), s.unit())
		}
	}
	for word, want := range map[string]string{"/usr/bin/floxd": "/usr/bin/floxd", "/a b": `"/a b"`, "100%": "100%%", `a"b`: `"a\"b"`, "$HOME": "$$HOME"} {
		if got := quoteUnit(word); got != want {
			t.Errorf("quoteUnit(%q) = %s, want %s", word, got, want)
		}
	}
}
