package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/load"
	"github.com/floxctl/flox/integration/probe"
)

// killRounds is how often the serving process is killed under load.
const killRounds = 200

// killCalm is how long the load is watched before each kill.
const killCalm = 300 * time.Millisecond

// killRows: what readers notice of a serving process that is killed over and over.
func (l *fuseLab) killRows(ctx context.Context) ([]Row, error) {
	spec, err := l.killLoad()
	if err != nil {
		return nil, err
	}
	loader, err := load.Build(ctx, l.dir)
	if err != nil {
		return nil, err
	}
	running, err := load.Start(ctx, l.warm.Host, loader, spec)
	if err != nil {
		return nil, err
	}
	for range killRounds {
		if err = running.Round(ctx, killCalm, l.killChild); err != nil {
			break
		}
	}
	report, stopErr := running.Stop()
	if err = errors.Join(err, stopErr); err != nil {
		return nil, err
	}
	if report.Failed > 0 {
		fmt.Printf("   kill: %s\n", strings.Join(report.Errors, "\n   "))
	}
	added := report.Added()
	p50, p99 := load.Quantile(added, 0.5), load.Quantile(added, 0.99)
	ms := func(d time.Duration) float64 { return d.Seconds() * 1e3 }
	return []Row{
		{Name: "kill -9 under load: errors", Unit: "errors", Ours: float64(report.Failed), Target: "0", Met: report.Failed == 0, Rounds: killRounds},
		{Name: "kill -9 under load: added stall, p50", Unit: "ms", Ours: ms(p50), Target: "publish", Met: true, Rounds: killRounds},
		{Name: "kill -9 under load: added stall, p99", Unit: "ms", Ours: ms(p99), Target: "<= 150 ms", Met: p99 <= 150*time.Millisecond, Rounds: killRounds},
	}, nil
}

// killLoad is 64 readers and mappers of the closure of a tool, the tool itself, and
// a find(1), on the warm agent.
func (l *fuseLab) killLoad() (load.Spec, error) {
	t, err := l.world.Tool("git")
	if err != nil {
		return load.Spec{}, err
	}
	spec := load.Spec{
		Files: map[string]string{}, Readers: 64, Mappers: 4, Pause: 20 * time.Millisecond,
		Programs: []load.Program{{Argv: []string{t.Exe, "--version"}, Want: "git version"}},
		Walk:     string(l.world.StoreDir), Probe: t.Exe,
	}
	plain, err := probe.Walk(l.plainStore(), string(t.Path))
	if err != nil {
		return spec, err
	}
	for _, name := range plain.Files {
		file := strings.TrimRight(string(name), "\x00")
		b, err := os.ReadFile(file)
		if err != nil {
			return spec, err
		}
		rel, err := filepath.Rel(l.plainStore(), file)
		if err != nil {
			return spec, err
		}
		sum := sha256.Sum256(b)
		spec.Files[filepath.Join(string(l.world.StoreDir), rel)] = hex.EncodeToString(sum[:])
	}
	return spec, nil
}

// killChild kills the warm agent's serving process and waits for the next one.
func (l *fuseLab) killChild(ctx context.Context) error {
	before, err := l.warm.Status(ctx)
	if err != nil {
		return err
	}
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		return err
	}
	return l.warm.Await(ctx, "another child", func(s *hosts.Status) bool { return s.PID != before.PID && s.Mounted })
}
