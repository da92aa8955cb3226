package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/integration/scenario"
	"github.com/floxctl/flox/integration/world"
)

// fuseParts are the groups of rows, in order; FUSE_PARTS=warm,bulk runs only some.
var fuseParts = []part[*fuseLab]{
	{"requests", (*fuseLab).requestRows},
	{"warm", (*fuseLab).warmRows},
	{"programs", (*fuseLab).programRows},
	{"names", (*fuseLab).nameRows},
	{"cold", (*fuseLab).coldRows},
	{"traces", (*fuseLab).traceRows},
	{"whole", (*fuseLab).wholeRows},
	{"stream", (*fuseLab).streamRows},
	{"inodes", (*fuseLab).inodeRows},
	{"kill", (*fuseLab).killRows},
	{"hole", (*fuseLab).holeRows},
	{"signals", (*fuseLab).signalRows},
}

// fuseLab is a storehouse with the world of tools, a host with an agent, and one
// with a plain copy of the same store, all on the same disk.
type fuseLab struct {
	dir      string
	world    *world.World
	programs hosts.Programs
	net      *netns.Network
	house    *hosts.Storehouse
	plain    *netns.Host // its /nix/store is a copy
	warm     *hosts.Agent
	cold     *hosts.Agent // starts with nothing again and again
	second   *hosts.Agent // another warm one, once it is needed
	files    string       // directory of the tools' input
}

// quiet are the flags of an agent that fetches only what it is asked for, what is
// read ahead of that included.
var quiet = []string{"--start-traces=false", "--offline", "none"}

// fuseBench measures the mount against a plain copy of the same store.
func fuseBench(ctx context.Context) (rows []Row, err error) {
	l := &fuseLab{}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.start(ctx); err != nil {
		return nil, err
	}
	return runParts(ctx, l, func() *hosts.Agent { return l.cold }, "FUSE_PARTS", fuseParts)
}

func (l *fuseLab) start(ctx context.Context) (err error) {
	if l.world, err = world.Tools(ctx); err != nil {
		return err
	}
	if err := l.open(ctx); err != nil {
		return err
	}
	l.files = filepath.Join(l.dir, "files")
	if err := errors.Join(os.Mkdir(l.files, 0o755), world.WriteToolFiles(l.files)); err != nil { //nolint:gosec // as above
		return err
	}
	house, err := l.host(ctx, "house")
	if err != nil {
		return err
	}
	if l.house, err = hosts.StartStorehouse(ctx, l.programs, house, l.dir); err != nil {
		return err
	}
	if err := l.nixCopy(ctx, l.world.Nix(), l.world.Abs()...); err != nil {
		return err
	}
	if l.plain, err = l.host(ctx, "plain"); err != nil {
		return err
	}
	if _, err := timeShell(ctx, "cp -a --reflink=never "+l.world.Nix().Dir+"/store/. "+l.plainStore()+"/ && sync -f "+l.plainStore()); err != nil {
		return err
	}
	if l.warm, err = l.agent(ctx, "warm", quiet...); err != nil {
		return err
	}
	l.cold, err = l.agent(ctx, "cold", quiet...)
	return err
}

// open makes the lab's directory, its programs and its network.
func (l *fuseLab) open(ctx context.Context) (err error) {
	if l.dir, err = os.MkdirTemp("", "flox-bench-"); err != nil {
		return err
	}
	if err := os.Chmod(l.dir, 0o755); err != nil { //nolint:gosec // the unprivileged processes go through it
		return err
	}
	if l.programs, err = hosts.Build(ctx, l.dir); err != nil {
		return err
	}
	l.net, err = netns.New(ctx, netns.Config{Dir: l.dir})
	return err
}

// host adds a host on a subnet of its own.
func (l *fuseLab) host(ctx context.Context, name string) (*netns.Host, error) {
	subnet, err := l.net.Subnet(ctx, name+"-lan", netip.Prefix{})
	if err != nil {
		return nil, err
	}
	return l.net.Host(ctx, name, subnet)
}

