package storehouse

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// seenReport is a report of one tree with a chunk of 10 bytes at each offset, in
// the order they were used.
func seenReport(path, tag string, offsets ...uint64) *floxv1.StartReport {
	t := &floxv1.SeenTree{Path: path}
	for i, off := range offsets {
		t.Chunks = append(t.Chunks, &floxv1.SeenChunk{Entry: 3, Offset: off, Size: 10, Rank: uint32(i)})
	}
	return &floxv1.StartReport{Path: path, Tag: []byte(tag), Trees: []*floxv1.SeenTree{t}}
}

// of lists the offsets of a state's chunks, accepted or not.
func of(s *floxv1.StartState, want bool) (offsets []uint64) {
	for _, t := range s.GetTrees() {
		for _, c := range t.GetChunks() {
			if accepted(c) == want {
				offsets = append(offsets, c.GetOffset())
			}
		}
	}
	return offsets
}

const startPath = "00000000000000000000000000000000-a"

// Only what two machines saw is accepted, and then nobody is named any more.
func TestTwoMachinesAgree(t *testing.T) {
	t.Parallel()
	s := mergeStart(&floxv1.StartState{}, seenReport(startPath, "aaaa", 0, 10, 20))
	if got := of(s, true); got != nil {
		t.Errorf("one machine alone made %v accepted", got)
	}
	for range 5 { // not by saying it again
		s = mergeStart(s, seenReport(startPath, "aaaa", 0, 10, 20))
	}
	if got := of(s, true); got != nil {
		t.Errorf("one machine alone, again and again, made %v accepted", got)
	}
	s = mergeStart(s, seenReport(startPath, "bbbb", 10, 20, 30))
	if diff := cmp.Diff([]uint64{10, 20}, of(s, true)); diff != "" {
		t.Errorf("accepted (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]uint64{0, 30}, of(s, false)); diff != "" {
		t.Errorf("waiting for a second (-want +got):\n%s", diff)
	}
	for _, c := range s.GetTrees()[0].GetChunks() {
		if accepted(c) != (c.GetTag() == nil) {
			t.Errorf("%v: who reported an accepted chunk is still known", c)
		}
	}
	s = mergeStart(s, seenReport(startPath, "cccc", 0, 30))
	if diff := cmp.Diff([]uint64{0, 10, 20, 30}, of(s, true)); diff != "" {
		t.Errorf("accepted, the union (-want +got):\n%s", diff)
	}
}

// What no start reads any more goes, but not at once; what every start reads stays.
func TestDecay(t *testing.T) {
	t.Parallel()
	s := mergeStart(&floxv1.StartState{}, seenReport(startPath, "aaaa", 0, 10))
	s = mergeStart(s, seenReport(startPath, "bbbb", 0, 10))
	s = mergeStart(s, seenReport(startPath, "cccc", 99)) // of one machine, once
	for i := range 200 {
		s = mergeStart(s, seenReport(startPath, "aaaa", 0))
		if i == 20 && len(of(s, true)) != 2 {
			t.Error("forgotten after twenty starts of another kind")
		}
	}
	if diff := cmp.Diff([]uint64{0}, of(s, true)); diff != "" {
		t.Errorf("after 200 starts (-want +got):\n%s", diff)
	}
	if got := of(s, false); got != nil {
		t.Errorf("what one machine said once is still kept: %v", got)
	}
}

// A path's trace is bounded, and nobody alone can push accepted chunks out of it.
func TestStartsAreBounded(t *testing.T) {
	t.Parallel()
	s := mergeStart(&floxv1.StartState{}, seenReport(startPath, "aaaa", 0, 10))
	s = mergeStart(s, seenReport(startPath, "bbbb", 0, 10))
	flood := make([]uint64, 2*maxStartChunks)
	for i := range flood {
		flood[i] = uint64(1000 + 10*i)
	}
	s = mergeStart(s, seenReport(startPath, "evil", flood...))
	if n := countSeen(s); n != maxStartChunks {
		t.Errorf("%d chunks, want %d", n, maxStartChunks)
	}
	if diff := cmp.Diff([]uint64{0, 10}, of(s, true)); diff != "" {
		t.Errorf("accepted (-want +got):\n%s", diff)
	}
	huge := seenReport(startPath, "cccc", 7, 8, 9)
	for _, c := range huge.GetTrees()[0].GetChunks() {
		c.Size = maxStartBytes / 2
	}
	s = mergeStart(&floxv1.StartState{}, huge)
	if n := countSeen(s); n != 2 {
		t.Errorf("%d chunks of half the bytes each, want 2", n)
	}
}

// startLog is the processor in a log of its own.
type startLog struct {
	*Server
	t *testing.T
}

func newStartLog(t *testing.T, p traces) *startLog {
	t.Helper()
	n := newLog(t, tracesKind, p)
	disk := &gauge{dir: t.TempDir(), marks: testConfig("").Watermarks, log: slog.New(slog.DiscardHandler)}
	return &startLog{&Server{node: n, starts: n.NewSession(), disk: disk}, t}
}

func (l *startLog) merge(reports ...*floxv1.StartReport) error {
	return l.mergeStarts(within(l.t), &floxv1.MergeStarts{Reports: reports})
}

func (l *startLog) state(path string) *floxv1.StartState {
	l.t.Helper()
	r, err := l.node.View(within(l.t), tracesKind, cluster.Local)
	if err != nil {
		l.t.Fatal(err)
	}
	defer r.Close()
	s, err := readStart(r, flox.StorePath(path).HashPart())
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

// The path that nobody started for longest is forgotten, and the counters say
// how much there is.
func TestOldestStartsAreForgotten(t *testing.T) {
	t.Parallel()
	path := func(i int) string { return fmt.Sprintf("%032d-p", i) }
	l := newStartLog(t, traces{paths: 3, chunks: 8})
	for i := range 3 {
		if err := l.merge(seenReport(path(i), "aaaa", 0, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.merge(seenReport(path(0), "bbbb", 0, 10)); err != nil { // now 1 is the oldest
		t.Fatal(err)
	}
	if err := l.merge(seenReport(path(3), "aaaa", 0)); err != nil { // a fourth path
		t.Fatal(err)
	}
	if l.state(path(1)) != nil || l.state(path(0)) == nil || l.state(path(2)) == nil || l.state(path(3)) == nil {
		t.Error("not the oldest path was forgotten")
	}
	if err := l.merge(seenReport(path(3), "aaaa", 0, 10, 20, 30, 40, 50, 60)); err != nil { // too many chunks
		t.Fatal(err)
	}
	if l.state(path(2)) != nil || l.state(path(0)) != nil || l.state(path(3)) == nil {
		t.Error("the bound of all chunks does not hold, or the newest went")
	}
}

// The first salt is in force for ever; bad commands are refused and unknown ones
// stop the node.
func TestTraceCommands(t *testing.T) {
	t.Parallel()
	l := newStartLog(t, traces{})
	first := []byte(strings.Repeat("a", saltLen))
	for _, salt := range []string{strings.Repeat("a", saltLen), strings.Repeat("b", saltLen)} {
		reply, err := l.proposeTraces(within(t), &floxv1.TracesCommand{Command: &floxv1.TracesCommand_Salt{Salt: []byte(salt)}})
		if err != nil || string(reply.GetSalt()) != string(first) {
			t.Errorf("salt %q in force, %v", reply.GetSalt(), err)
		}
	}
	salt, err := l.traceSalt(within(t))
	if err != nil || string(salt) != string(first) {
		t.Errorf("salt %q, %v", salt, err)
	}
	_, err = l.proposeTraces(within(t), &floxv1.TracesCommand{Command: &floxv1.TracesCommand_Salt{Salt: []byte("short")}})
	if !errors.Is(err, cluster.ErrRefused) {
		t.Errorf("a short salt: %v", err)
	}
	for _, r := range []*floxv1.StartReport{seenReport("no path", "aaaa", 1), seenReport(startPath, "not a tag", 1)} {
		if err := l.merge(r); !errors.Is(err, cluster.ErrRefused) {
			t.Errorf("%v: %v", r, err)
		}
	}
	for _, c := range []string{"", "\xff\xff", "\x7a\x01\x01"} {
		if _, err := (traces{}).Apply(nil, []byte(c), time.Time{}, 1); !errors.Is(err, cluster.ErrUnknownCommand) {
			t.Errorf("command %q: %v", c, err)
		}
	}
}

// Servers that apply the same reports in another process, with other maps, have
// the same state to the byte.
func TestMergingIsDeterministic(t *testing.T) {
	t.Parallel()
	var want []byte
	for range 20 {
		s := &floxv1.StartState{}
		for i := range 30 {
			r := seenReport(startPath, fmt.Sprintf("%04d", i%5), uint64(10*(i%7)), uint64(10*(i%3)), uint64(1000+i))
			for j := range 20 {
				r.Trees = append(r.Trees, seenReport(fmt.Sprintf("%032d-t", j), "", uint64(i%4), 50).GetTrees()...)
			}
			s = mergeStart(s, r)
		}
		got, err := stable.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if want == nil {
			want = got
		}
		if string(got) != string(want) {
			t.Fatal("two states of the same reports differ")
		}
	}
}

// traceOf is an honest trace of everything in a published path.
func traceOf(t *testing.T, s *Server, of ...*flox.PathInfo) *floxv1.StartTrace {
	t.Helper()
	out := &floxv1.StartTrace{Path: string(of[0].Path)}
	for _, info := range of {
		m, err := content.OpenManifest(within(t), info.Manifest, s.Blocks())
		if err != nil {
			t.Fatal(err)
		}
		tree := &floxv1.TraceTree{Path: string(info.Path), Manifest: info.Manifest[:]}
		for i := range m.Entries() {
			_ = m.Chunks(within(t), i, 0, -1, func(off int64, c flox.Chunk) bool { // an error: no regular file
				tree.Chunks = append(tree.Chunks, &floxv1.TraceChunk{
					Entry: i, Offset: uint64(off), Size: c.Size, Id: c.ID[:], Rank: uint32(len(tree.GetChunks())),
				})
				return true
			})
		}
		if len(tree.GetChunks()) == 0 {
			t.Fatal("a path without chunks")
		}
		out.Trees = append(out.Trees, tree)
	}
	return out
}

// Reports over the wire: what two machines tell is served, to who asks for it;
// what does not fit the manifests is never taken.
func TestReportStarts(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	lib := publish(t, s, makePath(t, "lib", 300_000))
	app := publish(t, s, makePath(t, "app", 200_000, lib.Path))
	other := publish(t, s, makePath(t, "other", 100_000))
	a, b := join(t, s.Invite()), join(t, s.Invite())
	ctx := within(t)
	report := func(m *member, starts ...*floxv1.StartTrace) uint32 {
		t.Helper()
		got, err := m.store.ReportStarts(ctx, connect.NewRequest(&floxv1.ReportStartsRequest{Starts: starts}))
		if err != nil {
			t.Fatal(err)
		}
		return got.Msg.GetTaken()
	}
	served := func(traces bool) []*floxv1.StartTrace {
		t.Helper()
		got, err := a.facts.Paths(ctx, connect.NewRequest(&floxv1.PathsRequest{HashParts: []string{app.Path.HashPart()}, Closure: true, Traces: traces}))
		if err != nil || len(got.Msg.GetFound()) != 2 {
			t.Fatalf("%v %v", got, err)
		}
		return got.Msg.GetTraces()
	}
	trace := traceOf(t, s, app, lib)
	bad := func(change func(*floxv1.StartTrace)) *floxv1.StartTrace {
		m := proto.CloneOf(trace)
		change(m)
		return m
	}
	hostile := []*floxv1.StartTrace{
		bad(func(m *floxv1.StartTrace) { m.Path = string(other.Path) }), // the trees are not of its closure
		bad(func(m *floxv1.StartTrace) { m.Path = "nonsense" }),
		bad(func(m *floxv1.StartTrace) { m.Path = string(makePath(t, "nowhere", 1).info.Path) }),
		bad(func(m *floxv1.StartTrace) { m.Trees = append(m.Trees, traceOf(t, s, other).GetTrees()...) }),
		bad(func(m *floxv1.StartTrace) { m.Trees = append(m.Trees, m.GetTrees()[0]) }),
		bad(func(m *floxv1.StartTrace) { m.Trees = nil }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Manifest = other.Manifest[:] }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Size++ }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Size = 0 }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Offset++ }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Offset = 1 << 63 }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Entry = 1 << 30 }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Id = m.GetTrees()[1].GetChunks()[0].GetId() }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Chunks[0].Id = []byte("short") }),
		bad(func(m *floxv1.StartTrace) { m.Trees[0].Pages = [][]byte{other.Manifest[:]} }),
	}
	for _, m := range []*member{a, b} {
		for i, h := range hostile {
			forgetReports(s) // or it would not be looked at
			if n := report(m, h); n != 0 {
				t.Errorf("hostile report %d was believed", i)
			}
		}
	}
	forgetReports(s)
	if n := report(a, append(hostile[:3:3], trace)...); n != 1 {
		t.Errorf("%d of one honest and three hostile reports taken, want 1", n)
	}
	awaitMade(t, s, app.Path)
	if got := served(true); len(got) != 0 {
		t.Errorf("what one machine said is served: %v", got)
	}
	if n := report(b, trace); n != 1 {
		t.Errorf("%d taken, want 1", n)
	}
	awaitMade(t, s, app.Path)
	if got := served(false); len(got) != 0 {
		t.Error("traces for who did not ask")
	}
	got := served(true)
	if diff := cmp.Diff([]*floxv1.StartTrace{trace}, got, protocmp.Transform(), protocmp.SortRepeated(func(x, y *floxv1.TraceTree) bool { return x.GetPath() < y.GetPath() })); diff != "" {
		t.Errorf("served (-reported +served):\n%s", diff)
	}
	if _, err := a.store.ReportStarts(ctx, connect.NewRequest(&floxv1.ReportStartsRequest{Starts: make([]*floxv1.StartTrace, maxReports+1)})); err == nil {
		t.Error("more reports than one call may hold were taken")
	}
}

