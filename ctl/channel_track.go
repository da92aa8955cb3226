package ctl

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/profile/tarball"
	"github.com/floxctl/flox/profile/upgrade"
)

func newChannelTrackCmd(g *globals) *cobra.Command {
	opts := &channelOptions{globals: g}
	every := "1d"
	cmd := &cobra.Command{
		Use:   "track NAME URL [--every TIME] [--system SYSTEM]...",
		Short: "Have a channel follow a published tarball",
		Long: `Have a channel follow a tarball of Nix expressions that is published at a URL: nixexprs.tar.xz,
.tar.gz or .tar over http or https, or what redirects to one. The storehouse fetches it at once
and then every TIME, and makes a version of the channel whenever it is another one, evaluated
as by floxctl channel publish. What it cannot fetch or evaluate changes nothing, and is tried
again after 5 minutes, then later and later; floxctl channel show NAME says how the last try
went, and when the next one is.

nixpkgs is published at
  ` + tarball.Nixpkgs + `

The first fetch is shown until it is over. Ctrl-C ends that, not the fetch: it goes on in the
storehouse. Admins of the storehouse say what is tracked.

` + cli.ExitCodes,
		Example: "  floxctl channel track nixpkgs " + tarball.Nixpkgs,
		Args:    cli.Args(2, 2, "NAME and URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runChannelTrack(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd), args[0], args[1], every)
		},
	}
	cmd.Flags().StringVar(&every, "every", every, "how often it is fetched, a `TIME` such as 7d or 12h, an hour at least")
	cmd.Flags().StringArrayVar(&opts.systems, "system", nil, "a `SYSTEM` to evaluate for, such as x86_64-linux (default: this machine's; can be repeated)")
	return cmd
}

func runChannelTrack(ctx context.Context, opts *channelOptions, out, says *output, name, url, every string) error {
	if err := tarball.CheckURL(url); err != nil {
		return err
	}
	often, err := parseSchedule("", "", every) // which --every of a profile's schedule means as well
	if err != nil {
		return err
	}
	if len(opts.systems) == 0 {
		opts.systems = []string{thisSystem()}
	}
	stream, err := opts.admin().TrackChannel(ctx, connect.NewRequest(&floxv1.TrackChannelRequest{
		Channel: name, Url: url, EveryMinutes: often.GetEveryMinutes(), Systems: opts.systems,
	}))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	bar := newProgress(says)
	defer bar.end()
	var end *floxv1.ChannelState
	begun := false
	for stream.Receive() {
		begun, end = true, stream.Msg().GetState()
		bar.show(trackStep(stream.Msg()))
	}
	bar.end()
	switch err := stream.Err(); {
	case err != nil && begun: // it is tracked: what ended is only that somebody looks
		return fmt.Errorf("%w\nThe storehouse goes on with channel %s by itself; to look: floxctl channel show %s", explainAdmin(err), clean(name), clean(name))
	case err != nil:
		return explainAdmin(err)
	case end.GetTracking() == nil:
		return errors.New("the storehouse ended before the channel was fetched; to look: floxctl channel show " + clean(name))
	}
	return tellTracked(out, end)
}

// trackStep is what is shown of a fetch under way.
func trackStep(m *floxv1.TrackChannelProgress) step {
	words := clean(m.GetDoing())
	count := func(n uint64) string { return fmt.Sprint(n) }
	if m.GetBytes() {
		count = cli.FormatBytes
	}
	switch {
	case m.GetAll() > 0:
		words += ": " + count(m.GetDone()) + " of " + count(m.GetAll())
	case m.GetDone() > 0:
		words += ": " + count(m.GetDone())
	}
	return step{done: m.GetDone(), total: m.GetAll(), says: words}
}

// tellTracked says what the first fetch came to.
func tellTracked(out *output, s *floxv1.ChannelState) error {
	name, last := clean(s.GetChannel().GetName()), s.GetTracking().GetLast()
	if out.json {
		if err := out.printJSON(stateFacts(s)); err != nil {
			return err
		}
	}
	if last.GetResult() == "failed" {
		return cli.Explain(flox.ErrUnreachable, "channel %s: %s\nIt is tracked all the same, and tried again %s; to look: floxctl channel show %s; to end that: floxctl channel untrack %s",
			name, clean(last.GetDetail()), until(s.GetNextFetchUnixMs()), name, name)
	}
	if out.json {
		return nil
	}
	if v := s.GetNewest(); last.GetResult() == "published" {
		out.printf("Channel %s: version %d, %d packages for %s. To look: floxctl search --channel %s\n", name, v.GetNumber(),
			v.GetPackages()-v.GetFailed(), clean(strings.Join(v.GetSystems(), ", ")), name)
	} else {
		out.printf("Channel %s is so already, in version %d.\n", name, last.GetVersion())
	}
	tellTracking(out, s.GetTracking(), s.GetNextFetchUnixMs())
	return nil
}

