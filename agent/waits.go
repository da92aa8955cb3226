package agent

import (
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox/api/metrics"
	"github.com/floxctl/flox/p2p"
)

// What is waited for.
const (
	opLookup   = "LOOKUP"   // the facts of a store path
	opManifest = "MANIFEST" // a block of its file tree
	opRead     = "READ"     // bytes of a file
)

// waits lists who waits for what right now, for people to see.
type waits struct {
	mu   sync.Mutex
	all  map[*wait]struct{}
	idle time.Time // when the last of them ended

	spent *metrics.Waits // hears how long each took
}

// wait is one request that could not be answered from what is here.
type wait struct {
	list  *waits
	pid   uint32
	op    string
	path  string
	since time.Time

	mu     sync.Mutex
	total  uint64
	done   uint64
	source string
	why    string
	ask    func() error // tells why nothing came so far; nil = why does
}

func newWaits() *waits { return &waits{all: make(map[*wait]struct{}), spent: metrics.NewWaits()} }

// begin registers a wait; end it with its end method. The number of waits is
// bounded by the mount's own limit on requests under way and by the callers of
// the control socket.
func (w *waits) begin(pid uint32, op, path string, total uint64) *wait {
	e := &wait{list: w, pid: pid, op: op, path: path, since: time.Now(), total: total}
	w.mu.Lock()
	w.all[e] = struct{}{}
	w.mu.Unlock()
	return e
}

func (e *wait) end() {
	e.list.mu.Lock()
	delete(e.list.all, e)
	e.list.idle = time.Now()
	e.list.mu.Unlock()
	e.list.spent.Waited(strings.ToLower(e.op), time.Since(e.since))
}

// expect says how many bytes are waited for, once that is known.
func (e *wait) expect(total uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.total = total
}

// arrived counts a block in. A nil wait counts nothing.
func (e *wait) arrived(fl *flight) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.done += uint64(len(fl.data))
	e.why = ""
	switch {
	case fl.local:
		e.source = "cache"
	case fl.from.Tier == p2p.TierStorehouse || fl.from.Peer == "":
		e.source = fl.from.Tier.String()
	default:
		e.source = fl.from.Tier.String() + " " + string(fl.from.Peer)
	}
}

// reason says why nothing came so far.
func (e *wait) reason(err error) {
	if e == nil || err == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.why = err.Error()
}

// explained makes newest tell why nothing came so far, for as long as e waits. A
// nil wait wants no explanation.
func (e *wait) explained(newest func() error) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ask = newest
}

// reasons are why nothing came so far; e.mu is held.
func (e *wait) reasons() string {
	if e.ask == nil || e.why != "" {
		return e.why
	}
	if err := e.ask(); err != nil {
		return oneLine(err)
	}
	return ""
}

// snapshot copies the waits that began before cutoff.
func (w *waits) snapshot(cutoff time.Time) []waitView {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]waitView, 0, len(w.all))
	for e := range w.all {
		if e.since.After(cutoff) {
			continue
		}
		e.mu.Lock()
		out = append(out, waitView{e.pid, e.op, e.path, e.since, e.total, e.done, e.source, e.reasons()})
		e.mu.Unlock()
	}
	return out
}

func (w *waits) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.all)
}

// quiet is for how long nobody has waited.
func (w *waits) quiet() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.all) > 0 {
		return 0
	}
	return time.Since(w.idle)
}

// waitView is a copy of a wait.
type waitView struct {
	pid         uint32
	op, path    string
	since       time.Time
	total, done uint64
	source, why string
}
