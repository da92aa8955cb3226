package ctl

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newStoreWhyCmd(g *globals) *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use:   "why PATH [--all]",
		Short: "Show what keeps a path in the storehouse",
		Long: `Show why no collection of the storehouse removes a path: a chain of references from
a root to it, or with --all one from every root. A path that nothing keeps goes
with the next collection.

` + cli.ExitCodes,
		Example: "  floxctl store why ./result",
		Args:    cli.Args(1, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runStoreWhy(cmd.Context(), g, g.printer(cmd), args[0], all)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "from every root, not just the nearest")
	return cmd
}

// rootFacts is a root; until is null if it stays for as long as it is there.
type rootFacts struct {
	Kind  string  `json:"kind"`
	Name  string  `json:"name"`
	Path  string  `json:"path"`
	Until *string `json:"until"`
}

func rootOf(r *floxv1.Root) rootFacts {
	return rootFacts{Kind: r.GetKind(), Name: r.GetName(), Path: r.GetPath(), Until: stamp(r.GetUntilUnix())}
}

// chainFacts leads from a root's path to the one asked for.
type chainFacts struct {
	Root  rootFacts `json:"root"`
	Paths []string  `json:"paths"`
}

// whyFacts has no chain when nothing keeps the path.
type whyFacts struct {
	Path        string       `json:"path"`
	Chains      []chainFacts `json:"chains"`
	Condemned   bool         `json:"condemned"`
	CondemnedAt *string      `json:"condemnedAt"`
}

// runStoreWhy prints each chain from its root on.
func runStoreWhy(ctx context.Context, g *globals, out *output, arg string, all bool) error {
	path, err := storeArg(arg)
	if err != nil {
		return err
	}
	resp, err := g.admin().Why(ctx, connect.NewRequest(&floxv1.WhyRequest{Path: path, All: all}))
	if err != nil {
		return explainAdmin(err)
	}
	why := resp.Msg
	if out.json {
		facts := whyFacts{Path: path, Chains: []chainFacts{}, Condemned: why.GetCondemned(), CondemnedAt: stamp(why.GetCondemnedUnix())}
		for _, c := range why.GetChains() {
			facts.Chains = append(facts.Chains, chainFacts{Root: rootOf(c.GetRoot()), Paths: some(c.GetPaths())})
		}
		return out.printJSON(facts)
	}
	now := time.Now()
	for _, c := range why.GetChains() {
		out.printf("%s\n", out.paint(bold, clean(rootWords(c.GetRoot(), now))))
		for i, p := range c.GetPaths() {
			arrow := ""
			if i > 0 {
				arrow = "→ "
			}
			out.printf("  %*s%s\n", 2*i, "", clean(arrow+p))
		}
	}
	if len(why.GetChains()) == 0 {
		out.printf("Nothing keeps it: the next collection condemns it unless somebody uses it.\n")
	}
	if why.GetCondemned() {
		out.printf("A collection condemned it %s ago; whoever uses it takes that back.\n", ago(why.GetCondemnedUnix()*1000, now))
	}
	return nil
}

// rootWords says what kind of root it is: "machine laptop, for 89 d".
func rootWords(r *floxv1.Root, now time.Time) string {
	words := map[string]string{
		"keep": "kept", "recent": "published lately", "machine": "machine", "profile": "profile", "channel": "channel",
		"upload": "an upload or import under way",
	}[r.GetKind()]
	if words == "" {
		words = r.GetKind()
	}
	if r.GetName() != "" {
		sep := " "
		if r.GetKind() == "keep" {
			sep = ": "
		}
		words += sep + r.GetName()
	}
	if r.GetUntilUnix() > 0 {
		words += fmt.Sprintf(", for %s", cli.FormatDuration(max(time.Unix(r.GetUntilUnix(), 0).Sub(now), 0).Truncate(time.Second)))
	}
	return words
}
