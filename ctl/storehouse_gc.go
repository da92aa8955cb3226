package ctl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// collectOptions are the command line of gc.
type collectOptions struct {
	*globals
	dryRun, resume bool
	keepRecent     string
}

func newCollectCmd(g *globals) *cobra.Command {
	opts := collectOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "gc [--dry-run] [--keep-recent 14d] [--resume]",
		Short: "Remove what nobody wants any more, and free its content everywhere",
		Long: `Remove the store paths that no root reaches, and free their content on every
server. Roots are what is kept (floxctl storehouse keep), what machines hold on to,
and what was published or used lately (--keep-recent); floxctl store why PATH tells
which. A use within an hour of the one before is not noted, so what is kept as recent
reaches an hour further back than --keep-recent says.

A path is condemned first, and removed after a grace (collect-grace, 1 h) unless
somebody uses it meanwhile; the command waits for it. Ctrl-C stops the collection:
what is condemned stays valid until --resume, or the next collection, removes it.
One collection runs at a time, on the server that leads, whichever is asked; a
storehouse also collects by itself (collect-every).

A server gives room back to its disk by rewriting files of which less than half is
used, of 1 to 256 MiB; meanwhile it needs room for what is used of one of them.

--dry-run lists what would go and changes nothing. With --json one line for each
step.

` + cli.ExitCodes,
		Example: `  floxctl storehouse gc --dry-run
  floxctl storehouse gc --keep-recent 30d`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.resume && (opts.dryRun || cmd.Flags().Changed("keep-recent")) {
				return cli.Usage("--resume goes on with what was condemned before: it takes neither --dry-run nor --keep-recent")
			}
			return runCollect(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd))
		},
	}
	cmd.Flags().BoolVar(&opts.dryRun, "dry-run", false, "list what would go, and change nothing")
	cmd.Flags().StringVar(&opts.keepRecent, "keep-recent", "14d", "keep what was published or used within this `TIME`, and an hour more: 12h, 14d, 8w")
	cmd.Flags().BoolVar(&opts.resume, "resume", false, "only remove what an earlier collection condemned")
	return cmd
}

// collectFacts is one line of gc --json; the last one says finished.
type collectFacts struct {
	Phase      string   `json:"phase"`
	Done       uint64   `json:"done"`
	Total      uint64   `json:"total"`
	LivePaths  uint64   `json:"livePaths"`
	DeadPaths  uint64   `json:"deadPaths"`
	DeadBytes  uint64   `json:"deadBytes"`
	FreedBytes uint64   `json:"freedBytes"`
	Paths      []string `json:"paths,omitempty"`
	Finished   bool     `json:"finished"`
	UsedSince  *string  `json:"usedSince,omitempty"` // what may have been used since then stays
}

func collectOf(p *floxv1.CollectProgress) collectFacts {
	return collectFacts{
		Phase: p.GetPhase(), Done: p.GetDone(), Total: p.GetTotal(), LivePaths: p.GetLivePaths(), DeadPaths: p.GetDeadPaths(),
		DeadBytes: p.GetDeadBytes(), FreedBytes: p.GetFreedBytes(), Paths: p.GetPaths(), Finished: p.GetFinished(), UsedSince: stampMs(p.GetUsedSinceUnixMs()),
	}
}

// runCollect shows progress until the storehouse says that it is finished.
func runCollect(ctx context.Context, opts collectOptions, out, errOut *output) error {
	keep, err := parseSpan("--keep-recent", opts.keepRecent)
	if err != nil {
		return err
	}
	stream, err := opts.admin().Collect(ctx, connect.NewRequest(&floxv1.CollectRequest{
		DryRun: opts.dryRun, Resume: opts.resume, KeepRecentSeconds: uint64(keep / time.Second),
	}))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	bar := newProgress(errOut)
	defer bar.end()
	var last *floxv1.CollectProgress
	for stream.Receive() {
		last = stream.Msg()
		if out.json {
			if err := out.printJSONLine(collectOf(last)); err != nil {
				return err
			}
			continue
		}
		if len(last.GetPaths()) > 0 {
			bar.end()
		}
		for _, p := range last.GetPaths() {
			out.printf("%s\n", clean(p))
		}
		bar.show(step{done: last.GetDone(), total: last.GetTotal(), says: collectWords(last)})
	}
	bar.end()
	if err := explainAdmin(stream.Err()); err != nil {
		if errors.Is(err, context.Canceled) && !out.json && !opts.dryRun {
			errOut.printf("Stopped. What is condemned stays valid until a collection removes it; go on with: floxctl storehouse gc --resume\n")
		}
		return err
	}
	if !last.GetFinished() {
		return errors.New("the storehouse ended the collection without finishing it; go on with: floxctl storehouse gc --resume")
	}
	if out.json {
		return nil
	}
	gone := fmt.Sprintf("%s of %s", plural(last.GetDeadPaths(), "path", "paths"), cli.FormatBytes(last.GetDeadBytes()))
	if opts.dryRun {
		out.printf("%s would go, %s stay. Nothing was changed.\n", gone, plural(last.GetLivePaths(), "path", "paths"))
	} else {
		out.printf("%s removed, %s freed on all servers.\n", gone, cli.FormatBytes(last.GetFreedBytes()))
	}
	if at := last.GetUsedSinceUnixMs(); at != 0 {
		out.printf("Kept as recent: what was published or used since %s, --keep-recent and an hour before the collection.\n", time.UnixMilli(at).Format(time.DateTime))
	}
	return nil
}

// collectWords says what a collection is doing.
func collectWords(p *floxv1.CollectProgress) string {
	done := cli.FormatCount(p.GetDone())
	if p.GetTotal() > 0 {
		done += " of " + cli.FormatCount(p.GetTotal())
	}
	switch p.GetPhase() {
	case "mark":
		return fmt.Sprintf("looking for what is wanted: %s paths", done)
	case "condemn":
		return fmt.Sprintf("condemning the rest: %s paths", done)
	case "wait":
		left := time.Duration(p.GetTotal()-min(p.GetDone(), p.GetTotal())) * time.Second //nolint:gosec // of an hour or so
		return fmt.Sprintf("waiting %s for somebody who uses what is condemned", cli.FormatDuration(left))
	case "remove":
		return fmt.Sprintf("removing: %s paths", done)
	case "sweep":
		return fmt.Sprintf("freeing content: %s paths looked at", done)
	}
	return p.GetPhase() + ": " + done
}
