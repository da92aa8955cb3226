package ctl

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// keepPathOptions are the command line of storehouse keep.
type keepPathOptions struct {
	*globals
	undo   bool
	reason string
}

func newKeepPathCmd(g *globals) *cobra.Command {
	opts := keepPathOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "keep PATH... [--undo] [--reason TEXT]",
		Short: "Never let the storehouse collect these paths and what they need",
		Long: `Make store paths roots of the storehouse: no collection removes them or what they
refer to, until --undo. What stays on this machine's disk is another matter: that is
floxctl keep.

` + cli.ExitCodes,
		Example: `  floxctl storehouse keep ./result --reason "release 1.2"
  floxctl storehouse keep /nix/store/...-hello --undo`,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runKeepPath(cmd.Context(), opts, g.printer(cmd), args)
		},
	}
	cmd.Flags().BoolVar(&opts.undo, "undo", false, "let them be collected again")
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl store why")
	return cmd
}

// runKeepPath ends at the first that is refused; those before it are kept.
func runKeepPath(ctx context.Context, opts keepPathOptions, out *output, args []string) error {
	paths, err := storeArgs(args)
	if err != nil {
		return err
	}
	admin := opts.admin()
	for _, p := range paths {
		if _, err := admin.KeepPath(ctx, connect.NewRequest(&floxv1.KeepPathRequest{Path: p, Undo: opts.undo, Reason: opts.reason})); err != nil {
			return explainAdmin(err)
		}
		if !out.json {
			out.printf("%s\n", clean(p))
		}
	}
	if out.json {
		return out.printJSON(struct {
			Paths []string `json:"paths"`
		}{paths})
	}
	done := "kept in the storehouse"
	if opts.undo {
		done = "no longer kept in the storehouse"
	}
	out.printf("%s %s.\n", plural(uint64(len(paths)), "path is", "paths are"), done)
	return nil
}
