package ctl

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

// runOptions are the command line of run.
type runOptions struct {
	*globals
	path     string
	profile  string
	command  []string
	mode     string
	to       string
	invite   string
	storeDir string
	stateDir string
	quiet    bool
	explain  bool
	dash     bool // there was a --
}

const runHelp = `Run COMMAND (without one, a shell) with the programs of a store path in front of
its PATH. PATH is a store path, its base name, or a link to one; a PROFILE is a
link such as ~/.nix-profile, or OWNER/NAME below ` + profilesDir + `.

What it takes is looked for in this order, and said on standard error:

  agent  the agent of this machine has the store mounted
  bind   it is mounted here by somebody else, as in a container that was given the
         host's mount; at another place it is shown at its own in a namespace
  fuse   an agent of one's own, mounted in a user and mount namespace
  copy   the path and all it refers to is fetched as ordinary files, checked, and
         shown at its place in such a namespace

Root gets no fuse, and copy only with --to: what talks to the network should not
be root, and with sudo floxd agent it is not. With --to it is, as in a container
in which only root may write to DIR.

--mode takes one or fails. --to DIR writes the files there: if DIR is the store
directory itself, COMMAND runs without a namespace; without COMMAND that is all.

fuse and copy need no right but that to make a user namespace, and an invite the
first time, a file with what floxctl invite --role agent --ephemeral prints, or the
invite.json of an open storehouse: --invite, then $` + envInvite + `, then
~/.config/floxd/invite.json, then that of this machine's agent if it may be read.
The cache is in ~/.local/state/floxd (--state-dir, $XDG_STATE_HOME); programs that
run at the same time have an agent and a cache each, so the second may have to
fetch again, and is a machine of its own that joins: for two at a time, the invite
is made with --uses 2, or the second run is given one more (--invite).

COMMAND is oneself, in the namespace too, with all signals passed on. What it
leaves running in the background ends with it wherever there is a namespace: in
fuse, in copy unless DIR is the store directory, in bind from another place.

The exit code is COMMAND's. If it could not be run:

` + cli.ExitCodes

func newRunCmd(g *globals) *cobra.Command {
	opts := runOptions{globals: g}
	probe := false
	cmd := &cobra.Command{
		Use:   "run PATH|-p PROFILE [--mode MODE] [--to DIR] [-- COMMAND...]",
		Short: "Run a program of the store, also without root, agent or FUSE",
		Long:  runHelp,
		Example: `  floxctl run ./result -- hello --version
  floxctl run -p ~/.nix-profile -- git log
  floxctl run --explain ./result           say how it would be done
  floxctl run --to /mnt/nix/store ./result copy, and run nothing`,
	}
	flags := cmd.Flags()
	flags.StringVarP(&opts.profile, "profile", "p", "", "run from a `PROFILE`")
	flags.StringVar(&opts.mode, "mode", "", "how: agent, bind, fuse or copy (default: the first that can be)")
	flags.StringVar(&opts.to, "to", "", "copy to `DIR`, and stay there")
	flags.StringVar(&opts.invite, "invite", "", "the storehouse's invite, a `FILE`; remembered")
	flags.StringVar(&opts.storeDir, "store-dir", "", "the store `DIR`, where no agent says (default: the invite's)")
	flags.StringVar(&opts.stateDir, "state-dir", "", "`DIR` for cache and invite of an agent of one's own")
	flags.BoolVarP(&opts.quiet, "quiet", "q", false, "do not say how, and show no progress")
	flags.BoolVar(&opts.explain, "explain", false, "say how it would be done, and do not")
	flags.BoolVar(&probe, "probe", false, "")
	if err := flags.MarkHidden("probe"); err != nil {
		panic(err) // the flag is the line above
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if probe {
			return g.printer(cmd).printJSONLine(room.ProbeInside())
		}
		if err := opts.take(args, cmd.ArgsLenAtDash()); err != nil {
			return err
		}
		return runRun(cmd.Context(), &opts, g.printer(cmd), g.progressPrinter(cmd))
	}
	return cmd
}

