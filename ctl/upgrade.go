package ctl

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/profile/upgrade"
)

func newUpgradeCmd(g *globals) *cobra.Command {
	opts := &changeOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:   "upgrade [PACKAGE...] [-p OWNER/NAME] [--dry-run]",
		Short: "Bring packages of a profile to what their channels have now",
		Long: `Bring packages of a profile, or all of them, to what their channels have now, in one step.
What was installed as NAME@VERSION stays within that version, what is held (floxctl hold)
as it is. What did not come from a channel is not looked at. It says what of that this
machine has to fetch, and how much is here already, by what the new versions share.

` + cli.ExitCodes,
		Example: "  floxctl upgrade --dry-run\n  floxctl upgrade git -p acme/ci",
		Args:    cli.Args(0, -1, "PACKAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runUpgrade(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd), args)
		},
	}
	opts.register(cmd)
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl history")
	cmd.Flags().BoolVar(&opts.dryRun, "dry-run", false, "only say what would change")
	return cmd
}

func runUpgrade(ctx context.Context, opts *changeOptions, out, says *output, args []string) error {
	at, err := opts.generation(ctx, 0)
	if err != nil {
		return err
	}
	profile := at.GetProfile()
	for _, name := range args {
		p := packageNamed(at.GetGeneration(), name)
		switch {
		case p == nil:
			return cli.Explain(flox.ErrNotFound, "%s has no package %s; it has: %s", clean(profile.GetName()), clean(name), clean(strings.Join(packageNames(at.GetGeneration()), " ")))
		case p.GetHeld():
			return cli.Explain(flox.ErrBadInput, "%s is held in %s: floxctl unhold %s, or install what you want of it", clean(name), clean(profile.GetName()), clean(name))
		case !upgrade.IsName(p.GetSource()):
			return cli.Explain(flox.ErrBadInput, "%s was installed from %s, and not from a channel: install it again", clean(name), clean(p.GetSource()))
		}
	}
	q := &floxv1.ChangeProfileRequest{Kind: "upgrade", Parent: profile.GetLive()}
	for _, p := range at.GetGeneration().GetPackages() {
		if len(args) > 0 && !slices.Contains(args, p.GetName()) || !upgrade.Looks(p) {
			continue
		}
		now, err := fromChannel(ctx, opts.globals, says, &installable{arg: p.GetSource(), name: p.GetSource()}, upgrade.Systems(p), opts.dryRun)
		if err != nil {
			return err
		}
		q.Set = append(q.Set, upgrade.InPlaceOf(p, now))
	}
	return runChange(ctx, opts, out, q)
}
