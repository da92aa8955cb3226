package ctl

import (
	"github.com/spf13/cobra"

	"github.com/floxctl/flox/ctl/cli"
)

// newStorehouseCmd only holds the commands below it.
func newStorehouseCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "storehouse",
		Short: "Run the storehouse: its servers, its content, its backups",
		Long: `What operators of a storehouse do, on one of its servers (as root) or on any machine
that has joined. Every member may look; who changes something is an admin
(floxctl machine user), and it is written into the audit log.

` + cli.ExitCodes,
	}
	cmd.AddCommand(
		newHouseStatusCmd(g), newServersCmd(g), newTransferCmd(g), newDrainCmd(g), newRemoveServerCmd(g),
		newUsageCmd(g), newCollectCmd(g), newKeepPathCmd(g),
		newBackupCmd(g), newBackupsCmd(g), newVerifyBackupCmd(g), newRestoreCmd(g),
	)
	return cmd
}