// take sorts the arguments; dash is how many stood before --, or -1.
func (o *runOptions) take(args []string, dash int) error {
	if o.dash = dash >= 0; o.dash {
		o.command, args = args[dash:], args[:dash]
	}
	switch {
	case len(args) == 0 && o.profile == "":
		return cli.Usage("run: PATH or -p PROFILE is missing")
	case len(args) > 0 && o.profile != "":
		return cli.Usage("run: %s and -p %s: want one of them; a command comes behind --", args[0], o.profile)
	case len(args) > 1:
		return cli.Usage("run: unexpected argument %q: a command comes behind --, as in: floxctl run %s -- %s", args[1], args[0], strings.Join(args[1:], " "))
	case len(args) == 1:
		o.path = args[0]
	}
	if o.to == "" {
		return nil
	}
	if o.mode != "" && o.mode != modeCopy {
		return cli.Usage("run: --to copies, and --mode %s does not", o.mode)
	}
	abs, err := filepath.Abs(o.to)
	if err != nil {
		return cli.Usage("run: --to: %v", err)
	}
	o.to = abs
	return nil
}

// target is the store path to run from.
type target struct {
	Path flox.StorePath
	dir  string // the store directory it was named with, "" = none
}

// target finds out what path or profile was named.
func (o *runOptions) target() (target, error) {
	arg, given := o.path, o.path
	if o.profile != "" {
		given = "profile " + o.profile
		var err error
		if arg, err = profileLink(o.profile); err != nil {
			return target{}, err
		}
	}
	at, err := storeArg(arg)
	if err != nil {
		return target{}, err
	}
	if p, err := flox.ParseStorePath(at); err == nil {
		return target{Path: p}, nil
	}
	p, err := flox.ParseStorePath(filepath.Base(at))
	if err != nil {
		return target{}, cli.Explain(flox.ErrBadInput, "%s leads to %s, which lies inside a store path: want the store path itself", given, at)
	}
	return target{Path: p, dir: filepath.Dir(at)}, nil
}

// runRun looks, decides, says so, and becomes what it decided for.
func runRun(ctx context.Context, opts *runOptions, out, errOut *output) error {
	what, err := opts.target()
	if err != nil {
		return err
	}
	s, err := look(ctx, opts, what)
	if err != nil {
		return err
	}
	if opts.explain {
		return printChoice(out, s, opts)
	}
	c, err := choose(s, opts.mode, opts.to)
	if err != nil {
		return err
	}
	if !opts.quiet {
		errOut.printf("floxctl: %s: %s\n", c.Mode, c.Why)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.here {
		return opts.runHere(s)
	}
	return s.becomeDaemon(opts, c)
}

// runHere replaces this process by the command: the store is at its place.
func (o *runOptions) runHere(s *surroundings) error {
	dir := s.storeDir.Join(s.what.Path)
	if err := room.There(dir); err != nil {
		return err
	}
	c, err := room.Find(dir, o.command, os.Environ())
	if err != nil {
		return err
	}
	return c.Failed(c.Exec())
}

// becomeDaemon replaces this process by floxd, which can do more than this small
// program.
func (s *surroundings) becomeDaemon(opts *runOptions, c choice) error {
	args := []string{
		"floxd", "run", "--mode", c.Mode, "--store-dir", string(s.storeDir), "--state-dir", s.stateDir,
		"--invite", s.invite, "--source", c.Source, "--to", opts.to,
	}
	if opts.quiet {
		args = append(args, "--quiet")
	}
	if c.Source != "" && c.Source == s.served {
		args = append(args, "--nix", s.nix)
	}
	args = append(append(args, string(s.what.Path), "--"), opts.command...)
	err := syscall.Exec(s.floxd, args, os.Environ())
	return cli.Explain(flox.ErrDenied, "cannot run %s: %v", s.floxd, err)
}
