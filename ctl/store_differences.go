package ctl

import (
	"context"
	"encoding/hex"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newStoreDifferencesCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "differences [PATH]",
		Short: "List what did not build reproducibly: second, different content for valid paths",
		Long: `List where somebody offered other content for a path that was valid: a build that
gave something else than the one before, or an upload that did. The first content
stays valid; the second was not taken. Newest first, with who offered it.

` + cli.ExitCodes,
		Example: "  floxctl store differences\n  floxctl store differences ./result --json",
		Args:    cli.Args(0, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := ""
			if len(args) > 0 {
				var err error
				if path, err = storeArg(args[0]); err != nil {
					return err
				}
			}
			return runStoreDifferences(cmd.Context(), g, g.printer(cmd), path)
		},
	}
}

// difference is a floxv1.Difference in JSON.
type difference struct {
	Path      string    `json:"path"`
	Valid     string    `json:"valid_nar_hash"`
	Offered   string    `json:"offered_nar_hash"`
	OfferedBy string    `json:"offered_by"`
	Time      time.Time `json:"time"`
}

func runStoreDifferences(ctx context.Context, g *globals, out *output, path string) error {
	resp, err := g.admin().Differences(ctx, connect.NewRequest(&floxv1.DifferencesRequest{Path: path}))
	if err != nil {
		return explainAdmin(err)
	}
	list := make([]difference, 0, len(resp.Msg.GetDifferences()))
	for _, d := range resp.Msg.GetDifferences() {
		list = append(list, difference{
			d.GetPath(), "sha256:" + hex.EncodeToString(d.GetValidNarHash()), "sha256:" + hex.EncodeToString(d.GetOfferedNarHash()),
			d.GetPublisher(), time.UnixMilli(d.GetTimeUnixMs()).UTC(),
		})
	}
	if out.json {
		return out.printJSON(struct {
			Differences []difference `json:"differences"`
			More        bool         `json:"more"`
		}{list, resp.Msg.GetMore()})
	}
	if len(list) == 0 {
		out.printf("Nobody offered other content for a valid path.\n")
		return nil
	}
	rows := [][]string{{"WHEN", "PATH", "OFFERED BY"}}
	for _, d := range list {
		rows = append(rows, []string{d.Time.Format(time.DateTime), clean(d.Path), clean(d.OfferedBy)})
	}
	out.table(rows, nil)
	if resp.Msg.GetMore() {
		out.printf("There are more. Ask for one path: floxctl store differences PATH\n")
	}
	return nil
}
