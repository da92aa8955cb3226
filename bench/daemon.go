package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/world"
)

// daemonParts are the groups of rows, in order: copies come while the storehouse
// has nothing. DAEMON_PARTS=valid,crowd runs only some.
var daemonParts = []part[*daemonLab]{
	{"copy", (*daemonLab).copyRows},
	{"graph", (*daemonLab).graphRows},
	{"info", (*daemonLab).infoRows},
	{"valid", (*daemonLab).validRows},
	{"noop", (*daemonLab).noopRows},
	{"crowd", (*daemonLab).crowdRows},
}

// daemonLab is a storehouse, three hosts with an agent, of which one is far away,
// and one with stock nix-daemon and a store of its own, all on the same disk. Of
// the lab it is made of, warm is next to the storehouse, cold is the far one, and
// second is another near one, which adds nothing.
type daemonLab struct {
	fuseLab
	stock *hosts.Daemon // nix-daemon, on plain
	conf  string        // directory of nix.conf
}

// daemonBench measures stock Nix with the agent as its daemon against stock Nix
// with stock nix-daemon.
func daemonBench(ctx context.Context) (rows []Row, err error) {
	l := &daemonLab{}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.start(ctx); err != nil {
		return nil, err
	}
	return runParts(ctx, l, func() *hosts.Agent { return l.warm }, "DAEMON_PARTS", daemonParts)
}

// capped is how many pairs a row has: n, or fewer where the environment says so.
func capped(n int) int {
	for _, name := range []string{"DAEMON_ROUNDS", "SWARM_ROUNDS", "PROFILES_ROUNDS"} {
		if most, err := strconv.Atoi(os.Getenv(name)); err == nil && most > 0 {
			n = min(n, most)
		}
	}
	return n
}

// daemonConf is stock Nix's configuration, on all hosts: nothing is built or
// substituted, so that neither side does what the other does not.
const daemonConf = "build-users-group =\nsandbox = false\nsubstituters =\nexperimental-features = nix-command\nmax-jobs = 0\n"

func (l *daemonLab) start(ctx context.Context) (err error) {
	if l.world, err = world.Ensure(ctx); err != nil {
		return err
	}
	if err := l.open(ctx); err != nil {
		return err
	}
	l.conf = filepath.Join(l.dir, "conf")
	if err := errors.Join(os.Mkdir(l.conf, 0o755), os.WriteFile(filepath.Join(l.conf, "nix.conf"), []byte(daemonConf), 0o644)); err != nil { //nolint:gosec // as above
		return err
	}
	house, err := l.host(ctx, "house")
	if err != nil {
		return err
	}
	if l.house, err = hosts.StartStorehouse(ctx, l.programs, house, l.dir); err != nil {
		return err
	}
	for _, a := range []struct {
		name string
		to   **hosts.Agent
	}{{"near", &l.warm}, {"far", &l.cold}, {"reader", &l.second}} {
		if *a.to, err = l.agent(ctx, a.name, quiet...); err != nil {
			return err
		}
	}
	if err := l.cold.Host.Delay(ctx, farAway); err != nil {
		return err
	}
	if l.plain, err = l.host(ctx, "stock"); err != nil {
		return err
	}
	return l.startStock(ctx)
}

// startStock starts nix-daemon and waits until it answers.
func (l *daemonLab) startStock(ctx context.Context) (err error) {
	if l.stock, err = hosts.Start(l.plain, l.dir, "nix-daemon", append(append([]string{"env"}, l.env("")...), "nix-daemon")...); err != nil {
		return err
	}
	for range 100 {
		if _, err = l.nix(ctx, nil, "nix", "store", "ping"); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("nix-daemon does not answer: %w\n%s", err, l.stock.Tail())
}

func (l *daemonLab) close() error {
	var err error
	if l.stock != nil {
		err = l.stock.Stop()
	}
	return errors.Join(err, l.fuseLab.close())
}

// env is a client's environment, as arguments of env; remote is the store it uses.
func (l *daemonLab) env(remote string) []string {
	return []string{"-i", "PATH=" + os.Getenv("PATH"), "HOME=" + l.dir, "NIX_CONF_DIR=" + l.conf, "NIX_USER_CONF_FILES=", "NIX_REMOTE=" + remote}
}

// ran is how a client's run went.
type ran struct {
	took time.Duration
	out  string // what it printed on standard output
}

// last is the last line of it.
func (r ran) last() string {
	lines := strings.Fields(r.out)
	if len(lines) == 0 {
		return ""
	}
	return lines[len(lines)-1]
}

// nix runs a stock client against an agent on its host, or, with nil, against
// stock nix-daemon on its own.
func (l *daemonLab) nix(ctx context.Context, a *hosts.Agent, args ...string) (ran, error) {
	host, remote := l.plain, "daemon"
	if a != nil {
		host, remote = a.Host, "unix:///run/floxd/nix.socket"
	}
	cmd := host.Command(ctx, "env", append(l.env(remote), args...)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	began := time.Now()
	err := cmd.Run()
	r := ran{time.Since(began), out.String()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		text := said.Bytes()
		err = fmt.Errorf("%s on %s: %w: %s", args[0], host.Name, err, text[max(0, len(text)-2000):])
	}
	return r, err
}

// pair runs the same on an agent and on stock nix-daemon, in turns who is first, and
// gives milliseconds. Both have to print the same.
func (l *daemonLab) pair(ctx context.Context, a *hosts.Agent, round int, p *pairs, args ...string) (ran, error) {
	var got [2]ran
	for i := range 2 {
		which := (i + round) % 2
		var err error
		if got[which], err = l.nix(ctx, []*hosts.Agent{a, nil}[which], args...); err != nil {
			return ran{}, err
		}
	}
	if got[0].out != got[1].out {
		return ran{}, fmt.Errorf("%s prints %.300q, with stock nix-daemon %.300q", strings.Join(args, " "), got[0].out, got[1].out)
	}
	p.add(got[0].took.Seconds()*1e3, got[1].took.Seconds()*1e3)
	fmt.Printf("   %s: %.1f s, with stock nix-daemon %.1f s\n", args[0], got[0].took.Seconds(), got[1].took.Seconds())
	return got[0], nil
}

// atMost makes a row of pairs with a target for the ratio.
func (p *pairs) atMost(name, unit string, most float64) Row {
	row := p.row(name, unit, "stock nix-daemon")
	row.Target, row.Met = fmt.Sprintf("<= %.1fx", most), row.Ratio <= most
	return row
}
