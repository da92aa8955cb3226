package ctl

import (
	"context"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newStoreCatCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "cat PATH",
		Short: "Print a file of the store, also where the store is not mounted",
		Long: `Print the bytes of one regular file inside a store path, checked like any other
read. It needs the agent, not the mount.

` + cli.ExitCodes,
		Args: cli.Args(1, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runStoreCat(cmd.Context(), g, cmd.OutOrStdout(), args[0])
		},
	}
}

// runStoreCat writes as the bytes come; a file may be larger than memory.
func runStoreCat(ctx context.Context, g *globals, w io.Writer, arg string) error {
	path, err := storeArg(arg)
	if err != nil {
		return err
	}
	stream, err := g.agent().Cat(ctx, connect.NewRequest(&floxv1.CatRequest{Path: path}))
	if err != nil {
		return explain(err)
	}
	defer stream.Close()
	for stream.Receive() {
		if _, err := w.Write(stream.Msg().GetData()); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return explain(stream.Err())
}
