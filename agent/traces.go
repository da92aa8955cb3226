package agent

import (
	"context"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// starts is everything about start traces: what programs read when they start,
// recorded here, told to the storehouse, and replayed where others started them.
// DESIGN.md says what becomes of a trace on its way.
type starts struct {
	recorder *startRecorder // nil = nothing is recorded
	reporter *reporter
	book     *traceBook // nil = nothing is replayed
	loads    *loads     // nil = nothing is fetched ahead

	recorded, replayed atomic.Uint64
}

func (a *Agent) newStarts() *starts {
	s := &starts{}
	if !a.cfg.NoPrefetch {
		s.loads = newLoads(a)
	}
	if !a.cfg.NoTraces && !a.cfg.NoPrefetch {
		s.book = newTraceBook(a)
	}
	s.reporter = &reporter{send: a.sendStarts, served: s.book.get, wake: make(chan struct{}, 1), told: make(map[flox.StorePath]*toldStart)}
	return s
}

// wait waits for what is under way in the background, once the agent's life ended.
func (s *starts) wait() {
	if s.loads != nil {
		s.loads.work.Wait()
	}
	if s.book != nil {
		s.book.work.Wait()
	}
}

// newRecorder makes the recorder of a mount.
func (a *Agent) newRecorder(ask processes, resolve func(node uint64) (flox.CID, uint32, bool)) *startRecorder {
	return &startRecorder{
		touches: make(chan touch, maxTouches), proc: "/proc", ask: ask, store: a.cfg.StoreDir, resolve: resolve,
		closure: a.localClosure, finish: a.startRecorded, log: a.log,
		threads: make(map[uint32]thread), known: make(map[uint32]*process),
	}
}

// startRecorded tells of a start that is over.
func (a *Agent) startRecorded(ctx context.Context, rec *recording) {
	a.linked(ctx, rec)
	trace := a.trace(ctx, rec)
	if len(trace.GetTrees()) == 0 {
		return
	}
	a.starts.recorded.Add(1)
	told := a.starts.reporter.add(trace, time.Now())
	a.log.Debug("start recorded", "path", trace.GetPath(), "trees", len(trace.GetTrees()), "told", told)
}

// message adds what there is to say about traces.
func (s *starts) message(m *floxv1.Prefetch) *floxv1.Prefetch {
	m.Traces = s.recorder != nil || s.book != nil
	m.StartsRecorded, m.StartsReplayed = s.recorded.Load(), s.replayed.Load()
	return m
}

// read is called for every read of a regular file by somebody. It never waits.
func (s *starts) read(t *tree, index uint32, e flox.Entry, off int64, p []byte, who flox.Reader) {
	exec := off == 0 && isProgram(e)
	if exec {
		s.book.starting(t.path)
		// Whoever copies a program begins as its start does, and would bring what it
		// never reads: far away that costs less than waiting until it is known which.
		if t.a.readers.far() {
			s.loads.starting(t, index)
		} else {
			s.loads.running(t, index, who.PID)
		}
	}
	s.recorder.note(touch{tid: who.PID, tree: t, entry: index, off: off, n: len(p), exec: exec})
}

// heard is a tree in the hands of a caller whose start may be recorded.
type heard struct {
	*tree
	who flox.Reader
}

// heard notes that somebody opened a tree, and listens to what is looked up there
// while a start is recorded.
func (s *starts) heard(t *tree, who flox.Reader) flox.Tree {
	if who.PID == 0 || !s.recorder.listens() {
		return t
	}
	s.recorder.note(touch{tid: who.PID, tree: t, entry: uint32(who.Node)}) //nolint:gosec // the lower half of a node is its entry
	return &heard{t, who}
}

// Child implements flox.Tree.
func (h *heard) Child(ctx context.Context, dir uint32, name string) (uint32, flox.Entry, error) {
	i, e, err := h.tree.Child(ctx, dir, name)
	if err == nil {
		h.a.starts.recorder.note(touch{tid: h.who.PID, tree: h.tree, entry: i})
	}
	return i, e, err
}
