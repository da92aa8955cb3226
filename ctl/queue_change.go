package ctl

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newQueueCancelCmd(g *globals) *cobra.Command {
	yes, reason := false, ""
	cmd := &cobra.Command{
		Use:   "cancel BUILD... [--yes] [--reason TEXT]",
		Short: "Have builds fail now, for all who wait for them",
		Long: `Have builds fail now, for all who wait for them and for what needs them. Who wants a
build may cancel it while nobody else wants it, an admin always.

` + buildNames + "\n\n" + cli.ExitCodes,
		Example: "  floxctl queue cancel hello-2.12 --reason 'not today'",
		Args:    cli.Args(1, -1, "BUILD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := confirm(cmd, yes, "Cancel "+plural(uint64(len(args)), "build", "builds")+"? What needs them fails as well."); err != nil {
				return err
			}
			req := &floxv1.ChangeBuildsRequest{Change: &floxv1.ChangeBuildsRequest_Cancel{Cancel: &floxv1.CancelThem{Reason: reason}}}
			return runQueueChange(cmd.Context(), g, g.printer(cmd), args, req, "cancelled")
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for those who wait and for the audit log")
	return cmd
}

func newQueueRetryCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "retry BUILD...",
		Short: "Try builds again that failed, and forget that they did",
		Long: `Try builds again that failed and that somebody still waits for, and forget failures that
are remembered: then the next one who wants them has them built. What they need is tried
again with them if it failed. A call that has already heard of the failure does not
change: it has to be made again.

` + buildNames + "\n\n" + cli.ExitCodes,
		Example: "  floxctl queue retry /nix/store/...-hello-2.12.drv",
		Args:    cli.Args(1, -1, "BUILD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &floxv1.ChangeBuildsRequest{Change: &floxv1.ChangeBuildsRequest_Retry{Retry: &floxv1.RetryThem{}}}
			return runQueueChange(cmd.Context(), g, g.printer(cmd), args, req, "tried again, as soon as somebody wants it")
		},
	}
}

func newQueueBumpCmd(g *globals) *cobra.Command {
	priority := int32(0)
	cmd := &cobra.Command{
		Use:   "bump BUILD... [--priority N]",
		Short: "Have builds go before others, with all that they need",
		Long: `Have builds go before others of their class (those that somebody waits for go before
those of schedules), and with them all that they need. Usual is priority 0. What is being
built stays as it is; what others want too, an admin alone puts back.

` + buildNames + "\n\n" + cli.ExitCodes,
		Example: "  floxctl queue bump hello-2.12\n  floxctl queue bump big-thing --priority -10     rather later",
		Args:    cli.Args(1, -1, "BUILD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if priority < -100 || priority > 100 {
				return cli.Usage("--priority %d: want -100 to 100", priority)
			}
			req := &floxv1.ChangeBuildsRequest{Change: &floxv1.ChangeBuildsRequest_Bump{Bump: &floxv1.BumpThem{Priority: priority}}}
			return runQueueChange(cmd.Context(), g, g.printer(cmd), args, req, "bumped")
		},
	}
	cmd.Flags().Int32Var(&priority, "priority", 10, "`N`, -100 to 100; what has a higher one goes first")
	return cmd
}

// runQueueChange changes builds, all or none, and says which; one that ended meanwhile is
// not cancelled any more.
func runQueueChange(ctx context.Context, g *globals, out *output, args []string, req *floxv1.ChangeBuildsRequest, did string) error {
	for _, arg := range args {
		name, err := buildArg(arg)
		if err != nil {
			return err
		}
		req.Builds = append(req.Builds, name)
	}
	resp, err := g.admin().ChangeBuilds(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	if out.json {
		return out.printJSON(struct {
			Builds  []string `json:"builds"`
			Changed uint64   `json:"changed"` // in the queue, with those that they need
		}{some(m.GetKeys()), m.GetChanged()})
	}
	for _, key := range m.GetKeys() {
		out.printf("%s is %s.\n", clean(key), did)
	}
	if n := len(args) - len(m.GetKeys()); n > 0 {
		out.printf("%s over already.\n", plural(uint64(n), "build was", "builds were"))
	}
	if n, all := m.GetChanged(), uint64(len(m.GetKeys())); n > all {
		out.printf("So is what they need: %s.\n", plural(n-all, "build", "builds"))
	}
	return nil
}
