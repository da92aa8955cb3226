package ctl

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// thisSystem is this machine's system in Nix's words.
func thisSystem() string {
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64", "386": "i686", "riscv64": "riscv64"}[runtime.GOARCH]
	if arch == "" {
		arch = runtime.GOARCH
	}
	return arch + "-" + runtime.GOOS
}

// defaultPriority is that of a package for which none is given, as in Nix.
const defaultPriority = 5

// changeOptions are the command line of install and uninstall.
type changeOptions struct {
	profileFlag
	priority uint32
	as       string
	reason   string
	dryRun   bool
}

func newInstallCmd(g *globals) *cobra.Command {
	opts := &changeOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:   "install PATH... [-p OWNER/NAME] [--as NAME] [--priority N] [--dry-run]",
		Short: "Put packages into a profile",
		Long: `Put packages into a profile, on every machine at once. PATH is a store path of the
storehouse, or a link to one, such as ./result; its package's name is the path's without
the version, or --as. A package of that name that is there already is replaced. Your own
profile is made with the first package.

` + cli.ExitCodes,
		Example: `  floxctl install ./result
  floxctl install -p acme/ci /nix/store/...-hello-2.12`,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runInstall(cmd.Context(), opts, g.printer(cmd), args)
		},
	}
	opts.register(cmd)
	cmd.Flags().StringVar(&opts.as, "as", "", "the package's `NAME` in the profile, of one PATH")
	cmd.Flags().Uint32Var(&opts.priority, "priority", defaultPriority, "of two packages with the same file the one with the lower `N` has it")
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl history")
	cmd.Flags().BoolVar(&opts.dryRun, "dry-run", false, "only say what would change")
	return cmd
}

func newUninstallCmd(g *globals) *cobra.Command {
	opts := &changeOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:     "uninstall PACKAGE... [-p OWNER/NAME] [--dry-run]",
		Short:   "Take packages out of a profile",
		Long:    "Take packages out of a profile, on every machine at once. floxctl rollback brings\nthem back.\n\n" + cli.ExitCodes,
		Example: "  floxctl uninstall hello",
		Args:    cli.Args(1, -1, "PACKAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runChange(cmd.Context(), opts, g.printer(cmd), &floxv1.ChangeProfileRequest{Drop: args, Kind: "uninstall"})
		},
	}
	opts.register(cmd)
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl history")
	cmd.Flags().BoolVar(&opts.dryRun, "dry-run", false, "only say what would change")
	return cmd
}

func runInstall(ctx context.Context, opts *changeOptions, out *output, args []string) error {
	if opts.as != "" && len(args) > 1 {
		return fmt.Errorf("--as %s names one package, and there are %d paths: %w", opts.as, len(args), flox.ErrBadInput)
	}
	q := &floxv1.ChangeProfileRequest{Kind: "install"}
	for _, arg := range args {
		text, err := storeArg(arg)
		if err != nil {
			return err
		}
		path, err := storePathIn(text)
		if err != nil {
			return err
		}
		name, version := nameAndVersion(path.Name())
		if opts.as != "" {
			name = opts.as
		}
		q.Set = append(q.Set, &floxv1.Package{
			Name: name, Version: version, Priority: opts.priority, Source: arg,
			Paths: []*floxv1.PackagePaths{{System: thisSystem(), Paths: []string{string(path)}}},
		})
	}
	return runChange(ctx, opts, out, q)
}

