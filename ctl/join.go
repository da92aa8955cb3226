package ctl

import (
	"os"
	"syscall"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

func newJoinCmd() *cobra.Command {
	return floxdCmd("join", &cobra.Command{
		Use:   "join [INVITE] [flags of floxd join]",
		Short: "Make this machine a part of a storehouse",
		Long: `Make this machine a part of a storehouse, with the line that floxctl invite printed.
Without INVITE it looks for a storehouse on the LAN that lets machines in now
(floxctl invite --lan 10m), shows its fingerprint, and asks.

It needs root, and runs floxd join; floxd join --help shows every flag.

` + cli.ExitCodes,
		Example: `  sudo floxctl join flox1AAB…
  sudo floxctl join                         a storehouse of this LAN
  sudo floxctl join --yes FINGERPRINT       the same in a script`,
	})
}

func newLeaveCmd() *cobra.Command {
	return floxdCmd("leave", &cobra.Command{
		Use:   "leave [--purge] [--yes] [flags of floxd leave]",
		Short: "Take this machine out of its storehouse",
		Long: `Take this machine out of the storehouse it joined, and stop what runs of it here.
--purge removes what it has on the disk, too.

It needs root, and runs floxd leave; floxd leave --help shows every flag.

` + cli.ExitCodes,
		Example: "  sudo floxctl leave\n  sudo floxctl leave --purge --yes",
	})
}

// floxdCmd makes a command of one that floxd has: this program is small, and
// what talks to other machines is not in it.
func floxdCmd(name string, cmd *cobra.Command) *cobra.Command {
	cmd.DisableFlagParsing = true
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, arg := range args {
			if arg == "--help" || arg == "-h" {
				return cmd.Help()
			}
		}
		floxd := findFloxd()
		if floxd == "" {
			return cli.Explain(flox.ErrNotFound, "floxd is neither beside floxctl nor in PATH: install it, or run it by its name: sudo /path/to/floxd %s", name)
		}
		err := syscall.Exec(floxd, append([]string{floxd, name}, args...), os.Environ())
		return cli.Explain(flox.ErrNotFound, "cannot run %s: %v", floxd, err)
	}
	return cmd
}
