// Package scenario is the main job, end to end: real programs, copied into a
// storehouse with stock Nix, run from the lazy store of machines that never
// installed them, also when the storehouse is unplugged. The demo shows it, the
// integration test asserts it.
package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/integration/world"
)

// Config says what to run it with.
type Config struct {
	Programs hosts.Programs
	World    *world.World
	Dir      string    // for state and logs, on a disk
	Out      io.Writer // what a person sees while it runs
}

// Scenario is three running hosts: a storehouse, and two agents on subnets of
// their own, which multicast does not cross.
type Scenario struct {
	cfg   Config
	Net   *netns.Network
	House *hosts.Storehouse
	A, B  *hosts.Agent
}

// program is what is run on both agents.
type program struct {
	name string
	argv []string
	of   world.Program
	want string // must stand in the output
}

func programs(w *world.World) []program {
	script := "import numpy as np; a = np.arange(12.0).reshape(3, 4); print('sum', (a @ a.T).sum())"
	return []program{
		{"git --version", []string{w.Git.Exe, "--version"}, w.Git, "git version"},
		{"rg", []string{w.Ripgrep.Exe, "--count", "root", "/etc/passwd"}, w.Ripgrep, "1"},
		{"python numpy", []string{w.Python.Exe, "-c", script}, w.Python, "sum 1"},
	}
}

// Start makes the network and starts storehouse and agents, then copies the
// world into the storehouse with stock Nix. Close must be called in any case.
func Start(ctx context.Context, cfg Config) (*Scenario, *Report, error) {
	s := &Scenario{cfg: cfg}
	report := &Report{}
	if err := s.start(ctx, report); err != nil {
		return nil, nil, errors.Join(err, s.Close())
	}
	return s, report, nil
}

// start makes three subnets of one host each, joined by a router.
func (s *Scenario) start(ctx context.Context, report *Report) error {
	var err error
	if s.Net, err = netns.New(ctx, netns.Config{Dir: s.cfg.Dir}); err != nil {
		return err
	}
	var machines []*netns.Host
	for _, name := range []string{"storehouse", "a", "b"} {
		subnet, err := s.Net.Subnet(ctx, name+"-lan", netip.Prefix{})
		if err != nil {
			return err
		}
		host, err := s.Net.Host(ctx, name, subnet)
		if err != nil {
			return err
		}
		machines = append(machines, host)
	}
	if reaches, err := netns.MulticastReaches(ctx, machines[1], machines[2]); err != nil || reaches {
		return errors.Join(fmt.Errorf("multicast from A reaches B: %v", reaches), err)
	}
	if s.House, err = hosts.StartStorehouse(ctx, s.cfg.Programs, machines[0], s.cfg.Dir); err != nil {
		return err
	}
	s.say("storehouse on %s, agents on %s and %s, each on a subnet of its own", machines[0].Addr(), machines[1].Addr(), machines[2].Addr())
	if err := s.copyWorld(ctx, report); err != nil {
		return err
	}
	s.say("nix copy brought %d store paths, %s, in %.1f s", report.Paths, size(report.WorldBytes), report.CopySeconds)
	// What a program fetches is counted: what is completed after it ran is not its.
	lazy := []string{"--offline", "none"}
	if s.A, err = hosts.StartAgent(ctx, s.cfg.Programs, machines[1], s.cfg.Dir, s.House.Invite(), lazy...); err != nil {
		return err
	}
	s.B, err = hosts.StartAgent(ctx, s.cfg.Programs, machines[2], s.cfg.Dir, s.House.Invite(), lazy...)
	return err
}

// world is the store directory everything is built for.
func (s *Scenario) world() flox.StoreDir { return s.cfg.World.StoreDir }

func (s *Scenario) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.cfg.Out, format+"\n", args...)
}

// Close stops the daemons and removes the network.
func (s *Scenario) Close() error {
	var errs []error
	for _, d := range []*hosts.Agent{s.A, s.B} {
		if d != nil && d.Daemon != nil {
			errs = append(errs, d.Stop())
		}
	}
	if s.House != nil && s.House.Daemon != nil {
		errs = append(errs, s.House.Stop())
	}
	if s.Net != nil {
		errs = append(errs, s.Net.Close())
	}
	return errors.Join(errs...)
}

// copyWorld copies every path into the storehouse, as any Nix user would.
func (s *Scenario) copyWorld(ctx context.Context, report *Report) error {
	for _, p := range s.cfg.World.Paths {
		report.Paths++
		report.WorldBytes += p.NarSize
	}
	args, err := s.House.CopyArgs(s.cfg.World.Abs()...)
	if err != nil {
		return err
	}
	began := time.Now()
	out, err := s.Nix().Command(ctx, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("nix copy: %w: %s", err, out)
	}
	report.CopySeconds = time.Since(began).Seconds()
	return nil
}