// storePathIn is the store path that an absolute path lies in, or names.
func storePathIn(text string) (flox.StorePath, error) {
	if p, err := flox.ParseStorePath(text); err == nil {
		return p, nil
	}
	for part := range strings.SplitSeq(text, "/") {
		if p, err := flox.ParseStorePath(part); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is in no store: %w", text, flox.ErrBadInput)
}

// nameAndVersion splits a derivation's name as Nix's builtins.parseDrvName does: the
// version begins behind the first dash that no letter follows.
func nameAndVersion(s string) (name, version string) {
	for i := 0; i+1 < len(s); i++ {
		c := s[i+1]
		if s[i] == '-' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

// runChange changes a profile. One's own is made if it is not there.
func runChange(ctx context.Context, opts *changeOptions, out *output, q *floxv1.ChangeProfileRequest) (err error) {
	if q.Name, err = opts.name(); err != nil {
		return err
	}
	q.Reason, q.DryRun = opts.reason, opts.dryRun
	if err := share(ctx, opts.globals, q); err != nil {
		return err
	}
	admin := opts.admin()
	resp, err := admin.ChangeProfile(ctx, connect.NewRequest(q))
	if connect.CodeOf(err) == connect.CodeNotFound && opts.profile == "" && !q.GetDryRun() && len(q.GetSet()) > 0 {
		_, made := admin.CreateProfile(ctx, connect.NewRequest(&floxv1.CreateProfileRequest{Name: q.GetName(), Systems: []string{thisSystem()}}))
		if made == nil {
			resp, err = admin.ChangeProfile(ctx, connect.NewRequest(q))
		}
	}
	if err != nil {
		return explainAdmin(err)
	}
	return tellChange(out, q, resp.Msg)
}

// share brings to the storehouse what was added on this machine only.
func share(ctx context.Context, g *globals, q *floxv1.ChangeProfileRequest) error {
	mine := &floxv1.ShareRequest{}
	for _, p := range q.GetSet() {
		for _, s := range p.GetPaths() {
			mine.Paths = append(mine.Paths, s.GetPaths()...)
		}
	}
	if len(mine.GetPaths()) == 0 || q.GetDryRun() {
		return nil
	}
	_, err := g.agent().Share(ctx, connect.NewRequest(mine))
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return nil // a server of the storehouse itself
	}
	if errors.Is(err, flox.ErrUntrusted) || connect.CodeOf(err) == connect.CodeUnauthenticated {
		return cli.Explain(flox.ErrUntrusted, "it was built or added on this machine, and others have no reason to believe it (%v): have the storehouse build it (nix-build on this machine), or sign it with a key that it knows", explain(err))
	}
	return explainAdmin(err)
}

// changeFacts is a change as JSON.
type changeFacts struct {
	Profile     string            `json:"profile"`
	Generation  uint64            `json:"generation"` // 0 with --dry-run
	Before      uint64            `json:"before"`
	Changed     bool              `json:"changed"`
	Merged      bool              `json:"merged"`
	Packages    []packageFacts    `json:"packages"`
	Environment map[string]string `json:"environment"` // by system
}

type packageFacts struct {
	Name     string              `json:"name"`
	Version  string              `json:"version"`
	Priority uint32              `json:"priority"`
	Source   string              `json:"source"`
	Paths    map[string][]string `json:"paths"` // by system
}

func packagesOf(g *floxv1.Generation) []packageFacts {
	facts := make([]packageFacts, 0, len(g.GetPackages()))
	for _, p := range g.GetPackages() {
		f := packageFacts{p.GetName(), p.GetVersion(), p.GetPriority(), p.GetSource(), map[string][]string{}}
		for _, s := range p.GetPaths() {
			f.Paths[s.GetSystem()] = s.GetPaths()
		}
		facts = append(facts, f)
	}
	return facts
}

func environmentsOf(g *floxv1.Generation) map[string]string {
	m := map[string]string{}
	for _, e := range g.GetEnvironments() {
		m[e.GetSystem()] = e.GetPath()
	}
	return m
}

func tellChange(out *output, q *floxv1.ChangeProfileRequest, m *floxv1.ChangeProfileResponse) error {
	changed := m.GetGeneration().GetNumber() != m.GetBefore().GetNumber() || q.GetDryRun()
	if out.json {
		return out.printJSON(changeFacts{
			m.GetProfile().GetName(), m.GetGeneration().GetNumber(), m.GetBefore().GetNumber(), changed, m.GetMerged(),
			packagesOf(m.GetGeneration()), environmentsOf(m.GetGeneration()),
		})
	}
	for _, d := range differences(m.GetBefore(), m.GetGeneration()) {
		out.printf("%s\n", d)
	}
	switch name := clean(m.GetProfile().GetName()); {
	case q.GetDryRun():
		out.printf("Nothing was changed in %s (--dry-run).\n", name)
	case !changed:
		out.printf("%s is so already, in generation %d.\n", name, m.GetGeneration().GetNumber())
	default:
		out.printf("%s: generation %d lives now.\n", name, m.GetGeneration().GetNumber())
	}
	return nil
}

// differences says in lines what is different between two generations.
func differences(before, after *floxv1.Generation) (lines []string) {
	was := map[string]*floxv1.Package{}
	for _, p := range before.GetPackages() {
		was[p.GetName()] = p
	}
	for _, p := range after.GetPackages() {
		old := was[p.GetName()]
		delete(was, p.GetName())
		switch named := clean(strings.TrimSpace(p.GetName() + " " + p.GetVersion())); {
		case old == nil:
			lines = append(lines, "+ "+named)
		case old.GetVersion() != p.GetVersion():
			lines = append(lines, fmt.Sprintf("~ %s: %s -> %s", clean(p.GetName()), clean(old.GetVersion()), clean(p.GetVersion())))
		case old.String() != p.String():
			lines = append(lines, "~ "+named)
		}
	}
	for _, p := range before.GetPackages() {
		if was[p.GetName()] != nil {
			lines = append(lines, "- "+clean(strings.TrimSpace(p.GetName()+" "+p.GetVersion())))
		}
	}
	return lines
}

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
	q := &floxv1.RollbackProfileRequest{}
	cmd := &cobra.Command{
		Use:   "rollback [-p OWNER/NAME] [--to GENERATION]",
		Short: "Let an earlier generation of a profile live again",
		Long: `Let an earlier generation of a profile live again, on every machine at once: what the one
that lives was made on, or --to. What is automatic leaves the profile alone from then on,
until a person changes it.

` + cli.ExitCodes,
		Example: "  floxctl rollback\n  floxctl rollback -p acme/ci --to 41 --reason 'broken build'",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if q.Name, err = opts.name(); err != nil {
				return err
			}
			resp, err := g.admin().RollbackProfile(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explainAdmin(err)
			}
			out, m := g.printer(cmd), resp.Msg
			if out.json {
				return out.printJSON(struct {
					Profile    string `json:"profile"`
					Before     uint64 `json:"before"`
					Generation uint64 `json:"generation"`
				}{m.GetProfile().GetName(), m.GetFrom(), m.GetProfile().GetLive()})
			}
			out.printf("%s: generation %d lives again, before it was %d.\n", clean(m.GetProfile().GetName()), m.GetProfile().GetLive(), m.GetFrom())
			return nil
		},
	}
	opts.register(cmd)
	cmd.Flags().Uint64Var(&q.To, "to", 0, "the `GENERATION` (default: what lived before the one that lives)")
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
				if _, err := fmt.Sscanf(words[0]+"\n", "%d\n", &q.Generation); err != nil || q.GetGeneration() == 0 {
					return fmt.Errorf("generation %q: want its number, as floxctl history shows it: %w", words[0], flox.ErrBadInput)
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
