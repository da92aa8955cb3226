package ctl

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/profile/tarball"
)

func newChannelCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "channel",
		Short: "Give packages names: publish, track, list and delete channels",
		Long: `A channel is a named catalogue of packages, made by evaluating a Nix expression in the
storehouse. What is in one can be found (floxctl search) and installed by name (floxctl
install NAME); each publication makes a version of it, and earlier ones stay installable
(NAME@VERSION): the last 100, each for a year. Of still earlier ones, what somebody had made
is made again of its derivation, which is kept. A channel can follow a tarball that others
publish, such as nixpkgs (floxctl channel track).

` + cli.ExitCodes,
		Example: "  floxctl channel publish nixexprs ./nixexprs",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newChannelPublishCmd(g), newChannelTrackCmd(g), newChannelUntrackCmd(g), newChannelListCmd(g), newChannelShowCmd(g), newChannelPublishersCmd(g), newChannelDeleteCmd(g))
	return cmd
}

// channelOptions are the command line of channel publish.
type channelOptions struct {
	*globals
	systems []string
	reason  string
}

func newChannelPublishCmd(g *globals) *cobra.Command {
	opts := &channelOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "publish NAME FILE|DIR [--system SYSTEM]...",
		Short: "Make a version of a channel of a Nix expression",
		Long: `Make a version of a channel of a Nix expression: a FILE, a DIR with default.nix, or a store
path. It is a set of derivations, or a function of attributes that all have a default, of
which system is given; as for nix-env, sets in it are looked into that have
recurseForDerivations. It is brought to the storehouse (with stock Nix, unless it is a
store path) and evaluated on a server that builds, where it sees nothing but itself: no
other file, no network, no result of a build. What cannot be evaluated is left out, and
told. Admins make channels, and say who else publishes (floxctl channel publishers).

` + cli.ExitCodes,
		Example: "  floxctl channel publish nixexprs ./nixexprs --system x86_64-linux --system aarch64-linux",
		Args:    cli.Args(2, 2, "NAME and FILE or DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runChannelPublish(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd), args[0], args[1])
		},
	}
	cmd.Flags().StringArrayVar(&opts.systems, "system", nil, "a `SYSTEM` to evaluate for, such as x86_64-linux (default: this machine's; can be repeated)")
	cmd.Flags().StringVar(&opts.reason, "reason", "", "why, shown by floxctl channel show")
	return cmd
}

// sourceOf gives the store path of an expression, and the file below it. What is not in
// the store yet is brought there, and to the storehouse.
func (o *channelOptions) sourceOf(ctx context.Context, says *output, arg string) (source flox.StorePath, file string, err error) {
	text, err := storeArg(arg)
	if err == nil {
		if source, err = storePathIn(text); err != nil {
			return "", "", err
		}
		if _, below, ok := strings.Cut(text, string(source)+"/"); ok {
			file = below
		}
	} else {
		at, kind := expressionAt(arg)
		if kind != "expression" {
			return "", "", cli.Explain(flox.ErrBadInput, "%s: want a file with a Nix expression, a directory with default.nix, or a store path", at)
		}
		n, err := newStockNix(ctx, o.globals, says.w)
		if err != nil {
			return "", "", err
		}
		out, err := n.run(ctx, arg, "nix-store", "--add", at)
		if err != nil {
			return "", "", err
		}
		if source, err = storePathIn(strings.TrimSpace(string(out))); err != nil {
			return "", "", err
		}
	}
	return source, file, sharePaths(ctx, o.globals, string(source))
}

func runChannelPublish(ctx context.Context, opts *channelOptions, out, says *output, name, arg string) error {
	source, file, err := opts.sourceOf(ctx, says, arg)
	if err != nil {
		return err
	}
	if len(opts.systems) == 0 {
		opts.systems = []string{thisSystem()}
	}
	stream, err := opts.admin().PublishChannel(ctx, connect.NewRequest(&floxv1.PublishChannelRequest{
		Channel: name, Source: string(source), File: file, Systems: opts.systems, Reason: opts.reason,
	}))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	bar := newProgress(says)
	defer bar.end()
	var end *floxv1.PublishChannelProgress
	for stream.Receive() {
		end = stream.Msg()
		words := clean(end.GetDoing())
		if end.GetAll() > 0 {
			words += fmt.Sprintf(": %d of %d", end.GetDone(), end.GetAll())
		}
		bar.show(step{done: uint64(end.GetDone()), total: uint64(end.GetAll()), says: words})
	}
	if err := stream.Err(); err != nil {
		return explainAdmin(err)
	}
	if end.GetVersion() == nil {
		return errors.New("the storehouse ended before anything was published; try again")
	}
	bar.end()
	return tellPublished(out, name, end)
}

