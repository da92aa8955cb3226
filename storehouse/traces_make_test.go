package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// forgetReports makes room for more reports of the same machines.
func forgetReports(s *Server) {
	s.reports.mu.Lock()
	defer s.reports.mu.Unlock()
	s.reports.peers = nil
}

// awaitMade waits until a path's trace is made of what is known now, or cannot be.
func awaitMade(t *testing.T, s *Server, p flox.StorePath) {
	t.Helper()
	select {
	case <-s.made.want(string(p)):
	case <-within(t).Done():
		t.Fatalf("the trace of %s is not made", p)
	}
}

// agree has two machines report a start.
func agree(t *testing.T, s *Server, trace *floxv1.StartTrace) {
	t.Helper()
	for _, peer := range []string{"one", "two"} {
		if n, err := s.takeReports(within(t), peer, []*floxv1.StartTrace{trace}); n != 1 || err != nil {
			t.Fatalf("%d reports taken, %v", n, err)
		}
	}
}

// askTraces asks for facts and traces and gives those traces.
func askTraces(t *testing.T, s *Server, paths ...flox.StorePath) []*floxv1.StartTrace {
	t.Helper()
	req := &floxv1.PathsRequest{Traces: true}
	for _, p := range paths {
		req.HashParts = append(req.HashParts, p.HashPart())
	}
	got, err := s.answerPaths(within(t), req)
	if err != nil || len(got.GetFound()) != len(paths) {
		t.Fatalf("%d of %d facts, %v", len(got.GetFound()), len(paths), err)
	}
	return got.GetTraces()
}

// Facts do not wait for a trace that is not ready, however long it takes, and it
// is made once however many ask.
func TestFactsDoNotWaitForTraces(t *testing.T) {
	t.Parallel()
	began, ended := make(chan struct{}, 100), make(chan struct{}, 100)
	s, stop := startChanged(t, testConfig(t.TempDir()), func(s *Server) {
		s.buildTrace = func(ctx context.Context, _ *floxv1.StartState) (*floxv1.StartTrace, error) {
			began <- struct{}{}
			<-ctx.Done() // as long as it may
			ended <- struct{}{}
			return nil, ctx.Err()
		}
	})
	app := publish(t, s, makePath(t, "app", 100_000))
	agree(t, s, traceOf(t, s, app))
	select {
	case <-began:
	case <-within(t).Done():
		t.Fatal("nobody makes the trace of a report")
	}
	for range 20 {
		if got := askTraces(t, s, app.Path); len(got) != 0 {
			t.Errorf("a trace that is not made was served: %v", got)
		}
	}
	select {
	case <-ended:
		t.Error("twenty answers took as long as making a trace may")
	default:
	}
	if n := len(s.made.queue); n > 1 || len(began) > 0 {
		t.Errorf("the trace is made %d times more and %d wait", len(began), n)
	}
	stop() // ends what is being made
	<-ended
}

// damaging writes one path's state so that nobody can read it.
type damaging struct {
	traces
	path flox.StorePath
}

func (d *damaging) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	reply, err := d.traces.Apply(tx, command, at, index)
	if d.path != "" {
		err = errors.Join(err, tx.Set(hashKey(startKey, d.path.HashPart()), []byte{0xff}))
	}
	return reply, err
}

// Whatever is wrong with one trace, the facts and the other traces are answered,
// and the trace is not tried anew for each who asks.
func TestBadTraceSpoilsNothing(t *testing.T) {
	t.Parallel()
	bad := makePath(t, "bad", 100_000)
	failing := makePath(t, "failing", 100_000)
	tries := make(chan struct{}, 100)
	s, _ := startChanged(t, testConfig(t.TempDir()), func(s *Server) {
		s.node.Register(tracesKind, &damaging{path: bad.info.Path})
		s.buildTrace = func(ctx context.Context, state *floxv1.StartState) (*floxv1.StartTrace, error) {
			if state.GetPath() == string(failing.info.Path) {
				tries <- struct{}{}
				return nil, fmt.Errorf("in a test: %w", flox.ErrCorrupt)
			}
			return s.startTrace(ctx, state)
		}
	})
	good, b, f := publish(t, s, makePath(t, "good", 100_000)), publish(t, s, bad), publish(t, s, failing)
	agree(t, s, traceOf(t, s, f))
	agree(t, s, traceOf(t, s, good))
	awaitMade(t, s, good.Path)
	awaitMade(t, s, f.Path)
	had := len(tries)
	if had == 0 {
		t.Error("nobody tried to make the trace of a report")
	}
	for range 10 {
		got := askTraces(t, s, b.Path, f.Path, good.Path)
		if len(got) != 1 || got[0].GetPath() != string(good.Path) {
			t.Fatalf("served %v, want the trace of %s", got, good.Path)
		}
	}
	awaitMade(t, s, good.Path) // after whatever they asked for
	if n := len(tries); n != had {
		t.Errorf("tried %d times more for who asked", n-had)
	}
}

