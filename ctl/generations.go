package ctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newHistoryCmd(g *globals) *cobra.Command {
	f := &profileFlag{globals: g}
	limit := uint32(0)
	cmd := &cobra.Command{
		Use:     "history [-p OWNER/NAME] [--limit N]",
		Short:   "Show what happened to a profile: who changed what, when and where",
		Long:    "Show what happened to a profile, newest first: who changed what, when, on which\nmachine, and which generation lived then.\n\n" + cli.ExitCodes,
		Example: "  floxctl history -p acme/ci",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			name, err := f.name()
			if err != nil {
				return err
			}
			resp, err := g.admin().ProfileHistory(cmd.Context(), connect.NewRequest(&floxv1.ProfileHistoryRequest{Name: name, Limit: limit}))
			if err != nil {
				return explainAdmin(err)
			}
			return tellHistory(g.printer(cmd), resp.Msg)
		},
	}
	f.register(cmd)
	cmd.Flags().Uint32Var(&limit, "limit", 100, "show at most `N`")
	return cmd
}

type eventFacts struct {
	Time    *string `json:"time"`
	User    string  `json:"user"`
	Machine string  `json:"machine"`
	Kind    string  `json:"kind"`
	From    uint64  `json:"from"`
	To      uint64  `json:"to"`
	Reason  string  `json:"reason"`
	Detail  string  `json:"detail"`
}

func tellHistory(out *output, m *floxv1.ProfileHistoryResponse) error {
	if out.json {
		facts := make([]eventFacts, len(m.GetEvents()))
		for i, e := range m.GetEvents() {
			facts[i] = eventFacts{stampMs(e.GetTimeUnixMs()), e.GetActor().GetUser(), e.GetActor().GetMachine(), e.GetKind(), e.GetFrom(), e.GetTo(), e.GetReason(), e.GetDetail()}
		}
		return out.printJSON(struct {
			Profile    string       `json:"profile"`
			Generation uint64       `json:"generation"`
			Events     []eventFacts `json:"events"`
			More       bool         `json:"more"`
		}{m.GetProfile().GetName(), m.GetProfile().GetLive(), facts, m.GetMore()})
	}
	rows := [][]string{{"GENERATION", "WHEN", "WHO", "WHAT", ""}}
	for _, e := range m.GetEvents() {
		words := clean(e.GetDetail())
		if e.GetReason() != "" {
			words = strings.TrimSpace(words + " (" + clean(e.GetReason()) + ")")
		}
		rows = append(rows, []string{
			fmt.Sprint(e.GetTo()), ago(e.GetTimeUnixMs(), time.Now()) + " ago", clean(e.GetActor().GetUser() + " on " + e.GetActor().GetMachine()), clean(e.GetKind()), words,
		})
	}
	out.table(rows, map[int]bool{0: true})
	out.printf("%s: generation %d lives.\n", clean(m.GetProfile().GetName()), m.GetProfile().GetLive())
	return nil
}

func newRollbackCmd(g *globals) *cobra.Command {
	opts := &profileFlag{globals: g}
	q, to := &floxv1.RollbackProfileRequest{}, ""
	cmd := &cobra.Command{
		Use:   "rollback [-p OWNER/NAME] [--to GENERATION]",
		Short: "Let an earlier generation of a profile live again",
		Long: `Let an earlier generation of a profile live again, on every machine at once: what the one
that lives was made on, or --to. What is automatic leaves the profile alone from then on,
until a person changes it.

While the storehouse cannot be reached it counts on this machine alone, which passes it on
as soon as it can; if somebody changed the profile meanwhile, that counts (floxctl profile
show says so).

` + cli.ExitCodes,
		Example: "  floxctl rollback\n  floxctl rollback -p acme/ci --to 41 --reason 'broken build'",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if q.Name, err = opts.name(); err != nil {
				return err
			}
			if to != "" {
				if q.To, err = opts.number(cmd.Context(), to); err != nil {
					return err
				}
			}
			done, err := g.rollBack(cmd.Context(), q)
			if err != nil {
				return err
			}
			return done.tell(g.printer(cmd))
		},
	}
	opts.register(cmd)
	cmd.Flags().StringVar(&to, "to", "", "the `GENERATION`, or @TAG (default: what lived before the one that lives)")
	cmd.Flags().StringVar(&q.Reason, "reason", "", "why, shown by floxctl history")
	return cmd
}

func newListCmd(g *globals) *cobra.Command { return newShowGenerationCmd(g, "list", 0) }
func newShowCmd(g *globals) *cobra.Command { return newShowGenerationCmd(g, "show GENERATION", 1) }