type versionFacts struct {
	Number   uint64   `json:"number"`
	Time     *string  `json:"time"`
	User     string   `json:"user"`
	Machine  string   `json:"machine"`
	Source   string   `json:"source"`
	File     string   `json:"file"`
	Systems  []string `json:"systems"`
	Packages uint32   `json:"packages"`
	Failed   uint32   `json:"failed"`
	Reason   string   `json:"reason"`
}

func versionOf(v *floxv1.ChannelVersion) versionFacts {
	return versionFacts{
		v.GetNumber(), stampMs(v.GetTimeUnixMs()), v.GetActor().GetUser(), v.GetActor().GetMachine(), v.GetSource(), v.GetFile(),
		v.GetSystems(), v.GetPackages(), v.GetFailed(), v.GetReason(),
	}
}

func tellPublished(out *output, name string, end *floxv1.PublishChannelProgress) error {
	v := end.GetVersion()
	if out.json {
		return out.printJSON(struct {
			Channel  string       `json:"channel"`
			Changed  bool         `json:"changed"`
			Version  versionFacts `json:"version"`
			Failures []string     `json:"failures"`
		}{name, end.GetChannel() != nil, versionOf(v), append([]string{}, end.GetFailures()...)})
	}
	for _, f := range end.GetFailures() {
		out.printf("Left out: %s\n", clean(f))
	}
	if more := int(v.GetFailed()) - len(end.GetFailures()); more > 0 && len(end.GetFailures()) > 0 {
		out.printf("Left out: %d more\n", more)
	}
	if end.GetChannel() == nil {
		out.printf("Channel %s is so already, in version %d.\n", clean(name), v.GetNumber())
		return nil
	}
	out.printf("Channel %s: version %d, %d packages for %s. To look: floxctl search --channel %s\n", clean(end.GetChannel().GetName()), v.GetNumber(),
		v.GetPackages()-v.GetFailed(), clean(strings.Join(v.GetSystems(), ", ")), clean(end.GetChannel().GetName()))
	return nil
}

func newChannelListCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the channels",
		Long:    "List the channels, with the newest version of each.\n\n" + cli.ExitCodes,
		Example: "  floxctl channel list",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := g.admin().ListChannels(cmd.Context(), connect.NewRequest(&floxv1.ListChannelsRequest{}))
			if err != nil {
				return explainAdmin(err)
			}
			return tellChannels(g.printer(cmd), resp.Msg.GetChannels())
		},
	}
}

type channelFacts struct {
	Name       string         `json:"name"`
	Publishers []string       `json:"publishers"` // beside admins
	CreatedAt  *string        `json:"createdAt"`
	CreatedBy  string         `json:"createdBy"`
	Versions   []versionFacts `json:"versions"` // newest first; in a list, that alone
	Tracking   *trackingFacts `json:"tracking"` // null = nothing
}

func channelOf(c *floxv1.Channel, versions ...*floxv1.ChannelVersion) channelFacts {
	f := channelFacts{c.GetName(), append([]string{}, c.GetPublishers()...), stampMs(c.GetCreatedUnixMs()), c.GetCreatedBy(), nil, nil}
	for _, v := range versions {
		f.Versions = append(f.Versions, versionOf(v))
	}
	return f
}

func tellChannels(out *output, all []*floxv1.ChannelState) error {
	if out.json {
		facts := make([]channelFacts, len(all))
		for i, s := range all {
			facts[i] = stateFacts(s)
		}
		return out.printJSON(struct {
			Channels []channelFacts `json:"channels"`
		}{facts})
	}
	if len(all) == 0 {
		out.printf("No channel. To make one: floxctl channel publish NAME DIR, or for nixpkgs\n  floxctl channel track nixpkgs %s\n", tarball.Nixpkgs)
		return nil
	}
	rows := [][]string{{"CHANNEL", "VERSION", "PACKAGES", "PUBLISHED", "SYSTEMS"}}
	for _, s := range all {
		v := s.GetNewest()
		row := []string{clean(s.GetChannel().GetName()), "-", "-", "-", clean(strings.Join(s.GetTracking().GetSystems(), ", "))}
		if v != nil {
			row = []string{
				row[0], fmt.Sprint(v.GetNumber()), fmt.Sprint(v.GetPackages() - v.GetFailed()),
				ago(v.GetTimeUnixMs(), time.Now()) + " ago", clean(strings.Join(v.GetSystems(), ", ")),
			}
		}
		rows = append(rows, row)
	}
	out.table(rows, map[int]bool{1: true, 2: true})
	for _, s := range all {
		if t := s.GetTracking(); t != nil {
			how := "not fetched yet"
			if last := t.GetLast(); last != nil {
				how = clean(last.GetResult()) + " " + ago(last.GetTimeUnixMs(), time.Now()) + " ago"
			}
			out.printf("%s tracks %s: %s, next %s\n", clean(s.GetChannel().GetName()), clean(t.GetUrl()), how, until(s.GetNextFetchUnixMs()))
		}
	}
	return nil
}

func newChannelShowCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Show the versions of a channel",
		Long:    "Show the versions of a channel, the newest first: who published them, when, and what\nwas evaluated; and what it tracks, how the last fetch went and when the next one is.\n\n" + cli.ExitCodes,
		Example: "  floxctl channel show nixexprs",
		Args:    cli.Args(1, 1, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			resp, err := g.admin().ShowChannel(cmd.Context(), connect.NewRequest(&floxv1.ShowChannelRequest{Channel: args[0]}))
			if err != nil {
				return explainAdmin(err)
			}
			out, m := g.printer(cmd), resp.Msg
			if out.json {
				facts := channelOf(m.GetChannel(), m.GetVersions()...)
				facts.Tracking = trackingOf(m.GetTracking(), m.GetNextFetchUnixMs())
				return out.printJSON(facts)
			}
			rows := [][]string{{"VERSION", "PUBLISHED", "WHO", "PACKAGES", "SOURCE", ""}}
			for _, v := range m.GetVersions() {
				rows = append(rows, []string{
					fmt.Sprint(v.GetNumber()), ago(v.GetTimeUnixMs(), time.Now()) + " ago", clean(v.GetActor().GetUser() + " on " + v.GetActor().GetMachine()),
					fmt.Sprint(v.GetPackages() - v.GetFailed()), clean(filepath.Join(v.GetSource(), v.GetFile())), clean(v.GetReason()),
				})
			}
			out.table(rows, map[int]bool{0: true, 3: true})
			if p := m.GetChannel().GetPublishers(); len(p) > 0 {
				out.printf("Publishers beside admins: %s\n", clean(strings.Join(p, ", ")))
			}
			tellTracking(out, m.GetTracking(), m.GetNextFetchUnixMs())
			return nil
		},
	}
}

func newChannelPublishersCmd(g *globals) *cobra.Command {
	var add, drop []string
	cmd := &cobra.Command{
		Use:     "publishers NAME [--add USER]... [--drop USER]...",
		Short:   "Say who publishes a channel, beside admins",
		Long:    "Say who publishes a channel, beside admins of the storehouse.\n\n" + cli.ExitCodes,
		Example: "  floxctl channel publishers nixexprs --add alice",
		Args:    cli.Args(1, 1, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(add)+len(drop) == 0 {
				return cli.Usage("want --add USER or --drop USER; who they are: floxctl channel show %s", args[0])
			}
			resp, err := g.admin().SetPublishers(cmd.Context(), connect.NewRequest(&floxv1.SetPublishersRequest{Channel: args[0], Add: add, Drop: drop}))
			if err != nil {
				return explainAdmin(err)
			}
			out, c := g.printer(cmd), resp.Msg.GetChannel()
			if out.json {
				return out.printJSON(channelOf(c))
			}
			out.printf("Publishers of %s beside admins: %s\n", clean(c.GetName()), clean(strings.Join(append(c.GetPublishers(), ""), " ")))
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&add, "add", nil, "a `USER` who may publish from now on")
	cmd.Flags().StringArrayVar(&drop, "drop", nil, "a `USER` who may not any more")
	return cmd
}

func newChannelDeleteCmd(g *globals) *cobra.Command {
	yes := false
	cmd := &cobra.Command{
		Use:     "delete NAME [--yes]",
		Short:   "Forget a channel with all its versions",
		Long:    "Forget a channel with all its versions. What was installed from it stays installed.\n\n" + cli.ExitCodes,
		Example: "  floxctl channel delete old --yes",
		Args:    cli.Args(1, 1, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !yes {
				return cli.Explain(flox.ErrBadInput, "this forgets channel %s with all its versions, for everybody: say --yes if that is meant", clean(args[0]))
			}
			if _, err := g.admin().DeleteChannel(cmd.Context(), connect.NewRequest(&floxv1.DeleteChannelRequest{Channel: args[0]})); err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(struct {
					Deleted string `json:"deleted"`
				}{args[0]})
			}
			out.printf("Channel %s is forgotten.\n", clean(args[0]))
			return nil
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	return cmd
}
