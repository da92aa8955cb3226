package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/nix/worker"
)

const (
	// validOps is how many questions one measurement has.
	validOps = 2000
	// crowd is how many connections there are, busy how many of them ask at a time,
	// crowdOps how often each of these does; crowdPause is for the row of those who do
	// something else after each answer.
	crowd, busy, crowdOps = 1000, 100, 100
	crowdPause            = 20 * time.Millisecond
)

// dial connects to an agent, or, with nil, to stock nix-daemon.
func (l *daemonLab) dial(ctx context.Context, a *hosts.Agent) (*worker.Client, error) {
	socket := filepath.Join(l.plain.Root(), "nix/var/nix/daemon-socket/socket")
	if a != nil {
		socket = filepath.Join(a.Host.Root(), "run/floxd/nix.socket")
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	return worker.NewClient(ctx, conn, worker.ClientConfig{Dir: flox.DefaultStoreDir})
}

// aPath is valid on both sides.
func (l *daemonLab) aPath(ctx context.Context) (flox.StorePath, error) {
	file := filepath.Join(l.dir, "a-path.nix")
	text := `derivation { name = "a-path"; system = "x86_64-linux"; builder = "/bin/sh"; }`
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil { //nolint:gosec // Nix on all hosts reads it
		return "", err
	}
	var p pairs
	made, err := l.pair(ctx, l.warm, 0, &p, "nix-instantiate", file)
	if err != nil {
		return "", err
	}
	if err := l.publish(ctx, l.warm, file); err != nil {
		return "", err
	}
	return flox.DefaultStoreDir.Parse(made.last())
}

// validRows: one client asks the same question over and over.
func (l *daemonLab) validRows(ctx context.Context) (rows []Row, err error) {
	path, err := l.aPath(ctx)
	if err != nil {
		return nil, err
	}
	var clients [2]*worker.Client
	for i, a := range []*hosts.Agent{l.second, nil} {
		if clients[i], err = l.dial(ctx, a); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, clients[i].Close()) }()
	}
	var p pairs
	for round := range fusePairs {
		var took [2]float64
		for i := range 2 {
			which := (i + round) % 2
			began := time.Now()
			for range validOps {
				if valid, err := clients[which].IsValid(ctx, path); err != nil || !valid {
					return nil, fmt.Errorf("%s: valid %v, %w", path, valid, err)
				}
			}
			took[which] = float64(time.Since(began).Microseconds()) / validOps
		}
		p.add(took[0], took[1])
	}
	return []Row{p.atMost("IsValidPath", "µs", 1.5)}, nil
}

// crowdRows: a thousand connections, of which a hundred ask at a time.
func (l *daemonLab) crowdRows(ctx context.Context) ([]Row, error) {
	path, err := l.aPath(ctx)
	if err != nil {
		return nil, err
	}
	status, err := l.warm.Status(ctx)
	if err != nil {
		return nil, err
	}
	before, err := resident(status.PID)
	if err != nil {
		return nil, err
	}
	rows := make([]Row, 0, 3)
	after := before
	for _, c := range []struct {
		name  string
		pause time.Duration
		most  float64 // 0 = published
	}{{"", 0, 20}, {fmt.Sprintf(", each %v after its last answer", crowdPause), crowdPause, 0}} {
		ours, memory, err := l.crowd(ctx, l.warm, path, status.PID, c.pause)
		if err != nil {
			return nil, err
		}
		stock, _, err := l.crowd(ctx, nil, path, l.stock.PID(), c.pause)
		if err != nil {
			return nil, err
		}
		after = max(after, memory)
		row := Row{
			Name: fmt.Sprintf("IsValidPath, %d of %d connections asking%s: 99th percentile", busy, crowd, c.name), Unit: "ms", Ours: ours, Peer: stock,
			PeerName: "stock nix-daemon, a process for each", Ratio: ours / stock, Rounds: busy * crowdOps, Target: "publish", Met: true,
		}
		if c.most > 0 {
			row.Target, row.Met = fmt.Sprintf("<= %.0f ms", c.most), ours <= c.most
		}
		rows = append(rows, row)
	}
	each := (after - before) / crowd / 1024
	return append(rows, Row{
		Name: fmt.Sprintf("memory of the agent for each of %d connections", crowd), Unit: "KiB", Ours: each, Rounds: 1,
		Target: "<= 64 KiB", Met: each <= 64,
	}), nil
}

// crowd makes the connections and gives the percentile in milliseconds, and what a
// process holds of memory while they are there.
func (l *daemonLab) crowd(ctx context.Context, a *hosts.Agent, path flox.StorePath, pid int, pause time.Duration) (p99, memory float64, err error) {
	var clients []*worker.Client
	defer func() {
		for _, c := range clients {
			err = errors.Join(err, c.Close())
		}
	}()
	for range crowd {
		c, err := l.dial(ctx, a)
		if err != nil {
			return 0, 0, fmt.Errorf("connection %d: %w", len(clients), err)
		}
		clients = append(clients, c)
	}
	took, failed := make([][]float64, busy), make([]error, busy)
	var group sync.WaitGroup
	for i := range busy {
		group.Go(func() {
			for n := range crowdOps {
				began := time.Now()
				// Another connection each time: all of them are used.
				if _, err := clients[(i+n*busy)%crowd].IsValid(ctx, path); err != nil {
					failed[i] = err
					return
				}
				took[i] = append(took[i], time.Since(began).Seconds()*1e3)
				time.Sleep(pause)
			}
		})
	}
	group.Wait()
	if err := errors.Join(failed...); err != nil {
		return 0, 0, err
	}
	all := slices.Concat(took...)
	slices.Sort(all)
	memory, err = resident(pid)
	return all[len(all)*99/100], memory, err
}

// resident is how many bytes of memory a process holds.
func resident(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib float64
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			_, err := fmt.Sscan(rest, &kib)
			return kib * 1024, err
		}
	}
	return 0, fmt.Errorf("process %d: no VmRSS in its status", pid)
}
