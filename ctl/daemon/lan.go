package daemon

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/term"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

// onLAN finds the storehouses of this LAN that let machines in now, and has a
// person say which one is theirs, or takes the one whose fingerprint was given.
func (j *join) onLAN(ctx context.Context, in io.Reader) (*api.JoinInvite, error) {
	fmt.Fprintln(j.errOut, "Looking for storehouses on this LAN …")
	var all []entry.Found
	step := &entry.Step{Do: entry.Find, StateDir: j.cfg.StateDir}
	if err := runStep(ctx, j.who, step, &all, j.errOut); err != nil {
		return nil, err
	}
	var open []entry.Found
	for _, f := range all {
		if f.Problem == "" {
			open = append(open, f)
		} else {
			fmt.Fprintf(j.errOut, "%s at %s cannot be joined: %s\n", f.Invite.Name, f.Address, f.Problem)
		}
	}
	if len(open) == 0 {
		return nil, cli.Explain(flox.ErrNotFound, `no storehouse on this LAN lets machines in now. On one of its servers, or as an admin:
  floxctl invite --lan 10m                   whoever is in that LAN may join
  floxctl invite --role agent                or an invite for: sudo floxctl join INVITE`)
	}
	if j.yes != "" {
		return pick(open, j.yes)
	}
	for i, f := range open {
		fmt.Fprintf(j.errOut, "%d. %s\n   Fingerprint %s\n   Address     %s\n", i+1, f.Invite.Name, f.Invite.TrustList, f.Address)
	}
	return choose(ctx, in, j.errOut, open)
}

// pick gives the storehouse with a fingerprint.
func pick(open []entry.Found, fingerprint string) (*api.JoinInvite, error) {
	var seen []string
	for _, f := range open {
		if f.Invite.TrustList.String() == fingerprint {
			return f.Invite, nil
		}
		seen = append(seen, f.Invite.Name+" "+f.Invite.TrustList.String())
	}
	return nil, cli.Explain(flox.ErrUntrusted, "no storehouse on this LAN has the fingerprint %s, but: %s", fingerprint, strings.Join(seen, ", "))
}

// choose asks at the terminal.
func choose(ctx context.Context, in io.Reader, out io.Writer, open []entry.Found) (*api.JoinInvite, error) {
	file, isFile := in.(*os.File)
	if !isFile || !term.IsTerminal(int(file.Fd())) {
		return nil, cli.Usage("standard input is no terminal to ask at: compare the fingerprint with what floxctl invite --lan printed, and say it with --yes FINGERPRINT")
	}
	if len(open) == 1 {
		fmt.Fprintf(out, "Compare the fingerprint with what floxctl invite --lan printed. Join it? [y/N] ")
	} else {
		fmt.Fprintf(out, "Compare the fingerprints with what floxctl invite --lan printed. Join which? [1-%d, or nothing] ", len(open))
	}
	answer := make(chan string, 1)
	go func() { // a read of a terminal ends with the program at the latest
		line, _ := bufio.NewReader(file).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case line := <-answer:
		if len(open) == 1 && (line == "y" || line == "yes") {
			return open[0].Invite, nil
		}
		if n, err := strconv.Atoi(line); err == nil && n >= 1 && n <= len(open) {
			return open[n-1].Invite, nil
		}
		return nil, cli.Explain(cli.ErrInterrupted, "nothing was changed")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