// Nix runs stock Nix with the world as its store, on the storehouse's host.
func (s *Scenario) Nix() world.Nix {
	n := s.cfg.World.Nix()
	n.NetNS = s.House.Host.NetNS()
	return n
}

// RunPrograms runs all programs on an agent's host and measures each.
func (s *Scenario) RunPrograms(ctx context.Context, a *hosts.Agent, round int) ([]Run, error) {
	var runs []Run
	for _, p := range programs(s.cfg.World) {
		before, err := a.Status(ctx)
		if err != nil {
			return nil, err
		}
		run, err := s.runProgram(ctx, a, p)
		if err != nil {
			return nil, fmt.Errorf("%s on %s: %w", p.name, a.Name, err)
		}
		after, err := a.Status(ctx)
		if err != nil {
			return nil, err
		}
		run.Round, run.Closure = round, p.of.ClosureBytes
		was, wasIoctl := before.Requests()
		now, nowIoctl := after.Requests()
		run.Fuse, run.Ioctl = now-was, nowIoctl-wasIoctl
		run.Traffic = after.Traffic.Sub(before.Traffic)
		runs = append(runs, *run)
		s.say("  %s: %-14s %s", a.Name, p.name, run.line())
	}
	return runs, nil
}

func (r *Run) line() string {
	return fmt.Sprintf("first output after %d ms, %s fetched, %d FUSE requests", r.FirstOutput.Milliseconds(), size(r.Traffic.Plain()), r.Fuse)
}

// runProgram runs one program with an empty environment and checks its output.
func (s *Scenario) runProgram(ctx context.Context, a *hosts.Agent, p program) (*Run, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := a.Host.Command(ctx, p.argv[0], p.argv[1:]...)
	cmd.Env = []string{"HOME=/nonexistent", "PATH=/nonexistent"}
	first := &FirstOutput{Began: time.Now()}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = first, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, stderr.String())
	}
	if !strings.Contains(first.All.String(), p.want) {
		return nil, fmt.Errorf("printed %q, want %q in it", first.All.String(), p.want)
	}
	return &Run{Host: a.Name, Program: p.name, FirstOutput: first.After, Took: time.Since(first.Began)}, nil
}

// FirstOutput keeps what is written to it, and notes when the first byte came.
type FirstOutput struct {
	Began time.Time
	After time.Duration // 0 = nothing was written yet
	All   bytes.Buffer
}

// Write implements io.Writer.
func (f *FirstOutput) Write(p []byte) (int, error) {
	if f.After == 0 {
		f.After = time.Since(f.Began)
	}
	return f.All.Write(p)
}

// Fetched says what an agent fetched while do ran.
func (s *Scenario) Fetched(ctx context.Context, a *hosts.Agent, do func() error) (hosts.Traffic, error) {
	before, err := a.Status(ctx)
	if err != nil {
		return hosts.Traffic{}, err
	}
	if err := do(); err != nil {
		return hosts.Traffic{}, err
	}
	after, err := a.Status(ctx)
	if err != nil {
		return hosts.Traffic{}, err
	}
	return after.Traffic.Sub(before.Traffic), nil
}

// Sum hashes a file of the store on a host, through the mount, with the host's
// own sha256sum, and compares it with the file in the world it came from.
func (s *Scenario) Sum(ctx context.Context, a *hosts.Agent, file string) error {
	got, err := a.Host.Command(ctx, "sha256sum", file).Output()
	if err != nil {
		return fmt.Errorf("read %s on %s: %w", file, a.Name, explain(err))
	}
	rel, err := filepath.Rel(string(s.cfg.World.StoreDir), file)
	if err != nil {
		return err
	}
	want, err := exec.CommandContext(ctx, "sha256sum", filepath.Join(s.cfg.World.Dir, "nix", "store", rel)).Output()
	if err != nil {
		return err
	}
	if string(got[:64]) != string(want[:64]) {
		return fmt.Errorf("%s on %s: other bytes than in the world: %w", file, a.Name, flox.ErrCorrupt)
	}
	return nil
}

// explain adds what a failed command printed.
func explain(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}

// largest gives the largest regular file of a store path, as seen in the mount.
func (s *Scenario) largest(p flox.StorePath) (string, error) {
	root := filepath.Join(s.cfg.World.Dir, "nix", "store", string(p))
	var best string
	var most int64 = -1
	err := filepath.Walk(root, func(file string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && info.Size() > most {
			best, most = file, info.Size()
		}
		return err
	})
	if err != nil || best == "" {
		return "", errors.Join(fmt.Errorf("no file in %s", p), err)
	}
	rel, err := filepath.Rel(root, best)
	return filepath.Join(s.cfg.World.StoreDir.Join(p), rel), err
}
