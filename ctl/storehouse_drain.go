package ctl

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newDrainCmd(g *globals) *cobra.Command {
	undo := false
	cmd := &cobra.Command{
		Use:   "drain SERVER [--undo]",
		Short: "Keep a server from leading, before maintenance",
		Long: `Make a server give leadership away and not stand for it again, until --undo, also over
restarts. It goes on voting, answering and keeping content, so it can be stopped at
any time afterwards without anybody waiting for an election.

` + cli.ExitCodes,
		Example: `  floxctl storehouse drain s1        before its reboot
  floxctl storehouse drain s1 --undo`,
		Args: cli.Args(1, 1, "SERVER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runDrain(cmd.Context(), g, g.printer(cmd), args[0], undo)
		},
	}
	cmd.Flags().BoolVar(&undo, "undo", false, "let it lead again")
	return cmd
}

func runDrain(ctx context.Context, g *globals, out *output, server string, undo bool) error {
	if _, err := g.admin().Drain(ctx, connect.NewRequest(&floxv1.DrainRequest{Server: server, Undo: undo})); err != nil {
		return explainAdmin(err)
	}
	server = spelled(ctx, g, server)
	if out.json {
		return out.printJSON(struct {
			Server  string `json:"server"`
			Drained bool   `json:"drained"`
		}{server, !undo})
	}
	if undo {
		out.printf("%s may lead again.\n", clean(server))
		return nil
	}
	out.printf("%s does not lead until: floxctl storehouse drain %s --undo\n", clean(server), clean(server))
	return nil
}
