package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/integration/probe"
)

const (
	// holeKills is how many processes of each kind are killed.
	holeKills = 32
	// holeSettle is how long one waits before it is killed, at least, so that it is
	// where it is meant to be.
	holeSettle = 200 * time.Millisecond
	// holeDeadline is that of the agent: nothing must end of itself meanwhile.
	holeDeadline = "10m"
	// signalRTT is far longer than the pause between two signals.
	signalRTT = 30 * time.Millisecond
	// signalSize is about how large the file is that is read under signals.
	signalSize = 2 << 20
)

// holeRows: how long who waits for packets that are dropped is there after it was
// killed.
func (l *fuseLab) holeRows(ctx context.Context) (rows []Row, err error) {
	files, err := l.coldFiles(ctx, "--lookup-timeout", holeDeadline, "--read-timeout", holeDeadline)
	if err != nil {
		return nil, err
	}
	if err := l.cold.Host.BlackHole(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.cold.Host.Restore(ctx), l.cold.RestartCold(ctx, quiet...)) }()
	kinds := []struct{ how, name string }{
		{touchStat, "a look-up"}, {touchRead, "a read"}, {touchMap, "a page fault of a mapped file"}, {touchRead + touchTick, "a read, with a signal every 10 ms"},
	}
	worst := make([]time.Duration, len(kinds))
	for n := range holeKills {
		for i, kind := range kinds {
			file := files[(n*len(kinds)+i)%len(files)].name
			if kind.how == touchStat {
				file = l.world.StoreDir.Join("") + fmt.Sprintf("%032d-nobody", n)
			}
			t, err := touch(ctx, l.cold.Host, kind.how, file)
			if err != nil {
				return nil, err
			}
			select {
			case <-time.After(holeSettle + rand.N(holeSettle)): //nolint:gosec // spreads the moments
			case <-ctx.Done():
			}
			took, err := t.kill()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", kind.name, err)
			}
			worst[i] = max(worst[i], took)
		}
	}
	for i, kind := range kinds {
		rows = append(rows, Row{
			Name: "packets dropped: SIGKILL to gone, in " + kind.name + ", worst", Unit: "ms", Ours: worst[i].Seconds() * 1e3,
			Target: "<= 1000 ms", Met: worst[i] <= time.Second, Rounds: holeKills,
		})
	}
	return rows, nil
}

// signalRows: a reader with a signal every 10 ms gets what is not here as fast as
// one without.
func (l *fuseLab) signalRows(ctx context.Context) (rows []Row, err error) {
	files, err := l.coldFiles(ctx)
	if err != nil {
		return nil, err
	}
	file := files[len(files)-1]
	for _, f := range files { // the largest that is not too large
		if f.size <= signalSize {
			file = f
			break
		}
	}
	if err := l.cold.Host.Delay(ctx, signalRTT); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.cold.Host.Delay(ctx, 0), l.cold.RestartCold(ctx, quiet...)) }()
	var p pairs
	for n := range fusePairs {
		var took [2]time.Duration
		for i := range took {
			which := (i + n) % 2
			if took[which], err = l.readAgain(ctx, []string{touchRead + touchTick, touchRead}[which], file); err != nil {
				return nil, err
			}
		}
		p.add(took[0].Seconds()*1e3, took[1].Seconds()*1e3)
	}
	row := p.row("reading what is not here under a signal every 10 ms", "ms", "without signals")
	row.Target, row.Met = "95 % interval includes <= 1.05x", row.Low <= 1.05
	return []Row{row}, nil
}

// coldFile is a file of which the name is here, and nothing else.
type coldFile struct {
	name string
	size int64
}

// coldFiles restarts the cold agent with nothing, makes the names of a closure
// known, and gives its larger files, largest first.
func (l *fuseLab) coldFiles(ctx context.Context, flags ...string) (files []coldFile, err error) {
	t, err := l.world.Tool("git")
	if err != nil {
		return nil, err
	}
	if err := l.cold.RestartCold(ctx, slices.Concat(quiet, []string{"--prefetch=false"}, flags)...); err != nil {
		return nil, err
	}
	if err := connected(ctx, l.cold); err != nil {
		return nil, err
	}
	for _, name := range l.closure(t) {
		if _, err := l.cold.Host.Run(ctx, "ls", "-R", filepath.Join(string(l.world.StoreDir), name)); err != nil {
			return nil, err
		}
		plain, err := probe.Walk(l.plainStore(), name)
		if err != nil {
			return nil, err
		}
		for _, f := range plain.Large {
			file := strings.TrimRight(string(f), "\x00")
			info, err := os.Stat(file)
			if err != nil {
				return nil, err
			}
			rel, err := filepath.Rel(l.plainStore(), file)
			if err != nil {
				return nil, err
			}
			files = append(files, coldFile{filepath.Join(string(l.world.StoreDir), rel), info.Size()})
		}
	}
	slices.SortFunc(files, func(a, b coldFile) int { return cmp.Compare(b.size, a.size) })
	if len(files) < 3 {
		return nil, fmt.Errorf("only %d files of %s are large enough", len(files), t.Name)
	}
	return files, nil
}

// readAgain times a read of a file that the agent has not and the kernel has not.
func (l *fuseLab) readAgain(ctx context.Context, how string, file coldFile) (time.Duration, error) {
	err := l.cold.Host.DoMounted(func() error {
		f, err := os.Open(file.name)
		if err != nil {
			return err
		}
		return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close()) //nolint:gosec // a descriptor
	})
	if err != nil {
		return 0, err
	}
	if _, err := l.cold.Ctl(ctx, "cache", "gc"); err != nil {
		return 0, err
	}
	before, err := l.cold.Status(ctx)
	if err != nil {
		return 0, err
	}
	t, err := touch(ctx, l.cold.Host, how, file.name)
	if err != nil {
		return 0, err
	}
	took, err := t.took()
	if err != nil {
		return 0, fmt.Errorf("%s of %s: %w", how, file.name, err)
	}
	after, err := l.cold.Status(ctx)
	if err != nil {
		return 0, err
	}
	if got := after.Traffic.Sub(before.Traffic).Plain(); got < uint64(file.size) { //nolint:gosec // a size
		return 0, fmt.Errorf("%s of %s, of %d bytes, fetched %d", how, file.name, file.size, got)
	}
	return took, nil
}
