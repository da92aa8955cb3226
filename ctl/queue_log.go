package ctl

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newQueueLogCmd(g *globals) *cobra.Command {
	req := &floxv1.BuildOutputRequest{}
	cmd := &cobra.Command{
		Use:   "log BUILD [-f]",
		Short: "Print the log of a build, also of one under way",
		Long: `Print the log of a build: of one under way what it has said so far, with -f until it is
over; else that of the last time it was built. With --json one line for each.

` + buildNames + "\n\n" + cli.ExitCodes,
		Example: "  floxctl queue log -f hello-2.12",
		Args:    cli.Args(1, 1, "BUILD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := buildArg(args[0])
			if err != nil {
				return err
			}
			req.Build = name
			return runQueueLog(cmd.Context(), g, g.printer(cmd), req)
		},
	}
	cmd.Flags().BoolVarP(&req.Follow, "follow", "f", false, "go on until the build is over, or Ctrl-C")
	return cmd
}

// runQueueLog prints lines as they come.
func runQueueLog(ctx context.Context, g *globals, out *output, req *floxv1.BuildOutputRequest) error {
	stream, err := g.admin().BuildOutput(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	part := "" // of a line
	line := func(text string) error {
		if out.json {
			return out.printJSONLine(struct {
				Line string `json:"line"`
			}{text})
		}
		out.printf("%s\n", cleanLine(text))
		return nil
	}
	for stream.Receive() {
		lines := strings.Split(part+string(stream.Msg().GetData()), "\n")
		part = lines[len(lines)-1]
		for _, text := range lines[:len(lines)-1] {
			if err := line(text); err != nil {
				return err
			}
		}
	}
	if part != "" {
		if err := line(part); err != nil {
			return err
		}
	}
	if err := explainAdmin(stream.Err()); err != nil && (!req.GetFollow() || !errors.Is(err, context.Canceled)) {
		return err
	}
	return nil
}

// cleanLine is clean for a line of a log, whose tabs stay.
func cleanLine(text string) string {
	parts := strings.Split(text, "\t")
	for i, p := range parts {
		parts[i] = clean(p)
	}
	return strings.Join(parts, "\t")
}
