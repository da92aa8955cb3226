package ctl

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newUpstreamCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upstream",
		Short: "Binary caches that the storehouse substitutes from",
		Long: `Add, list, test and remove upstreams: binary caches that the storehouse asks for what
is not valid, once for everybody. What has a signature by a key of the upstream it comes
from enters, with its signatures, and stays when the upstream goes.

Upstreams are asked when Nix substitutes, and never because somebody looks for a name
in the store that is not there.

` + cli.ExitCodes,
		Example: `  floxctl upstream add https://cache.nixos.org --key cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=
  floxctl upstream list
  floxctl upstream test https://cache.nixos.org`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newUpstreamAddCmd(g), newUpstreamListCmd(g), newUpstreamTestCmd(g), newUpstreamRemoveCmd(g))
	return cmd
}

// upstreamAddOptions are the command line of upstream add.
type upstreamAddOptions struct {
	*globals
	url      string
	keys     []string
	netrc    string
	priority uint32
	untested bool
}

func newUpstreamAddCmd(g *globals) *cobra.Command {
	opts := upstreamAddOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "add URL --key NAME:BASE64... [--netrc FILE] [--priority N] [--untested]",
		Short: "Substitute from a binary cache from now on",
		Long: `Substitute from a binary cache from now on, at every server. URL is

  https://HOST/PATH, http://…
  s3://BUCKET?region=R&endpoint=HOST:PORT&scheme=http   the parameters as Nix has them
  ssh-ng://USER@HOST?ssh-key=FILE                       the store of Nix there; FILE lies on every server
  file:///DIRECTORY                                     on every server

Only what one of its keys signed enters. A cache that asks for a login gets the one that
FILE, as ~/.netrc is written, has for its host (S3: for the bucket; login is the access
key and password the secret key); the servers keep it encrypted, and show it to nobody.
Without one S3 is asked with the keys that the AWS tools of the server find. ssh runs as the
storehouse does, asks nobody anything (the host has to be known and the key to be allowed),
and takes more options from NIX_SSHOPTS.

The cache is tested first. Adding an upstream again replaces its keys, login and priority.

` + cli.ExitCodes,
		Example: `  floxctl upstream add https://cache.nixos.org --key cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=
  floxctl upstream add https://cache.example.org/team --key team-1:iKq0... --netrc ~/.netrc --priority 10
  floxctl upstream add ssh-ng://cache@builder.example.org?ssh-key=/etc/floxd/builder --key builder-1:Zb9u...`,
		Args: cli.Args(1, 1, "URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.url = args[0]
			return runUpstreamAdd(cmd.Context(), opts, g.printer(cmd))
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&opts.keys, "key", nil, "accept what this public key signed, `NAME:BASE64`; may be repeated")
	f.StringVar(&opts.netrc, "netrc", "", "take the login from this `FILE`")
	f.Uint32Var(&opts.priority, "priority", 0, "the upstream with the lowest `N` is asked first (default: as the cache says, or 50)")
	f.BoolVar(&opts.untested, "untested", false, "add it though it does not answer at present")
	return cmd
}

// request checks the command line before anybody is asked.
func (o upstreamAddOptions) request() (*floxv1.AddUpstreamRequest, error) {
	if len(o.keys) == 0 {
		return nil, cli.Usage("--key is missing: what the cache has must be signed by a key that you trust, NAME:BASE64 as in trusted-public-keys of nix.conf")
	}
	for _, k := range o.keys {
		if name, key, found := strings.Cut(k, ":"); !found || name == "" || key == "" {
			return nil, cli.Usage("--key %q: want NAME:BASE64, as in trusted-public-keys of nix.conf", k)
		}
	}
	q := &floxv1.AddUpstreamRequest{Upstream: &floxv1.Upstream{Url: o.url, Keys: o.keys, Priority: o.priority}, Untested: o.untested}
	if o.netrc == "" {
		return q, nil
	}
	login, err := netrcLogin(o.netrc, o.url)
	q.Login, q.Password = login.name, login.password
	return q, err
}

// upstreamFacts is an upstream as it was set.
type upstreamFacts struct {
	URL      string   `json:"url"`
	Keys     []string `json:"keys"`
	Priority uint32   `json:"priority"`
	Login    bool     `json:"login"`
	AddedAt  *string  `json:"addedAt"`
	AddedBy  string   `json:"addedBy"`
}

