package agent

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	// reportEvery is how often starts are told at most.
	reportEvery = 2 * time.Second
	// maxReports is how many starts wait to be told, and how many one call holds.
	maxReports = 64
	// maxReportBytes bounds one call.
	maxReportBytes = 2 << 20
	// maxTold is of how many paths it is remembered what was told, and toldLasts for
	// how long.
	maxTold   = 512
	toldLasts = time.Hour
)

// reporter tells the storehouse what programs read when they started. A report
// says which store path and which chunks, and nothing of who, where, when or how.
type reporter struct {
	send   func(ctx context.Context, m *floxv1.ReportStartsRequest) error
	served func(flox.StorePath) *floxv1.StartTrace // accepted, as far as known here

	wake chan struct{} // something waits

	mu      sync.Mutex
	waiting []*floxv1.StartTrace
	told    map[flox.StorePath]*toldStart
}

// toldStart is what this machine told of a path.
type toldStart struct {
	at     time.Time
	chunks map[traceKey]struct{}
}

// traceKey is a chunk of a trace.
type traceKey struct {
	path string
	chunkKey
}

// add queues a trace unless there is nothing new in it, or no room.
func (r *reporter) add(t *floxv1.StartTrace, now time.Time) bool {
	path := flox.StorePath(t.GetPath())
	known := make(map[traceKey]struct{})
	eachChunk(r.served(path), func(k traceKey) { known[k] = struct{}{} })
	r.mu.Lock()
	defer r.mu.Unlock()
	told := r.told[path]
	if told != nil && now.Sub(told.at) > toldLasts {
		told = nil
	}
	fresh := false
	eachChunk(t, func(k traceKey) {
		_, accepted := known[k]
		before := false
		if told != nil {
			_, before = told.chunks[k]
		}
		fresh = fresh || !accepted && !before
	})
	if !fresh || len(r.waiting) >= maxReports {
		return false
	}
	if told == nil {
		for other := range r.told { // any one: it may be told again
			if len(r.told) < maxTold {
				break
			}
			delete(r.told, other)
		}
		told = &toldStart{at: now, chunks: make(map[traceKey]struct{})}
		r.told[path] = told
	}
	eachChunk(t, func(k traceKey) { told.chunks[k] = struct{}{} })
	r.waiting = append(r.waiting, t)
	r.poke()
	return true
}

func (r *reporter) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reporter) waits() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.waiting) > 0
}

func eachChunk(t *floxv1.StartTrace, yield func(traceKey)) {
	for _, tree := range t.GetTrees() {
		for _, c := range tree.GetChunks() {
			yield(traceKey{tree.GetPath(), chunkKey{c.GetEntry(), c.GetOffset()}})
		}
	}
}

// take gives what one call may hold.
func (r *reporter) take() (out []*floxv1.StartTrace) {
	r.mu.Lock()
	defer r.mu.Unlock()
	size := 0
	for i, t := range r.waiting {
		if size += proto.Size(t); i > 0 && size > maxReportBytes {
			break
		}
		out = append(out, t)
	}
	r.waiting = append([]*floxv1.StartTrace(nil), r.waiting[len(out):]...)
	return out
}

// flush tells what waits. What could not be told is dropped, and told when it is
// seen again.
func (r *reporter) flush(ctx context.Context) error {
	starts := r.take()
	if len(starts) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	err := r.send(ctx, &floxv1.ReportStartsRequest{Starts: starts})
	if err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, t := range starts {
			delete(r.told, flox.StorePath(t.GetPath()))
		}
	}
	return err
}

// report tells starts while the storehouse is connected, until ctx ends.
func (a *Agent) report(ctx context.Context) error {
	for {
		select {
		case <-a.starts.reporter.wake:
		case <-ctx.Done():
			return nil
		}
		if a.follower.state().connected {
			if err := a.starts.reporter.flush(ctx); err != nil {
				a.log.Debug("starts not told", "error", err)
			}
		}
		select {
		case <-time.After(reportEvery):
		case <-ctx.Done():
			return nil
		}
		if a.starts.reporter.waits() {
			a.starts.reporter.poke()
		}
	}
}

// sendStarts is one call of the storehouse.
func (a *Agent) sendStarts(ctx context.Context, m *floxv1.ReportStartsRequest) error {
	var answer *connect.Response[floxv1.ReportStartsResponse]
	err := a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		answer, err = a.calls.storehouse(house).ReportStarts(ctx, connect.NewRequest(m))
		return err
	})
	if err != nil {
		return err
	}
	a.log.Debug("told of starts", "told", len(m.GetStarts()), "believed", answer.Msg.GetTaken())
	return nil
}
