package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

// runOptions are the command line of run, as floxctl run has decided on it.
type runOptions struct {
	mode     string
	storeDir string
	stateDir string
	invite   string
	source   string // bind: where the mount is
	to       string // copy: where to
	nix      string // the agent's socket for stock Nix; "" = the environment stays as it is
	quiet    bool
	path     flox.StorePath // "" = none: the command is found as without a room
	command  []string
}

func newRunCmd(file *string) *cobra.Command {
	opts := runOptions{}
	inside := false
	cmd := &cobra.Command{
		Use:   "run --mode MODE [flags] PATH -- COMMAND...",
		Short: "Run a program where there is no agent (started by floxctl run)",
		Long: `Run a program from a store path where there is no agent, as an ordinary user.
floxctl run decides how, and starts this:

  --mode fuse   an agent of one's own, mounted in a namespace of one's own
  --mode copy   the path and all it refers to, as files, in --to or in a namespace
  --mode bind   the mount at --source, in a namespace, at its place; PATH may be left
                out then, and --nix makes stock Nix a client of the agent there

What is kept between runs lies in the state directory. --config and the
environment configure the agent as they do for floxd agent; it listens at a port
the system chooses, and is no member of the DHT and of multicast unless told so.

` + cli.ExitCodes,
		Hidden: true,
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.mode, "mode", "", "fuse, copy or bind")
	flags.StringVar(&opts.storeDir, "store-dir", string(flox.DefaultStoreDir), "store directory of PATH")
	flags.StringVar(&opts.stateDir, "state-dir", "", "where cache and invite are kept")
	flags.StringVar(&opts.invite, "invite", "", "a file with an invite, or the storehouse's invite.json (default: the one used before)")
	flags.StringVar(&opts.source, "source", "", "bind: where the store is mounted")
	flags.StringVar(&opts.to, "to", "", "copy: the directory to write to")
	flags.StringVar(&opts.nix, "nix", "", "bind: the agent's socket for stock Nix")
	flags.BoolVar(&opts.quiet, "quiet", false, "no progress")
	flags.BoolVar(&inside, "inside", false, "")
	if err := flags.MarkHidden("inside"); err != nil {
		panic(err) // the flag is the line above
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if inside {
			return runInside(cmd.Context())
		}
		dash := cmd.ArgsLenAtDash()
		if dash < 0 {
			dash = len(args)
		}
		if dash != 1 && (dash != 0 || opts.mode != modeBind) {
			return cli.Usage("run: want one store path, then -- and the command")
		}
		if dash == 1 {
			var err error
			if opts.path, err = flox.ParseStorePath(args[0]); err != nil {
				return err
			}
		}
		opts.command = args[dash:]
		return noRoom(runRun(cmd.Context(), *file, &opts), opts.stateDir)
	}
	return cmd
}

// noRoom says what to do about a state directory whose disk is full.
func noRoom(err error, stateDir string) error {
	if errors.Is(err, flox.ErrFull) || !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return err
	}
	return cli.Explain(flox.ErrFull, "%v; free some space on the disk of %s, or choose another --state-dir", err, stateDir)
}

// runRun is the outer process: it prepares what the mode needs and hands over
// to the one in the namespace.
func runRun(ctx context.Context, file string, opts *runOptions) error {
	plan := roomPlan{
		Mode: opts.mode, StoreDir: opts.storeDir, Path: opts.path, Source: opts.source, Nix: opts.nix,
		UID: os.Geteuid(), GID: os.Getegid(),
	}
	for _, a := range opts.command {
		plan.Command = append(plan.Command, []byte(a))
	}
	if opts.stateDir == "" || !filepath.IsAbs(opts.stateDir) {
		return cli.Explain(flox.ErrBadInput, "--state-dir %q: want an absolute directory", opts.stateDir)
	}
	if room.Root() && (opts.mode == modeFUSE || opts.mode == modeCopy && opts.to == "") {
		return cli.Explain(flox.ErrDenied, "--mode %s talks to the network, and must not do so as root: run it as an ordinary user, or start an agent, which does not: sudo floxd agent", opts.mode)
	}
	slot, err := takeSlot(opts.stateDir)
	if err != nil {
		return err
	}
	defer slot.release()
	plan.Scratch = slot.scratch()
	switch opts.mode {
	case modeBind:
		if opts.source == "" {
			return cli.Usage("run: --mode bind wants --source")
		}
	case modeFUSE:
		if plan.Config, err = slot.config(ctx, file, opts); err != nil {
			return err
		}
		plan.Log, plan.MountDir = slot.log(), slot.mountDir()
	case modeCopy:
		here, err := runCopy(ctx, file, opts, slot)
		if err != nil || len(opts.command) == 0 && opts.to != "" {
			return err
		}
		if here == opts.storeDir {
			slot.release() // this process will be another program
			return execHere(opts)
		}
		plan.Source = here
	default:
		return cli.Usage("run: --mode %q: want fuse, copy or bind", opts.mode)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err = room.Enter(plan, "run", "--inside")
	slot.release() // before this process dies
	err = room.Die(err)
	if opts.to != "" && errors.Is(err, flox.ErrDenied) {
		return cli.Explain(flox.ErrDenied, "the files are in %s, and programs run from there only where that is %s: %v", opts.to, opts.storeDir, err)
	}
	return err
}

// The modes this program is started for.
const (
	modeBind = "bind"
	modeFUSE = "fuse"
	modeCopy = "copy"
)

// execHere replaces this process by the command, where the store is at its place.
func execHere(opts *runOptions) error {
	dir := flox.StoreDir(opts.storeDir).Join(opts.path)
	c, err := room.Find(dir, opts.command, os.Environ())
	if err != nil {
		return err
	}
	return c.Failed(c.Exec())
}
