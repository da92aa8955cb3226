package ctl

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newStoreRootsCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "roots [PATH]",
		Short: "List what the storehouse keeps, or what keeps one path",
		Long: `List the roots of the storehouse: the paths that no collection removes, with all
they refer to, and why. With PATH, those that hold it, itself or through what refers
to it; floxctl store why PATH shows how.

` + cli.ExitCodes,
		Example: "  floxctl store roots ./result",
		Args:    cli.Args(0, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := ""
			if len(args) > 0 {
				var err error
				if path, err = storeArg(args[0]); err != nil {
					return err
				}
			}
			return runStoreRoots(cmd.Context(), g, g.printer(cmd), path)
		},
	}
}

// runStoreRoots says so when not all roots fit into the answer.
func runStoreRoots(ctx context.Context, g *globals, out *output, path string) error {
	resp, err := g.admin().Roots(ctx, connect.NewRequest(&floxv1.RootsRequest{Path: path}))
	if err != nil {
		return explainAdmin(err)
	}
	roots := resp.Msg.GetRoots()
	if out.json {
		facts := make([]rootFacts, 0, len(roots))
		for _, r := range roots {
			facts = append(facts, rootOf(r))
		}
		return out.printJSON(struct {
			Roots []rootFacts `json:"roots"`
			More  bool        `json:"more"`
		}{facts, resp.Msg.GetMore()})
	}
	if len(roots) == 0 && path != "" {
		out.printf("Nothing keeps it: the next collection condemns it unless somebody uses it.\n")
		return nil
	}
	now := time.Now()
	rows := [][]string{{"PATH", "KEPT BY"}}
	for _, r := range roots {
		rows = append(rows, []string{clean(r.GetPath()), clean(rootWords(r, now))})
	}
	out.table(rows, nil)
	if resp.Msg.GetMore() {
		out.printf("There are more. Ask for one path: floxctl store roots PATH\n")
	}
	return nil
}
