package ctl

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// downloadOptions are the command line of download.
type downloadOptions struct {
	profileFlag
	paths   []string
	closure bool
	keep    bool
}

func newDownloadCmd(g *globals) *cobra.Command {
	opts := downloadOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:   "download PATH...|-p OWNER/NAME [--closure=false] [--keep]",
		Short: "Fetch store paths whole, with all they need",
		Long: `Fetch store paths whole, with everything they refer to, so that they work
without a network. PATH is a store path, its base name, or a link to one. One that is
not valid the storehouse substitutes first, if an upstream has it. With -p it is the
generation of a profile that lives now (OWNER/NAME@41, @TAG: another one), for this
machine; floxctl status says what is ready to go offline.

Ctrl-C stops it at any time; what has arrived stays, and the same command goes on
from there.

` + cli.ExitCodes,
		Example: "  floxctl download ./result --keep\n  floxctl download -p acme/ci",
		RunE: func(cmd *cobra.Command, args []string) error {
			if opts.profile == "" && len(args) == 0 {
				return cli.Usage("download: PATH is missing: name one, or a profile with -p OWNER/NAME")
			}
			opts.paths = args
			return runDownload(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd))
		},
	}
	cmd.Flags().StringVarP(&opts.profile, "profile", "p", "", "a profile, OWNER/NAME")
	cmd.Flags().BoolVar(&opts.closure, "closure", true, "also everything they refer to, at any depth")
	cmd.Flags().BoolVar(&opts.keep, "keep", false, "never evict them from the cache (take back: floxctl unkeep)")
	return cmd
}

// downloadFacts is one line of download --json; the last one says finished.
type downloadFacts struct {
	Path           string `json:"path"`
	DoneBytes      uint64 `json:"doneBytes"`
	TotalBytes     uint64 `json:"totalBytes"`
	BytesPerSecond uint64 `json:"bytesPerSecond"`
	DonePaths      uint32 `json:"donePaths"`
	TotalPaths     uint32 `json:"totalPaths"`
	Finished       bool   `json:"finished"`
}

// runDownload shows progress until the agent says that it is finished. A stream
// that ends without that is a failure: the paths are not all here.
func runDownload(ctx context.Context, opts downloadOptions, out, errOut *output) error {
	paths, err := storeArgs(opts.paths)
	if err != nil {
		return err
	}
	named := ""
	if opts.profile != "" {
		p, _, err := opts.shown(ctx)
		if err != nil {
			return err
		}
		paths, named = append(paths, path.Base(p.GetPath())), fmt.Sprintf("%s@%d: ", clean(p.GetName()), p.GetGeneration())
	}
	start := time.Now()
	stream, err := opts.agent().Download(ctx, connect.NewRequest(&floxv1.DownloadRequest{Paths: paths, Closure: opts.closure, Keep: opts.keep}))
	if err != nil {
		return explain(err)
	}
	defer stream.Close()
	bar := newProgress(errOut)
	defer bar.end()
	var last *floxv1.DownloadProgress
	for stream.Receive() {
		last = stream.Msg()
		if out.json {
			if err := out.printJSONLine(downloadOf(last)); err != nil {
				return err
			}
			continue
		}
		bar.show(step{
			done: last.GetDoneBytes(), total: last.GetTotalBytes(), bytesPerSecond: last.GetBytesPerSecond(),
			what: path.Base(last.GetPath()), extra: fmt.Sprintf("%d of %d paths", last.GetDonePaths(), last.GetTotalPaths()),
		})
	}
	bar.end()
	if err := explain(stream.Err()); err != nil {
		if errors.Is(err, context.Canceled) && !out.json {
			errOut.printf("Stopped%s. What has arrived stays; the same command goes on from there.\n", soFar(last))
		}
		return err
	}
	if !last.GetFinished() {
		return errors.New("the agent ended the download without finishing it; the same command goes on from there")
	}
	if !out.json {
		kept := ""
		if opts.keep {
			kept = " and kept"
		}
		out.printf("%s%s, %s, complete on this machine%s (%s).\n", named, plural(uint64(last.GetTotalPaths()), "path", "paths"),
			cli.FormatBytes(last.GetTotalBytes()), kept, cli.FormatDuration(time.Since(start)))
	}
	return nil
}

func downloadOf(m *floxv1.DownloadProgress) downloadFacts {
	return downloadFacts{
		Path: m.GetPath(), DoneBytes: m.GetDoneBytes(), TotalBytes: m.GetTotalBytes(), BytesPerSecond: m.GetBytesPerSecond(),
		DonePaths: m.GetDonePaths(), TotalPaths: m.GetTotalPaths(), Finished: m.GetFinished(),
	}
}

// soFar says how far a stopped download got.
func soFar(last *floxv1.DownloadProgress) string {
	if last.GetTotalBytes() == 0 {
		return ""
	}
	return fmt.Sprintf(" at %s of %s", cli.FormatBytes(last.GetDoneBytes()), cli.FormatBytes(last.GetTotalBytes()))
}