// until says when something is: "now", "in 5 min".
func until(unixMs int64) string {
	if wait := time.Until(time.UnixMilli(unixMs)); wait > time.Second {
		return "in " + cli.FormatDuration(wait.Truncate(time.Second))
	}
	return "now"
}

// tellTracking says what a channel tracks, and how that goes.
func tellTracking(out *output, t *floxv1.ChannelTracking, next int64) {
	if t == nil {
		return
	}
	out.printf("It tracks %s %s for %s, next %s.\n", clean(t.GetUrl()), upgrade.Describe(&floxv1.ProfileSchedule{EveryMinutes: t.GetEveryMinutes()}),
		clean(strings.Join(t.GetSystems(), ", ")), until(next))
	last := t.GetLast()
	switch {
	case last == nil:
		out.printf("It was not fetched yet.\n")
	case last.GetResult() == "failed":
		out.printf("Last fetch, %s ago: failed %s in a row: %s\n", ago(last.GetTimeUnixMs(), time.Now()), plural(uint64(last.GetFailures()), "time", "times"), clean(last.GetDetail()))
	default:
		out.printf("Last fetch, %s ago: %s, version %d, from %s\n", ago(last.GetTimeUnixMs(), time.Now()), clean(last.GetResult()), last.GetVersion(), clean(last.GetDetail()))
	}
}

// trackingFacts is what a channel tracks, as JSON.
type trackingFacts struct {
	URL          string      `json:"url"`
	EveryMinutes uint32      `json:"everyMinutes"`
	Systems      []string    `json:"systems"`
	Since        *string     `json:"since"`
	By           string      `json:"by"`
	Next         *string     `json:"next"` // fetch; in the past, it is due
	Last         *fetchFacts `json:"last"` // null = it was not fetched yet
}

type fetchFacts struct {
	Time     *string `json:"time"`
	Result   string  `json:"result"` // published, unchanged or failed
	Detail   string  `json:"detail"` // where it was fetched from, or why it failed
	Failures uint32  `json:"failures"`
	Version  uint64  `json:"version"`
}

func trackingOf(t *floxv1.ChannelTracking, next int64) *trackingFacts {
	if t == nil {
		return nil
	}
	facts := &trackingFacts{t.GetUrl(), t.GetEveryMinutes(), append([]string{}, t.GetSystems()...), stampMs(t.GetSinceUnixMs()), t.GetActor().GetUser(), stampMs(next), nil}
	if last := t.GetLast(); last != nil {
		facts.Last = &fetchFacts{stampMs(last.GetTimeUnixMs()), last.GetResult(), last.GetDetail(), last.GetFailures(), last.GetVersion()}
	}
	return facts
}

// stateFacts is a channel with its newest version, as JSON.
func stateFacts(s *floxv1.ChannelState) channelFacts {
	var versions []*floxv1.ChannelVersion
	if v := s.GetNewest(); v != nil {
		versions = append(versions, v)
	}
	facts := channelOf(s.GetChannel(), versions...)
	facts.Tracking = trackingOf(s.GetTracking(), s.GetNextFetchUnixMs())
	return facts
}

func newChannelUntrackCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "untrack NAME",
		Short:   "Have a channel follow nothing any more",
		Long:    "Have a channel follow nothing any more. Its versions stay.\n\n" + cli.ExitCodes,
		Example: "  floxctl channel untrack nixpkgs",
		Args:    cli.Args(1, 1, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			resp, err := g.admin().UntrackChannel(cmd.Context(), connect.NewRequest(&floxv1.UntrackChannelRequest{Channel: args[0]}))
			if err != nil {
				return explainAdmin(err)
			}
			out, was := g.printer(cmd), resp.Msg.GetTracking()
			if out.json {
				return out.printJSON(struct {
					Channel string         `json:"channel"`
					Was     *trackingFacts `json:"was"`
				}{was.GetChannel(), trackingOf(was, 0)})
			}
			out.printf("Channel %s tracks nothing any more; it was %s.\n", clean(was.GetChannel()), clean(was.GetUrl()))
			return nil
		},
	}
}
