package load

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxErrors bounds the errors that are kept in words.
const maxErrors = 20

// loader is the load as it runs on the host.
type loader struct {
	spec  Spec
	paths []string // of spec.Files

	files, bytes, programs, lines, walks, probes, failed atomic.Uint64

	longest atomic.Int64 // nanoseconds

	mu     sync.Mutex
	errors []string
}

// Main runs a load that is told by lines: first the Spec, then "counts" for each
// line of Counts, then "stop" for the last one. It returns the exit code.
func Main(in io.Reader, out io.Writer) int {
	if err := run(in, out); err != nil {
		fmt.Fprintln(os.Stderr, "loader:", err)
		return 1
	}
	return 0
}

func run(in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	first, err := lines.ReadBytes('\n')
	if err != nil {
		return err
	}
	l := &loader{}
	if err := json.Unmarshal(first, &l.spec); err != nil {
		return err
	}
	l.paths = slices.Sorted(maps.Keys(l.spec.Files))
	if l.spec.Probe != "" { // from here on it waits for who serves, not for a network
		if _, _, err := l.read(l.spec.Probe, false); err != nil {
			return fmt.Errorf("probe: %w", err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var work sync.WaitGroup
	l.begin(ctx, &work)
	tell := json.NewEncoder(out)
	for {
		line, err := lines.ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if line != "counts\n" { // "stop", or who wanted it is gone
			break
		}
		if err := tell.Encode(l.counts()); err != nil {
			return err
		}
	}
	cancel()
	work.Wait()
	return tell.Encode(l.counts())
}

// begin starts everybody.
func (l *loader) begin(ctx context.Context, work *sync.WaitGroup) {
	for n := range l.spec.Readers {
		work.Go(func() { l.each(ctx, n, l.read) })
	}
	for n := range l.spec.Mappers {
		work.Go(func() { l.each(ctx, n, l.mapped) })
	}
	for _, p := range l.spec.Programs {
		work.Go(func() { l.repeat(ctx, &l.programs, func() error { return runProgram(p) }) })
	}
	if len(l.spec.Echo) > 0 {
		work.Go(func() {
			if err := l.echo(ctx); err != nil {
				l.fail("echo: %v", err)
			}
		})
	}
	if l.spec.Walk != "" {
		work.Go(func() { l.repeat(ctx, &l.walks, func() error { return walk(l.spec.Walk) }) })
	}
	if l.spec.Probe != "" {
		work.Go(func() { l.probe(ctx) })
	}
}

func (l *loader) counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Counts{
		Files: l.files.Load(), Bytes: l.bytes.Load(), Programs: l.programs.Load(), Lines: l.lines.Load(),
		Walks: l.walks.Load(), Probes: l.probes.Load(), Longest: time.Duration(l.longest.Swap(0)),
		Errors: slices.Clone(l.errors), Failed: l.failed.Load(),
	}
}

func (l *loader) fail(format string, args ...any) {
	l.failed.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.errors) < maxErrors {
		l.errors = append(l.errors, fmt.Sprintf(format, args...))
	}
}

// each takes one file after another until ctx is done, every other time cold.
func (l *loader) each(ctx context.Context, n int, do func(path string, cold bool) (sum string, size int, err error)) {
	// Everybody begins somewhere else.
	for i := n * 17; ctx.Err() == nil; i++ {
		path := l.paths[i%len(l.paths)]
		sum, size, err := do(path, i/len(l.paths)%2 == 0 || i%2 == 0)
		switch {
		case err != nil:
			l.fail("%s: %v", path, err)
		case sum != l.spec.Files[path]:
			l.fail("%s: wrong bytes: %s, want %s", path, sum, l.spec.Files[path])
		}
		l.files.Add(1)
		l.bytes.Add(uint64(size)) //nolint:gosec // a size
		_ = sleep(ctx, l.spec.Pause)
	}
}

// repeat does the same until ctx is done.
func (l *loader) repeat(ctx context.Context, count *atomic.Uint64, do func() error) {
	for ctx.Err() == nil {
		if err := do(); err != nil {
			l.fail("%v", err)
		}
		count.Add(1)
		_ = sleep(ctx, l.spec.Pause)
	}
}
