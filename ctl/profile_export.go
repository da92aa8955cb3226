package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// exportVersion is that of the format of exported profiles; another one is not read.
const exportVersion = 1

// maxExport bounds a file with an exported profile, in bytes.
const maxExport = 64 << 20

// exportFacts is a generation as a file.
type exportFacts struct {
	Version    int            `json:"version"`
	Profile    string         `json:"profile"`    // where it comes from
	Generation uint64         `json:"generation"` // and which it was
	Systems    []string       `json:"systems"`
	Packages   []packageFacts `json:"packages"`
}

func newProfileExportCmd(g *globals) *cobra.Command {
	number := uint64(0)
	cmd := &cobra.Command{
		Use:   "export OWNER/NAME [--generation N]",
		Short: "Print what is in a profile, for import",
		Long: `Print what is in a profile, as JSON: packages, versions and store paths. floxctl profile
import makes another profile so, here or in another storehouse that has the paths.

` + cli.ExitCodes,
		Example: "  floxctl profile export acme/ci >ci.json",
		Args:    cli.Args(1, 1, "OWNER/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f := profileFlag{globals: g, profile: args[0]}
			at, err := f.generation(cmd.Context(), number)
			if err != nil {
				return err
			}
			p := at.GetProfile()
			return g.printer(cmd).printJSON(exportFacts{exportVersion, p.GetName(), at.GetGeneration().GetNumber(), p.GetSystems(), packagesOf(at.GetGeneration())})
		},
	}
	cmd.Flags().Uint64Var(&number, "generation", 0, "the generation `N` (default: the one that lives)")
	return cmd
}

func newProfileImportCmd(g *globals) *cobra.Command {
	opts := &changeOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:   "import OWNER/NAME FILE [--dry-run]",
		Short: "Make a profile have what an exported one had",
		Long: `Make a profile have exactly the packages of a FILE that floxctl profile export printed
(- reads standard input), in one step: others that it has are taken out. It is made, for
the systems in FILE, if it is not there.

` + cli.ExitCodes,
		Example: "  floxctl profile import acme/ci-copy ci.json",
		Args:    cli.Args(2, 2, "OWNER/NAME and FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.profile = args[0]
			return runProfileImport(cmd.Context(), opts, g.printer(cmd), cmd.InOrStdin(), args[1])
		},
	}
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl history")
	cmd.Flags().BoolVar(&opts.dryRun, "dry-run", false, "only say what would change")
	return cmd
}

func runProfileImport(ctx context.Context, opts *changeOptions, out *output, stdin io.Reader, file string) error {
	facts, err := readExport(stdin, file)
	if err != nil {
		return err
	}
	q := &floxv1.ChangeProfileRequest{Kind: "import"}
	want := map[string]bool{}
	for _, f := range facts.Packages {
		p := &floxv1.Package{Name: f.Name, Version: f.Version, Priority: f.Priority, Source: f.Source, Held: f.Held}
		for _, system := range slices.Sorted(maps.Keys(f.Paths)) {
			p.Paths = append(p.Paths, &floxv1.PackagePaths{System: system, Paths: f.Paths[system]})
		}
		want[f.Name] = true
		q.Set = append(q.Set, p)
	}
	admin := opts.admin()
	at, err := admin.ShowProfile(ctx, connect.NewRequest(&floxv1.ShowProfileRequest{Name: opts.profile}))
	if connect.CodeOf(err) == connect.CodeNotFound && !opts.dryRun {
		if _, err = admin.CreateProfile(ctx, connect.NewRequest(&floxv1.CreateProfileRequest{Name: opts.profile, Systems: facts.Systems})); err == nil {
			return runChange(ctx, opts, out, q)
		}
	}
	if err != nil {
		return explainAdmin(err)
	}
	q.Parent = at.Msg.GetProfile().GetLive()
	for _, name := range packageNames(at.Msg.GetGeneration()) {
		if !want[name] {
			q.Drop = append(q.Drop, name)
		}
	}
	return runChange(ctx, opts, out, q)
}

// readExport reads an exported profile.
func readExport(stdin io.Reader, file string) (*exportFacts, error) {
	in, name := stdin, "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, flox.ErrBadInput)
		}
		defer f.Close()
		in, name = f, file
	}
	b, err := io.ReadAll(io.LimitReader(in, maxExport+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	facts := &exportFacts{}
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	switch err := d.Decode(facts); {
	case len(b) > maxExport:
		return nil, fmt.Errorf("%s: more than %d bytes: %w", name, maxExport, flox.ErrBadInput)
	case err != nil:
		return nil, fmt.Errorf("%s: want what floxctl profile export printed: %w: %w", name, err, flox.ErrBadInput)
	case facts.Version != exportVersion:
		return nil, fmt.Errorf("%s: version %d of the format, this program reads %d: %w", name, facts.Version, exportVersion, flox.ErrBadInput)
	}
	return facts, nil
}