func upstreamOf(u *floxv1.Upstream) upstreamFacts {
	return upstreamFacts{
		URL: u.GetUrl(), Keys: some(u.GetKeys()), Priority: u.GetPriority(), Login: u.GetLogin(), AddedAt: stampMs(u.GetAddedUnixMs()), AddedBy: u.GetAddedBy(),
	}
}

func runUpstreamAdd(ctx context.Context, opts upstreamAddOptions, out *output) error {
	req, err := opts.request()
	if err != nil {
		return err
	}
	resp, err := opts.admin().AddUpstream(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	if out.json {
		return out.printJSON(struct {
			upstreamFacts
			Replaced bool   `json:"replaced"`
			Problem  string `json:"problem"`
		}{upstreamOf(m.GetUpstream()), m.GetReplaced(), m.GetProblem()})
	}
	did := "Added"
	if m.GetReplaced() {
		did = "Changed"
	}
	out.printf("%s: %s, priority %d.\n", did, clean(m.GetUpstream().GetUrl()), m.GetUpstream().GetPriority())
	if m.GetProblem() != "" {
		out.printf("It does not answer at present: %s\n", clean(m.GetProblem()))
	}
	return nil
}

func newUpstreamTestCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "test URL [PATH]",
		Short: "Ask an upstream whether it answers, and has a path",
		Long: `Have the server that fetches ask an upstream whether it answers, and whether it has PATH
with a signature by one of its keys. One that was left alone because it did not answer is
asked again from then on, and what was remembered of it is forgotten.

` + cli.ExitCodes,
		Example: "  floxctl upstream test https://cache.nixos.org /nix/store/...-hello",
		Args:    cli.Args(1, 2, "URL and perhaps PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &floxv1.TestUpstreamRequest{Url: args[0]}
			if len(args) > 1 {
				path, err := storeArg(args[1])
				if err != nil {
					return err
				}
				req.Path = path
			}
			return runUpstreamTest(cmd.Context(), g, g.printer(cmd), req)
		},
	}
}

func runUpstreamTest(ctx context.Context, g *globals, out *output, req *floxv1.TestUpstreamRequest) error {
	resp, err := g.admin().TestUpstream(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	found := m.GetFound()
	if out.json {
		facts := struct {
			RoundTripUs  uint64  `json:"roundTripUs"`
			StoreDir     string  `json:"storeDir"`
			Priority     uint32  `json:"priority"`
			Path         *string `json:"path"`
			NarSize      uint64  `json:"narSize"`
			DownloadSize uint64  `json:"downloadSize"`
		}{RoundTripUs: m.GetRoundTripUs(), StoreDir: m.GetStoreDir(), Priority: m.GetPriority()}
		if found != nil {
			path := found.GetInfo().GetPath()
			facts.Path, facts.NarSize, facts.DownloadSize = &path, found.GetInfo().GetNarSize(), found.GetDownloadSize()
		}
		return out.printJSON(facts)
	}
	out.printf("It answers (%s).\n", cli.FormatDuration(time.Duration(min(m.GetRoundTripUs(), 1e12))*time.Microsecond))
	if found != nil {
		out.printf("It has %s: %s to download, %s unpacked, with a signature that is accepted.\n",
			clean(found.GetInfo().GetPath()), downloadSize(found.GetDownloadSize()), cli.FormatBytes(found.GetInfo().GetNarSize()))
	}
	return nil
}

// downloadSize is in words what a cache need not say.
func downloadSize(n uint64) string {
	if n == 0 {
		return "an unknown size"
	}
	return cli.FormatBytes(n)
}

func newUpstreamRemoveCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "remove URL",
		Short: "Substitute from a binary cache no more",
		Long: `Substitute from a binary cache no more. What came from it stays, and its login is
forgotten.

` + cli.ExitCodes,
		Example: "  floxctl upstream remove https://cache.nixos.org",
		Args:    cli.Args(1, 1, "URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := g.admin().RemoveUpstream(cmd.Context(), connect.NewRequest(&floxv1.RemoveUpstreamRequest{Url: args[0]}))
			if err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(struct {
					Removed string `json:"removed"`
				}{args[0]})
			}
			out.printf("Removed: %s. What came from it stays.\n", clean(args[0]))
			return nil
		},
	}
}

func newUpstreamListCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the upstreams, in the order in which they are asked",
		Long: `List the upstreams, in the order in which they are asked: how often each was asked for
a path and had it, and what was fetched, since the server that fetches started or the
upstream was changed. One that does not answer is left alone for a while, and tried then.

` + cli.ExitCodes,
		Example: "  floxctl upstream list --json",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runUpstreamList(cmd.Context(), g, g.printer(cmd)) },
	}
}

// upstreamStateFacts is an upstream and what came of asking it.
type upstreamStateFacts struct {
	upstreamFacts
	Problem      string  `json:"problem"`
	RetryAt      *string `json:"retryAt"`
	Asked        uint64  `json:"asked"`
	Had          uint64  `json:"had"`
	FetchedPaths uint64  `json:"fetchedPaths"`
	FetchedBytes uint64  `json:"fetchedBytes"`
}

func runUpstreamList(ctx context.Context, g *globals, out *output) error {
	resp, err := g.admin().ListUpstreams(ctx, connect.NewRequest(&floxv1.ListUpstreamsRequest{}))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	if out.json {
		return out.printJSON(upstreamListOf(m))
	}
	if len(m.GetUpstreams()) == 0 {
		out.printf("No upstream: nothing is substituted.\n")
	} else {
		rows := [][]string{{"PRIORITY", "UPSTREAM", "STATE", "HAD", "ASKED", "FETCHED", "KEYS"}}
		for _, u := range m.GetUpstreams() {
			rows = append(rows, []string{
				fmt.Sprint(u.GetUpstream().GetPriority()), clean(u.GetUpstream().GetUrl()), upstreamState(u, time.Now()), fmt.Sprint(u.GetHad()),
				fmt.Sprint(u.GetAsked()), cli.FormatBytes(u.GetFetchedBytes()), clean(keyNames(u.GetUpstream().GetKeys())),
			})
		}
		out.table(rows, map[int]bool{0: true, 3: true, 4: true, 5: true})
	}
	for _, u := range m.GetUpstreams() {
		if u.GetProblem() != "" {
			out.printf("\n%s: %s\n", clean(u.GetUpstream().GetUrl()), clean(u.GetProblem()))
		}
	}
	for _, u := range m.GetSuggested() {
		out.printf("\nNot added, and never asked: %s\nTo add it: floxctl upstream add %s --key %s\n",
			clean(u.GetUrl()), clean(u.GetUrl()), clean(strings.Join(u.GetKeys(), " --key ")))
	}
	return nil
}

// upstreamListFacts are the upstreams, and caches that could be some.
type upstreamListFacts struct {
	Upstreams []upstreamStateFacts `json:"upstreams"`
	Suggested []upstreamFacts      `json:"suggested"`
}

func upstreamListOf(m *floxv1.ListUpstreamsResponse) upstreamListFacts {
	facts := upstreamListFacts{Upstreams: []upstreamStateFacts{}, Suggested: []upstreamFacts{}}
	for _, u := range m.GetUpstreams() {
		facts.Upstreams = append(facts.Upstreams, upstreamStateFacts{
			upstreamFacts: upstreamOf(u.GetUpstream()), Problem: u.GetProblem(), RetryAt: stampMs(u.GetRetryUnixMs()), Asked: u.GetAsked(), Had: u.GetHad(),
			FetchedPaths: u.GetFetchedPaths(), FetchedBytes: u.GetFetchedBytes(),
		})
	}
	for _, u := range m.GetSuggested() {
		facts.Suggested = append(facts.Suggested, upstreamOf(u))
	}
	return facts
}

// upstreamState says in words whether an upstream is asked.
func upstreamState(u *floxv1.UpstreamState, now time.Time) string {
	switch left := time.UnixMilli(u.GetRetryUnixMs()).Sub(now); {
	case u.GetRetryUnixMs() == 0 && u.GetProblem() == "":
		return "asked"
	case u.GetRetryUnixMs() == 0:
		return "failing"
	case left > 0:
		return "away, tried in " + cli.FormatDuration(left.Truncate(time.Second))
	}
	return "away, tried next time"
}

// keyNames are the names of public keys.
func keyNames(keys []string) string {
	names := make([]string, 0, len(keys))
	for _, k := range keys {
		name, _, _ := strings.Cut(k, ":")
		names = append(names, name)
	}
	return strings.Join(names, " ")
}
