package ctl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/profile/upgrade"
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
	priority *uint32
	as       string
	reason   string
	dryRun   bool
}

func newInstallCmd(g *globals) *cobra.Command {
	opts, priority := &changeOptions{profileFlag: profileFlag{globals: g}}, uint32(0)
	cmd := &cobra.Command{
		Use:   "install PACKAGE... [-p OWNER/NAME] [--as NAME] [--priority N] [--dry-run]",
		Short: "Put packages into a profile",
		Long: `Put packages into a profile, on every machine at once. PACKAGE is

  NAME, NAME@VERSION or CHANNEL.NAME, of a channel (floxctl search), for each system of
  the profile; the storehouse builds what it lacks;
  a store path of the storehouse or of this machine, or a link to one, such as ./result;
  FILE or FILE#ATTR, a Nix expression: stock Nix evaluates it here, for each system of
  the profile, and the storehouse builds what it lacks;
  FLAKE#ATTR, as of stock Nix, for this machine's system;

with SYSTEM= before it, for that system only, as in aarch64-linux=/nix/store/...-hello.
Its name is what the expression says, or the path's without the version, or --as. A
package of that name that is there already is replaced. All packages of a command are
installed, for all systems of the profile, or none. Your own profile is made with the
first package.

` + cli.ExitCodes,
		Example: `  floxctl install git ripgrep python3@3.11
  floxctl install -p acme/ci ./default.nix#hello /nix/store/...-jq-1.7`,
		Args: cli.Args(1, -1, "PACKAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("priority") {
				opts.priority = &priority
			}
			return runInstall(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd), args)
		},
	}
	opts.register(cmd)
	cmd.Flags().StringVar(&opts.as, "as", "", "the package's `NAME` in the profile, of one PACKAGE")
	cmd.Flags().Uint32Var(&priority, "priority", defaultPriority, "of two packages with the same file the one with the lower `N` has it (default: what the expression says)")
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

func runInstall(ctx context.Context, opts *changeOptions, out, says *output, args []string) error {
	if opts.as != "" && len(args) > 1 {
		return fmt.Errorf("--as %s names one package, and there are %d: %w", opts.as, len(args), flox.ErrBadInput)
	}
	set, err := packagesFrom(ctx, opts, says, args)
	if err != nil {
		return err
	}
	for _, p := range set {
		if opts.as != "" {
			p.Name = opts.as
		}
		if opts.priority != nil {
			p.Priority = *opts.priority
		}
	}
	return runChange(ctx, opts, out, &floxv1.ChangeProfileRequest{Kind: "install", Set: set})
}

// packagesFrom makes packages of what is to be installed. Those of one name are one
// package, if they are for different systems.
func packagesFrom(ctx context.Context, opts *changeOptions, says *output, args []string) (set []*floxv1.Package, err error) {
	all := make([]installable, len(args))
	evaluates, named := false, false
	for n, arg := range args { // all of them, before anything is done for one
		if all[n], err = parseInstallable(arg); err != nil {
			return nil, err
		}
		evaluates = evaluates || !all[n].local() && all[n].name == ""
		named = named || all[n].name != ""
	}
	var stock *stockNix
	var systems []string
	if evaluates || named {
		if systems, err = opts.systems(ctx); err != nil {
			return nil, err
		}
	}
	if evaluates {
		if stock, err = newStockNix(ctx, opts.globals, says.w); err != nil {
			return nil, err
		}
	}
	for n := range all {
		i := &all[n]
		var p *floxv1.Package
		switch {
		case i.local():
			p, err = i.stored()
		case i.name != "":
			p, err = fromChannel(ctx, opts.globals, says, i, systems, opts.dryRun)
		default:
			p, err = stock.packageOf(ctx, i, systems, opts.dryRun)
		}
		if err != nil {
			return nil, err
		}
		if len(p.GetPaths()) == 0 {
			return nil, fmt.Errorf("%s: the profile is for %s: %w", i.arg, strings.Join(systems, ", "), flox.ErrBadInput)
		}
		if set, err = joinPackage(set, p); err != nil {
			return nil, err
		}
	}
	return set, nil
}

// stored makes a package of a store path.
func (i *installable) stored() (*floxv1.Package, error) {
	path, err := storePathIn(i.store)
	if err != nil {
		return nil, err
	}
	p := &floxv1.Package{Priority: defaultPriority, Source: i.arg, Paths: []*floxv1.PackagePaths{{System: systemOr(i.system), Paths: []string{string(path)}}}}
	p.Name, p.Version = nix.NameAndVersion(path.Name())
	return p, nil
}

