package ctl

import (
	"context"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newProfileAssignCmd(g *globals) *cobra.Command {
	q := &floxv1.AssignProfileRequest{}
	cmd := &cobra.Command{
		Use:   "assign OWNER/NAME --to LABEL=VALUE|MACHINE...",
		Short: "Have machines show a profile",
		Long: `Have machines show a profile, at /flox/OWNER/NAME and in what ls /flox lists, whoever uses
them: one machine, or all that have a label (floxctl machine label), now or later. Admins
of the storehouse do it.

` + cli.ExitCodes,
		Example: "  floxctl profile assign acme/base --to site=berlin",
		Args:    cli.Args(1, 1, "OWNER/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(q.GetAdd()) == 0 {
				return cli.Usage("want --to LABEL=VALUE or --to MACHINE")
			}
			q.Name = args[0]
			return runAssign(cmd.Context(), g, g.printer(cmd), q)
		},
	}
	cmd.Flags().StringArrayVar(&q.Add, "to", nil, "`LABEL=VALUE`, or a machine's name or peer ID (can be repeated)")
	return cmd
}

func newProfileUnassignCmd(g *globals) *cobra.Command {
	q := &floxv1.AssignProfileRequest{}
	cmd := &cobra.Command{
		Use:     "unassign OWNER/NAME --from LABEL=VALUE|MACHINE...",
		Short:   "Have machines show a profile no more",
		Long:    "Take back what floxctl profile assign said. Those whose users have a role in the profile\ngo on showing it. Admins of the storehouse do it.\n\n" + cli.ExitCodes,
		Example: "  floxctl profile unassign acme/base --from site=berlin",
		Args:    cli.Args(1, 1, "OWNER/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(q.GetDrop()) == 0 {
				return cli.Usage("want --from LABEL=VALUE or --from MACHINE; to what it is assigned: floxctl profile show %s", args[0])
			}
			q.Name = args[0]
			return runAssign(cmd.Context(), g, g.printer(cmd), q)
		},
	}
	cmd.Flags().StringArrayVar(&q.Drop, "from", nil, "`LABEL=VALUE`, or a machine's name or peer ID (can be repeated)")
	return cmd
}

func runAssign(ctx context.Context, g *globals, out *output, q *floxv1.AssignProfileRequest) error {
	resp, err := g.admin().AssignProfile(ctx, connect.NewRequest(q))
	if err != nil {
		return explainAdmin(err)
	}
	p := resp.Msg.GetProfile()
	if out.json {
		return out.printJSON(profileOf(p))
	}
	if len(p.GetAssigned()) == 0 {
		out.printf("%s is assigned to no machine.\n", clean(p.GetName()))
		return nil
	}
	out.printf("%s is assigned to: %s\n", clean(p.GetName()), clean(strings.Join(assignmentsOf(p), ", ")))
	return nil
}

// assignmentsOf gives machines' names, and LABEL=VALUE.
func assignmentsOf(p *floxv1.Profile) []string {
	all := make([]string, 0, len(p.GetAssigned()))
	for _, to := range p.GetAssigned() {
		word := to.GetMachine()
		switch {
		case to.GetLabel() != "":
			word = to.GetLabel() + "=" + to.GetValue()
		case word == "":
			word = to.GetPeer()
		}
		all = append(all, word)
	}
	return all
}

func newProfileShowCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "show OWNER/NAME",
		Short:   "Show who may do what with a profile, when it is upgraded, what of it is kept, and where it is shown",
		Long:    "Show who may do what with a profile, when it is upgraded by itself, what of it is kept,\non which machines it is shown, and what is bound to it on this one. What is in it: floxctl list -p OWNER/NAME.\n\n" + cli.ExitCodes,
		Example: "  floxctl profile show acme/ci",
		Args:    cli.Args(1, 1, "OWNER/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f := &profileFlag{globals: g, profile: args[0]}
			at, err := f.generation(cmd.Context(), 0)
			if err != nil {
				return err
			}
			out, p := g.printer(cmd), at.GetProfile()
			if out.json {
				facts := profileWithRuns(at)
				facts.RollbackHere = g.rollbackHere(cmd.Context(), p.GetName())
				facts.Bindings = bindingsOn(cmd.Context(), g, p.GetName())
				return out.printJSON(facts)
			}
			out.printf("%s: generation %d lives, for %s, changed %s ago\n", clean(p.GetName()), p.GetLive(), clean(strings.Join(p.GetSystems(), ", ")), ago(p.GetChangedUnixMs(), time.Now()))
			if p.GetHeld() {
				out.printf("It was rolled back: nothing automatic changes it before a person does.\n")
			}
			g.rollbackHere(cmd.Context(), p.GetName()).tell(out)
			for _, gr := range p.GetGrants() {
				out.printf("%s: %s\n", clean(gr.GetUser()), clean(gr.GetRole()))
			}
			for _, to := range assignmentsOf(p) {
				out.printf("Assigned to: %s\n", clean(to))
			}
			for _, name := range p.GetFormerly() {
				out.printf("Formerly: %s\n", clean(name))
			}
			for _, b := range bindingsOn(cmd.Context(), g, p.GetName()) {
				out.printf("Bound here: %s\n", b.words())
			}
			tellSchedule(out, at)
			return tellRetention(out, p)
		},
	}
}
