package ctl

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/ctl/cli"
)

// admin gives a client of what operators ask of the storehouse: over the socket
// that was named, or on a server over its own if the caller may open it, since
// there an operator has every right, or over the agent's, which passes it on.
func (g *globals) admin() floxv1connect.AdminClient {
	sockets := []string{cli.DefaultRunDir + "/" + cli.StorehouseSocket, cli.DefaultSocket}
	if named := g.socketPath(); named != cli.DefaultSocket {
		sockets = []string{named}
	}
	client, _ := cli.Admin(sockets...) // its connections end with the command
	return client
}

// explainAdmin is explain for calls that the storehouse answers.
func explainAdmin(err error) error {
	var dial *cli.DialError
	if errors.As(err, &dial) && !errors.Is(err, context.Canceled) && !errors.Is(err, os.ErrPermission) {
		return cli.Explain(flox.ErrUnreachable, `nobody to ask: neither a storehouse nor an agent answers on this machine (%s: %v).
Run it on a server of the storehouse or on a machine with an agent, or name a socket with --socket or %s.`, dial.Socket, dial.Err, cli.EnvSocket)
	}
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return cli.Explain(flox.ErrBadInput, "the storehouse or the agent in between does not know this request: it is another version than this floxctl (%s); compare: floxctl version, floxd version",
			cli.ReadVersion().Version)
	}
	return explain(err)
}

// parseSpan reads a time span that a person thinks of: "90s", "10m", "1h", "14d", "2w".
func parseSpan(flag, text string) (time.Duration, error) {
	bad := cli.Usage("%s %q: want a number and a unit such as 10m, 1h or 14d", flag, text)
	d, err := time.ParseDuration(text)
	if err != nil {
		day, isDays := strings.CutSuffix(text, "d")
		if week, isWeeks := strings.CutSuffix(text, "w"); isWeeks {
			day, isDays = week, true
		}
		n, err := strconv.ParseUint(day, 10, 16)
		if !isDays || err != nil {
			return 0, bad
		}
		d = time.Duration(n) * 24 * time.Hour
		if strings.HasSuffix(text, "w") {
			d *= 7
		}
	}
	if d < time.Second {
		return 0, bad
	}
	return d, nil
}

// ago gives how long ago a time was, "-" for none.
func ago(unixMs int64, now time.Time) string {
	if unixMs <= 0 {
		return "-"
	}
	return cli.FormatDuration(max(now.Sub(time.UnixMilli(unixMs)), 0).Truncate(time.Second))
}

// stampMs is stamp for milliseconds, with them.
func stampMs(unixMs int64) *string {
	if unixMs <= 0 {
		return nil
	}
	s := time.UnixMilli(unixMs).UTC().Format("2006-01-02T15:04:05.000Z07:00") // RFC 3339
	return &s
}

// labelsOf gives "k=v,k=v".
func labelsOf(labels []*floxv1.Label) string {
	words := make([]string, 0, len(labels))
	for _, l := range labels {
		words = append(words, clean(l.GetKey()+"="+l.GetValue()))
	}
	return strings.Join(words, ",")
}

// labelMap is the labels for JSON.
func labelMap(labels []*floxv1.Label) map[string]string {
	m := make(map[string]string, len(labels))
	for _, l := range labels {
		m[l.GetKey()] = l.GetValue()
	}
	return m
}

// parseLabels reads "k=v" of a command line; what a label may be is the storehouse's to say.
func parseLabels(words []string) ([]*floxv1.Label, error) {
	labels := make([]*floxv1.Label, 0, len(words))
	for _, w := range words {
		key, value, found := strings.Cut(w, "=")
		if !found || key == "" {
			return nil, cli.Usage("label %q: want KEY=VALUE", w)
		}
		labels = append(labels, &floxv1.Label{Key: key, Value: value})
	}
	return labels, nil
}

// actorOf names on whose behalf something was done: "alice on s1".
func actorOf(a *floxv1.Actor) string {
	machine := a.GetMachine()
	if machine == "" {
		machine = a.GetPeer()
	}
	switch {
	case a.GetUser() == "":
		return clean(orDash(machine))
	case machine == "":
		return clean(a.GetUser())
	}
	return clean(a.GetUser() + " on " + machine)
}

// confirm is cli.Confirm.
func confirm(cmd *cobra.Command, yes bool, question string) error {
	return cli.Confirm(cmd, yes, question)
}
