package ctl

import (
	"context"
	"slices"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newKeepCmd(g *globals) *cobra.Command {
	opts := keepOptions{done: "kept"}
	cmd := &cobra.Command{
		Use:   "keep PATH... [--offline closure|used|none] [--closure=false]",
		Short: "Never evict these paths from this machine's cache",
		Long: `Mark store paths so that what is here of them is never evicted from the cache.

--offline says what of them is brought here in the background, so that they work
with the network cut:
  closure  all of them and of everything they refer to, and kept complete
  used     what of them runs on this machine (of a path that is new to keep)
  none     nothing: what is here stays, what is not is fetched when it is read
Without --offline a path's policy stays as it was. floxctl status says what is
ready; floxctl store info PATH shows the policy of a path. To fetch now and wait
for it: floxctl download PATH --keep.

` + cli.ExitCodes,
		Example: `  floxctl keep --offline closure /nix/store/...-texlive   # before a journey
  floxctl status                                          # until it says ready`,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.paths = args
			return runKeep(cmd.Context(), g.agent().Keep, g.printer(cmd), opts)
		},
	}
	cmd.Flags().BoolVar(&opts.closure, "closure", true, "also everything they refer to, at any depth")
	cmd.Flags().StringVar(&opts.offline, "offline", "", "what is completed in the background: closure, used or none (default: as it was)")
	return cmd
}

func newUnkeepCmd(g *globals) *cobra.Command {
	opts := keepOptions{done: "no longer kept"}
	cmd := &cobra.Command{
		Use:   "unkeep PATH... [--closure=false]",
		Short: "Let the cache evict these paths again",
		Long: `Take back a keep, and the offline policy that came with it. Nothing is deleted now; see floxctl cache gc for that.

` + cli.ExitCodes,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.paths = args
			return runKeep(cmd.Context(), g.agent().Unkeep, g.printer(cmd), opts)
		},
	}
	cmd.Flags().BoolVar(&opts.closure, "closure", true, "also everything they refer to, at any depth")
	return cmd
}

// keepOptions are the command lines of keep and unkeep.
type keepOptions struct {
	paths   []string
	closure bool
	offline string
	done    string // what is said of the paths then
}

// keepCall is Keep or Unkeep: they differ in nothing else.
type keepCall func(context.Context, *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error)

// runKeep prints what the agent says it did, which with closures is more than
// what was asked for.
func runKeep(ctx context.Context, call keepCall, out *output, opts keepOptions) error {
	if !slices.Contains([]string{"", "closure", "used", "none"}, opts.offline) {
		return cli.Explain(flox.ErrBadInput, "--offline %q: want closure, used or none", opts.offline)
	}
	paths, err := storeArgs(opts.paths)
	if err != nil {
		return err
	}
	resp, err := call(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: paths, Closure: opts.closure, Offline: opts.offline}))
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
	out.printf("%s %s.\n", plural(uint64(len(resp.Msg.GetKept())), "path is", "paths are"), opts.done)
	return nil
}
