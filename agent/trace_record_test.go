package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// fakeProcesses are the processes of a made-up machine.
type fakeProcesses struct {
	exe   map[uint32]string
	pages map[uint32][]warden.PageRun
	asked int
}

// Exe implements processes.
func (f *fakeProcesses) Exe(_ context.Context, pid uint32) (string, error) {
	if exe, ok := f.exe[pid]; ok {
		return exe, nil
	}
	return "", flox.ErrNotFound
}

// Pages implements processes.
func (f *fakeProcesses) Pages(_ context.Context, pid uint32) ([]warden.PageRun, error) {
	f.asked++
	if _, ok := f.exe[pid]; !ok {
		return nil, flox.ErrNotFound
	}
	return f.pages[pid], nil
}

// recordRig is a recorder beside an agent that has everything of two store paths.
type recordRig struct {
	*startRecorder
	t        *testing.T
	a        *Agent
	fake     *fakeProcesses
	app, lib *tree
	other    *tree // of no closure
	now      time.Time
	over     []*recording
}

func newRecordRig(t *testing.T) *recordRig {
	t.Helper()
	h := newHouse(t)
	libInfo := h.make(t, "lib", nil, testFile{name: "lib/libc.so.6", data: randomBytes(1, 1_000_000), exec: true})
	appInfo := h.make(t, "app", []flox.StorePath{libInfo.Path},
		testFile{name: "bin/app", data: randomBytes(2, 500_000), exec: true}, testFile{name: "etc/conf", data: []byte("small")})
	otherInfo := h.make(t, "other", nil, testFile{name: "bin/other", data: randomBytes(3, 300_000), exec: true})
	h.publish(libInfo, appInfo, otherInfo)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	ctx := within(t, time.Minute)
	r := &recordRig{t: t, a: a, now: time.Now(), fake: &fakeProcesses{exe: map[uint32]string{}, pages: map[uint32][]warden.PageRun{}}}
	r.app = treeOf(ctx, t, a, appInfo.Path).(*tree)
	r.lib = treeOf(ctx, t, a, libInfo.Path).(*tree)
	r.other = treeOf(ctx, t, a, otherInfo.Path).(*tree)
	trees := []*tree{r.app, r.lib, r.other}
	r.startRecorder = a.newRecorder(r.fake, func(node uint64) (flox.CID, uint32, bool) {
		if i := int(node >> 32); i < len(trees) {
			return trees[i].ID(), uint32(node), true
		}
		return flox.CID{}, 0, false
	})
	r.proc = t.TempDir()
	r.log = slog.New(slog.DiscardHandler)
	r.finish = func(_ context.Context, rec *recording) { r.over = append(r.over, rec) }
	return r
}

// node is what r.resolve turns back.
func (r *recordRig) node(of *tree, name string) uint64 {
	return uint64(slices.Index([]*tree{r.app, r.lib, r.other}, of))<<32 | uint64(entryOf(r.t.Context(), r.t, of, name))
}

// process makes a process with its entry in /proc; old says that it began long ago.
func (r *recordRig) process(pid, parent uint32, exe string, old bool) {
	r.t.Helper()
	dir := filepath.Join(r.proc, strconv.Itoa(int(pid)))
	began := int64(0)
	if !old {
		up, err := os.ReadFile("/proc/uptime")
		if err != nil {
			r.t.Fatal(err)
		}
		var seconds float64
		if _, err := fmt.Sscan(string(up), &seconds); err != nil {
			r.t.Fatal(err)
		}
		began = int64(seconds * userHZ)
	}
	stat := fmt.Sprintf("%d (a ) name) S %d 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 1 1", pid, parent, began)
	status := fmt.Sprintf("Name:\tx\nTgid:\t%d\nPid:\t%d\nPPid:\t%d\n", pid, pid, parent)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	for name, text := range map[string]string{"stat": stat, "status": status} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
	r.fake.exe[pid] = exe
}

// reads lets a thread read a part of a file, and time pass.
func (r *recordRig) reads(tid uint32, of *tree, name string, off int64, n int) {
	e := entryOf(r.t.Context(), r.t, of, name)
	entry, err := of.Entry(r.t.Context(), e)
	if err != nil {
		r.t.Fatal(err)
	}
	r.take(r.t.Context(), touch{tid: tid, tree: of, entry: e, off: off, n: n, exec: off == 0 && isProgram(entry)}, r.now)
	r.now = r.now.Add(10 * time.Millisecond)
}

// quiet lets so much time pass that every start is over.
func (r *recordRig) quiet() {
	r.now = r.now.Add(startQuiet + time.Second)
	r.tend(r.t.Context(), r.now)
}