// A machine that tells too much is not listened to for a while; others are.
func TestReportsAreCounted(t *testing.T) {
	t.Parallel()
	var c reportCounts
	now := time.Now()
	for i := range reportsOfPath + 1 {
		if got := c.allow("a", "p", now); got != (i < reportsOfPath) {
			t.Errorf("report %d of one path: %v", i, got)
		}
	}
	if !c.allow("b", "p", now) || !c.allow("a", "q", now) {
		t.Error("another machine, or another path, pays for it")
	}
	for i := range reportsOfPeer {
		c.allow("a", fmt.Sprint(i), now)
	}
	if c.allow("a", "r", now) {
		t.Error("no bound over all paths")
	}
	if !c.allow("a", "p", now.Add(reportWindow+time.Second)) {
		t.Error("for ever")
	}
}

// Tags of one machine cannot be linked over paths, nor made without the salt.
func TestTags(t *testing.T) {
	t.Parallel()
	tags := map[string]string{}
	for _, salt := range []string{"s1", "s2"} {
		for _, peer := range []string{"a", "b"} {
			for _, path := range []string{"p", "q"} {
				tag := traceTag([]byte(salt), peer, path)
				if len(tag) != tagLen {
					t.Fatalf("tag of %d bytes", len(tag))
				}
				if other, ok := tags[string(tag)]; ok {
					t.Errorf("%s and %s have one tag", salt+peer+path, other)
				}
				tags[string(tag)] = salt + peer + path
			}
		}
	}
}
