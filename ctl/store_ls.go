package ctl

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// lsOptions are the command line of ls.
type lsOptions struct {
	*globals
	path      string
	recursive bool
	long      bool
}

func newStoreLsCmd(g *globals) *cobra.Command {
	opts := lsOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "ls PATH [-l] [-R]",
		Short: "List what a store path holds, without reading any of its files",
		Long: `List a directory inside a store path, from its manifest: no file is fetched for
it. With --json every entry is one line.

` + cli.ExitCodes,
		Args: cli.Args(1, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.path = args[0]
			return runStoreLs(cmd.Context(), opts, g.printer(cmd))
		},
	}
	cmd.Flags().BoolVarP(&opts.recursive, "recursive", "R", false, "everything below, at any depth")
	cmd.Flags().BoolVarP(&opts.long, "long", "l", false, "mode, size, how much of it is here, link target")
	return cmd
}

// entryFacts is one line of ls --json; paths are relative to the one asked for.
type entryFacts struct {
	Path       string `json:"path"`
	Kind       string `json:"kind"`
	Executable bool   `json:"executable"`
	Size       uint64 `json:"size"`
	LocalBytes uint64 `json:"localBytes"`
	Target     string `json:"target,omitempty"`
}

// runStoreLs prints as the entries come: a store path may hold 100,000.
func runStoreLs(ctx context.Context, opts lsOptions, out *output) error {
	path, err := storeArg(opts.path)
	if err != nil {
		return err
	}
	stream, err := opts.agent().List(ctx, connect.NewRequest(&floxv1.ListRequest{Path: path, Recursive: opts.recursive}))
	if err != nil {
		return explain(err)
	}
	defer stream.Close()
	for stream.Receive() {
		e := stream.Msg()
		if e.GetPath() == "" && !out.json { // what was asked for is no directory
			e.Path = path
		}
		switch {
		case out.json:
			err := out.printJSONLine(entryFacts{
				Path: e.GetPath(), Kind: e.GetKind(), Executable: e.GetExecutable(), Size: e.GetSize(),
				LocalBytes: e.GetLocalBytes(), Target: e.GetTarget(),
			})
			if err != nil {
				return err
			}
		case opts.long:
			out.printf("%s\n", longEntry(e))
		default:
			out.printf("%s\n", clean(e.GetPath()))
		}
	}
	return explain(stream.Err())
}

// longEntry gives "-r-xr-xr-x  1.20 MiB  45 %  bin/git".
func longEntry(e *floxv1.ListEntry) string {
	mode, size, here, name := "-r--r--r--", cli.FormatBytes(e.GetSize()), "", clean(e.GetPath())
	switch e.GetKind() {
	case "directory":
		mode, size = "dr-xr-xr-x", "-"
	case "symlink":
		mode, size = "lrwxrwxrwx", "-"
		name += " -> " + clean(e.GetTarget())
	default:
		if e.GetExecutable() {
			mode = "-r-xr-xr-x"
		}
		here = "100 %"
		if e.GetSize() > 0 {
			here = fmt.Sprintf("%d %%", step{done: e.GetLocalBytes(), total: e.GetSize()}.percent())
		}
	}
	return fmt.Sprintf("%s  %9s  %5s  %s", mode, size, here, name)
}
