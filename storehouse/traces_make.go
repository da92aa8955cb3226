package storehouse

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of making traces.
const (
	// maxMadeTraces is how many traces are kept as they are sent.
	maxMadeTraces = 512
	// maxTraceQueue is how many paths wait for theirs. What does not fit is made
	// when somebody asks again.
	maxTraceQueue = 1024
	makeTimeout   = 10 * time.Second // of one trace
	makeAgain     = time.Minute      // until one that could not be made is tried again for who asks
)

// traceMaker makes traces as they are sent, one after the other and never while
// an answer is: to make one reads many manifests, and a trace is only a hint.
type traceMaker struct {
	queue chan traceJob

	mu     sync.Mutex
	made   map[string]madeTrace     // by path
	queued map[string]chan struct{} // by path, until it is taken from the queue
}

// traceJob is a path whose trace is to be made. done is closed when it was, or failed.
type traceJob struct {
	path string
	done chan struct{}
}

type madeTrace struct {
	reported uint64             // of the state it was made of
	trace    *floxv1.StartTrace // nil = none could be made yet
	size     int                // of the trace, in bytes
	failed   time.Time          // zero = the last try did not fail
}

// current reports whether nothing better is to be had for a state.
func (m madeTrace) current(reported uint64, now time.Time) bool {
	if !m.failed.IsZero() {
		return now.Sub(m.failed) < makeAgain
	}
	return m.trace != nil && m.reported == reported
}

// useful reports whether there is anything to send.
func (m madeTrace) useful() bool { return len(m.trace.GetTrees()) > 0 }

func newTraceMaker() *traceMaker {
	return &traceMaker{
		queue: make(chan traceJob, maxTraceQueue), made: map[string]madeTrace{}, queued: map[string]chan struct{}{},
	}
}

// want puts a path into the queue unless it is there. What it gives is closed when
// the path's trace was made of a state no older than now; nil = the queue is full.
func (m *traceMaker) want(path string) <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if done, ok := m.queued[path]; ok {
		return done
	}
	done := make(chan struct{})
	select {
	case m.queue <- traceJob{path, done}:
		m.queued[path] = done
		return done
	default:
		return nil
	}
}

// run calls build for what is wanted until ctx ends.
func (m *traceMaker) run(ctx context.Context, build func(ctx context.Context, path string)) error {
	for {
		select {
		case job := <-m.queue:
			m.mu.Lock()
			delete(m.queued, job.path) // before the state is read: who asks from here on may mean a newer one
			m.mu.Unlock()
			one, cancel := context.WithTimeout(ctx, makeTimeout)
			build(one, job.path)
			cancel()
			close(job.done)
		case <-ctx.Done():
			return nil
		}
	}
}

func (m *traceMaker) get(path string) madeTrace {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.made[path]
}

func (m *traceMaker) forget(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.made, path)
}

func (m *traceMaker) keep(path string, t madeTrace) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.made, path)
	for other := range m.made { // any one: it is made again
		if len(m.made) < maxMadeTraces {
			break
		}
		delete(m.made, other)
	}
	m.made[path] = t
}

// makeTrace makes a path's trace of what is known now. Only the log hears of an error.
func (s *Server) makeTrace(ctx context.Context, path string) {
	state, err := s.startState(ctx, path)
	if errors.Is(err, flox.ErrNotFound) {
		s.made.forget(path)
		return
	}
	have := s.made.get(path)
	if err == nil && have.failed.IsZero() && have.current(state.GetReported(), time.Now()) {
		return
	}
	next := madeTrace{reported: state.GetReported()}
	if err == nil {
		next.trace, err = s.buildTrace(ctx, state)
	}
	if errors.Is(err, context.Canceled) { // the server ends
		return
	}
	if err != nil {
		s.cfg.Log.Warn("start trace not made", "path", path, "error", err)
		have.failed = time.Now() // the one before is still a hint
		s.made.keep(path, have)
		return
	}
	next.size = proto.Size(next.trace)
	s.made.keep(path, next)
}

// startState gives what is known of the starts of a path. ErrNotFound.
func (s *Server) startState(ctx context.Context, path string) (state *floxv1.StartState, err error) {
	r, err := s.node.View(ctx, tracesKind, cluster.Local)
	if err != nil {
		return nil, err
	}
	state, err = readStart(r, flox.StorePath(path).HashPart())
	if err == nil && state.GetPath() != path {
		err = flox.ErrNotFound
	}
	return state, errors.Join(err, r.Close())
}
