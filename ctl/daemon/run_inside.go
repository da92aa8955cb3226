package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/agent/warden"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

// roomPlan is what the inner process is told.
type roomPlan struct {
	Mode     string
	StoreDir string
	Path     flox.StorePath
	Command  [][]byte // an argument may be anything, words of JSON may not
	UID, GID int      // the caller's
	Scratch  string   // an empty directory
	Source   string   // bind, copy: what is to appear at StoreDir
	Nix      string   // the agent's socket for stock Nix, "" = none

	// fuse: the private agent
	Config   *Config
	MountDir string
	Log      string
}

// defaultRunLevel is what a private agent logs unless told otherwise.
const defaultRunLevel = slog.LevelWarn

// mountTimeout is how long a private agent may take to serve.
const mountTimeout = 20 * time.Second

// statusTimeout is how long it may take to say how it is.
const statusTimeout = 5 * time.Second

// runInside is the inner process: it makes the store appear at its place, runs
// the command, and clears away.
func runInside(ctx context.Context) error {
	plan := &roomPlan{}
	line, err := room.Inside(plan)
	if err != nil {
		return err
	}
	// A signal is the command's to take once it runs, and the store stays for as
	// long as the command does: until then only, a signal ends all.
	caller := ctx
	ctx, cancel := context.WithCancel(context.WithoutCancel(caller))
	defer cancel()
	commandless := context.AfterFunc(caller, cancel)
	if err := room.Prepare(plan.StoreDir, plan.Scratch); err != nil {
		return cli.Explain(flox.ErrDenied, "namespace: %v", err)
	}
	env := os.Environ()
	if plan.Mode == modeFUSE {
		served := make(chan error, 1)
		log, err := os.OpenFile(plan.Log, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
		if err != nil {
			return fmt.Errorf("log of the agent: %w", err)
		}
		defer log.Close()
		go func() { served <- plan.serve(ctx, log) }()
		defer func() { cancel(); <-served }()
		if err := plan.awaitMount(ctx, line, served); err != nil {
			return err
		}
		plan.Source = plan.MountDir
		env = room.Set(env, cli.EnvSocket, plan.socket())
	}
	if err := room.Place(plan.Source, plan.StoreDir); err != nil {
		return cli.Explain(flox.ErrDenied, "namespace: %v", err)
	}
	dir := ""
	if plan.Path != "" {
		dir = flox.StoreDir(plan.StoreDir).Join(plan.Path)
		if err := room.There(dir); err != nil {
			return plan.whyAway(ctx, err)
		}
	}
	env = room.NixClient(env, plan.Nix)
	var args []string
	for _, a := range plan.Command {
		args = append(args, string(a))
	}
	command, err := room.Find(dir, args, env)
	if err != nil {
		return err
	}
	if !commandless() {
		return cli.ErrInterrupted
	}
	return line.Run(command, plan.UID, plan.GID)
}

func (p *roomPlan) socket() string { return filepath.Join(p.Config.RunDir, cli.SocketName) }

// serve mounts and supervises the private agent until ctx ends.
func (p *roomPlan) serve(ctx context.Context, log *os.File) error {
	if err := agent.CheckState(filepath.Join(p.Config.StateDir, agentDir), cli.ReadVersion().Version); err != nil {
		return err
	}
	return warden.Run(ctx, warden.Config{
		MountDir: p.MountDir, RunDir: p.Config.RunDir, Unprivileged: true,
		UID: uint32(p.UID), GID: uint32(p.GID), //nolint:gosec // the kernel's own numbers
		// The default file is that of the machine's agent, and all it could say is
		// in the environment.
		Child: []string{"/proc/self/exe", "agent", "--child", "--config", os.DevNull}, Env: environ(p.Config),
		ReadAheadKiB: int(p.Config.Agent.ReadAhead >> 10), Output: log, Log: newLogger(log, p.Config, defaultRunLevel),
	})
}

// awaitMount waits until the agent serves the mount.
func (p *roomPlan) awaitMount(ctx context.Context, line *room.Line, served chan error) error {
	ctx, cancel := context.WithTimeout(ctx, mountTimeout)
	defer cancel()
	ready := make(chan struct{})
	defer close(ready)
	go func() {
		if line.Stopped(ready) {
			cancel()
		}
	}()
	client, done := cli.Agent(p.socket())
	defer done()
	for {
		status, err := client.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
		if err == nil && status.Msg.GetMounted() {
			return nil
		}
		select {
		case err := <-served:
			served <- nil // for who waits for the end
			return fmt.Errorf("mount: %w", err)
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return cli.ErrInterrupted
			}
			return cli.Explain(flox.ErrUnreachable, "the private agent does not serve after %s; the end of %s:\n%s", mountTimeout, p.Log, tailOf(p.Log))
		}
	}
}

// whyAway adds to what the mount says of a path, for which it has one word, what the
// private agent knows of the storehouse.
func (p *roomPlan) whyAway(ctx context.Context, err error) error {
	if p.Mode != modeFUSE || !errors.Is(err, flox.ErrUnreachable) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	client, done := cli.Agent(p.socket())
	defer done()
	status, asked := client.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if asked != nil {
		return err
	}
	link := status.Msg.GetStorehouse()
	if link.GetConnected() || link.GetError() == "" {
		return err
	}
	return notKnown(fmt.Errorf("%w; the storehouse %s is not connected: %s", err, link.GetName(), link.GetError()))
}

// notKnown adds to why a path could not be looked up what else it may be: a machine
// that never was a member, or an ephemeral one that was forgotten.
func notKnown(err error) error {
	return cli.Explain(flox.ErrUnreachable, "%v\nIf the storehouse does not know this machine (any more): %s", err, cli.HowToBeInvited)
}

// tailOf gives the end of a log, for somebody whose agent did not start.
func tailOf(file string) string {
	const most = 2000
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-most):])
}