// Who asks right after a restart, or after a report that another server took, has
// the trace made; one that is outdated is served until then.
func TestTracesAreMadeForWhoAsks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, stop := start(t, testConfig(dir))
	app := publish(t, s, makePath(t, "app", 300_000))
	whole := traceOf(t, s, app)
	part := proto.CloneOf(whole)
	part.Trees[0].Chunks = part.GetTrees()[0].GetChunks()[:1]
	agree(t, s, part)
	stop()

	s, _ = start(t, testConfig(dir))
	soon := func(chunks int) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; {
			got := askTraces(t, s, app.Path)
			if len(got) == 1 && len(got[0].GetTrees()[0].GetChunks()) == chunks {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("served %v, want a trace of %d chunks", got, chunks)
			}
		}
	}
	soon(1)
	for _, peer := range []string{"three", "four"} { // as if another server had
		r, err := s.checkStart(within(t), whole)
		if err != nil {
			t.Fatal(err)
		}
		r.Tag = traceTag([]byte("salt"), peer, whole.GetPath())
		if err := s.mergeStarts(within(t), &floxv1.MergeStarts{Reports: []*floxv1.StartReport{r}}); err != nil {
			t.Fatal(err)
		}
		if got := askTraces(t, s, app.Path); len(got) != 1 {
			t.Errorf("served %v while the next trace is made, want the one before", got)
		}
	}
	soon(len(whole.GetTrees()[0].GetChunks()))
}

// The queue of traces to be made is bounded, and holds a path once.
func TestTraceQueueIsBounded(t *testing.T) {
	t.Parallel()
	m := newTraceMaker()
	for i := range 2 * maxTraceQueue {
		a, b := m.want(fmt.Sprint(i)), m.want(fmt.Sprint(i))
		if a != b || (a == nil) != (i >= maxTraceQueue) {
			t.Fatalf("path %d: %v, again %v", i, a, b)
		}
	}
	if len(m.queue) != maxTraceQueue || len(m.queued) != maxTraceQueue {
		t.Errorf("%d wait, %d are known to wait, want %d", len(m.queue), len(m.queued), maxTraceQueue)
	}
	for i := range 2 * maxMadeTraces {
		m.keep(fmt.Sprint(i), madeTrace{})
	}
	if len(m.made) != maxMadeTraces {
		t.Errorf("%d traces are kept, want %d", len(m.made), maxMadeTraces)
	}
}

// sessionName is a session's name in an entry of the log.
var sessionName = regexp.MustCompile(`\x12\x1a([A-Z2-7]{26})\x18`)

