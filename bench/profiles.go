package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
)

// profilesParts are the groups of rows, in order. PROFILES_PARTS=install,seen runs only some.
var profilesParts = []part[*profilesLab]{
	{"start", (*profilesLab).startRows},
	{"install", (*profilesLab).installRows},
	{"seen", (*profilesLab).seenRows},
	{"environment", (*profilesLab).environmentRows},
	{"many", (*profilesLab).manyRows},
}

const (
	installRounds = 60
	seenRounds    = 200
	startRounds   = 200
	ownProfile    = "root/default"
)

var profilesTargets = []figureTarget{
	{"listing of 1,000 profiles, p99", "<= 50 ms", "", atMostMs(50)},
	{"listing of one's own profiles, p99", "<= 50 ms", "", atMostMs(50)},
	{"history of a profile, 100 events, p99", "<= 50 ms", "", atMostMs(50)},
	{"search among 100000 packages, p99", "<= 50 ms", "", atMostMs(50)},
	{"change to heard by 1000 watchers, p99", "<= 500 ms", "", atMostMs(500)},
}

func atMostMs(most float64) func(Row) bool { return func(r Row) bool { return r.Ours <= most } }

// profilesLab is a daemonLab, where people install: on warm, while second is looked at, and
// with stock Nix beside it.
type profilesLab struct {
	daemonLab
	tools [2]string // store paths with bin/tool, everywhere
	next  int       // numbers installs: each makes a generation unlike all others
}

// profilesBench measures profiles, with those of stock Nix beside them.
func profilesBench(ctx context.Context) (rows []Row, err error) {
	l := &profilesLab{}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.start(ctx); err != nil {
		return nil, err
	}
	for i := range l.tools {
		dir := filepath.Join(l.dir, fmt.Sprint("tool-", i))
		bin := filepath.Join(dir, "bin")
		if err := errors.Join(os.MkdirAll(bin, 0o755), os.WriteFile(filepath.Join(bin, "tool"), fmt.Appendf(nil, "#!/bin/sh\necho tool %d\n", i), 0o755)); err != nil { //nolint:gosec // as programs are
			return nil, err
		}
		for _, a := range []*hosts.Agent{l.warm, nil} {
			added, err := l.nix(ctx, a, "nix-store", "--add", dir)
			if err != nil {
				return nil, err
			}
			l.tools[i] = added.last()
		}
	}
	return runParts(ctx, l, func() *hosts.Agent { return l.warm }, "PROFILES_PARTS", profilesParts)
}

// timed runs a program and says how long it took; what it printed is in the error, or given.
func timed(cmd *exec.Cmd) (took time.Duration, out []byte, err error) {
	var said bytes.Buffer
	var printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &printed, &said
	began := time.Now()
	err = cmd.Run()
	took = time.Since(began)
	if err != nil {
		err = fmt.Errorf("%s: %w: %.500s", strings.Join(cmd.Args, " "), err, said.String())
	}
	return took, printed.Bytes(), err
}

// startRows is the start of floxctl itself, in turns with nix.
func (l *profilesLab) startRows(ctx context.Context) ([]Row, error) {
	var p pairs
	for range capped(startRounds) {
		ours, _, err := timed(exec.CommandContext(ctx, l.programs.Floxctl, "version"))
		if err != nil {
			return nil, err
		}
		peer, _, err := timed(exec.CommandContext(ctx, "nix", "--version"))
		if err != nil {
			return nil, err
		}
		p.add(ours.Seconds()*1e3, peer.Seconds()*1e3)
	}
	row := p.row("floxctl version, command to prompt, p50", "ms", "nix --version")
	row.Target, row.Met = "<= 15 ms", row.Ours <= 15
	return []Row{row}, nil
}

// install is what `floxctl install --json` says.
type install struct {
	Generation  uint64            `json:"generation"`
	Environment map[string]string `json:"environment"`
}

// install makes a generation with one package that is in the store, on the first machine.
func (l *profilesLab) install(ctx context.Context) (took time.Duration, made install, err error) {
	l.next++
	var out []byte
	err = l.warm.Host.DoMounted(func() (err error) {
		took, out, err = timed(exec.CommandContext(ctx, l.programs.Floxctl, "install", l.tools[l.next%2], "--as", "tool", "--priority", fmt.Sprint(l.next), "--json"))
		return err
	})
	if err == nil {
		err = json.Unmarshal(out, &made)
	}
	return took, made, err
}