// covered are the files of a recording and how many bytes of each.
func (r *recordRig) covered(rec *recording) map[string]int64 {
	out := map[string]int64{}
	for key, f := range rec.files {
		of := r.app
		if f.path == r.lib.path {
			of = r.lib
		}
		name, err := of.Path(r.t.Context(), key.entry)
		if err != nil {
			r.t.Fatal(err)
		}
		n := int64(0)
		for _, run := range f.runs {
			n += run.end - run.off
		}
		out[name] = n
	}
	return out
}

func (r *recordRig) exe(of *tree, name string) string {
	return r.a.cfg.StoreDir.Join(of.path) + "/" + name
}

func (r *recordRig) only() *recording {
	r.t.Helper()
	if len(r.over) != 1 {
		r.t.Fatalf("%d starts recorded, want 1", len(r.over))
	}
	return r.over[0]
}

// What a program reads from when it is executed is recorded, until it is quiet:
// of its closure, in order, also what its threads read.
func TestAStartIsRecorded(t *testing.T) {
	t.Parallel()
	r := newRecordRig(t)
	r.process(100, 1, "/bin/sh", false)
	r.reads(100, r.app, "bin/app", 0, 65536) // the kernel, in execve
	r.fake.exe[100] = r.exe(r.app, "bin/app")
	r.reads(100, r.lib, "lib/libc.so.6", 0, 4096)
	r.process(101, 1, "", false)
	if err := os.WriteFile(filepath.Join(r.proc, "101", "status"), []byte("Name:\tx\nTgid:\t100\nPPid:\t1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.reads(101, r.app, "bin/app", 65536, 65536)   // a thread of 100
	r.reads(100, r.other, "bin/other", 100, 65536) // not of its closure
	r.quiet()
	rec := r.only()
	if rec.path != r.app.path {
		t.Errorf("recorded for %s", rec.path)
	}
	if diff := cmp.Diff(map[string]int64{"bin/app": 131072, "lib/libc.so.6": 4096}, r.covered(rec)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	app := rec.files[fileKey{r.app.ID(), entryOf(t.Context(), t, r.app, "bin/app")}]
	lib := rec.files[fileKey{r.lib.ID(), entryOf(t.Context(), t, r.lib, "lib/libc.so.6")}]
	if app.rank >= lib.rank {
		t.Errorf("rank of the program %d, of the library %d", app.rank, lib.rank)
	}
	if r.open.Load() != 0 || len(r.all) != 0 {
		t.Error("something is still recorded")
	}
	r.reads(100, r.app, "bin/app", 200_000, 4096) // much later
	r.quiet()
	if len(r.over) != 1 {
		t.Error("reads long after a start were taken for another")
	}
}

// What was warm is completed from what the process has mapped, and the warden is
// asked a bounded number of times.
func TestAWarmStartIsCompleted(t *testing.T) {
	t.Parallel()
	r := newRecordRig(t)
	r.process(100, 1, "/bin/sh", false)
	r.reads(100, r.app, "bin/app", 0, 65536)
	r.fake.exe[100] = r.exe(r.app, "bin/app")
	r.fake.pages[100] = []warden.PageRun{
		{Node: r.node(r.lib, "lib/libc.so.6"), Off: 400_000 &^ 4095, Len: 8192},
		{Node: r.node(r.other, "bin/other"), Off: 0, Len: 4096},
		{Node: 99 << 32, Off: 0, Len: 4096},
	}
	for range 200 {
		r.reads(100, r.app, "bin/app", 65536, 4096)
	}
	r.quiet()
	want := map[string]int64{"bin/app": 69632, "lib/libc.so.6": 8192 + 2*readAround}
	if diff := cmp.Diff(want, r.covered(r.only())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if r.fake.asked > maxAsks+1 || r.fake.asked < 2 {
		t.Errorf("the warden was asked %d times", r.fake.asked)
	}
}

// A start whose program was warm is seen by its first read of something else; a
// process that is old, or of another file system, is none.
func TestWarmProgramsAreRecognised(t *testing.T) {
	t.Parallel()
	r := newRecordRig(t)
	r.process(100, 1, r.exe(r.app, "bin/app"), false)
	r.process(200, 1, r.exe(r.app, "bin/app"), true)
	r.process(300, 1, "/usr/bin/python3", false)
	for _, pid := range []uint32{100, 200, 300, 400} { // 400 is gone already
		r.reads(pid, r.lib, "lib/libc.so.6", 8192, 4096)
	}
	r.process(101, 100, r.exe(r.app, "bin/app"), false) // a child of 100 by fork
	r.process(102, 100, r.exe(r.other, "bin/other"), false)
	r.reads(101, r.lib, "lib/libc.so.6", 200_000, 4096)
	r.reads(102, r.lib, "lib/libc.so.6", 300_000, 4096) // another program
	r.quiet()
	var first *recording
	paths := map[flox.StorePath]int{}
	for _, rec := range r.over {
		paths[rec.path]++
		if rec.pid == 100 {
			first = rec
		}
	}
	if diff := cmp.Diff(map[flox.StorePath]int{r.app.path: 1, r.other.path: 1}, paths); diff != "" || first == nil {
		t.Fatalf("starts (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]int64{"lib/libc.so.6": 8192}, r.covered(first)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Who reads a program without running it starts nothing, nor does a library.
func TestReadingIsNotStarting(t *testing.T) {
	t.Parallel()
	r := newRecordRig(t)
	r.process(100, 1, "/bin/cat", false)
	for off := int64(0); off < 500_000; off += 65536 {
		r.reads(100, r.app, "bin/app", off, 65536)
	}
	r.reads(100, r.lib, "lib/libc.so.6", 0, 4096)
	if len(r.all) != 1 || r.all[0].path != r.app.path {
		t.Fatalf("%d recordings under way", len(r.all))
	}
	r.quiet()
	if len(r.over) != 0 {
		t.Errorf("%d starts recorded", len(r.over))
	}
}

// The number of recordings, of what they hold and of what is remembered is bounded.
func TestRecordingIsBounded(t *testing.T) {
	t.Parallel()
	r := newRecordRig(t)
	for pid := uint32(1000); pid < 1000+2*maxProcesses; pid++ {
		r.reads(pid, r.app, "bin/app", 0, 4096)
		r.now = r.now.Add(-10 * time.Millisecond)
	}
	if len(r.all) != maxRecordings || len(r.known) > maxProcesses || len(r.threads) > maxProcesses {
		t.Errorf("%d recordings, %d processes, %d threads", len(r.all), len(r.known), len(r.threads))
	}
	rec := r.all[0]
	for i := range 2 * maxRuns {
		rec.add(fileKey{r.app.ID(), uint32(i)}, r.app.path, 0, 4096)
	}
	if rec.runs > maxRuns+1 {
		t.Errorf("%d parts noted, want at most %d", rec.runs, maxRuns)
	}
	for range 3 * maxTouches {
		r.note(touch{tid: 1, tree: r.app}) // nobody takes them, and nobody waits
	}
}

// A recording becomes exactly the chunks of what was used, with the manifests'
// own names, and nothing else: no field could hold who, where, when or how.
func TestTraceOfARecording(t *testing.T) {
	t.Parallel()
	r := newRecordRig(t)
	ctx := within(t, time.Minute)
	r.process(100, 1, r.exe(r.app, "bin/app"), false)
	r.reads(100, r.app, "bin/app", 0, 4096)
	r.reads(100, r.lib, "lib/libc.so.6", 500_000, 100_000)
	r.reads(100, r.app, "etc/conf", 0, 5) // inline: no chunk
	r.quiet()
	trace := r.a.trace(ctx, r.only())
	if trace.GetPath() != string(r.app.path) || len(trace.GetTrees()) != 2 {
		t.Fatalf("%v", trace)
	}
	got := map[string]int{}
	for _, tree := range trace.GetTrees() {
		of := r.app
		if tree.GetPath() == string(r.lib.path) {
			of = r.lib
		}
		if id := of.ID(); string(tree.GetManifest()) != string(id[:]) {
			t.Errorf("%s has another manifest", tree.GetPath())
		}
		for _, c := range tree.GetChunks() {
			ok := false
			err := of.Chunks(ctx, c.GetEntry(), int64(c.GetOffset()), 1, func(off int64, have flox.Chunk) bool {
				ok = uint64(off) == c.GetOffset() && have.Size == c.GetSize() && string(have.ID[:]) == string(c.GetId())
				return false
			})
			if err != nil || !ok {
				t.Errorf("%v is no chunk of %s: %v", c, of.path, err)
			}
			got[tree.GetPath()]++
		}
	}
	want := map[string]int{}
	count := func(of *tree, name string, off, n int64) {
		_ = of.Chunks(ctx, entryOf(ctx, t, of, name), off, n, func(int64, flox.Chunk) bool { want[string(of.path)]++; return true })
	}
	count(r.app, "bin/app", 0, 4096)
	count(r.lib, "lib/libc.so.6", 500_000, 100_000)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("chunks (-want +got):\n%s", diff)
	}
	onlyKnownFields(t, (&floxv1.ReportStartsRequest{}).ProtoReflect().Descriptor(), map[string][]string{
		"ReportStartsRequest": {"starts"},
		"StartTrace":          {"path", "trees"},
		"TraceTree":           {"path", "manifest", "pages", "chunks"},
		"TraceChunk":          {"entry", "offset", "size", "id", "rank"},
	})
}

// onlyKnownFields checks that a message has no fields but those listed, at any depth.
func onlyKnownFields(t *testing.T, m protoreflect.MessageDescriptor, known map[string][]string) {
	t.Helper()
	var names []string
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		names = append(names, string(f.Name()))
		if f.Message() != nil {
			onlyKnownFields(t, f.Message(), known)
		}
	}
	if diff := cmp.Diff(known[string(m.Name())], names); diff != "" {
		t.Errorf("a report's %s says more than it should (-want +got):\n%s", m.Name(), diff)
	}
}

// A trace that is too large loses what was used last.
func TestTracesAreCut(t *testing.T) {
	t.Parallel()
	trees := map[flox.StorePath]*tracedTree{}
	for i := range 3 {
		p := storePath(t, i)
		tree := &tracedTree{out: &floxv1.TraceTree{Path: string(p)}}
		for j := range maxTraceChunks {
			tree.out.Chunks = append(tree.out.Chunks, &floxv1.TraceChunk{Entry: uint32(j), Size: 1, Rank: uint32(3*j + i)})
		}
		trees[p] = tree
	}
	n := 0
	for _, tree := range assemble(storePath(t, 0), trees).GetTrees() {
		for _, c := range tree.GetChunks() {
			n++
			if c.GetRank() >= maxTraceChunks {
				t.Fatalf("chunk of rank %d kept, %d others were used before it", c.GetRank(), c.GetRank())
			}
		}
	}
	if n != maxTraceChunks {
		t.Errorf("%d chunks, want %d", n, maxTraceChunks)
	}
	big := map[flox.StorePath]*tracedTree{storePath(t, 0): {out: &floxv1.TraceTree{Chunks: []*floxv1.TraceChunk{
		{Size: maxTraceBytes / 2, Rank: 1}, {Size: maxTraceBytes / 2, Rank: 2}, {Size: 1, Rank: 3},
	}}}}
	if got := assemble(storePath(t, 0), big).GetTrees()[0].GetChunks(); len(got) != 2 {
		t.Errorf("%d chunks, want the two that fit", len(got))
	}
}

// What the storehouse serves already, or was told, is not told again; what could
// not be told is.
func TestReportsAreSaidOnce(t *testing.T) {
	t.Parallel()
	var sent []*floxv1.ReportStartsRequest
	var fail error
	served := map[flox.StorePath]*floxv1.StartTrace{}
	r := &reporter{
		send: func(_ context.Context, m *floxv1.ReportStartsRequest) error {
			sent = append(sent, m)
			return fail
		},
		served: func(p flox.StorePath) *floxv1.StartTrace { return served[p] },
		wake:   make(chan struct{}, 1), told: make(map[flox.StorePath]*toldStart),
	}
	seen := func(path int, offsets ...uint64) *floxv1.StartTrace {
		tree := &floxv1.TraceTree{Path: string(storePath(t, path))}
		for _, off := range offsets {
			tree.Chunks = append(tree.Chunks, &floxv1.TraceChunk{Offset: off})
		}
		return &floxv1.StartTrace{Path: tree.GetPath(), Trees: []*floxv1.TraceTree{tree}}
	}
	now := time.Now()
	served[storePath(t, 2)] = seen(2, 1, 2, 3)
	for _, c := range []struct {
		what  string
		trace *floxv1.StartTrace
		at    time.Time
		want  bool
	}{
		{"something new", seen(1, 1, 2), now, true},
		{"the same", seen(1, 1, 2), now, false},
		{"a part of it", seen(1, 2), now, false},
		{"one more chunk", seen(1, 2, 3), now, true},
		{"what is served", seen(2, 1, 3), now, false},
		{"more than is served", seen(2, 3, 4), now, true},
		{"long after", seen(1, 1, 2), now.Add(2 * toldLasts), true},
	} {
		if got := r.add(c.trace, c.at); got != c.want {
			t.Errorf("%s: told %v, want %v", c.what, got, c.want)
		}
	}
	if err := r.flush(t.Context()); err != nil || len(sent) != 1 || len(sent[0].GetStarts()) != 4 {
		t.Fatalf("%d calls, %v", len(sent), err)
	}
	fail = flox.ErrUnreachable
	if !r.add(seen(5, 1), now) || r.flush(t.Context()) == nil || !r.add(seen(5, 1), now) {
		t.Error("what could not be told is not told again")
	}
	for i := range 3 * maxReports {
		r.add(seen(100+i, 1), now)
	}
	if len(r.waiting) != maxReports {
		t.Errorf("%d reports wait, want at most %d", len(r.waiting), maxReports)
	}
}
