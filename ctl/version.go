package ctl

import (
	"github.com/spf13/cobra"

	"github.com/floxctl/flox/ctl/cli"
)

func newVersionCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print which build of floxctl this is",
		Long:  "Print which build of floxctl this is. The agent's version is part of: floxctl status.",
		Args:  cli.Args(0, 0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return runVersion(g.printer(cmd)) },
	}
}

// runVersion asks nobody: it must work when nothing else does.
func runVersion(out *output) error {
	v := cli.ReadVersion()
	if out.json {
		return out.printJSON(v)
	}
	out.printf("floxctl %s\n", v)
	return nil
}