// installRows installs a package that is in the store, in turns with stock Nix's own profiles.
func (l *profilesLab) installRows(ctx context.Context) ([]Row, error) {
	mine := filepath.Join(l.dir, "stock-profile")
	var p pairs
	for i := range capped(installRounds) {
		ours, _, err := l.install(ctx)
		if err != nil {
			return nil, err
		}
		peer, err := l.nix(ctx, nil, "nix", "--option", "max-jobs", "1", "profile", "install", "--profile", mine, l.tools[i%2])
		if err != nil {
			return nil, err
		}
		if _, err := l.nix(ctx, nil, "nix", "profile", "remove", "--profile", mine, l.tools[i%2]); err != nil {
			return nil, err
		}
		p.add(ours.Seconds()*1e3, peer.took.Seconds()*1e3)
	}
	row := p.row("install of a package in the store, command to prompt, p50", "ms", "nix profile install")
	row.Target, row.Met = "<= 100 ms", row.Ours <= 100
	return []Row{row}, nil
}

// seenRows is how soon the path on another machine leads to what was made live: from the
// time that the change has in the log, which is when the storehouse took it, in whole
// milliseconds, downwards.
func (l *profilesLab) seenRows(ctx context.Context) ([]Row, error) {
	const live = "/flox/" + ownProfile
	changes := capped(seenRounds)
	_, made, err := l.install(ctx)
	if err == nil {
		_, err = l.warm.Ctl(ctx, "profile", "grant", ownProfile, "*=reader") // no machine of an open storehouse has users
	}
	if err != nil {
		return nil, err
	}
	seen := map[string]time.Time{} // by the name of the environment
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var last string // environment that ends it; written before done is closed
	done, watched := make(chan struct{}), make(chan error, 1)
	go func() {
		watched <- l.second.Host.DoMounted(func() error {
			before := ""
			for ctx.Err() == nil {
				to, err := os.Readlink(live)
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
				if name := filepath.Base(to); err == nil && name != before {
					before, seen[name] = name, time.Now()
				}
				select {
				case <-done:
					if before == last {
						return nil
					}
				default:
				}
				time.Sleep(200 * time.Microsecond)
			}
			return ctx.Err()
		})
	}()
	names := map[uint64]string{}
	for range changes {
		if _, made, err = l.install(ctx); err != nil {
			return nil, err
		}
		for _, env := range made.Environment {
			last = filepath.Base(env)
			names[made.Generation] = last
		}
	}
	close(done)
	select {
	case err = <-watched:
	case <-time.After(30 * time.Second):
		err = fmt.Errorf("generation %d, %s, is not seen on %s, which saw %d: %w", made.Generation, last, l.second.Host.Name, len(seen), flox.ErrUnreachable)
	}
	if err != nil {
		return nil, err
	}
	return l.soon(ctx, names, seen)
}

// soon makes rows of when generations were made, and when they were seen.
func (l *profilesLab) soon(ctx context.Context, names map[uint64]string, seen map[string]time.Time) ([]Row, error) {
	out, err := l.warm.Ctl(ctx, "history", "--limit", "1000", "--json")
	if err != nil {
		return nil, err
	}
	var history struct {
		Events []struct {
			Time time.Time `json:"time"`
			To   uint64    `json:"to"`
		} `json:"events"`
	}
	if err := json.Unmarshal(out, &history); err != nil {
		return nil, err
	}
	var took []float64
	for _, e := range history.Events {
		if at, ok := seen[names[e.To]]; ok {
			took = append(took, at.Sub(e.Time).Seconds()*1e3)
		}
	}
	if len(took) < len(names)*9/10 {
		return nil, fmt.Errorf("%d of %d generations were seen: %w", len(took), len(names), flox.ErrCorrupt)
	}
	slices.Sort(took)
	row := func(what string, q float64, most float64) Row {
		v := took[min(len(took)-1, int(q*float64(len(took))))]
		return Row{Name: "change on A to its path on B, " + what, Unit: "ms", Ours: v, Rounds: len(took), Target: fmt.Sprintf("<= %g ms", most), Met: v <= most}
	}
	return []Row{row("p50", 0.5, 50), row("p99", 0.99, 200)}, nil
}

// environmentRows makes the environment of 500 packages with 200,000 links.
func (l *profilesLab) environmentRows(ctx context.Context) ([]Row, error) {
	const runs = 10
	figures, err := goBenchmark(ctx, "./profile/environment", "Environment", runs)
	if err != nil {
		return nil, err
	}
	each := figures["ns/op"] / 1e9
	return []Row{{Name: "environment of 500 packages, 200,000 links", Unit: "s", Ours: each, Rounds: runs, Target: "<= 1 s", Met: each <= 1}}, nil
}

// manyRows are those of a storehouse with very many profiles, and with many who look.
func (l *profilesLab) manyRows(ctx context.Context) ([]Row, error) {
	return figuresBench(ctx, l.dir, profilesTargets, "ManyProfiles", "Watchers")
}
