package ctl

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/profile/tarball"
	"github.com/floxctl/flox/profile/upgrade"
)

func newSearchCmd(g *globals) *cobra.Command {
	q := &floxv1.SearchPackagesRequest{}
	all := false
	cmd := &cobra.Command{
		Use:   "search [TERM...] [--channel NAME] [--system SYSTEM|--all-systems] [--limit N]",
		Short: "Find packages in the channels",
		Long: `Find packages in the newest versions of the channels: those in which every word of TERM
occurs, in their name, their attribute or their description, the best first.

` + cli.ExitCodes,
		Example: "  floxctl search json processor",
		Args:    cli.Args(0, -1, "TERM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if q.Term = strings.Join(args, " "); q.GetSystem() == "" && !all {
				q.System = thisSystem()
			}
			resp, err := g.admin().SearchPackages(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explainAdmin(err)
			}
			return tellFound(g.printer(cmd), q, resp.Msg)
		},
	}
	cmd.Flags().StringVar(&q.Channel, "channel", "", "only in channel `NAME`")
	cmd.Flags().StringVar(&q.System, "system", "", "for `SYSTEM` (default: this machine's)")
	cmd.Flags().BoolVar(&all, "all-systems", false, "for any system")
	cmd.Flags().Uint32Var(&q.Limit, "limit", 50, "at most `N`")
	return cmd
}

type foundFacts struct {
	Channel     string   `json:"channel"`
	Attr        string   `json:"attr"`
	Name        string   `json:"name"`
	Version     string   `json:"version"`
	Description string   `json:"description"`
	System      string   `json:"system"`
	Outputs     []string `json:"outputs"`
	Paths       []string `json:"paths"` // of outputs; "" = known when it is built
}

func tellFound(out *output, q *floxv1.SearchPackagesRequest, m *floxv1.SearchPackagesResponse) error {
	if out.json {
		facts := make([]foundFacts, len(m.GetPackages()))
		for i, p := range m.GetPackages() {
			facts[i] = foundFacts{p.GetChannel(), p.GetAttr(), p.GetName(), p.GetVersion(), p.GetDescription(), p.GetSystem(), p.GetOutputs(), p.GetPaths()}
		}
		return out.printJSON(struct {
			Packages []foundFacts `json:"packages"`
			More     bool         `json:"more"`
			Channels uint32       `json:"channels"`
		}{facts, m.GetMore(), m.GetChannels()})
	}
	switch {
	case m.GetChannels() == 0:
		return cli.Explain(flox.ErrNotFound, "there is no channel, where packages have names: make one with floxctl channel publish NAME DIR, or have nixpkgs with floxctl channel track nixpkgs %s", tarball.Nixpkgs)
	case len(m.GetPackages()) == 0:
		return cli.Explain(flox.ErrNotFound, "no package for %q in %d channels; for all systems: --all-systems", clean(q.GetTerm()), m.GetChannels())
	}
	rows := [][]string{{"PACKAGE", "VERSION", "DESCRIPTION"}}
	for _, p := range m.GetPackages() {
		name := clean(p.GetChannel() + "." + p.GetAttr())
		if q.GetSystem() == "" {
			name += " (" + clean(p.GetSystem()) + ")"
		}
		rows = append(rows, []string{name, clean(p.GetVersion()), clean(p.GetDescription())})
	}
	out.table(rows, nil)
	if m.GetMore() {
		out.printf("There are more: --limit N\n")
	}
	return nil
}

// fromChannel has a package of a channel made for some systems, and gives it. If it is
// only tried, nothing is made.
func fromChannel(ctx context.Context, g *globals, says *output, i *installable, systems []string, try bool) (*floxv1.Package, error) {
	if i.system != "" {
		systems = []string{i.system}
	}
	stream, err := g.admin().BuildPackage(ctx, connect.NewRequest(&floxv1.BuildPackageRequest{Name: i.name, Systems: systems, Find: try}))
	if err != nil {
		return nil, explainAdmin(err)
	}
	defer stream.Close()
	bar := newProgress(says)
	defer bar.end()
	var found []*floxv1.CataloguePackage
	for stream.Receive() {
		m := stream.Msg()
		switch found = m.GetPackages(); {
		case m.GetDoing() != "":
			bar.show(step{says: clean(i.name + ": " + m.GetDoing())})
		case m.GetLine() != "" && !says.json:
			bar.end()
			says.printf("%s\n", clean(m.GetLine()))
		}
	}
	if err := stream.Err(); err != nil {
		return nil, explainAdmin(err)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s: the storehouse ended before it was made; try again: %w", i.name, flox.ErrUnreachable)
	}
	for _, p := range found {
		if p.GetDropped() && !says.json {
			says.printf("%s %s for %s: the channel keeps no version any more that has it; it is made of its derivation, which is kept from version %d.\n",
				clean(p.GetName()), clean(p.GetVersion()), clean(p.GetSystem()), p.GetVersionNumber())
		}
	}
	return upgrade.Package(i.name, found), nil
}
