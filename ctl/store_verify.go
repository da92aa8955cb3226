package ctl

import (
	"context"
	"errors"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newStoreVerifyCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "verify [PATH...]",
		Short: "Check what is on this machine byte by byte",
		Long: `Read everything that is here of the given store paths (of all, without one) and
compare it with what its signed names say. What is wrong is listed, dropped, and
fetched again when somebody reads it; then the exit code is 6.

` + cli.ExitCodes,
		Args: cli.Args(0, -1, ""),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runStoreVerify(cmd.Context(), g, g.printer(cmd), g.progressPrinter(cmd), args)
		},
	}
}

// verifyFacts is one line of verify --json; bad is all that was found so far.
type verifyFacts struct {
	DoneBytes  uint64   `json:"doneBytes"`
	TotalBytes uint64   `json:"totalBytes"`
	Bad        []string `json:"bad"`
	Finished   bool     `json:"finished"`
}

// runStoreVerify prints what is wrong as it is found. A check that did not come
// to its end has proved nothing and fails.
func runStoreVerify(ctx context.Context, g *globals, out, errOut *output, args []string) error {
	paths, err := storeArgs(args)
	if err != nil {
		return err
	}
	stream, err := g.agent().Verify(ctx, connect.NewRequest(&floxv1.VerifyRequest{Paths: paths}))
	if err != nil {
		return explain(err)
	}
	defer stream.Close()
	bar := newProgress(errOut)
	defer bar.end()
	bad, checked, finished := 0, uint64(0), false
	for stream.Receive() {
		m := stream.Msg()
		fresh := m.GetBad()[min(bad, len(m.GetBad())):] // the list only grows
		bad += len(fresh)
		checked, finished = m.GetDoneBytes(), m.GetFinished()
		if out.json {
			if err := out.printJSONLine(verifyFacts{m.GetDoneBytes(), m.GetTotalBytes(), some(m.GetBad()), finished}); err != nil {
				return err
			}
			continue
		}
		if len(fresh) > 0 {
			bar.end()
		}
		for _, b := range fresh {
			out.printf("%s %s\n", out.paint(red, "bad"), clean(b))
		}
		bar.show(step{done: m.GetDoneBytes(), total: m.GetTotalBytes(), what: "checking"})
	}
	bar.end()
	if err := explain(stream.Err()); err != nil {
		return err
	}
	if !finished {
		return errors.New("the agent ended the check before it was through")
	}
	if bad > 0 {
		return cli.Explain(flox.ErrCorrupt, "%s wrong; dropped, and fetched again when somebody reads it", plural(uint64(bad), "piece was", "pieces were"))
	}
	if !out.json {
		out.printf("%s checked, nothing wrong.\n", cli.FormatBytes(checked))
	}
	return nil
}
