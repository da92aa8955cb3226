package storehouse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// figure is one measurement of the benchmark "cluster" that needs what is
// inside a storehouse. It runs these as tests, with FLOX_FIGURES naming the file
// they write to.
type figure struct {
	Name string  `json:"name"`
	Unit string  `json:"unit"`
	Ours float64 `json:"ours"`
	Peer float64 `json:"peer,omitempty"`
}

// measures skips a test that is none, and gives where its figures go.
func measures(t *testing.T) func(figure) {
	t.Helper()
	file := os.Getenv("FLOX_FIGURES")
	if file == "" {
		t.Skip("measures only: make bench BENCH=cluster")
	}
	return func(f figure) {
		t.Logf("%s: %.1f %s, peer %.1f", f.Name, f.Ours, f.Unit, f.Peer)
		out, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err == nil {
			err = json.NewEncoder(out).Encode(f)
		}
		if err == nil {
			err = out.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// sized is a number from the environment, so that a figure can be tried small.
func sized(t *testing.T, name string, normal int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return normal
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a number", name, text)
	}
	return n
}

// rate gives how often per second something is done by so many at once. The time
// of the processors is logged: it says more of a machine that others use.
func rate(t *testing.T, clients int, d time.Duration, do func(ctx context.Context, random *rand.Rand) error) float64 {
	t.Helper()
	var done atomic.Int64
	group, ctx := errgroup.WithContext(context.Background())
	begin, used := time.Now(), processorTime(t)
	for i := range clients {
		group.Go(func() error {
			random := rand.New(rand.NewPCG(uint64(i), 7))
			for time.Since(begin) < d {
				if err := do(ctx, random); err == errDone { //nolint:errorlint // ours, as it is
					return nil
				} else if err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	t.Logf("%d in %s: %.1f us of processors each, callers and server together", done.Load(), took.Round(time.Millisecond), float64((processorTime(t)-used).Microseconds())/float64(max(1, done.Load())))
	return float64(done.Load()) / took.Seconds()
}

// errDone ends a rate early.
var errDone = errors.New("nothing is left to do")

// processorTime is what this process has used.
func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestFigurePathInfos measures how fast one server answers for path infos: those it
// is asked for the first time after its start, and those it was asked for before.
func TestFigurePathInfos(t *testing.T) {
	report := measures(t)
	n := sized(t, "FIGURE_PATHS", 1_000_000)
	cfg := testConfig(t.TempDir())
	fillReal(t, cfg, n)
	_, stop := start(t, cfg) // takes the snapshot in
	stop()
	s, _ := start(t, cfg)
	m := join(t, s.Invite())
	const batch = 64
	ask := func(ctx context.Context, which func(k int) int) error {
		req := &floxv1.PathsRequest{}
		for k := range batch {
			req.HashParts = append(req.HashParts, hashPart(which(k), n))
		}
		out, err := m.facts.Paths(ctx, connect.NewRequest(req))
		if err != nil {
			return api.FromConnect(err)
		}
		if found := len(out.Msg.GetFound()); found == 0 || len(out.Msg.GetInvalid()) > 0 { // some are drawn twice
			return fmt.Errorf("%d path infos, and %d are not valid", found, len(out.Msg.GetInvalid()))
		}
		return nil
	}
	// Each batch is of paths from all over the store, each path in one batch.
	batches := n / batch
	var next atomic.Int64
	first := rate(t, 16, time.Minute, func(ctx context.Context, _ *rand.Rand) error {
		i := int(next.Add(1)) - 1
		if i >= batches {
			return errDone
		}
		return ask(ctx, func(k int) int { return k*batches + i })
	})
	report(figure{Name: fmt.Sprintf("path infos after a start, each asked for once, of %d paths", n), Unit: "infos/s", Ours: first * batch})
	again := rate(t, 16, 10*time.Second, func(ctx context.Context, random *rand.Rand) error {
		return ask(ctx, func(int) int { return random.IntN(n) })
	})
	report(figure{Name: fmt.Sprintf("path infos from one server, batches of 64 over /flox/rpc/1, of %d paths", n), Unit: "infos/s", Ours: again * batch})
	report(figure{Name: fmt.Sprintf("memory of server and callers after that, of %d paths", n), Unit: "MiB", Ours: memory(t) / (1 << 20)})
	web := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	defer web.CloseIdleConnections()
	single := rate(t, 16, 5*time.Second, func(ctx context.Context, random *rand.Rand) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Invite().HTTPURL+"/"+hashPart(random.IntN(n), n)+".narinfo", nil)
		if err != nil {
			return err
		}
		resp, err := web.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %w", resp.Status, err)
		}
		return nil
	})
	report(figure{Name: "single narinfo over HTTP, 16 clients", Unit: "requests/s", Ours: single})
}

// memory gives what of this process is in memory, in bytes.
func memory(t *testing.T) float64 {
	t.Helper()
	runtime.GC()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib * 1024
}

// TestFigureManyPaths measures a storehouse of ten million paths: its start, and
// what a snapshot costs those who write.
func TestFigureManyPaths(t *testing.T) {
	report := measures(t)
	n := sized(t, "FIGURE_MANY", 10_000_000)
	dir := t.TempDir()
	fillReal(t, testConfig(dir), n)
	_, stop := start(t, testConfig(dir)) // takes the snapshot in
	stop()
	debug.FreeOSMemory() // what filling took
	begin := time.Now()
	s, stop := start(t, testConfig(dir))
	report(figure{Name: fmt.Sprintf("start with %d path infos, to ready", n), Unit: "s", Ours: time.Since(begin).Seconds()})
	report(figure{Name: fmt.Sprintf("memory of the process with %d path infos", n), Unit: "MiB", Ours: memory(t) / (1 << 20)})

	next := n
	// Writes one after the other, first without and then beside snapshots.
	longest := func(d time.Duration, beside func()) (worst time.Duration) {
		done := make(chan struct{})
		var writer sync.WaitGroup
		session := s.node.NewSession()
		writer.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				one := &floxv1.AddPaths{Paths: []*floxv1.PathInfo{likeReal(next, n)}}
				next++
				from := time.Now()
				if _, err := propose(context.Background(), session, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: one}}); err != nil {
					t.Error(err)
					return
				}
				worst = max(worst, time.Since(from))
			}
		})
		until := time.Now().Add(d)
		for time.Now().Before(until) {
			beside()
		}
		close(done)
		writer.Wait()
		return worst
	}
	quiet := longest(5*time.Second, func() { time.Sleep(100 * time.Millisecond) })
	snapshots := 0
	beside := longest(10*time.Second, func() {
		if err := s.node.Snapshot(context.Background()); err != nil {
			t.Error(err)
		}
		snapshots++
	})
	report(figure{Name: fmt.Sprintf("longest write while snapshots of %d path infos are made, of %d; peer: without snapshots", n, snapshots), Unit: "ms", Ours: beside.Seconds() * 1e3, Peer: quiet.Seconds() * 1e3})
	stop()
}