// joinPackage adds a package to others.
func joinPackage(set []*floxv1.Package, p *floxv1.Package) ([]*floxv1.Package, error) {
	for _, have := range set {
		if have.GetName() != p.GetName() {
			continue
		}
		for _, s := range p.GetPaths() {
			for _, o := range have.GetPaths() {
				if o.GetSystem() == s.GetSystem() {
					return nil, fmt.Errorf("%s and %s both are %s for %s: leave one out, or install them one by one with --as: %w",
						have.GetSource(), p.GetSource(), p.GetName(), s.GetSystem(), flox.ErrBadInput)
				}
			}
			have.Paths = append(have.Paths, s)
		}
		return set, nil
	}
	return append(set, p), nil
}

// systems are those of the profile; of one that is not there yet, this machine's.
func (f *profileFlag) systems(ctx context.Context) ([]string, error) {
	name, err := f.name()
	if err != nil {
		return nil, err
	}
	resp, err := f.admin().ShowProfile(ctx, connect.NewRequest(&floxv1.ShowProfileRequest{Name: name}))
	switch {
	case err == nil:
		return resp.Msg.GetProfile().GetSystems(), nil
	case connect.CodeOf(err) == connect.CodeNotFound && f.profile == "":
		return []string{thisSystem()}, nil
	}
	return nil, explainAdmin(err)
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
	first := connect.CodeOf(err) == connect.CodeNotFound && opts.profile == "" && len(q.GetSet()) > 0
	if first && q.GetDryRun() {
		return tellChange(ctx, opts.globals, out, q, &floxv1.ChangeProfileResponse{Profile: &floxv1.Profile{Name: q.GetName()}, Generation: &floxv1.Generation{Packages: q.GetSet()}})
	}
	if first {
		_, made := admin.CreateProfile(ctx, connect.NewRequest(&floxv1.CreateProfileRequest{Name: q.GetName(), Systems: []string{thisSystem()}}))
		if made == nil {
			resp, err = admin.ChangeProfile(ctx, connect.NewRequest(q))
		}
	}
	if err != nil {
		return explainAdmin(err)
	}
	return tellChange(ctx, opts.globals, out, q, resp.Msg)
}

// share brings to the storehouse what was added on this machine only.
func share(ctx context.Context, g *globals, q *floxv1.ChangeProfileRequest) error {
	var mine []string
	for _, p := range q.GetSet() {
		if upgrade.IsName(p.GetSource()) {
			continue // the storehouse has it
		}
		for _, s := range p.GetPaths() {
			mine = append(mine, s.GetPaths()...)
		}
	}
	if len(mine) == 0 || q.GetDryRun() {
		return nil
	}
	return sharePaths(ctx, g, mine...)
}

