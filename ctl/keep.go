package ctl

import (
	"context"
	"slices"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newKeepCmd(g *globals) *cobra.Command {
	opts, list := keepOptions{done: "kept"}, false
	cmd := &cobra.Command{
		Use:   "keep PATH|PROFILE... [--offline closure|used|none] [--closure=false] | --list",
		Short: "Never evict these paths from this machine's cache",
		Long: `Mark store paths so that what is here of them is never evicted from the cache.

--offline says what of them is brought here in the background, so that they work
with the network cut:
  closure  all of them and of everything they refer to, and kept complete
  used     what of them runs on this machine (of a path that is new to keep)
  none     nothing: what is here stays, what is not is fetched when it is read
Without --offline a path's policy stays as it was. floxctl status says what is
ready; floxctl store info PATH shows the policy of a path. To fetch now and wait
for it: floxctl download PATH --keep.

With --offline, a link outside the store is a PROFILE: the policy is that of what
it leads to, with all that refers to, now and whenever it moves to another
generation; the one before then loses it. One that cannot be read keeps what it
had. Without --offline it stands for the path it leads to now. A user may keep 32
profiles, root all that is left of 256; and give a policy to 4,096 paths, root to all
that is left of 16,384.

` + cli.ExitCodes,
		Example: `  floxctl keep --offline closure /nix/store/...-texlive   # before a journey
  floxctl keep --offline closure ~/.nix-profile           # and all it will be
  floxctl status                                          # until it says ready
  floxctl keep --list                                     # what is kept`,
		Args: func(cmd *cobra.Command, args []string) error {
			if list {
				return cli.Args(0, 0, "")(cmd, args)
			}
			return cli.Args(1, -1, "PATH")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if list {
				return runKeepList(cmd.Context(), g, g.printer(cmd))
			}
			opts.paths = args
			return runKeep(cmd.Context(), g.agent().Keep, g.printer(cmd), opts)
		},
	}
	cmd.Flags().BoolVar(&opts.closure, "closure", true, "also everything they refer to, at any depth")
	cmd.Flags().BoolVar(&list, "list", false, "list what is kept, and what profiles lead to now")
	cmd.Flags().StringVar(&opts.offline, "offline", "", "what is completed in the background: closure, used or none (default: as it was)")
	return cmd
}

func newUnkeepCmd(g *globals) *cobra.Command {
	opts := keepOptions{done: "no longer kept", undo: true}
	cmd := &cobra.Command{
		Use:   "unkeep PATH|PROFILE... [--closure=false]",
		Short: "Let the cache evict these paths again",
		Long: `Take back a keep, and the offline policy that came with it. Nothing is deleted now; see floxctl cache gc for that.
Only root may, but whoever keeps a profile may let go of it.

` + cli.ExitCodes,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.paths = args
			return runKeep(cmd.Context(), g.agent().Unkeep, g.printer(cmd), opts)
		},
	}
	cmd.Flags().BoolVar(&opts.closure, "closure", true, "also everything they refer to, at any depth")
	return cmd
}

// keepOptions are the command lines of keep and unkeep.
type keepOptions struct {
	paths   []string
	closure bool
	offline string
	done    string // what is said of the paths then
	undo    bool
}

// keepCall is Keep or Unkeep: they differ in nothing else.
type keepCall func(context.Context, *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error)

// runKeep prints what the agent says it did, which with closures is more than
// what was asked for.
func runKeep(ctx context.Context, call keepCall, out *output, opts keepOptions) error {
	if !slices.Contains([]string{"", "closure", "used", "none"}, opts.offline) {
		return cli.Explain(flox.ErrBadInput, "--offline %q: want closure, used or none", opts.offline)
	}
	request := &floxv1.KeepRequest{Closure: opts.closure, Offline: opts.offline}
	for _, arg := range opts.paths {
		link, err := profileArg(arg)
		switch {
		case err != nil:
			return err
		case link != "" && (opts.undo || opts.offline != ""):
			request.Profiles = append(request.Profiles, link)
			continue
		}
		path, err := storeArg(arg)
		if err != nil {
			return err
		}
		request.Paths = append(request.Paths, path)
	}
	if len(request.GetProfiles()) > 0 && !opts.undo && !opts.closure {
		return cli.Explain(flox.ErrBadInput, "--closure=false: a profile (%s) is kept with all it leads to", request.GetProfiles()[0])
	}
	resp, err := call(ctx, connect.NewRequest(request))
	if err != nil {
		return explain(err)
	}
	return printKept(out, resp.Msg, opts.done)
}

// printKept prints what was kept or let go of.
func printKept(out *output, m *floxv1.KeepResponse, done string) error {
	profiles := profilesOf(m.GetProfiles())
	if out.json {
		return out.printJSON(struct {
			Paths    []string       `json:"paths"`
			Profiles []profileFacts `json:"profiles"`
		}{some(m.GetKept()), profiles})
	}
	for _, p := range profiles {
		out.printf("%s, now %s\n", clean(p.Link), clean(p.Path))
	}
	if len(profiles) > 0 {
		out.printf("%s %s.\n", plural(uint64(len(profiles)), "profile is", "profiles are"), done)
	}
	if len(m.GetKept()) == 0 && len(profiles) > 0 {
		return nil
	}
	for _, p := range m.GetKept() {
		out.printf("%s\n", clean(p))
	}
	out.printf("%s %s.\n", plural(uint64(len(m.GetKept())), "path is", "paths are"), done)
	return nil
}

// runKeepList prints what is kept, and because of what.
func runKeepList(ctx context.Context, g *globals, out *output) error {
	resp, err := g.agent().Kept(ctx, connect.NewRequest(&floxv1.KeptRequest{}))
	if err != nil {
		return explain(err)
	}
	type keptFacts struct {
		Path   string `json:"path"`
		Policy string `json:"policy"`
	}
	facts := struct {
		Paths    []keptFacts    `json:"paths"`
		Profiles []profileFacts `json:"profiles"`
	}{[]keptFacts{}, profilesOf(resp.Msg.GetProfiles())}
	for _, p := range resp.Msg.GetPaths() {
		facts.Paths = append(facts.Paths, keptFacts{p.GetPath(), p.GetPolicy()})
	}
	if out.json {
		return out.printJSON(facts)
	}
	for _, p := range facts.Profiles {
		out.printf("%-8s %s\n", clean(p.Policy), profileLine(out, p))
	}
	for _, p := range facts.Paths {
		out.printf("%-8s %s\n", clean(p.Policy), clean(p.Path))
	}
	if len(facts.Paths)+len(facts.Profiles) == 0 {
		out.printf("Nothing is kept.\n")
	}
	return nil
}
