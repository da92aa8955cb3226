package ctl

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// newCacheCmd only holds the commands below it.
func newCacheCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Look at and shrink what this machine keeps of the store",
	}
	cmd.AddCommand(newCacheUsageCmd(g), newCacheGCCmd(g))
	return cmd
}

func newCacheUsageCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "usage",
		Short: "Show how much the cache holds and may hold",
		Args:  cli.Args(0, 0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return runCacheUsage(cmd.Context(), g, g.printer(cmd)) },
	}
}

// runCacheUsage prints each number with what it means for the user: what may
// go, what never goes, what is left to others.
func runCacheUsage(ctx context.Context, g *globals, out *output) error {
	resp, err := g.agent().CacheUsage(ctx, connect.NewRequest(&floxv1.CacheUsageRequest{}))
	if err != nil {
		return explain(err)
	}
	c := cacheOf(resp.Msg)
	if out.json {
		return out.printJSON(c)
	}
	out.printf("directory   %s\n", clean(c.Dir))
	out.printf("holds       %s in %s and %s\n", cli.FormatBytes(c.Bytes), plural(c.Files, "file", "files"), plural(c.Blocks, "block", "blocks"))
	out.printf("may hold    %s\n", cli.FormatBytes(c.BudgetBytes))
	out.printf("kept        %s that never goes by itself (floxctl keep)\n", cli.FormatBytes(c.KeptBytes))
	out.printf("evicted     %s since the agent started\n", cli.FormatBytes(c.EvictedBytes))
	out.printf("disk        %s free, of which %s stay free for others\n", cli.FormatBytes(c.FreeDiskBytes), cli.FormatBytes(c.ReserveBytes))
	if c.Streaming {
		out.printf("%s\n", out.paint(yellow, "The disk is full: what is read now is passed through and not kept. Free some space, or: floxctl cache gc"))
	}
	return nil
}

func newCacheGCCmd(g *globals) *cobra.Command {
	target := ""
	cmd := &cobra.Command{
		Use:   "gc [--to SIZE]",
		Short: "Drop cached content that is neither kept nor in use",
		Long: `Drop cached content that is neither kept nor in use, longest unused first. What
is dropped is fetched again when somebody reads it.

` + cli.ExitCodes,
		Example: "  floxctl cache gc --to 2GiB",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runCacheGC(cmd.Context(), g, g.printer(cmd), target)
		},
	}
	cmd.Flags().StringVar(&target, "to", "", "stop when the cache is this small (default: drop all that may go)")
	return cmd
}

// runCacheGC refuses a size it cannot read before it asks the agent: a typing
// error must not empty a cache.
func runCacheGC(ctx context.Context, g *globals, out *output, target string) error {
	req := &floxv1.CacheGCRequest{}
	if target != "" {
		bytes, err := cli.ParseBytes(target)
		if err != nil {
			return cli.Usage("--to: %v", err)
		}
		// 0 would mean "all that may go" on the wire as well, which is the same thing.
		req.TargetBytes = bytes
	}
	resp, err := g.agent().CacheGC(ctx, connect.NewRequest(req))
	if err != nil {
		return explain(err)
	}
	if out.json {
		return out.printJSON(struct {
			FreedBytes uint64 `json:"freedBytes"`
			Bytes      uint64 `json:"bytes"`
		}{resp.Msg.GetFreedBytes(), resp.Msg.GetBytes()})
	}
	out.printf("Freed %s; the cache now holds %s.\n", cli.FormatBytes(resp.Msg.GetFreedBytes()), cli.FormatBytes(resp.Msg.GetBytes()))
	return nil
}
