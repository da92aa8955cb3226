package ctl

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newTransferCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "transfer [SERVER]",
		Short: "Hand leadership to another server",
		Long: `Hand leadership to SERVER, or to the one that is furthest. Nobody's work is lost by
it; a collection that runs ends, and the next goes on. To keep a server from leading
for longer, before maintenance: floxctl storehouse drain.

` + cli.ExitCodes,
		Example: "  floxctl storehouse transfer s2",
		Args:    cli.Args(0, 1, "SERVER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			to := ""
			if len(args) > 0 {
				if to = args[0]; to == "" { // which would mean any
					return cli.Usage("SERVER is empty")
				}
			}
			return runTransfer(cmd.Context(), g, g.printer(cmd), to)
		},
	}
}

// runTransfer prints who leads then.
func runTransfer(ctx context.Context, g *globals, out *output, to string) error {
	resp, err := g.admin().Transfer(ctx, connect.NewRequest(&floxv1.TransferRequest{Server: to}))
	if err != nil {
		return explainAdmin(err)
	}
	name := resp.Msg.GetLeader()
	if m, err := oneMachine(ctx, g, name); err == nil { // it is done, named or not
		name = m.GetMachine().GetName()
	}
	if out.json {
		return out.printJSON(struct {
			Peer string `json:"peer"`
			Name string `json:"name"`
		}{resp.Msg.GetLeader(), name})
	}
	out.printf("%s leads.\n", clean(name))
	return nil
}