// agent adds a host with an agent that is connected to the storehouse.
func (l *fuseLab) agent(ctx context.Context, name string, flags ...string) (*hosts.Agent, error) {
	host, err := l.host(ctx, name)
	if err != nil {
		return nil, err
	}
	a, err := hosts.StartAgent(ctx, l.programs, host, l.dir, l.house.Invite(), flags...)
	if err != nil {
		return nil, err
	}
	return a, connected(ctx, a)
}

func connected(ctx context.Context, a *hosts.Agent) error {
	return a.Await(ctx, "connected to the storehouse", func(s *hosts.Status) bool { return s.Storehouse.Connected })
}

func (l *fuseLab) close() error {
	var errs []error
	for _, a := range []*hosts.Agent{l.warm, l.cold, l.second} {
		if a != nil && a.Daemon != nil {
			errs = append(errs, a.Stop())
		}
	}
	if l.house != nil && l.house.Daemon != nil {
		errs = append(errs, l.house.Stop())
	}
	if l.net != nil {
		errs = append(errs, l.net.Close())
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	return errors.Join(errs...)
}

// plainStore is where the plain copy lies, seen from everywhere.
func (l *fuseLab) plainStore() string { return filepath.Join(l.plain.Dir, "nix", "store") }

// nixCopy copies paths of a stock store into the storehouse.
func (l *fuseLab) nixCopy(ctx context.Context, n world.Nix, paths ...string) error {
	args, err := l.house.CopyArgs(paths...)
	if err != nil {
		return err
	}
	n.NetNS = l.house.Host.NetNS()
	cmd := n.Command(ctx, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nix copy: %w: %s", err, out)
	}
	return nil
}

// closure names the store paths a tool needs, as entries of the store directory.
func (l *fuseLab) closure(t world.Tool) []string {
	var names []string
	for _, p := range l.world.Closure(t.Path) {
		names = append(names, string(p.Path))
	}
	return names
}

// started is how a program's run went.
type started struct{ first, took time.Duration }

// run runs a tool on a host, with an empty environment, and checks its output.
func (l *fuseLab) run(ctx context.Context, h *netns.Host, t world.Tool) (s started, err error) {
	err = h.DoMounted(func() error {
		s, err = l.exec(ctx, t)
		return err
	})
	if err != nil {
		err = fmt.Errorf("on %s: %w", h.Name, err)
	}
	return s, err
}

// exec is run with the mounts of the calling thread.
func (l *fuseLab) exec(ctx context.Context, t world.Tool) (started, error) {
	// Through another program: a thread of ours that starts one waits until it is
	// found, with a part of Go's scheduler in its hands, and what it waits for may
	// have to pass a delay that this process makes.
	cmd := exec.CommandContext(ctx, "/usr/bin/env", append([]string{t.Exe}, t.Args...)...)
	cmd.Dir, cmd.Env = l.files, []string{"HOME=/nonexistent", "PATH=/nonexistent"}
	return finish(cmd, t)
}

// finish runs a prepared command of a tool.
func finish(cmd *exec.Cmd, t world.Tool) (started, error) {
	cmd.Stdin = strings.NewReader(t.Stdin)
	out, stderr := &scenario.FirstOutput{Began: time.Now()}, &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, stderr
	err := cmd.Run()
	took := time.Since(out.Began)
	if printed := out.All.String() + stderr.String(); err != nil || !strings.Contains(printed, t.Want) {
		return started{}, fmt.Errorf("%s printed %.300q, want %q in it: %w", t.Name, printed, t.Want, errors.Join(err, flox.ErrCorrupt))
	}
	if out.After == 0 {
		out.After = took
	}
	return started{out.After, took}, nil
}

// asked is how many FUSE requests an agent got that any file system could have
// kept from it: an ioctl never can.
func asked(ctx context.Context, a *hosts.Agent) (uint64, error) {
	s, err := a.Status(ctx)
	if err != nil {
		return 0, err
	}
	n, _ := s.Requests()
	return n, nil
}
