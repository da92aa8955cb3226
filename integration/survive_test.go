package integration

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/load"
	"github.com/floxctl/flox/integration/netns"
)

const (
	// killRounds is how often the child is killed in a test, soakRounds in one
	// with FLOX_SOAK=1; any other number there is taken as it is.
	killRounds, soakRounds = 20, 1000
	// soakStall is what a kill may add to the longest wait of its round, 99 of 100 times.
	soakStall = 150 * time.Millisecond
	// calm is how long a round leaves the child alone first.
	calm = 300 * time.Millisecond
	// newVersion is that of the program the agent is reloaded to.
	newVersion = "v9.8.7-test"
)

func rounds() int {
	switch soak := os.Getenv("FLOX_SOAK"); {
	case soak == "":
		return killRounds
	default:
		if n, err := strconv.Atoi(soak); err == nil && n > 1 {
			return n
		}
		return soakRounds
	}
}

// newer builds a floxd of another version, which obeys FLOXD_TEST_WITHOUT_RESEND and
// FLOXD_TEST_TOUCH_EVERY.
func newer(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "floxd-newer")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "floxtest", "-o", name,
		"-ldflags", "-X github.com/floxctl/flox/ctl/cli.version="+newVersion, "github.com/floxctl/flox/cmd/floxd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return name
}

