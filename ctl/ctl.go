// Package ctl holds floxctl's commands, one file each: newXCmd builds a
// command, runX does its work.
//
// It talks to the local agent, or on a server to the storehouse, over a unix
// socket and to nothing else. It
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

// globals are the options every command has.
type globals struct {
	socket  string
	json    bool
	noColor bool
}

// newRootCmd builds the whole tree of commands. It is built on every start, so
// nothing here may open, read or ask anything.
func newRootCmd() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:   "floxctl",
		Short: "Look at and steer the package store of this machine",
		Long: `floxctl talks to the agent that mounts the package store on this machine.

It asks the agent over its control socket, ` + cli.DefaultSocket + ` unless
--socket or ` + cli.EnvSocket + ` says otherwise. Sizes are binary (1 KiB = 1,024 bytes)
and exact with --json; what goes on over time is JSON lines there.

` + cli.ExitCodes,
		Example: `  floxctl status                  is everything well, and if not, what to do
  floxctl watch                   which program waits for which file
  floxctl download ./result       fetch a path and all it needs, now
  floxctl doctor                  check this machine`,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&g.socket, "socket", "", "the agent's control socket, a `FILE` (default $"+cli.EnvSocket+", then "+cli.DefaultSocket+")")
	flags.BoolVar(&g.json, "json", false, "print facts as JSON")
	flags.BoolVar(&g.noColor, "no-color", false, "print without colours (also: NO_COLOR in the environment)")
	root.AddCommand(
		newStatusCmd(g), newPeersCmd(g), newExplainCmd(g), newWatchCmd(g), newStoreCmd(g), newRunCmd(g), newDownloadCmd(g),
		newKeepCmd(g), newUnkeepCmd(g), newCacheCmd(g), newDoctorCmd(g), newVersionCmd(g),
		newInviteCmd(g), newMachineCmd(g), newAuditCmd(g), newKeyCmd(g), newStorehouseCmd(g), newImportCmd(g), newUpstreamCmd(g), newQueueCmd(g), newWorkersCmd(g),
		newProfileCmd(g), newInstallCmd(g), newUninstallCmd(g), newListCmd(g), newShowCmd(g), newHistoryCmd(g), newDiffCmd(g), newWhyCmd(g), newRollbackCmd(g),
		newHoldCmd(g, true), newHoldCmd(g, false), newActivateCmd(g), newDirenvCmd(g), newUpgradeCmd(g), newChannelCmd(g), newSearchCmd(g),
		newJoinCmd(), newLeaveCmd(), newShellenvCmd(g), newNixCmd(g),
	)
	return root
}
