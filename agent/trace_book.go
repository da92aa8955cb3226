package agent

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	// maxHeldTraces and maxHeldChunks bound the traces kept in memory.
	maxHeldTraces, maxHeldChunks = 512, 128 << 10
	// askTraceAgain is after how long the storehouse is asked again for a trace of a
	// path it had none of.
	askTraceAgain = 10 * time.Minute
	// askTraceSoon is the same where nobody answered.
	askTraceSoon = 10 * time.Second
	// replayAgain is after how long a trace may be replayed once more: what it
	// brought may have been evicted.
	replayAgain = 30 * time.Second
	// maxReplays bounds the replays, and the questions for traces, under way;
	// maxBundles those of them that may hold a window of bytes.
	maxReplays, maxBundles = 16, 3
	// replayLasts bounds one of them.
	replayLasts = time.Minute
)

// traceBook keeps accepted traces in memory and replays them.
type traceBook struct {
	a      *Agent
	places chan struct{}
	bundle chan struct{}
	work   sync.WaitGroup // replays under way; Close waits for them

	mu     sync.Mutex
	traces map[flox.StorePath]*heldTrace
	chunks int
}

// heldTrace is what is known of a path's starts.
type heldTrace struct {
	trace  *floxv1.StartTrace // nil = the storehouse has none
	chunks int
	asked  time.Time
	next   time.Time // not replayed before
}

func newTraceBook(a *Agent) *traceBook {
	return &traceBook{a: a, places: make(chan struct{}, maxReplays), bundle: make(chan struct{}, maxBundles), traces: make(map[flox.StorePath]*heldTrace)}
}

// put keeps the answer to a question for the trace of p; nil = there is none.
func (b *traceBook) put(p flox.StorePath, trace *floxv1.StartTrace) {
	held := &heldTrace{trace: trace, asked: time.Now()}
	for _, t := range trace.GetTrees() {
		held.chunks += len(t.GetChunks()) + len(t.GetPages()) + 1
	}
	if held.chunks > maxTraceChunks+maxTraceTrees+maxTracePages {
		held.trace, held.chunks = nil, 0 // no storehouse of ours sends that
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if old := b.traces[p]; old != nil {
		b.chunks -= old.chunks
		held.next = old.next
		delete(b.traces, p)
	}
	for other, old := range b.traces { // any ones: they are asked for again
		if len(b.traces) < maxHeldTraces && b.chunks+held.chunks <= maxHeldChunks {
			break
		}
		b.chunks -= old.chunks
		delete(b.traces, other)
	}
	b.traces[p] = held
	b.chunks += held.chunks
}

// get gives the accepted trace of p, nil if none is known here.
func (b *traceBook) get(p flox.StorePath) *floxv1.StartTrace {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if held := b.traces[p]; held != nil {
		return held.trace
	}
	return nil
}

// starting is called when a program of p is about to run: its trace is replayed,
// or asked for first. It does not wait, and does nothing for what was done lately.
func (b *traceBook) starting(p flox.StorePath) {
	if b == nil {
		return
	}
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	held := b.traces[p]
	switch {
	case held == nil || held.trace == nil && now.Sub(held.asked) > askTraceAgain:
		b.spawn(func(ctx context.Context) {
			if b.ask(ctx, p) {
				b.replay(ctx, p)
			}
		})
	case held.trace != nil && now.After(held.next):
		b.spawn(func(ctx context.Context) { b.replay(ctx, p) })
	}
}

// spawn runs what a start needs in the background, if there is a place.
func (b *traceBook) spawn(do func(context.Context)) bool {
	select {
	case b.places <- struct{}{}:
	default:
		return false
	}
	b.work.Go(func() { // bounded by b.places
		defer func() { <-b.places }()
		ctx, cancel := context.WithTimeout(b.a.fetcher.life, replayLasts)
		defer cancel()
		do(ctx)
	})
	return true
}

// ask asks the storehouse for the trace of a path whose facts came from somebody
// else, or were here already. It reports whether there is one to be replayed.
func (b *traceBook) ask(ctx context.Context, p flox.StorePath) bool {
	if !b.a.follower.state().connected {
		return false // it is asked when it can be
	}
	b.mu.Lock()
	held := b.traces[p]
	again := held == nil || held.trace == nil && time.Since(held.asked) > askTraceAgain
	b.mu.Unlock()
	if !again {
		return false
	}
	b.put(p, nil) // others do not ask meanwhile
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	request := connect.NewRequest(&floxv1.PathsRequest{HashParts: []string{p.HashPart()}, Traces: true})
	var answer *connect.Response[floxv1.PathsResponse]
	err := b.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		answer, err = b.a.calls.facts(house).Paths(ctx, request)
		return err
	})
	if err != nil {
		b.a.log.Debug("trace not asked for", "path", string(p), "error", err)
		b.later(p)
		return false
	}
	b.answered(p, answer.Msg)
	return b.get(p) != nil
}

// later makes a path be asked for again soon: nobody answered.
func (b *traceBook) later(p flox.StorePath) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if held := b.traces[p]; held != nil && held.trace == nil {
		held.asked = time.Now().Add(askTraceSoon - askTraceAgain)
	}
}

// answered keeps what the storehouse said about the trace of p.
func (b *traceBook) answered(p flox.StorePath, answer *floxv1.PathsResponse) {
	var found *floxv1.StartTrace
	for _, t := range answer.GetTraces() {
		b.a.traffic.trace(t)
		if t.GetPath() == string(p) {
			found = t
		}
	}
	b.put(p, found)
}

// found is called when the storehouse answered about p with its facts: if p has
// a trace, its manifest is needed next, in whole.
func (b *traceBook) found(p flox.StorePath, answer *floxv1.PathsResponse) {
	if b == nil {
		return
	}
	b.answered(p, answer)
	if trace := b.get(p); trace != nil {
		b.spawn(func(ctx context.Context) { b.manifest(ctx, p, trace) })
	}
}

// due gives the trace of p if it is time to replay it, and to nobody else for a while.
func (b *traceBook) due(p flox.StorePath) *floxv1.StartTrace {
	b.mu.Lock()
	defer b.mu.Unlock()
	held, now := b.traces[p], time.Now()
	if held == nil || held.trace == nil || now.Before(held.next) {
		return nil
	}
	held.next = now.Add(replayAgain)
	return held.trace
}

// replay brings everything a start of p needs, in one request.
func (b *traceBook) replay(ctx context.Context, p flox.StorePath) {
	trace := b.due(p)
	if trace == nil {
		return
	}
	select {
	case b.bundle <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-b.bundle }()
	n, err := newBundle(b.a, p).fetch(ctx, trace)
	if n > 0 {
		b.a.starts.replayed.Add(1)
	}
	if err != nil {
		b.a.log.Debug("trace not replayed in whole", "path", string(p), "blocks", n, "error", err)
	}
}

// manifest brings the blocks of p's own manifest.
func (b *traceBook) manifest(ctx context.Context, p flox.StorePath, trace *floxv1.StartTrace) {
	own := &floxv1.StartTrace{Path: trace.GetPath()}
	for _, t := range trace.GetTrees() {
		if t.GetPath() == string(p) {
			own.Trees = []*floxv1.TraceTree{{Path: t.GetPath(), Manifest: t.GetManifest(), Pages: t.GetPages()}}
		}
	}
	if _, err := newBundle(b.a, p).fetch(ctx, own); err != nil {
		b.a.log.Debug("manifest not fetched ahead", "path", string(p), "error", err)
	}
}
