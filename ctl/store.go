package ctl

import (
	"github.com/spf13/cobra"
)

// newStoreCmd only holds the commands below it.
func newStoreCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "List store paths, look into them, add and verify them, and say what keeps them",
	}
	cmd.AddCommand(newStoreListCmd(g), newStoreLsCmd(g), newStoreCatCmd(g), newStoreInfoCmd(g), newStoreAddCmd(g), newStoreVerifyCmd(g),
		newStoreWhyCmd(g), newStoreRootsCmd(g), newStoreDifferencesCmd(g))
	return cmd
}
