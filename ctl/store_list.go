package ctl

import (
	"context"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// listOptions are the command line of list.
type listOptions struct {
	*globals
	valid bool
}

func newStoreListCmd(g *globals) *cobra.Command {
	opts := listOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "list [--valid]",
		Short: "List store paths: those known here, or everything valid",
		Long: `List store paths in the order of their names: those known on this machine, which
are what was used or downloaded here and all they refer to. With --valid,
everything the storehouse has: any of it can be used, and is fetched then. That
needs the storehouse; where it is away the command fails instead of listing less.

With --json every path is one line and says whether it is known here.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runStoreList(cmd.Context(), opts, g.printer(cmd))
		},
	}
	cmd.Flags().BoolVar(&opts.valid, "valid", false, "everything valid in the storehouse, not only what is known here")
	return cmd
}

// listedFacts is one line of list --json.
type listedFacts struct {
	Path  string `json:"path"`
	Known bool   `json:"known"`
}

// runStoreList prints as the names come: there may be a million.
func runStoreList(ctx context.Context, opts listOptions, out *output) error {
	agent := opts.agent()
	dir, err := storeDir(ctx, agent)
	if err != nil {
		return err
	}
	stream, err := agent.Paths(ctx, connect.NewRequest(&floxv1.ListPathsRequest{Valid: opts.valid}))
	if err != nil {
		return explain(err)
	}
	defer stream.Close()
	for stream.Receive() {
		if err := printListed(out, dir, stream.Msg().GetPaths()); err != nil {
			return err
		}
	}
	return explain(stream.Err())
}

// printListed prints one message's paths in one piece.
func printListed(out *output, dir flox.StoreDir, paths []*floxv1.ListedPath) error {
	var text strings.Builder
	lines := &output{w: &text, json: out.json}
	for _, p := range paths {
		name := clean(string(dir) + "/" + p.GetPath())
		if !out.json {
			lines.printf("%s\n", name)
			continue
		}
		if err := lines.printJSONLine(listedFacts{Path: name, Known: p.GetKnown()}); err != nil {
			return err
		}
	}
	out.printf("%s", text.String())
	return nil
}