// newShowGenerationCmd shows the generation that lives, or one that is named.
func newShowGenerationCmd(g *globals, use string, args int) *cobra.Command {
	f := &profileFlag{globals: g}
	what := map[int]string{0: "List what is in a profile", 1: "Show what was in a profile in one generation"}[args]
	cmd := &cobra.Command{
		Use:     use + " [-p OWNER/NAME]",
		Short:   what,
		Long:    what + ": packages, versions and store paths.\n\n" + cli.ExitCodes,
		Example: "  floxctl " + strings.Replace(use, "GENERATION", "41", 1) + " -p acme/ci",
		Args:    cli.Args(args, args, strings.TrimPrefix(use, "show ")),
		RunE: func(cmd *cobra.Command, words []string) error {
			name, err := f.name()
			if err != nil {
				return err
			}
			q := &floxv1.ShowProfileRequest{Name: name}
			if args == 1 {
				if q.Generation, err = f.number(cmd.Context(), words[0]); err != nil {
					return err
				}
			}
			resp, err := g.admin().ShowProfile(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explainAdmin(err)
			}
			return tellGeneration(g.printer(cmd), resp.Msg)
		},
	}
	f.register(cmd)
	return cmd
}

func tellGeneration(out *output, m *floxv1.ShowProfileResponse) error {
	g := m.GetGeneration()
	if out.json {
		return out.printJSON(struct {
			Profile     sharedProfileFacts `json:"profile"`
			Generation  uint64             `json:"generation"`
			Parent      uint64             `json:"parent"`
			Packages    []packageFacts     `json:"packages"`
			Environment map[string]string  `json:"environment"`
		}{profileOf(m.GetProfile()), g.GetNumber(), g.GetParent(), packagesOf(g), environmentsOf(g)})
	}
	if len(g.GetPackages()) == 0 {
		out.printf("%s is empty.\n", clean(m.GetProfile().GetName()))
		return nil
	}
	rows := [][]string{{"PACKAGE", "VERSION", "PATH"}}
	for _, p := range g.GetPackages() {
		for _, s := range p.GetPaths() {
			for _, path := range s.GetPaths() {
				rows = append(rows, []string{clean(p.GetName()), clean(p.GetVersion()), clean(path)})
			}
		}
	}
	out.table(rows, nil)
	for _, e := range g.GetEnvironments() {
		out.printf("Environment of generation %d for %s: %s\n", g.GetNumber(), clean(e.GetSystem()), clean(e.GetPath()))
	}
	return nil
}

// parseGeneration reads the number of a generation.
func parseGeneration(word string) (uint64, error) {
	n, err := strconv.ParseUint(word, 10, 64)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("generation %q: want its number, as floxctl history shows it, or @TAG: %w", word, flox.ErrBadInput)
	}
	return n, nil
}

// number is that of a generation, which may be said as @TAG.
func (f *profileFlag) number(ctx context.Context, word string) (uint64, error) {
	tag, ok := strings.CutPrefix(word, "@")
	if !ok {
		return parseGeneration(word)
	}
	if n, err := parseGeneration(tag); err == nil {
		return n, nil
	}
	at, err := f.generation(ctx, 0)
	if err != nil {
		return 0, err
	}
	var have []string
	for _, t := range at.GetProfile().GetTags() {
		if strings.EqualFold(t.GetName(), tag) {
			return t.GetGeneration(), nil
		}
		have = append(have, "@"+t.GetName())
	}
	return 0, cli.Explain(flox.ErrNotFound, "%s has no tag @%s; it has: %s", clean(at.GetProfile().GetName()), clean(tag), clean(cmp.Or(strings.Join(have, " "), "none")))
}

// generation asks for one of a profile; 0 = the one that lives.
func (f *profileFlag) generation(ctx context.Context, number uint64) (*floxv1.ShowProfileResponse, error) {
	name, err := f.name()
	if err != nil {
		return nil, err
	}
	resp, err := f.admin().ShowProfile(ctx, connect.NewRequest(&floxv1.ShowProfileRequest{Name: name, Generation: number}))
	if err != nil {
		return nil, explainAdmin(err)
	}
	return resp.Msg, nil
}

func newDiffCmd(g *globals) *cobra.Command {
	f := &profileFlag{globals: g}
	cmd := &cobra.Command{
		Use:     "diff FROM [TO] [-p OWNER/NAME]",
		Short:   "Show what is different between two generations of a profile",
		Long:    "Show what is different between two generations of a profile: packages that came (+),\nwent (-) and changed (~). Without TO, with the one that lives.\n\n" + cli.ExitCodes,
		Example: "  floxctl diff 41 44 -p acme/ci",
		Args:    cli.Args(1, 2, "FROM and TO"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var at [2]*floxv1.ShowProfileResponse
			for i, word := range append(args, "")[:2] {
				n := uint64(0)
				err := error(nil)
				if word != "" {
					n, err = f.number(cmd.Context(), word)
				}
				if err == nil {
					at[i], err = f.generation(cmd.Context(), n)
				}
				if err != nil {
					return err
				}
			}
			return tellDiff(g.printer(cmd), at[0], at[1])
		},
	}
	f.register(cmd)
	return cmd
}