func sharePaths(ctx context.Context, g *globals, paths ...string) error {
	_, err := g.agent().Share(ctx, connect.NewRequest(&floxv1.ShareRequest{Paths: paths}))
	var dial *cli.DialError
	if connect.CodeOf(err) == connect.CodeUnimplemented || errors.As(err, &dial) && !errors.Is(err, os.ErrPermission) {
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
	Environment map[string]string `json:"environment"`    // by system
	Missing     []string          `json:"missing"`        // with --dry-run: what the storehouse does not have
	Programs    []programFacts    `json:"programs"`       // that came, some of them
	Cost        *costFacts        `json:"cost,omitempty"` // of an upgrade that changes something
}

type packageFacts struct {
	Name     string              `json:"name"`
	Version  string              `json:"version"`
	Priority uint32              `json:"priority"`
	Source   string              `json:"source"`
	Held     bool                `json:"held"`
	Paths    map[string][]string `json:"paths"` // by system
}

func packagesOf(g *floxv1.Generation) []packageFacts {
	facts := make([]packageFacts, 0, len(g.GetPackages()))
	for _, p := range g.GetPackages() {
		facts = append(facts, packageOf(p))
	}
	return facts
}

func packageOf(p *floxv1.Package) packageFacts {
	f := packageFacts{p.GetName(), p.GetVersion(), p.GetPriority(), p.GetSource(), p.GetHeld(), map[string][]string{}}
	for _, s := range p.GetPaths() {
		f.Paths[s.GetSystem()] = s.GetPaths()
	}
	return f
}

func environmentsOf(g *floxv1.Generation) map[string]string {
	m := map[string]string{}
	for _, e := range g.GetEnvironments() {
		m[e.GetSystem()] = e.GetPath()
	}
	return m
}

func tellChange(ctx context.Context, g *globals, out *output, q *floxv1.ChangeProfileRequest, m *floxv1.ChangeProfileResponse) error {
	changed := m.GetGeneration().GetNumber() != m.GetBefore().GetNumber() || q.GetDryRun()
	var came []programFacts
	if changed && !q.GetDryRun() {
		came = programsOf(ctx, g, m)
	}
	var cost *costFacts
	if q.GetKind() == "upgrade" && changed {
		cost = costOf(ctx, g, m)
	}
	if out.json {
		return out.printJSON(changeFacts{
			m.GetProfile().GetName(), m.GetGeneration().GetNumber(), m.GetBefore().GetNumber(), changed, m.GetMerged(),
			packagesOf(m.GetGeneration()), environmentsOf(m.GetGeneration()), m.GetMissing(), some(came), cost,
		})
	}
	for _, d := range differences(m.GetBefore(), m.GetGeneration()) {
		out.printf("%s\n", d)
	}
	if cost != nil {
		cost.tell(out)
	}
	switch name := clean(m.GetProfile().GetName()); {
	case q.GetDryRun():
		for _, path := range m.GetMissing() {
			out.printf("To be built or brought first: %s\n", clean(path))
		}
		out.printf("Nothing was changed in %s (--dry-run).\n", name)
	case !changed:
		out.printf("%s is so already, in generation %d.\n", name, m.GetGeneration().GetNumber())
	default:
		out.printf("%s: generation %d lives now.\n", name, m.GetGeneration().GetNumber())
		tellPrograms(out, m.GetProfile().GetName(), came)
	}
	return nil
}

// changesOf gives what is different between two generations, in the order of names, what went last.
func changesOf(before, after *floxv1.Generation) []packageChange {
	changes := []packageChange{}
	for _, p := range after.GetPackages() {
		c, is := packageChange{Name: p.GetName()}, packageOf(p)
		c.After = &is
		if old := packageNamed(before, p.GetName()); old != nil {
			if old.String() == p.String() {
				continue
			}
			was := packageOf(old)
			c.Before = &was
		}
		changes = append(changes, c)
	}
	for _, p := range before.GetPackages() {
		if packageNamed(after, p.GetName()) == nil {
			was := packageOf(p)
			changes = append(changes, packageChange{Name: p.GetName(), Before: &was})
		}
	}
	return changes
}

// differences says it in lines.
func differences(before, after *floxv1.Generation) (lines []string) {
	for _, c := range changesOf(before, after) {
		named := func(p *packageFacts) string { return clean(strings.TrimSpace(p.Name + " " + p.Version)) }
		switch {
		case c.Before == nil:
			lines = append(lines, "+ "+named(c.After))
		case c.After == nil:
			lines = append(lines, "- "+named(c.Before))
		case c.Before.Version != c.After.Version:
			lines = append(lines, fmt.Sprintf("~ %s: %s -> %s", clean(c.Name), clean(c.Before.Version), clean(c.After.Version)))
		case c.Before.Held != c.After.Held:
			lines = append(lines, "~ "+named(c.After)+map[bool]string{true: ": held", false: ": not held any more"}[c.After.Held])
		default:
			lines = append(lines, "~ "+named(c.After))
		}
	}
	return lines
}

// newHoldCmd holds packages, or lets go of them.
func newHoldCmd(g *globals, hold bool) *cobra.Command {
	use, what := "hold", "Keep upgrades from changing packages of a profile"
	if !hold {
		use, what = "unhold", "Let upgrades change packages of a profile again"
	}
	opts := &changeOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:     use + " PACKAGE... [-p OWNER/NAME]",
		Short:   what,
		Long:    what + ", on every machine at once. People can change\nthem as ever.\n\n" + cli.ExitCodes,
		Example: "  floxctl " + use + " git",
		Args:    cli.Args(1, -1, "PACKAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := opts.generation(cmd.Context(), 0)
			if err != nil {
				return err
			}
			q := &floxv1.ChangeProfileRequest{Kind: use, Parent: at.GetProfile().GetLive()}
			for _, name := range args {
				p := packageNamed(at.GetGeneration(), name)
				if p == nil {
					return cli.Explain(flox.ErrNotFound, "%s has no package %s; it has: %s", clean(at.GetProfile().GetName()), clean(name), clean(strings.Join(packageNames(at.GetGeneration()), " ")))
				}
				p.Held = hold
				q.Set = append(q.Set, p)
			}
			return runChange(cmd.Context(), opts, g.printer(cmd), q)
		},
	}
	opts.register(cmd)
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl history")
	return cmd
}
