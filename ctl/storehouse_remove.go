package ctl

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// removeServerOptions are the command line of remove.
type removeServerOptions struct {
	*globals
	force, yes bool
}

func newRemoveServerCmd(g *globals) *cobra.Command {
	opts := removeServerOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "remove SERVER [--force] [--yes]",
		Short: "Take a server out of the storehouse for good",
		Long: `Take a server out of the storehouse for good: it votes no more, is cut off, its key is
never let in again, and the storehouse's keys are sealed anew to the others. To bring
it back, join it as a new one, with an empty state directory and a new invite.

It is refused while it would risk something: while the server does not answer, or the
others still lack content that may be on it. --force takes it out all the same; what
no other server has of the content is lost then (floxctl storehouse servers says what
they lack). Not even --force leaves the storehouse without a majority that is well.

` + cli.ExitCodes,
		Example: `  floxctl storehouse remove s3
  floxctl storehouse remove s3 --force      its disk is dead`,
		Args: cli.Args(1, 1, "SERVER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "" {
				return cli.Usage("SERVER is empty")
			}
			args[0] = spelled(cmd.Context(), g, args[0])
			question := fmt.Sprintf("Take %s out of the servers? Its key is never let in again.", clean(args[0]))
			if opts.force {
				question = fmt.Sprintf("Take %s out of the servers by force? Its key is never let in again, and what only it has of the content is lost.", clean(args[0]))
			}
			if err := confirm(cmd, opts.yes, question); err != nil {
				return err
			}
			return runRemoveServer(cmd.Context(), opts, g.printer(cmd), args[0])
		},
	}
	cmd.Flags().BoolVar(&opts.force, "force", false, "also if it does not answer, or the others lack content; that may lose content")
	cmd.Flags().BoolVarP(&opts.yes, "yes", "y", false, "do not ask")
	return cmd
}

func runRemoveServer(ctx context.Context, opts removeServerOptions, out *output, server string) error {
	if _, err := opts.admin().RemoveServer(ctx, connect.NewRequest(&floxv1.RemoveServerRequest{Server: server, Force: opts.force})); err != nil {
		return explainAdmin(err)
	}
	if out.json {
		return out.printJSON(struct {
			Server string `json:"server"`
		}{server})
	}
	out.printf("%s is no server any more.\n", clean(server))
	out.printf("It knew the storehouse's keys. If it may be in wrong hands, replace them: floxctl key rotate, and floxctl key rotate --use token\n")
	return nil
}
