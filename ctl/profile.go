package ctl

import (
	"cmp"
	"context"
	"fmt"
	"os/user"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// defaultProfile is the name of a person's profile where none is given.
const defaultProfile = "default"

// profileFlag is -p of the commands about one profile.
type profileFlag struct {
	*globals
	profile string
}

func (f *profileFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.profile, "profile", "p", "", "the profile, OWNER/NAME (default: your own, USER/"+defaultProfile+")")
}

// name is the profile's name.
func (f *profileFlag) name() (string, error) {
	if f.profile != "" {
		return f.profile, nil
	}
	u, err := user.Current()
	if err != nil {
		return "", fmt.Errorf("who you are cannot be found out, so name a profile with -p OWNER/NAME: %w", err)
	}
	return u.Username + "/" + defaultProfile, nil
}

func newProfileCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "Make, list and share profiles",
		Long: `A profile is a set of packages that is the same on every machine. Each change makes
a new generation of it, in one step for all its systems; earlier ones can live again.
What is in a profile: floxctl install, uninstall, list, show, history, rollback.

` + cli.ExitCodes,
		Example: "  floxctl profile create acme/ci",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newProfileCreateCmd(g), newProfileListCmd(g), newProfileRenameCmd(g), newProfileDeleteCmd(g), newProfileRetentionCmd(g), newProfileTagCmd(g), newProfileScheduleCmd(g),
		newProfileShowCmd(g), newProfileAssignCmd(g), newProfileUnassignCmd(g), newProfileBindCmd(g), newProfileUnbindCmd(g), newProfileGrantCmd(g), newProfileExportCmd(g), newProfileImportCmd(g))
	return cmd
}

func newProfileCreateCmd(g *globals) *cobra.Command {
	var systems []string
	cmd := &cobra.Command{
		Use:   "create OWNER/NAME [--system SYSTEM]...",
		Short: "Make an empty profile",
		Long: `Make an empty profile. People make their own (USER/...); those of an organisation an
admin makes, and gives roles in them with floxctl profile grant. Every package of a
profile has to be there for all its systems.

` + cli.ExitCodes,
		Example: "  floxctl profile create acme/ci --system x86_64-linux --system aarch64-linux",
		Args:    cli.Args(1, 1, "OWNER/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(systems) == 0 {
				systems = []string{thisSystem()}
			}
			resp, err := g.admin().CreateProfile(cmd.Context(), connect.NewRequest(&floxv1.CreateProfileRequest{Name: args[0], Systems: systems}))
			if err != nil {
				return explainAdmin(err)
			}
			out, p := g.printer(cmd), resp.Msg.GetProfile()
			if out.json {
				return out.printJSON(profileOf(p))
			}
			out.printf("Profile %s for %s is there. To put something in: floxctl install -p %s PATH\n", clean(p.GetName()), strings.Join(p.GetSystems(), ", "), clean(p.GetName()))
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&systems, "system", nil, "a `SYSTEM` that it is for, such as x86_64-linux (default: this machine's; can be repeated)")
	return cmd
}

func newProfileListCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "list [OWNER]",
		Short:   "List the profiles that you may read",
		Long:    "List the profiles that you may read, of one owner or of all.\n\n" + cli.ExitCodes,
		Example: "  floxctl profile list acme",
		Args:    cli.Args(0, 1, "OWNER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runProfileList(cmd.Context(), g, g.printer(cmd), append(args, "")[0])
		},
	}
}

func runProfileList(ctx context.Context, g *globals, out *output, owner string) error {
	var all []*floxv1.Profile
	for after := ""; ; {
		resp, err := g.admin().ListProfiles(ctx, connect.NewRequest(&floxv1.ListProfilesRequest{Owner: owner, After: after}))
		if err != nil {
			return explainAdmin(err)
		}
		all = append(all, resp.Msg.GetProfiles()...)
		if !resp.Msg.GetMore() {
			break
		}
		after = all[len(all)-1].GetName()
	}
	if out.json {
		facts := make([]sharedProfileFacts, len(all))
		for i, p := range all {
			facts[i] = profileOf(p)
		}
		return out.printJSON(struct {
			Profiles []sharedProfileFacts `json:"profiles"`
		}{facts})
	}
	if len(all) == 0 {
		out.printf("No profile that you may read. To make one: floxctl profile create OWNER/NAME\n")
		return nil
	}
	rows := [][]string{{"PROFILE", "GENERATION", "CHANGED", "SYSTEMS", "ASSIGNED"}}
	for _, p := range all {
		rows = append(rows, []string{clean(p.GetName()), fmt.Sprint(p.GetLive()), ago(p.GetChangedUnixMs(), time.Now()) + " ago", clean(strings.Join(p.GetSystems(), ", ")), clean(strings.Join(assignmentsOf(p), ", "))})
	}
	out.table(rows, map[int]bool{1: true})
	return nil
}

