package ctl

import (
	"github.com/spf13/cobra"
)

// newStoreCmd only holds the commands below it.
func newStoreCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "List store paths, look into them, add and verify them",
	}
	cmd.AddCommand(newStoreListCmd(g), newStoreLsCmd(g), newStoreCatCmd(g), newStoreInfoCmd(g), newStoreAddCmd(g), newStoreVerifyCmd(g))
	return cmd
}
