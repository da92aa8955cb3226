package agent

import (
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
)

// Bounds of recording.
const (
	// maxTouches is how many reads wait to be looked at; more are not recorded.
	maxTouches = 4096
	// maxRecordings is how many starts are recorded at once.
	maxRecordings = 64
	// maxPerProcess is how many starts one process may be part of: a wrapper
	// script and the programs it becomes.
	maxPerProcess = 4
	// maxProcesses bounds the processes and threads remembered.
	maxProcesses = 1024
	// maxRuns bounds the parts of files noted of one start.
	maxRuns = 16 << 10
	// startLasts is how long a start is recorded at most, startQuiet how long
	// without a read.
	startLasts, startQuiet = 10 * time.Second, 2 * time.Second
	// startAge is how old a process may be whose start is recorded although its
	// program was not read.
	startAge = 10 * time.Second
	// processKnown is how long it is remembered that a process is not recorded,
	// and which process a thread belongs to.
	processKnown = 5 * time.Second
	// maxMeets is how many processes that nothing is known of are looked at per
	// second: on a machine that starts more, some starts are not seen.
	maxMeets = 200
	// maxAsks is how often the warden is asked about one start before it is over:
	// after firstAsk, and whenever the start is an eighth older. So what a process
	// uses in the last ninth of a short life may be missed, and little else.
	maxAsks, firstAsk = 48, time.Millisecond
	// readAround is how many bytes before and behind a page the kernel reads with it
	// when the page is missing: half its read-ahead. Where a page was warm, none of
	// that was needed; where it is not, the read waits for it.
	readAround = 32 << 10
	// askTimeout bounds one question.
	askTimeout = time.Second
	// recordTick is how often recordings are looked at while there are some.
	recordTick = 20 * time.Millisecond
)

// touch is one use of an entry of a store path.
type touch struct {
	tid   uint32
	tree  *tree
	entry uint32
	off   int64
	n     int  // bytes; 0 = it was looked at only
	exec  bool // the first bytes of a program or script
}

// processes is what the recorder asks about others.
type processes interface {
	Exe(ctx context.Context, pid uint32) (string, error)
	Pages(ctx context.Context, pid uint32) ([]warden.PageRun, error)
}

// startRecorder notes what programs read when they start. Readers only leave a note
// in a queue, never wait for it, and lose it when the queue is full.
type startRecorder struct {
	touches chan touch
	open    atomic.Int32 // recordings under way
	proc    string       // /proc
	ask     processes    // nil = there is nobody to ask
	store   flox.StoreDir
	resolve func(node uint64) (flox.CID, uint32, bool) // nil: as ask
	closure func(flox.StorePath) map[flox.StorePath]*flox.PathInfo
	finish  func(ctx context.Context, r *recording)
	log     *slog.Logger

	// owned by run
	threads map[uint32]thread
	known   map[uint32]*process
	all     []*recording
	second  time.Time // in which met counts
	met     int
}

// thread is which process a thread belongs to.
type thread struct {
	pid uint32
	at  time.Time
}

// process is one that reads from the mount.
type process struct {
	pid    uint32
	at     time.Time
	exe    string // "" = not known
	starts []*recording
	begun  []flox.StorePath // also of starts that are over
}

// recording is one start under way.
type recording struct {
	path        flox.StorePath
	closure     map[flox.StorePath]*flox.PathInfo
	manifests   map[flox.CID]flox.StorePath // of the closure
	pid         uint32
	began, last time.Time
	nextAsk     time.Time
	asks        int
	gone        bool // the process ended
	sure        bool // the process runs a program of the closure
	files       map[fileKey]*seenFile
	rank        uint32
	runs        int
}

// fileKey is an entry of a manifest.
type fileKey struct {
	manifest flox.CID
	entry    uint32
}

// seenFile is what was used of it, in the order of use.
type seenFile struct {
	path flox.StorePath
	rank uint32
	runs []seenRun
}

type seenRun struct {
	off, end int64
	rank     uint32
}

// note leaves a note of a use by a thread of somebody's.
func (r *startRecorder) note(t touch) {
	if r == nil || t.tid == 0 {
		return
	}
	select {
	case r.touches <- t:
	default:
	}
}

// listens reports whether uses that are no reads are of interest now.
func (r *startRecorder) listens() bool { return r != nil && r.open.Load() > 0 }

// run looks at notes until ctx ends. What is under way then is dropped.
func (r *startRecorder) run(ctx context.Context) error {
	tick := time.NewTicker(recordTick)
	defer tick.Stop()
	for {
		var ticks <-chan time.Time
		if len(r.all) > 0 {
			ticks = tick.C
		}
		select {
		case t := <-r.touches:
			r.take(ctx, t, time.Now())
		case <-ticks:
			r.tend(ctx, time.Now())
		case <-ctx.Done():
			return nil
		}
	}
}

// take adds a use to the starts of the process that made it.
func (r *startRecorder) take(ctx context.Context, t touch, now time.Time) {
	pid := r.process(t.tid, now)
	p := r.known[pid]
	switch {
	case t.exec:
		if p == nil {
			p = r.remember(pid, now)
		}
		p.at = now
		r.begin(p, t.tree.path, now)
	case p == nil || len(p.starts) == 0 && now.Sub(p.at) > processKnown:
		p = r.meet(ctx, pid, now)
	}
	for _, rec := range p.starts {
		rec.note(t, now)
		if !t.exec {
			r.question(ctx, rec, now)
		}
	}
}

// remember makes room for a process.
func (r *startRecorder) remember(pid uint32, now time.Time) *process {
	if len(r.known) >= maxProcesses {
		for id, p := range r.known {
			if len(p.starts) == 0 {
				delete(r.known, id)
			}
		}
	}
	p := &process{pid: pid, at: now}
	r.known[pid] = p
	return p
}

