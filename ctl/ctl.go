// Package ctl holds floxctl's commands, one file each: newXCmd builds a
// command, runX does its work.
//
// It talks to the local agent over its unix socket and to nothing else. It
// must not know how anything is stored, moved or mounted: a program linked
// with it starts in milliseconds.
package ctl

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/floxctl/flox/ctl/cli"
)

// Main runs floxctl with the process's arguments and returns its exit code.
func Main() int { return cli.Run(newRootCmd(), os.Args[1:]) }

func newRootCmd() *cobra.Command {
	return &cobra.Command{Use: "floxctl"}
}
