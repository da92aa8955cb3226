package ctl

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newProfileRetentionCmd(g *globals) *cobra.Command {
	f := &profileFlag{globals: g}
	q := &floxv1.SetProfileRetentionRequest{}
	off := false
	cmd := &cobra.Command{
		Use:   "retention [-p OWNER/NAME] [--keep N] [--days D] [--off]",
		Short: "Say which generations of a profile are kept",
		Long: `Say which generations of a profile are kept: the newest N, and those made in the last D
days; with one of the two, as that says. Others are dropped, at once and later by
themselves, and what only they had can be collected in the store. The generation that
lives, what it was made on and those with tags (floxctl profile tag) are never dropped.
A session (floxctl activate) of one that is dropped lacks its programs from then on.
Without a retention the newest 1,000 are kept. Owners of the profile say it; without
options it is shown.

` + cli.ExitCodes,
		Example: "  floxctl profile retention -p acme/ci --keep 20 --days 90",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if q.Name, err = f.name(); err != nil {
				return err
			}
			set := q.GetKeep() > 0 || q.GetDays() > 0
			switch {
			case set && off:
				return cli.Usage("--off keeps all generations that fit: want it alone")
			case !set && !off && (cmd.Flags().Changed("keep") || cmd.Flags().Changed("days")):
				return cli.Usage("want --keep or --days of at least 1, or --off")
			case !set && !off:
				at, err := f.generation(cmd.Context(), 0)
				if err != nil {
					return err
				}
				return tellRetention(g.printer(cmd), at.GetProfile())
			}
			resp, err := g.admin().SetProfileRetention(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explainAdmin(err)
			}
			return tellRetention(g.printer(cmd), resp.Msg.GetProfile())
		},
	}
	f.register(cmd)
	cmd.Flags().Uint32Var(&q.Keep, "keep", 0, "keep the newest `N` generations")
	cmd.Flags().Uint32Var(&q.Days, "days", 0, "keep the generations of the last `D` days")
	cmd.Flags().BoolVar(&off, "off", false, "keep all generations that fit")
	return cmd
}

func tellRetention(out *output, p *floxv1.Profile) error {
	if out.json {
		return out.printJSON(profileOf(p))
	}
	name, keep, days := clean(p.GetName()), p.GetKeep(), p.GetDays()
	switch {
	case keep > 0 && days > 0:
		out.printf("%s keeps the newest %d generations and those of the last %d days.\n", name, keep, days)
	case keep > 0:
		out.printf("%s keeps the newest %d generations.\n", name, keep)
	case days > 0:
		out.printf("%s keeps the generations of the last %d days.\n", name, days)
	default:
		out.printf("%s keeps all generations that fit.\n", name)
	}
	for _, t := range p.GetTags() {
		out.printf("Kept as %s: generation %d\n", clean(t.GetName()), t.GetGeneration())
	}
	return nil
}

func newProfileTagCmd(g *globals) *cobra.Command {
	f := &profileFlag{globals: g}
	drop := ""
	cmd := &cobra.Command{
		Use:   "tag GENERATION NAME [-p OWNER/NAME] | tag --drop NAME",
		Short: "Give a generation of a profile a name, by which it is kept",
		Long: `Give a generation of a profile a name. It is kept as long as it has one, and show, diff
and rollback --to take @NAME for its number. A name that another generation has moves.
Writers of the profile may do it.

` + cli.ExitCodes,
		Example: "  floxctl profile tag 41 v1.0 -p acme/ci\n  floxctl rollback --to @v1.0 -p acme/ci",
		Args:    cli.Args(0, 2, "GENERATION and NAME"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			q := &floxv1.TagProfileRequest{Tag: drop}
			if q.Name, err = f.name(); err != nil {
				return err
			}
			switch {
			case drop == "" && len(args) != 2 || drop != "" && len(args) > 0:
				return cli.Usage("want GENERATION and NAME, or --drop NAME")
			case drop == "":
				if q.Tag = args[1]; q.GetTag() == "" {
					return fmt.Errorf("an empty NAME: %w", flox.ErrBadInput)
				}
				if q.Generation, err = f.number(cmd.Context(), args[0]); err != nil {
					return err
				}
			}
			resp, err := g.admin().TagProfile(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(profileOf(resp.Msg.GetProfile()))
			}
			if drop != "" {
				out.printf("%s has no tag %s any more.\n", clean(q.GetName()), clean(drop))
				return nil
			}
			out.printf("Generation %d of %s is kept as %s.\n", q.GetGeneration(), clean(q.GetName()), clean(q.GetTag()))
			return nil
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&drop, "drop", "", "take the tag `NAME` away")
	return cmd
}