// packageChange is what became of a package, as JSON.
type packageChange struct {
	Name   string        `json:"name"`
	Before *packageFacts `json:"before"` // null: it was not there
	After  *packageFacts `json:"after"`
}

func tellDiff(out *output, from, to *floxv1.ShowProfileResponse) error {
	lines := differences(from.GetGeneration(), to.GetGeneration())
	if out.json {
		return out.printJSON(struct {
			Profile string          `json:"profile"`
			From    uint64          `json:"from"`
			To      uint64          `json:"to"`
			Changes []packageChange `json:"changes"`
		}{from.GetProfile().GetName(), from.GetGeneration().GetNumber(), to.GetGeneration().GetNumber(), changesOf(from.GetGeneration(), to.GetGeneration())})
	}
	for _, line := range lines {
		out.printf("%s\n", line)
	}
	if len(lines) == 0 {
		out.printf("Generations %d and %d of %s have the same packages.\n", from.GetGeneration().GetNumber(), to.GetGeneration().GetNumber(), clean(from.GetProfile().GetName()))
	}
	return nil
}

// maxWhy bounds how many generations why looks back through.
const maxWhy = 1000

func newWhyCmd(g *globals) *cobra.Command {
	f := &profileFlag{globals: g}
	cmd := &cobra.Command{
		Use:     "why PACKAGE [-p OWNER/NAME]",
		Short:   "Say who put a package into a profile, when, and as what",
		Long:    "Say who put a package into a profile as it is there now, when, on which machine, for\nwhat reason, and what was asked for then. What refers to a store path: floxctl store why.\n\n" + cli.ExitCodes,
		Example: "  floxctl why python3 -p acme/ci",
		Args:    cli.Args(1, 1, "PACKAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runWhyPackage(cmd.Context(), f, g.printer(cmd), args[0])
		},
	}
	f.register(cmd)
	return cmd
}

// runWhyPackage goes back from the generation that lives to the first that had the package as it is.
func runWhyPackage(ctx context.Context, f *profileFlag, out *output, name string) error {
	at, err := f.generation(ctx, 0)
	if err != nil {
		return err
	}
	profile, found := at.GetProfile(), at.GetGeneration()
	pkg := packageNamed(found, name)
	if pkg == nil {
		return cli.Explain(flox.ErrNotFound, "%s has no package %s; it has: %s", clean(profile.GetName()), clean(name), clean(strings.Join(packageNames(found), " ")))
	}
	for range maxWhy {
		if found.GetParent() == 0 {
			break
		}
		parent, err := f.generation(ctx, found.GetParent())
		if errors.Is(err, flox.ErrNotFound) {
			break // it is not kept any more
		}
		if err != nil {
			return err
		}
		if have := packageNamed(parent.GetGeneration(), name); have == nil || have.String() != pkg.String() {
			break
		}
		found = parent.GetGeneration()
	}
	if out.json {
		return out.printJSON(struct {
			Profile    string       `json:"profile"`
			Package    packageFacts `json:"package"`
			Generation uint64       `json:"generation"`
			Time       *string      `json:"time"`
			User       string       `json:"user"`
			Machine    string       `json:"machine"`
			Kind       string       `json:"kind"`
			Reason     string       `json:"reason"`
		}{
			profile.GetName(), packageOf(pkg), found.GetNumber(), stampMs(found.GetTimeUnixMs()), found.GetActor().GetUser(),
			found.GetActor().GetMachine(), found.GetKind(), found.GetReason(),
		})
	}
	out.printf("%s: %s of %s on %s, %s ago, generation %d", clean(strings.TrimSpace(pkg.GetName()+" "+pkg.GetVersion())), clean(found.GetKind()),
		clean(found.GetActor().GetUser()), clean(found.GetActor().GetMachine()), ago(found.GetTimeUnixMs(), time.Now()), found.GetNumber())
	if found.GetReason() != "" {
		out.printf(" (%s)", clean(found.GetReason()))
	}
	out.printf("\nAsked for as: %s\n", clean(pkg.GetSource()))
	for _, s := range pkg.GetPaths() {
		out.printf("%s: %s\n", clean(s.GetSystem()), clean(strings.Join(s.GetPaths(), " ")))
	}
	return nil
}

func packageNamed(g *floxv1.Generation, name string) *floxv1.Package {
	for _, p := range g.GetPackages() {
		if p.GetName() == name {
			return p
		}
	}
	return nil
}

func packageNames(g *floxv1.Generation) (names []string) {
	for _, p := range g.GetPackages() {
		names = append(names, p.GetName())
	}
	return names
}
