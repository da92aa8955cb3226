// Package load uses a mounted store as many busy users do, while something is
// done to who serves it: readers that hash files, cold and warm, running
// programs whose pages are taken away, mappings, walks, and a probe that notes
// the longest time anything had to wait. It checks every byte.
//
// The load runs as a process of its own on a host, so that what kills it (a
// SIGBUS) is seen. The package must not know what is done in a round.
package load

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/floxctl/flox/integration/netns"
)

// Spec says what is used, as the host sees it. Files must not be empty.
type Spec struct {
	// Files are hashed; the value is the SHA-256 in hex.
	Files map[string]string
	// Readers hash files one after another, every other time without what the
	// kernel has of it; Mappers do the same through a mapping. They rest for Pause
	// between two files, so that it is not the processor that is measured.
	Readers, Mappers int
	Pause            time.Duration
	// Programs are run over and over.
	Programs []Program
	// Echo is a program that runs for as long as the load and writes every line
	// it reads; its pages are taken away between two lines. Empty: there is none.
	Echo []string
	// Walk is a directory that find(1) walks. Empty: nobody walks.
	Walk string
	// Probe is a file of which the probe reads one page at a time that the kernel
	// does not have; in its directory it looks up names that are not there.
	Probe string
}

// Program is a command line and how its output must begin.
type Program struct {
	Argv []string
	Want string
}

// Counts are what a load has done since it began.
type Counts struct {
	Files, Bytes, Programs, Lines, Walks, Probes uint64
	// Longest is the longest time the probe waited since it was asked before.
	Longest time.Duration
	// Errors are what must not be: at most maxErrors, and how many there were.
	Errors []string
	Failed uint64
}

// Round is the longest wait of the probe while nothing was done, for as long as
// something was in the same round.
type Round struct{ Calm, Disturbed time.Duration }

// Report is what came of a load.
type Report struct {
	Counts
	Rounds []Round
}

// Added are the waits that the rounds added, sorted: the longest of a round less
// the median of the longest without anything done, which is the load's own.
func (r *Report) Added() []time.Duration {
	calm := make([]time.Duration, 0, len(r.Rounds))
	for _, round := range r.Rounds {
		calm = append(calm, round.Calm)
	}
	usual := Quantile(calm, 0.5)
	added := make([]time.Duration, 0, len(r.Rounds))
	for _, round := range r.Rounds {
		added = append(added, max(round.Disturbed-usual, 0))
	}
	slices.Sort(added)
	return added
}

// Quantile gives the q-th quantile, 0 to 1, of times in any order; 0 of none.
func Quantile(times []time.Duration, q float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	sorted := slices.SortedFunc(slices.Values(times), cmp.Compare[time.Duration])
	at := int(q*float64(len(sorted)) + 0.5)
	return sorted[min(max(at-1, 0), len(sorted)-1)]
}

// Build builds the loader into dir and gives its name.
func Build(ctx context.Context, dir string) (string, error) {
	name := filepath.Join(dir, "loader")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", name, "github.com/floxctl/flox/integration/load/loader")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the loader: %w\n%s", err, out)
	}
	return name, nil
}

// Load is a running load.
type Load struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	rounds []Round
}

// Start starts the loader on a host. Stop must be called.
func Start(ctx context.Context, host *netns.Host, loader string, spec Spec) (*Load, error) {
	l := &Load{cmd: host.Command(ctx, loader)}
	l.cmd.Stderr = os.Stderr
	l.cmd.WaitDelay = time.Second
	var err error
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	l.out = bufio.NewReader(out)
	if err := l.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the load: %w", err)
	}
	b, err := json.Marshal(spec)
	if err == nil {
		_, err = l.in.Write(append(b, '\n'))
	}
	if err == nil {
		_, err = l.Counts()
	}
	if err != nil {
		_, stopErr := l.Stop()
		return nil, errors.Join(err, stopErr)
	}
	return l, nil
}

// Counts asks how far the load is. An error is its end.
func (l *Load) Counts() (Counts, error) {
	var c Counts
	if _, err := io.WriteString(l.in, "counts\n"); err != nil {
		return c, fmt.Errorf("the load ended: %w", err)
	}
	line, err := l.out.ReadBytes('\n')
	if err != nil {
		return c, fmt.Errorf("the load ended: %w", err)
	}
	return c, json.Unmarshal(line, &c)
}

// Round leaves the load alone for a while, then does something, and notes the
// longest waits of both. do must return when what it did is over.
func (l *Load) Round(ctx context.Context, calm time.Duration, do func(context.Context) error) error {
	var round Round
	for _, part := range []struct {
		do      func(context.Context) error
		longest *time.Duration
	}{
		{func(ctx context.Context) error { return sleep(ctx, calm) }, &round.Calm},
		{do, &round.Disturbed},
	} {
		begun, err := l.Counts() // a new count begins
		if err != nil {
			return err
		}
		if err := part.do(ctx); err != nil {
			return err
		}
		if *part.longest, err = l.longest(ctx, begun.Probes+2); err != nil {
			return err
		}
	}
	l.rounds = append(l.rounds, round)
	return nil
}

// longest gives the longest wait until the probe has been through so often: who
// waits still would not be counted otherwise.
func (l *Load) longest(ctx context.Context, probes uint64) (longest time.Duration, err error) {
	for {
		c, err := l.Counts()
		if err != nil {
			return 0, err
		}
		if longest = max(longest, c.Longest); c.Probes >= probes {
			return longest, nil
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// Stop ends the load, everybody at the end of what they do, and gives the report.
func (l *Load) Stop() (*Report, error) {
	_, _ = io.WriteString(l.in, "stop\n")
	_ = l.in.Close()
	r := &Report{Rounds: l.rounds}
	timer := time.AfterFunc(time.Minute, func() { _ = l.cmd.Process.Kill() })
	defer timer.Stop()
	line, err := l.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r.Counts)
	}
	if waitErr := l.cmd.Wait(); waitErr != nil {
		return r, fmt.Errorf("the load did not end as it should: %w", waitErr)
	}
	return r, err
}
