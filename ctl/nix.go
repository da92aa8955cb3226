package ctl

import (
	"context"
	"os"
	"slices"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

func newNixCmd(g *globals) *cobra.Command {
	stateDir := ""
	cmd := &cobra.Command{
		Use:   "nix -- COMMAND...",
		Short: "Run stock Nix, or any program, with the agent's store",
		Long: `Run COMMAND (without one, a shell) where stock Nix uses the agent as its daemon and
the store is at its place. On a machine without a Nix store of its own that is so
everywhere, and COMMAND just runs.

On a machine that has one, that store and its daemon stay as they are. COMMAND runs
in a mount namespace of its own, in which the store directory shows both: what the
storehouse has, and of the local store what the storehouse has not. Content that both
have is read from the local disk; where they differ, the storehouse's is shown. Nobody
outside sees anything of it, and what COMMAND leaves running ends with it.

It needs no right but that to make a user namespace. The exit code is COMMAND's. If it
could not be run:

` + cli.ExitCodes,
		Example: `  floxctl nix -- nix-build '<nixpkgs>' -A hello
  floxctl nix -- nix path-info -r ./result
  floxctl nix                        a shell`,
	}
	cmd.Flags().StringVar(&stateDir, "state-dir", "", "`DIR` for what the namespace needs (default: as of floxctl run)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 && cmd.ArgsLenAtDash() != 0 {
			return cli.Usage("nix: unexpected argument %q: the command comes behind --, as in: floxctl nix -- nix-build", args[0])
		}
		return runNix(cmd.Context(), g, stateDir, args)
	}
	return cmd
}

// runNix becomes the command, or the program that puts the store at its place for it.
func runNix(ctx context.Context, g *globals, stateDir string, command []string) error {
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	resp, err := g.agent().Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		return explain(err)
	}
	m := resp.Msg
	switch {
	case m.GetNixSocket() == "":
		return cli.Explain(flox.ErrNotFound, "the agent at %s has no socket for stock Nix: take nix-socket = none out of its configuration", g.socketPath())
	case !m.GetMounted():
		return cli.Explain(flox.ErrUnreachable, "the agent at %s has nothing mounted: it is started with sudo floxd agent, or sudo floxd up", g.socketPath())
	}
	mounts := room.Mounts()
	switch {
	case slices.Contains(mounts, m.GetStoreDir()):
		c, err := room.Find("", command, room.NixClient(os.Environ(), m.GetNixSocket()))
		if err != nil {
			return err
		}
		return c.Failed(c.Exec())
	case !slices.Contains(mounts, m.GetMountDir()):
		return cli.Explain(flox.ErrNotFound, "the agent has its store mounted at %s, which is not seen here, as in a container that was not given it", m.GetMountDir())
	}
	floxd := findFloxd()
	if floxd == "" {
		return cli.Explain(flox.ErrNotFound, "this needs the program floxd, which is neither beside floxctl nor on the PATH")
	}
	if stateDir, err = privateState(stateDir); err != nil {
		return err
	}
	args := append([]string{
		"floxd", "run", "--mode", modeBind, "--store-dir", m.GetStoreDir(), "--state-dir", stateDir,
		"--source", m.GetMountDir(), "--nix", m.GetNixSocket(), "--",
	}, command...)
	err = syscall.Exec(floxd, args, os.Environ())
	return cli.Explain(flox.ErrDenied, "cannot run %s: %v", floxd, err)
}
