package ctl

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newKeepCmd(g *globals) *cobra.Command {
	closure := true
	cmd := &cobra.Command{
		Use:   "keep PATH... [--closure=false]",
		Short: "Never evict these paths from this machine's cache",
		Long: `Mark store paths so that what is here of them is never evicted from the cache. It
fetches nothing by itself: floxctl download PATH --keep does both.

` + cli.ExitCodes,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runKeep(cmd.Context(), g.agent().Keep, g.printer(cmd), args, closure, "kept")
		},
	}
	cmd.Flags().BoolVar(&closure, "closure", true, "also everything they refer to, at any depth")
	return cmd
}

func newUnkeepCmd(g *globals) *cobra.Command {
	closure := true
	cmd := &cobra.Command{
		Use:   "unkeep PATH... [--closure=false]",
		Short: "Let the cache evict these paths again",
		Long: `Take back a keep. Nothing is deleted now; see floxctl cache gc for that.

` + cli.ExitCodes,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runKeep(cmd.Context(), g.agent().Unkeep, g.printer(cmd), args, closure, "no longer kept")
		},
	}
	cmd.Flags().BoolVar(&closure, "closure", true, "also everything they refer to, at any depth")
	return cmd
}

// keepCall is Keep or Unkeep: they differ in nothing else.
type keepCall func(context.Context, *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error)

// runKeep prints what the agent says it did, which with closures is more than
// what was asked for.
func runKeep(ctx context.Context, call keepCall, out *output, args []string, closure bool, done string) error {
	paths, err := storeArgs(args)
	if err != nil {
		return err
	}
	resp, err := call(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: paths, Closure: closure}))
	if err != nil {
		return explain(err)
	}
	if out.json {
		return out.printJSON(struct {
			Paths []string `json:"paths"`
		}{some(resp.Msg.GetKept())})
	}
	for _, p := range resp.Msg.GetKept() {
		out.printf("%s\n", clean(p))
	}
	out.printf("%s %s.\n", plural(uint64(len(resp.Msg.GetKept())), "path is", "paths are"), done)
	return nil
}