// sessionsIn lists the sessions that entries of a log name.
func sessionsIn(t *testing.T, s *Server) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	err := filepath.WalkDir(stateFile(s, "raft"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range sessionName.FindAllSubmatch(b, -1) {
			names[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// However many reports there are, the log has to remember one session for them.
func TestReportsShareASession(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	app := publish(t, s, makePath(t, "app", 10_000))
	trace := traceOf(t, s, app)
	before := len(sessionsIn(t, s))
	if before == 0 {
		t.Fatal("the publish has no session in the log: this test looks at the wrong place")
	}
	applied := s.node.Applied()
	for i := range 20 {
		if n, err := s.takeReports(within(t), fmt.Sprint(i), []*floxv1.StartTrace{trace}); n != 1 || err != nil {
			t.Fatalf("%d reports taken, %v", n, err)
		}
	}
	if got := s.node.Applied() - applied; got < 20 {
		t.Fatalf("%d entries for 20 reports", got)
	}
	if got := len(sessionsIn(t, s)) - before; got != 1 {
		t.Errorf("%d sessions of 20 reports, want 1", got)
	}
}

// What is not listened to is not checked, and so many checks run at once.
func TestRefusedReportsCostNoCheck(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	app := publish(t, s, makePath(t, "app", 10_000))
	trace := traceOf(t, s, app)
	lie := proto.CloneOf(trace)
	lie.Trees[0].Chunks[0].Size++
	for range reportsOfPath { // lies count as well
		if n, err := s.takeReports(within(t), "liar", []*floxv1.StartTrace{lie}); n != 0 || err != nil {
			t.Fatalf("%d lies taken, %v", n, err)
		}
	}
	for range cap(s.checks) { // nothing can be checked from here on
		s.checks <- struct{}{}
	}
	soon, cancelSoon := context.WithTimeout(context.Background(), checkTimeout/2)
	defer cancelSoon()
	if n, err := s.takeReports(soon, "liar", []*floxv1.StartTrace{trace, {Path: "nonsense"}}); n != 0 || err != nil {
		t.Errorf("who is not listened to waits for a check: %d taken, %v", n, err)
	}
	short, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if n, err := s.takeReports(short, "other", []*floxv1.StartTrace{trace}); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("more checks than may run at once: %d taken, %v", n, err)
	}
	for range cap(s.checks) {
		<-s.checks
	}
	if n, err := s.takeReports(within(t), "other", []*floxv1.StartTrace{trace}); n != 1 || err != nil {
		t.Errorf("after the others: %d taken, %v", n, err)
	}
	if n := len(s.checks); n != 0 {
		t.Errorf("%d checks are never over", n)
	}
}

// Root blocks are sent to who asks for them: of the paths asked for, not of what
// those refer to, nor of one that is not valid.
func TestRootsAreServed(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	lib := publish(t, s, makePath(t, "lib", 100_000))
	app := publish(t, s, makePath(t, "app", 100_000, lib.Path))
	nowhere := makePath(t, "nowhere", 1).info.Path
	for _, roots := range []bool{true, false} {
		got, err := s.answerPaths(within(t), &floxv1.PathsRequest{
			HashParts: []string{nowhere.HashPart(), app.Path.HashPart()}, Closure: true, Roots: roots,
		})
		if err != nil || len(got.GetFound()) != 2 {
			t.Fatalf("%d facts, %v", len(got.GetFound()), err)
		}
		switch {
		case !roots && len(got.GetRoots()) > 0:
			t.Error("root blocks for who did not ask")
		case roots && (len(got.GetRoots()) != 1 || content.Hash(got.GetRoots()[0]) != app.Manifest):
			t.Errorf("%d root blocks, want that of %s", len(got.GetRoots()), app.Path)
		}
	}
}

// With its root block come the pages that a path's trace names, of that path only,
// each once.
func TestPagesAreServedWithRoots(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	lib := publish(t, s, makePath(t, "lib", 100_000))
	app := publish(t, s, makePath(t, "app", 100_000, lib.Path))
	other := publish(t, s, makePath(t, "other", 100_000))
	// Any block will do for a page here.
	trace := &floxv1.StartTrace{Path: string(app.Path), Trees: []*floxv1.TraceTree{
		{Path: string(lib.Path), Pages: [][]byte{other.Manifest[:]}},
		{Path: string(app.Path), Pages: [][]byte{app.Manifest[:], lib.Manifest[:], lib.Manifest[:]}},
	}}
	got := s.answerRoots(within(t), []*floxv1.PathInfo{{Path: string(app.Path), Manifest: app.Manifest[:]}}, []*floxv1.StartTrace{trace})
	if len(got) != 2 || content.Hash(got[0]) != app.Manifest || content.Hash(got[1]) != lib.Manifest {
		t.Errorf("%d blocks, want the root and one page", len(got))
	}
}

// What no start reported of a path's closure was warm there, and is looked up all
// the same where nothing is: the pages of those manifests come with the trace.
func TestUnreportedManifestsAreNamed(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	small := publish(t, s, makePath(t, "small", 1000))
	lib := publish(t, s, makeCrowded(t, "crowded", 2000))
	app := publish(t, s, makePath(t, "app", 200_000, small.Path, lib.Path))
	state := &floxv1.StartState{Path: string(app.Path)}
	for _, tree := range traceOf(t, s, app).GetTrees() {
		seen := &floxv1.SeenTree{Path: tree.GetPath()}
		for _, c := range tree.GetChunks() {
			seen.Chunks = append(seen.Chunks, &floxv1.SeenChunk{Entry: c.GetEntry(), Offset: c.GetOffset(), Size: c.GetSize(), Rank: c.GetRank()})
		}
		state.Trees = append(state.Trees, seen)
	}
	got, err := s.startTrace(within(t), state)
	if err != nil || len(got.GetTrees()) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	m, err := content.OpenManifest(within(t), lib.Manifest, s.Blocks())
	if err != nil {
		t.Fatal(err)
	}
	silent := got.GetTrees()[1]
	if silent.GetPath() != string(lib.Path) || len(silent.GetChunks()) > 0 || len(silent.GetPages()) != len(m.Pages()) || len(m.Pages()) < 2 {
		t.Errorf("%d pages, %d chunks of %s, want %d pages of %s", len(silent.GetPages()), len(silent.GetChunks()), silent.GetPath(), len(m.Pages()), lib.Path)
	}
	state.Trees = nil
	if got, err := s.startTrace(within(t), state); err != nil || len(got.GetTrees()) > 0 {
		t.Errorf("%v of a path nobody reported, %v", got, err)
	}
}