// sharedProfileFacts is a profile as JSON.
type sharedProfileFacts struct {
	Name       string            `json:"name"`
	Systems    []string          `json:"systems"`
	Generation uint64            `json:"generation"` // that lives; 0 = none
	Last       uint64            `json:"last"`
	Held       bool              `json:"held"`
	Roles      map[string]string `json:"roles"` // by user, beside the owner
	CreatedAt  *string           `json:"createdAt"`
	CreatedBy  string            `json:"createdBy"`
	ChangedAt  *string           `json:"changedAt"`
	Keep       uint32            `json:"keep"` // generations, the newest; with days 0, 0 = all that fit
	Days       uint32            `json:"days"`
	Tags       map[string]uint64 `json:"tags"`     // generations by name
	Assigned   []string          `json:"assigned"` // machines, and LABEL=VALUE
	Formerly   []string          `json:"formerly"` // names that lead to it
	Schedule   *scheduleFacts    `json:"schedule"` // by which it is upgraded; null = by people only
}

func profileOf(p *floxv1.Profile) sharedProfileFacts {
	roles := map[string]string{}
	for _, g := range p.GetGrants() {
		roles[g.GetUser()] = g.GetRole()
	}
	tags := map[string]uint64{}
	for _, t := range p.GetTags() {
		tags[t.GetName()] = t.GetGeneration()
	}
	return sharedProfileFacts{
		p.GetName(), p.GetSystems(), p.GetLive(), p.GetLast(), p.GetHeld(), roles,
		stampMs(p.GetCreatedUnixMs()), p.GetCreatedBy(), stampMs(p.GetChangedUnixMs()),
		p.GetKeep(), p.GetDays(), tags, assignmentsOf(p), append([]string{}, p.GetFormerly()...), scheduleOf(p),
	}
}

func newProfileDeleteCmd(g *globals) *cobra.Command {
	yes := false
	cmd := &cobra.Command{
		Use:     "delete OWNER/NAME [--yes]",
		Short:   "Forget a profile with all its generations",
		Long:    "Forget a profile with all its generations, on every machine. What it kept can be\ncollected then.\n\n" + cli.ExitCodes,
		Example: "  floxctl profile delete acme/old --yes",
		Args:    cli.Args(1, 1, "OWNER/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !yes {
				return cli.Explain(flox.ErrBadInput, "this forgets %s with all its generations, for everybody, and cannot be undone: say --yes if that is meant", clean(args[0]))
			}
			if _, err := g.admin().DeleteProfile(cmd.Context(), connect.NewRequest(&floxv1.DeleteProfileRequest{Name: args[0]})); err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(struct {
					Deleted string `json:"deleted"`
				}{args[0]})
			}
			out.printf("Profile %s is forgotten.\n", clean(args[0]))
			return nil
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	return cmd
}

func newProfileGrantCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "grant OWNER/NAME USER=reader|writer|owner|none...",
		Short: "Say who may read, change and own a profile",
		Long: `Give people roles in a profile, or take them away (none). A reader sees it, a writer
changes what is in it, an owner gives roles and deletes it. The user * is everybody,
who can be a reader. The owner in its name needs no role.

` + cli.ExitCodes,
		Example: "  floxctl profile grant acme/ci bob=writer '*=reader'",
		Args:    cli.Args(2, -1, "OWNER/NAME and USER=ROLE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := &floxv1.GrantProfileRequest{Name: args[0]}
			for _, word := range args[1:] {
				name, role, ok := strings.Cut(word, "=")
				if !ok || name == "" || role == "" {
					return fmt.Errorf("%q: want USER=reader, writer, owner or none: %w", word, flox.ErrBadInput)
				}
				if role == "none" {
					role = ""
				}
				q.Grants = append(q.Grants, &floxv1.ProfileGrant{User: name, Role: role})
			}
			resp, err := g.admin().GrantProfile(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(profileOf(resp.Msg.GetProfile()))
			}
			for _, gr := range resp.Msg.GetProfile().GetGrants() {
				out.printf("%s: %s\n", clean(gr.GetUser()), cmp.Or(gr.GetRole(), "none"))
			}
			return nil
		},
	}
}