// begin begins to record a start of path by p, unless that is done already.
func (r *startRecorder) begin(p *process, path flox.StorePath, now time.Time) *recording {
	if len(r.all) >= maxRecordings || len(p.begun) >= maxPerProcess || slices.Contains(p.begun, path) {
		return nil
	}
	rec := &recording{
		path: path, closure: r.closure(path), pid: p.pid, began: now, last: now, nextAsk: now.Add(firstAsk),
		files: make(map[fileKey]*seenFile), manifests: make(map[flox.CID]flox.StorePath),
	}
	for of, info := range rec.closure {
		rec.manifests[info.Manifest] = of
	}
	p.begun = append(p.begun, path)
	p.starts = append(p.starts, rec)
	r.all = append(r.all, rec)
	r.open.Store(int32(len(r.all))) //nolint:gosec // bounded
	return rec
}

// meet finds out whether a process that nothing is known of has just started: its
// program may have been warm, so that its start was not seen. A child that runs
// its parent's program is part of the parent's start.
func (r *startRecorder) meet(ctx context.Context, pid uint32, now time.Time) *process {
	p := r.remember(pid, now)
	if now.Sub(r.second) >= time.Second {
		r.second, r.met = now, 0
	}
	if r.met++; r.met > maxMeets || r.ask == nil || !r.young(pid) {
		return p
	}
	path, ok := r.runs(ctx, p)
	if !ok {
		return p
	}
	if parent := r.known[r.parent(pid)]; parent != nil && len(parent.starts) > 0 {
		if _, ok := r.runs(ctx, parent); ok && parent.exe == p.exe {
			p.starts = append(p.starts, parent.starts...)
			return p
		}
	}
	if rec := r.begin(p, path, now); rec != nil {
		rec.sure = true
	}
	return p
}

// runs asks which store path's program a process runs.
func (r *startRecorder) runs(ctx context.Context, p *process) (flox.StorePath, bool) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	exe, err := r.ask.Exe(ctx, p.pid)
	if err != nil {
		return "", false
	}
	p.exe = exe
	path, _, err := r.store.Split(exe)
	return path, err == nil
}

// question asks the warden what the process has mapped, if it is time to.
func (r *startRecorder) question(ctx context.Context, rec *recording, now time.Time) {
	if r.ask == nil || rec.gone || rec.asks >= maxAsks || now.Before(rec.nextAsk) {
		return
	}
	rec.asks++
	rec.nextAsk = now.Add(firstAsk + now.Sub(rec.began)/8)
	r.complete(ctx, rec)
}

// complete adds what the process has mapped. What was in the kernel's memory
// already is never read from us, and is needed on a machine where it is not.
func (r *startRecorder) complete(ctx context.Context, rec *recording) {
	if exe, ok := r.runs(ctx, &process{pid: rec.pid}); ok && rec.closure[exe] != nil {
		rec.sure = true
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	pages, err := r.ask.Pages(ctx, rec.pid)
	if err != nil {
		rec.gone = true
		return
	}
	if !rec.sure {
		return // still the program that called execve, or one that only reads this one
	}
	for _, run := range pages {
		manifest, entry, ok := r.resolve(run.Node)
		if path := rec.manifests[manifest]; ok && path != "" {
			from := max(run.Off-readAround, 0)
			rec.add(fileKey{manifest, entry}, path, from, run.Off+run.Len+readAround-from)
		}
	}
}

// tend asks what is due and ends recordings.
func (r *startRecorder) tend(ctx context.Context, now time.Time) {
	left := r.all[:0]
	var over []*recording
	for _, rec := range r.all {
		if now.Sub(rec.last) >= startQuiet || now.Sub(rec.began) >= startLasts {
			over = append(over, rec)
			continue
		}
		r.question(ctx, rec, now)
		left = append(left, rec)
	}
	clear(r.all[len(left):])
	r.all = left
	r.open.Store(int32(len(r.all))) //nolint:gosec // bounded
	for _, rec := range over {
		r.end(ctx, rec)
	}
}

// end hands a recording on. One of a process that never was seen to run a
// program of the closure is none: somebody copied or searched the file.
func (r *startRecorder) end(ctx context.Context, rec *recording) {
	if r.ask != nil && !rec.gone {
		r.complete(ctx, rec)
	}
	for _, p := range r.known {
		for i, other := range p.starts {
			if other == rec {
				p.starts = append(p.starts[:i:i], p.starts[i+1:]...)
				break
			}
		}
	}
	if rec.sure {
		r.finish(ctx, rec)
	}
}

// note adds a use.
func (rec *recording) note(t touch, now time.Time) {
	rec.last = now
	if rec.closure[t.tree.path] == nil {
		return
	}
	rec.add(fileKey{t.tree.ID(), t.entry}, t.tree.path, t.off, int64(t.n))
}

// add adds a part of a file; n = 0: only the entry.
func (rec *recording) add(key fileKey, path flox.StorePath, off, n int64) {
	if rec.runs >= maxRuns {
		return
	}
	f := rec.files[key]
	if f == nil {
		f = &seenFile{path: path, rank: rec.rank}
		rec.files[key] = f
		rec.rank++
		rec.runs++
	}
	if n <= 0 {
		return
	}
	for i := range f.runs {
		if have := &f.runs[i]; off >= have.off && off <= have.end {
			have.end = max(have.end, off+n)
			return
		}
	}
	f.runs = append(f.runs, seenRun{off, off + n, rec.rank})
	rec.rank++
	rec.runs++
}
