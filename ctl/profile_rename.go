package ctl

import (
	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newProfileRenameCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "rename OLD NEW",
		Short: "Give a profile another name",
		Long: `Give a profile another name, OWNER/NAME of the same owner, on every machine at once. Its
generations, their numbers and its history stay. Who asks for it by the old name is told
the new one, until another profile is made with the old name. An owner of the profile
may do it.

` + cli.ExitCodes,
		Example: "  floxctl profile rename acme/ci acme/build",
		Args:    cli.Args(2, 2, "OLD and NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			resp, err := g.admin().RenameProfile(cmd.Context(), connect.NewRequest(&floxv1.RenameProfileRequest{Name: args[0], To: args[1]}))
			if err != nil {
				return explainAdmin(err)
			}
			out, p := g.printer(cmd), resp.Msg.GetProfile()
			if out.json {
				return out.printJSON(profileOf(p))
			}
			out.printf("Profile %s is %s now.\n", clean(args[0]), clean(p.GetName()))
			return nil
		},
	}
}
