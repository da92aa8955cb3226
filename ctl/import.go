package ctl

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// importOptions are the command line of import.
type importOptions struct {
	*globals
	from  string
	paths []string
	jobs  uint32
	keys  []string
}

func newImportCmd(g *globals) *cobra.Command {
	opts := importOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "import --from URL|DIR [PATH...] [--jobs N] [--key NAME:BASE64]...",
		Short: "Copy an existing binary cache into the storehouse",
		Long: `Copy paths of an existing binary cache into the storehouse, with their signatures and
with all they refer to. DIR is a directory on the server that answers, as nix copy
--to file://DIR leaves it. It is imported whole if no PATH is given, and so is an S3
bucket; a cache over HTTP cannot be listed, so its paths have to be named.

A path must be signed by a key given with --key, or by one of the storehouse's own.
What cannot be had is told, and the others go on. Ctrl-C stops the import; what has
been imported stays, and the same command goes on from there. With --json one line
for each step.

` + cli.ExitCodes,
		Example: `  floxctl import --from /mnt/old-cache --key cache.example.org-1:iKq0...
  floxctl import --from https://cache.example.org --key cache.example.org-1:iKq0... /nix/store/...-hello`,
		Args: cli.Args(0, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.paths = args
			return runImport(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd))
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.from, "from", "", "the cache: http://…, https://…, s3://…, or a `DIR` on the server")
	f.Uint32Var(&opts.jobs, "jobs", 8, "how many paths are fetched at once, at most 64")
	f.StringArrayVar(&opts.keys, "key", nil, "accept what this public key signed, `NAME:BASE64`; may be repeated")
	return cmd
}

// request checks the command line before anybody is asked. A directory is the
// server's, but who names one from where he stands is on the server.
func (o importOptions) request() (*floxv1.ImportRequest, error) {
	if o.from == "" {
		return nil, cli.Usage("--from is missing: want http://…, https://…, s3://… or a directory on the server")
	}
	if o.jobs == 0 || o.jobs > 64 {
		return nil, cli.Usage("--jobs %d: want 1 to 64", o.jobs)
	}
	for _, k := range o.keys {
		if name, key, found := strings.Cut(k, ":"); !found || name == "" || key == "" {
			return nil, cli.Usage("--key %q: want NAME:BASE64, as in trusted-public-keys of nix.conf", k)
		}
	}
	web := strings.HasPrefix(o.from, "http://") || strings.HasPrefix(o.from, "https://")
	if web && len(o.paths) == 0 {
		return nil, cli.Usage("a cache behind a URL cannot be listed: name the paths to import")
	}
	from := o.from
	if !strings.Contains(from, "://") {
		var err error
		if from, err = filepath.Abs(from); err != nil {
			return nil, err
		}
	}
	paths, err := storeArgs(o.paths)
	return &floxv1.ImportRequest{From: from, Paths: paths, Jobs: o.jobs, Keys: o.keys}, err
}

// importFacts is one line of import --json; the last one says finished.
type importFacts struct {
	DonePaths   uint64   `json:"donePaths"`
	TotalPaths  uint64   `json:"totalPaths"`
	FailedPaths uint64   `json:"failedPaths"`
	DoneBytes   uint64   `json:"doneBytes"`
	TotalBytes  uint64   `json:"totalBytes"`
	Now         string   `json:"now"`
	Failed      []string `json:"failed,omitempty"`
	Finished    bool     `json:"finished"`
}

func importOf(p *floxv1.ImportProgress) importFacts {
	return importFacts{
		DonePaths: p.GetDonePaths(), TotalPaths: p.GetTotalPaths(), FailedPaths: p.GetFailedPaths(),
		DoneBytes: p.GetDoneBytes(), TotalBytes: p.GetTotalBytes(), Now: p.GetNow(), Failed: p.GetFailed(), Finished: p.GetFinished(),
	}
}

// runImport shows progress until the storehouse says that it is finished. Some
// paths that failed make the command fail.
func runImport(ctx context.Context, opts importOptions, out, errOut *output) error {
	req, err := opts.request()
	if err != nil {
		return err
	}
	start := time.Now()
	stream, err := opts.admin().Import(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	bar := newProgress(errOut)
	defer bar.end()
	var last *floxv1.ImportProgress
	for stream.Receive() {
		last = stream.Msg()
		if out.json {
			if err := out.printJSONLine(importOf(last)); err != nil {
				return err
			}
			continue
		}
		if len(last.GetFailed()) > 0 {
			bar.end()
		}
		for _, line := range last.GetFailed() {
			errOut.printf("not imported: %s\n", clean(line))
		}
		bar.show(step{
			done: last.GetDoneBytes(), total: last.GetTotalBytes(), what: last.GetNow(),
			extra: fmt.Sprintf("%d of %d paths", last.GetDonePaths(), last.GetTotalPaths()),
		})
	}
	bar.end()
	if err := explainAdmin(stream.Err()); err != nil {
		if errors.Is(err, context.Canceled) && !out.json {
			errOut.printf("Stopped at %s. What has been imported stays; the same command goes on from there.\n", plural(last.GetDonePaths(), "path", "paths"))
		}
		return err
	}
	if !last.GetFinished() {
		return errors.New("the storehouse ended the import without finishing it; the same command goes on from there")
	}
	if !out.json {
		out.printf("%s, %s, in the storehouse (%s).\n", plural(last.GetDonePaths(), "path", "paths"),
			cli.FormatBytes(last.GetDoneBytes()), cli.FormatDuration(time.Since(start)))
	}
	if n := last.GetFailedPaths(); n > 0 {
		return fmt.Errorf("%s of %d not imported; the same command tries again", plural(n, "path", "paths"), last.GetTotalPaths())
	}
	return nil
}
