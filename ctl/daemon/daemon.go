// Package daemon holds floxd's commands, one file each, and its configuration.
//
// It composes: what an agent or a storehouse does is theirs, and what a command
// line looks like is cli's.
package daemon

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/floxctl/flox/ctl/cli"
)

// Main runs floxd with the process's arguments and returns its exit code.
func Main() int { return cli.Run(newRootCmd(), os.Args[1:]) }

func newRootCmd() *cobra.Command {
	return &cobra.Command{Use: "floxd"}
}
