package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// Bounds of what waits for one caller to take it: lines and the like, of which the
// rest is left out, and everything.
const (
	maxQueuedLines  = 4096
	maxQueuedEvents = 4 * maxGraph
)

// sink is what a caller is to be told, in order. Who tells never waits.
type sink struct {
	mu    sync.Mutex
	queue []*floxv1.BuildEvent
	lines int
	left  map[string]int // lines left out, by derivation
	wake  chan struct{}  // holds one token while there is something
	taken bell
}

// room waits until there is room for another event.
func (s *sink) room(ctx context.Context) error {
	for {
		rung := s.taken.wait()
		s.mu.Lock()
		free := s.lines < maxQueuedLines && len(s.queue) < maxQueuedEvents
		s.mu.Unlock()
		if free {
			return nil
		}
		select {
		case <-rung:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func newSink() *sink { return &sink{wake: make(chan struct{}, 1), left: map[string]int{}} }

// put adds an event.
func (s *sink) put(e *floxv1.BuildEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	drv, droppable := "", true
	switch v := e.GetEvent().(type) {
	case *floxv1.BuildEvent_Line:
		drv = v.Line.GetDrv()
	case *floxv1.BuildEvent_Note:
		drv = v.Note.GetDrv()
	case *floxv1.BuildEvent_Wait:
	case *floxv1.BuildEvent_Phase:
	default:
		droppable = false
	}
	if len(s.queue) >= maxQueuedEvents || droppable && s.lines >= maxQueuedLines {
		if len(s.left) < maxGraph {
			s.left[drv]++
		}
		return
	}
	if n := s.left[drv]; n > 0 {
		delete(s.left, drv)
		s.queue = append(s.queue, &floxv1.BuildEvent{Event: &floxv1.BuildEvent_Note{Note: &floxv1.BuildNote{
			Drv: drv, Level: 1, Text: fmt.Sprintf("%d lines are left out here: they came faster than they were taken; the log has them", n),
		}}})
	}
	if droppable {
		s.lines++
	}
	s.queue = append(s.queue, e)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take gives what there is.
func (s *sink) take() []*floxv1.BuildEvent {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.queue
	s.queue, s.lines = nil, 0
	s.taken.ring()
	return all
}

// realising is a call of Build under way.
type realising struct {
	b       *builds
	asked   string
	req     *floxv1.BuildRequest
	graph   *graph
	to      *sink
	check   bool
	outcome map[*node]*floxv1.BuildOutcome
	fetched map[flox.StorePath]bool // from upstreams
}

// finished is what became of a node.
type finished struct {
	n   *node
	out *floxv1.BuildOutcome
	err error
}

// realise has everything built that a request needs, inputs first.
func (r *realising) realise(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	waits, needed := map[*node]int{}, map[*node][]*node{}
	done := make(chan finished, len(r.graph.order))
	running := 0
	begin := func(n *node) {
		running++
		group.Go(func() {
			f, err := r.b.want(ctx, &buildFlight{key: r.keyOf(n), asked: r.asked, options: r.req.GetOptions()}, r.to)
			if err != nil {
				done <- finished{n, nil, err}
				return
			}
			done <- finished{n, f.outcome, nil}
		})
	}
	for _, n := range r.graph.order {
		waits[n] = len(n.inputs)
		for _, in := range n.inputs {
			needed[in] = append(needed[in], n)
		}
	}
	for _, n := range r.graph.order {
		if waits[n] == 0 {
			begin(n)
		}
	}
	for running > 0 {
		f := <-done // want ends with ctx
		running--
		if f.err != nil && (ctx.Err() != nil || !errors.Is(f.err, flox.ErrNotFound)) {
			return f.err
		}
		if f.err != nil {
			f.out = failedOutcome(buildfarm.MiscFailure, "%v", f.err)
		}
		r.outcome[f.n] = f.out
		if ok(f.out) {
			for _, user := range needed[f.n] {
				if waits[user]--; waits[user] == 0 && r.outcome[user] == nil {
					begin(user)
				}
			}
			continue
		}
		r.fail(f.n, needed)
		if !r.req.GetOptions().GetKeepGoing() {
			return nil // what else runs is nobody's any more
		}
	}
	return nil
}

// asksFor reports whether outputs of a derivation are asked for.
func (r *realising) asksFor(drv flox.StorePath) bool {
	return slices.ContainsFunc(r.req.GetPaths(), func(p *floxv1.DerivedPath) bool { return p.GetPath() == string(drv) && len(p.GetOutputs()) > 0 })
}

// fail marks what needs a node that failed.
func (r *realising) fail(n *node, needed map[*node][]*node) {
	dir := r.b.s.cfg.StoreDir
	for stack := slices.Clone(needed[n]); len(stack) > 0; {
		user := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if r.outcome[user] != nil {
			continue
		}
		r.outcome[user] = failedOutcome(buildfarm.DependencyFailed, "1 dependencies of derivation '%s' failed to build", dir.Join(user.path))
		stack = append(stack, needed[user]...)
	}
}

// ok reports whether an outcome is a success.
func ok(o *floxv1.BuildOutcome) bool {
	return buildfarm.Status(o.GetStatus()).OK() || o.GetStatus() == statusResolves //nolint:gosec // Nix's numbers
}

// results says for every path asked for what became of it.
func (r *realising) results(ctx context.Context) error {
	for _, p := range r.req.GetPaths() {
		out, err := r.result(ctx, p)
		if err != nil {
			return err
		}
		r.to.put(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Result{Result: &floxv1.BuildResult{Path: p, Outcome: out}}})
	}
	return nil
}

func (r *realising) result(ctx context.Context, p *floxv1.DerivedPath) (*floxv1.BuildOutcome, error) {
	dir, path := r.b.s.cfg.StoreDir, flox.StorePath(p.GetPath())
	n := r.graph.nodes[path]
	if slices.Contains(r.graph.unknown, path) {
		if len(p.GetOutputs()) > 0 {
			return failedOutcome(buildfarm.MiscFailure, "derivation '%s' is not valid in the storehouse: upload it with all it refers to", dir.Join(path)), nil
		}
		return failedOutcome(buildfarm.NoSubstituters, "path '%s' is required, but there is no substituter that can build it", dir.Join(path)), nil
	}
	if len(p.GetOutputs()) == 0 {
		return &floxv1.BuildOutcome{Status: uint32(r.had(path))}, nil
	}
	names := slices.Sorted(slices.Values(p.GetOutputs()))
	if slices.Contains(names, "*") {
		names = n.drv.OutputNames()
	}
	out := r.outcome[n]
	switch {
	case out == nil && n.build:
		return failedOutcome(buildfarm.MiscFailure, "build of '%s' was stopped: another one failed", dir.Join(path)), nil
	case out == nil:
		out = &floxv1.BuildOutcome{Status: uint32(buildfarm.AlreadyValid)}
		var err error
		out.Outputs, err = r.b.built(ctx, n.drv, names)
		for _, o := range out.GetOutputs() {
			out.Status = min(out.GetStatus(), uint32(r.had(flox.StorePath(o.GetPath()))))
		}
		return out, err
	}
	wanted := &floxv1.BuildOutcome{
		Status: out.GetStatus(), Message: out.GetMessage(), TimesBuilt: out.GetTimesBuilt(), NonDeterministic: out.GetNonDeterministic(),
		StartUnix: out.GetStartUnix(), StopUnix: out.GetStopUnix(), Tail: out.GetTail(),
	}
	for _, o := range out.GetOutputs() {
		if slices.Contains(names, o.GetName()) {
			wanted.Outputs = append(wanted.Outputs, o)
		}
	}
	return wanted, nil
}
