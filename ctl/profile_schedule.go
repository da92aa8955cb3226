package ctl

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/profile/upgrade"
)

func newProfileScheduleCmd(g *globals) *cobra.Command {
	f := &profileFlag{globals: g}
	at, every := "", ""
	cmd := &cobra.Command{
		Use:   "schedule [on|off] [-p OWNER/NAME] [--at HH:MM] [--every TIME]",
		Short: "Say when the storehouse upgrades a profile by itself",
		Long: `Say when the storehouse upgrades a profile by itself, as floxctl upgrade does: what came by
name from a channel. on is once a day, at a time of day that each profile has for itself;
that is the default. --at is once a day at that time (UTC); --every is that often, such as
7d or 12h; off leaves upgrades to people. Packages that are held (floxctl hold) stay as they
are, and so does a profile that was rolled back, until a person changes it. What cannot be
made stays as it is and the others are upgraded; what stayed and why is shown here.
Owners of the profile say it; without options it is shown.

` + cli.ExitCodes,
		Example: "  floxctl profile schedule on -p acme/ci\n  floxctl profile schedule -p acme/ci --every 7d --at 03:00",
		Args:    cli.Args(0, 1, "on or off"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := parseSchedule(append(args, "")[0], at, every)
			if err != nil {
				return err
			}
			return runSchedule(cmd.Context(), f, g.printer(cmd), s)
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&at, "at", "", "at `HH:MM` of the day, UTC (default: a time of the profile's own)")
	cmd.Flags().StringVar(&every, "every", "", "how often, a `TIME` such as 7d or 12h (default 1d)")
	return cmd
}

// parseSchedule reads what a person says of a schedule; nil = nothing.
func parseSchedule(word, at, every string) (*floxv1.ProfileSchedule, error) {
	s := &floxv1.ProfileSchedule{EveryMinutes: upgrade.Daily}
	switch {
	case word == "off" && at == "" && every == "":
		return &floxv1.ProfileSchedule{}, nil
	case word == "off":
		return nil, cli.Usage("off leaves upgrades to people: want it without --at and --every")
	case word != "on" && word != "":
		return nil, cli.Usage("%q: want on or off", word)
	case word == "" && at == "" && every == "":
		return nil, nil //nolint:nilnil // nothing was said
	}
	if every != "" {
		span, err := parseSpan("--every", every)
		if err != nil {
			return nil, err
		}
		s.EveryMinutes = uint32(min(span/time.Minute, 1<<31)) //nolint:gosec // bounded
		if span%time.Minute != 0 {
			return nil, cli.Usage("--every %q: want whole minutes", every)
		}
	}
	if at != "" {
		t, err := time.Parse("15:04", at)
		if err != nil {
			return nil, cli.Usage("--at %q: want a time of the day, in UTC, such as 03:00", at)
		}
		minute := uint32(t.Hour()*60 + t.Minute()) //nolint:gosec // not negative
		s.AtMinute = &minute
	}
	if err := upgrade.Check(s); err != nil {
		return nil, err
	}
	return s, nil
}

// runSchedule sets a schedule, or shows it if s is nil.
func runSchedule(ctx context.Context, f *profileFlag, out *output, s *floxv1.ProfileSchedule) error {
	name, err := f.name()
	if err != nil {
		return err
	}
	if s == nil {
		at, err := f.generation(ctx, 0)
		if err != nil {
			return err
		}
		if out.json {
			return out.printJSON(profileWithRuns(at))
		}
		tellSchedule(out, at)
		return nil
	}
	resp, err := f.admin().SetProfileSchedule(ctx, connect.NewRequest(&floxv1.SetProfileScheduleRequest{Name: name, Schedule: s}))
	if err != nil {
		return explainAdmin(err)
	}
	at := &floxv1.ShowProfileResponse{Profile: resp.Msg.GetProfile(), NextRunUnixMs: resp.Msg.GetNextRunUnixMs()}
	if out.json {
		return out.printJSON(profileWithRuns(at))
	}
	tellSchedule(out, at)
	return nil
}

// scheduleFacts is a schedule as JSON.
type scheduleFacts struct {
	EveryMinutes uint32  `json:"everyMinutes"`
	At           *string `json:"at"`      // of the day, UTC; null = a time of the profile's own
	Default      bool    `json:"default"` // nobody said anything of it
}

func scheduleOf(p *floxv1.Profile) *scheduleFacts {
	s := upgrade.Of(p)
	if s.GetEveryMinutes() == 0 {
		return nil
	}
	facts := &scheduleFacts{EveryMinutes: s.GetEveryMinutes(), Default: p.GetSchedule() == nil}
	if s.AtMinute != nil {
		at := upgrade.Clock(s.GetAtMinute())
		facts.At = &at
	}
	return facts
}

// runFacts is what an upgrade by schedule came to, as JSON.
type runFacts struct {
	Due        *string `json:"due"`
	Time       *string `json:"time"`
	Result     string  `json:"result"` // upgraded, unchanged, held or failed
	Detail     string  `json:"detail"`
	Generation uint64  `json:"generation"`
}

// scheduledFacts is a profile with what becomes of its schedule, as JSON.
type scheduledFacts struct {
	sharedProfileFacts
	NextUpgrade *string        `json:"nextUpgrade"`        // null = never; in the past, it is due
	LastUpgrade *runFacts      `json:"lastUpgrade"`        // by its schedule; null = there was none
	Bindings    []bindingFacts `json:"bindings,omitempty"` // of profiles of stock Nix on this machine, if it was asked for

	RollbackHere *hereFacts `json:"rollbackHere"` // that the storehouse has not heard of, or refused; null = there is none
}

func profileWithRuns(m *floxv1.ShowProfileResponse) scheduledFacts {
	facts := scheduledFacts{sharedProfileFacts: profileOf(m.GetProfile()), NextUpgrade: stampMs(m.GetNextRunUnixMs())}
	if run := m.GetLastRun(); run != nil {
		facts.LastUpgrade = &runFacts{stampMs(run.GetDueUnixMs()), stampMs(run.GetTimeUnixMs()), run.GetResult(), run.GetDetail(), run.GetGeneration()}
	}
	return facts
}

// tellSchedule says when a profile is upgraded, and what that last came to.
func tellSchedule(out *output, m *floxv1.ShowProfileResponse) {
	name, next := clean(m.GetProfile().GetName()), m.GetNextRunUnixMs()
	switch wait := time.Until(time.UnixMilli(next)); {
	case next == 0:
		out.printf("%s is upgraded by people only; to have the storehouse do it: floxctl profile schedule on -p %s\n", name, name)
	case wait <= 0:
		out.printf("%s is upgraded %s, and due now.\n", name, upgrade.Describe(m.GetProfile().GetSchedule()))
	default:
		out.printf("%s is upgraded %s, next in %s.\n", name, upgrade.Describe(m.GetProfile().GetSchedule()), cli.FormatDuration(wait.Truncate(time.Second)))
	}
	run := m.GetLastRun()
	if run == nil {
		return
	}
	words := map[string]string{
		"upgraded": "to generation", "unchanged": "nothing was newer than generation", "held": "left alone, as it was rolled back, in generation", "failed": "failed, in generation",
	}[run.GetResult()]
	out.printf("Last upgrade by schedule, %s ago: %s %d", ago(run.GetTimeUnixMs(), time.Now()), words, run.GetGeneration())
	if run.GetDetail() != "" {
		out.printf(": %s", clean(run.GetDetail()))
	}
	out.printf("\n")
}