// own gives a test programs of its own, whose files it may replace.
func (l *lab) own(t *testing.T) (dir string, p hosts.Programs) {
	t.Helper()
	dir, err := os.MkdirTemp(l.dir, "programs-")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(l.programs.Floxd)
	p = hosts.Programs{Floxd: filepath.Join(dir, "floxd"), Floxctl: l.programs.Floxctl}
	if err := errors.Join(err, os.Chmod(dir, 0o755), os.WriteFile(p.Floxd, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir, p
}

// loadOf starts the load of 64 readers on a host, with ripgrep's closure.
func (l *lab) loadOf(t *testing.T, h *netns.Host) *load.Load {
	t.Helper()
	loader, err := load.Build(t.Context(), l.dir)
	if err != nil {
		t.Fatal(err)
	}
	spec := load.Spec{
		Files: map[string]string{}, Readers: 64, Mappers: 4, Pause: 20 * time.Millisecond,
		Programs: []load.Program{{Argv: []string{l.world.Ripgrep.Exe, "--version"}, Want: "ripgrep "}},
		Echo:     []string{l.world.Ripgrep.Exe, "--line-buffered", "line"},
		Walk:     string(l.world.StoreDir),
		Probe:    l.world.Ripgrep.Exe,
	}
	for _, file := range l.files(t, l.closure(l.world.Ripgrep.Path)...) {
		b, err := os.ReadFile(l.original(file))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(b)
		spec.Files[file] = hex.EncodeToString(sum[:])
	}
	load, err := load.Start(context.WithoutCancel(t.Context()), h, loader, spec)
	if err != nil {
		t.Fatal(err)
	}
	return load
}

// killRound kills the agent's child and waits for the next one.
func killRound(t *testing.T, a *hosts.Agent) func(context.Context) error {
	return func(ctx context.Context) error {
		before, err := a.Status(ctx)
		if err != nil {
			return err
		}
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			return err
		}
		return a.Await(ctx, "another child", func(s *hosts.Status) bool { return s.PID != before.PID && s.Mounted })
	}
}

// survived ends a load and checks that nobody in it noticed anything.
func survived(t *testing.T, l *load.Load) {
	t.Helper()
	r, err := l.Stop()
	if err != nil {
		t.Error(err)
	}
	if r.Failed > 0 {
		t.Errorf("%d failures, such as:\n%s", r.Failed, strings.Join(r.Errors, "\n"))
	}
	if r.Files < 64 || r.Programs < 2 || r.Lines < 2 || r.Walks < 1 || r.Probes < 10 {
		t.Errorf("the load did too little to show anything: %+v", r.Counts)
	}
	added := r.Added()
	if most := load.Quantile(added, 0.99); os.Getenv("FLOX_SOAK") != "" && most > soakStall {
		t.Errorf("the stall that a round added: p99 %v, want at most %v", most, soakStall)
	}
	var usual []time.Duration
	for _, round := range r.Rounds {
		usual = append(usual, round.Calm)
	}
	t.Logf("the longest wait of a round before anything was done: p50 %v, p99 %v", load.Quantile(usual, 0.5), load.Quantile(usual, 0.99))
	t.Logf("%d rounds, %d files of %d MiB, %d programs, %d lines, %d walks; added stall p50 %v, p99 %v, most %v", len(r.Rounds), r.Files, r.Bytes>>20,
		r.Programs, r.Lines, r.Walks, load.Quantile(added, 0.5), load.Quantile(added, 0.99), load.Quantile(added, 1))
}

// TestSurvives: under 64 readers, running programs and a walk the child is
// killed over and over, and in between the program is replaced by another
// version, and nobody sees an error or a wrong byte.
func TestSurvives(t *testing.T) {
	l := open(t)
	dir, programs := l.own(t)
	h := l.host(t, "survives")
	a, err := hosts.StartAgent(t.Context(), programs, h, l.dir, l.house.Invite())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	await(t, a, "follows the storehouse", connected)
	unprivileged(t, status(t, a).PID)
	work := l.loadOf(t, h)
	defer survived(t, work)
	n := rounds()
	for i := range n {
		if err := work.Round(t.Context(), calm, killRound(t, a)); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if i == n/2 {
			if err := os.Rename(newer(t, dir), programs.Floxd); err != nil {
				t.Fatal(err)
			}
			reload(t, a, programs.Floxd)
		}
	}
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, []byte("#!/bin/false\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	do(t, h, programs.Floxd, "agent", "reload", "--program", broken).want(t, 2, "nothing was changed")
	do(t, h, programs.Floxd, "agent", "reload", "--state-dir", "/var/lib/other").want(t, 4, "no agent runs")
	do(t, h, "setpriv", "--reuid=65534", "--clear-groups", "--", programs.Floxd, "agent", "reload").want(t, 5, "sudo")
	do(t, h, programs.Floxctl, "doctor").want(t, 0)
}

// reload reloads an agent to the newer version.
func reload(t *testing.T, a *hosts.Agent, floxd string) {
	t.Helper()
	before := status(t, a).PID
	r := do(t, a.Host, floxd, "agent", "reload", "--json")
	r.want(t, 0)
	var got struct {
		Program, From, To string
		PID               int
		Unserved          time.Duration `json:"unservedNanoseconds"`
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil {
		t.Fatalf("%v: %s", err, r.out)
	}
	after := status(t, a).PID
	if got.Program != floxd || got.From == newVersion || got.From == "" || got.To != newVersion || got.Unserved <= 0 || got.PID != after || after == before {
		t.Errorf("reloaded %+v; the child was %d and is %d", got, before, after)
	}
	t.Logf("reloaded from %s to %s, %v without anybody to serve", got.From, got.To, got.Unserved)
}

// unprivileged checks that a process is nobody and can become nobody else.
func unprivileged(t *testing.T, pid int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			got[name] = strings.TrimSpace(value)
		}
	}
	const none = "0000000000000000"
	for name, want := range map[string]string{
		"CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1", "Groups": "",
	} {
		if got[name] != want {
			t.Errorf("%s of the agent's child is %q, want %q", name, got[name], want)
		}
	}
	for _, name := range []string{"Uid", "Gid"} {
		for id := range strings.FieldsSeq(got[name]) {
			if id == "0" {
				t.Errorf("%s of the agent's child is %q, and must not be root in any way", name, got[name])
			}
		}
	}
	if got["Name"] != "floxd" {
		t.Errorf("the agent's child is called %q, want floxd", got["Name"])
	}
}

// TestSurvivesWithoutResend is the same where the kernel cannot send requests
// again to the next child.
func TestSurvivesWithoutResend(t *testing.T) {
	l := open(t)
	dir, programs := l.own(t)
	programs.Floxd = newer(t, dir)
	t.Setenv("FLOXD_TEST_WITHOUT_RESEND", "1")
	h := l.host(t, "journal")
	a, err := hosts.StartAgent(t.Context(), programs, h, l.dir, l.house.Invite(), "--lookup-timeout", "1m") // for losesARequest
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	await(t, a, "follows the storehouse", connected)
	func() {
		work := l.loadOf(t, h)
		defer survived(t, work)
		for i := range rounds() {
			if err := work.Round(t.Context(), calm, killRound(t, a)); err != nil {
				t.Fatalf("round %d: %v", i, err)
			}
		}
	}()
	do(t, h, programs.Floxctl, "doctor").want(t, 0, "older than Linux 6.9", "a journal keeps it", "none hangs")
	l.losesARequest(t, a)
}

// losesARequest spoils the journal of an agent that is killed while somebody waits:
// the next one serves new requests, and doctor says what hangs and what to do.
func (l *lab) losesARequest(t *testing.T, a *hosts.Agent) {
	t.Helper()
	if err := a.Host.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, err := a.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	journal := filepath.Join(a.Host.Root(), "run/floxd/journal")
	if !exists(journal) {
		t.Fatal("there is no journal to spoil")
	}
	lost := begin(t, func(ctx context.Context) *exec.Cmd {
		return a.Host.Command(ctx, "cat", "/nix/store/00000000000000000000000000000000-nobody")
	})
	eventually(t, "somebody waits", func() bool {
		return strings.Contains(do(t, a.Host, l.programs.Floxctl, "watch", "--once", "--json").out, "00000000000000000000000000000000-nobody")
	})
	// The warden is held meanwhile, or the next agent would be there first.
	if err := errors.Join(syscall.Kill(a.PID(), syscall.SIGSTOP), syscall.Kill(before.PID, syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child is gone", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", before.PID))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
	err = os.WriteFile(journal, []byte("what?"), 0o600)
	if err = errors.Join(err, syscall.Kill(a.PID(), syscall.SIGCONT)); err != nil {
		t.Fatal(err)
	}
	await(t, a, "another child", func(s *hosts.Status) bool { return s.PID != before.PID && s.Mounted })
	do(t, a.Host, l.programs.Floxctl, "doctor").want(t, 1, "1 requests are lost and whoever made them hangs", "that unmounts, and ends them with an error")
	if lost.hasEnded() {
		t.Error("the lost request was answered: nothing is shown here")
	}
	stop(t, a.Daemon) // unmounts
	if out, err := lost.wait(); err == nil || !strings.Contains(string(out), "cat: ") {
		t.Errorf("unmounted, it ends with %v: %s", err, out)
	}
}
