package p2p

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

const (
	maxLanes = 2
	// laneItems is how many unanswered blocks one stream may carry; the server
	// closes a stream that asks for more.
	laneItems = 1024
	batchSize = 1 << 20 // bytes of one request, so that two lanes share the work
	laneIdle  = time.Minute
	// stall is how long a lane may be without any whole reply while one is due.
	defaultStall = 20 * time.Second
)

// packedFlags say how a block may be packed.
const packedFlags = wire.FlagZstd | wire.FlagAsIs

// link is what is asked of one peer: two queues and up to two lanes that take
// from them. Guarded by peerTable.mu.
type link struct {
	queues   [2]fifo // in a hurry; background
	pending  int     // bytes queued or asked for
	inflight int     // bytes asked for
	lanes    []*lane

	// of the goodput measurement
	busySince time.Time
	gotBytes  int
}

// fifo is a queue of attempts; those called off are nil until it is compacted.
type fifo struct {
	list []*attempt
	gone int
}

func (q *fifo) push(a *attempt) { q.list = append(q.list, a) }

func (q *fifo) remove(a *attempt) {
	if i := slices.Index(q.list, a); i >= 0 {
		q.list[i] = nil
		q.gone++
	}
	if q.gone > 64 && q.gone > len(q.list)/2 {
		q.list = slices.DeleteFunc(q.list, func(a *attempt) bool { return a == nil })
		q.gone = 0
	}
}

// peek gives the first attempt, or nil.
func (q *fifo) peek() *attempt {
	for len(q.list) > 0 && q.list[0] == nil {
		q.list, q.gone = q.list[1:], q.gone-1
	}
	if len(q.list) == 0 {
		q.list, q.gone = nil, 0
		return nil
	}
	return q.list[0]
}

func (k *link) queue(a *attempt) *fifo {
	if a.background {
		return &k.queues[1]
	}
	return &k.queues[0]
}

func (k *link) push(a *attempt) {
	k.queue(a).push(a)
	k.pending += a.cost
}

// drain takes all that is still queued.
func (k *link) drain() []*attempt {
	var out []*attempt
	for i := range k.queues {
		for a := k.queues[i].peek(); a != nil; a = k.queues[i].peek() {
			k.queues[i].list = k.queues[i].list[1:]
			k.pending -= a.cost
			out = append(out, a)
		}
	}
	return out
}

// window is how many bytes may be asked for: what the peer delivers in a
// quarter of a second and a round trip, so that a block in a hurry does not
// queue behind seconds of background work.
func (r *remote) window(limit int) int {
	if r.goodput == 0 {
		return min(2<<20, limit)
	}
	return min(max(int(r.goodput*(r.rtt.Seconds()+0.25)), 1<<20), limit)
}

// moving reports whether something came lately, or may yet.
func (k *link) moving(now time.Time) bool {
	return slices.ContainsFunc(k.lanes, func(l *lane) bool { return now.Sub(l.moved) < movedLately })
}

// gave reports whether a block came lately.
func (k *link) gave(now time.Time) bool {
	return slices.ContainsFunc(k.lanes, func(l *lane) bool { return now.Sub(l.got) < movedLately })
}

// reset closes every lane; their goroutines then fail what was asked on them.
func (k *link) reset() {
	for _, l := range k.lanes {
		l.reset()
	}
}

// lane is one block stream to a peer. Guarded by peerTable.mu.
type lane struct {
	r       *remote
	stream  network.Stream // nil while it is being opened
	out     map[uint32]*attempt
	nextID  uint32
	cancels []uint32
	wake    chan struct{}
	moved   time.Time // the last whole reply, or when something was first due
	got     time.Time // the last block
	closed  bool
}

func (l *lane) reset() {
	l.closed = true
	if l.stream != nil {
		go drop(l.stream) // may wait for the connection's write lock
	}
	l.poke()
}

func (l *lane) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// flush wakes the lanes of every peer that has new work.
func (s *scheduler) flush() {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	s.flushLocked()
}

func (s *scheduler) flushLocked() {
	for r := range s.kick {
		want := 1
		if r.link.pending > batchSize {
			want = maxLanes
		}
		for len(r.link.lanes) < want && !s.closed {
			l := &lane{r: r, out: map[uint32]*attempt{}, wake: make(chan struct{}, 1), moved: time.Now()}
			r.link.lanes = append(r.link.lanes, l)
			if !s.h.spawn(func() { s.h.runLane(l) }) {
				break
			}
		}
		for _, l := range r.link.lanes {
			l.poke()
		}
	}
	clear(s.kick)
}

// callOff makes a's answer unwanted.
func (s *scheduler) callOff(a *attempt) {
	a.f = nil
	if a.lane == nil {
		a.r.link.queue(a).remove(a)
		a.r.link.pending -= a.cost
		return
	}
	if _, due := a.lane.out[a.id]; due && !a.lane.closed {
		a.lane.cancels = append(a.lane.cancels, a.id)
		s.kick[a.r] = struct{}{}
	}
}

// settle ends an attempt that was sent or taken from the queue by drain.
func (s *scheduler) settle(a *attempt) *flight {
	if a.lane != nil {
		a.r.link.pending -= a.cost
		a.r.link.inflight -= a.cost
		delete(a.lane.out, a.id)
	}
	f := a.f
	a.f = nil
	if f != nil {
		f.active = slices.DeleteFunc(f.active, func(b *attempt) bool { return a == b })
	}
	return f
}

// fail ends an attempt without the block and asks somebody else.
func (s *scheduler) fail(a *attempt, status wire.Status, err error) {
	f := s.settle(a)
	if f == nil {
		return
	}
	r := a.r
	f.lastErr = err
	s.tellOf(f, StepFailed, a.r, Step{Took: a.waited(time.Now()), Why: err.Error()})
	switch {
	case status == wire.StatusBusy:
		r.busyUntil = time.Now().Add(busyPause)
	case status == wire.StatusNotFound:
		f.tried = append(f.tried, r.id)
		f.absent = f.absent || (r.storehouse && r.greeted)
	case r.storehouse && !f.again && errors.Is(err, errLost):
		f.again = true
	default:
		f.tried = append(f.tried, r.id)
	}
	s.assign(f)
}

// errLost says that the stream or connection ended before the answer.
var errLost = fmt.Errorf("connection lost: %w", flox.ErrUnreachable)

// laneEnded fails what was due on l, and what waits for a lane if there is none.
func (s *scheduler) laneEnded(l *lane, err error) {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	l.closed = true
	k := &l.r.link
	k.lanes = slices.DeleteFunc(k.lanes, func(o *lane) bool { return o == l })
	due := make([]*attempt, 0, len(l.out))
	for _, a := range l.out {
		due = append(due, a)
	}
	if len(k.lanes) == 0 && err != nil {
		due = append(due, k.drain()...)
	} else if k.pending > k.inflight {
		s.kick[l.r] = struct{}{}
	}
	if err == nil {
		err = errLost
	}
	for _, a := range due {
		s.fail(a, wire.StatusFailed, err)
	}
	s.flushLocked()
}

// lost is called when the last connection to r is gone; peerTable.mu is held.
func (s *scheduler) lost(r *remote) { s.dropLink(r) }

// dropLink calls off everything asked of r; peerTable.mu is held.
func (s *scheduler) dropLink(r *remote) {
	queued := r.link.drain()
	r.link.reset()
	for _, a := range queued {
		s.fail(a, wire.StatusFailed, errLost)
	}
	s.flushLocked()
}

// take gives the next blocks to ask for on l, within the window, and the ids
// to cancel.
func (s *scheduler) take(l *lane) (wire.Request, []uint32, bool) {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	req := wire.Request{Base: l.nextID}
	req.Flags = wire.FlagAsIs
	if !l.r.near {
		req.Flags |= wire.FlagZstd
	}
	k := &l.r.link
	window, bytes, now := l.r.window(s.h.cfg.Limits.InFlight), 0, time.Now()
	for len(req.Items) < wire.MaxItems && len(l.out) < laneItems && bytes < batchSize {
		q := &k.queues[0]
		a := q.peek()
		if a == nil {
			q = &k.queues[1]
			a = q.peek()
		}
		if a == nil || (k.inflight > 0 && k.inflight+a.cost > window) {
			break
		}
		if len(req.Items) > 0 && a.flags != req.Flags&^packedFlags {
			break
		}
		if req.Flags |= a.flags; a.key.length > 0 {
			req.Flags &^= packedFlags
		}
		q.list = q.list[1:]
		if k.inflight == 0 {
			k.busySince, k.gotBytes = now, 0
		}
		if len(l.out) == 0 {
			l.moved = now
		}
		a.lane, a.id, a.sent = l, l.nextID, now
		l.out[a.id] = a
		l.nextID++
		k.inflight += a.cost
		bytes += a.cost
		req.Items = append(req.Items, wire.Item{ID: a.key.id, Offset: a.key.off, Length: a.key.length})
	}
	n := min(len(l.cancels), wire.MaxItems)
	cancels := l.cancels[:n:n]
	l.cancels = l.cancels[n:]
	return req, cancels, !l.closed
}

// answered takes a verified block.
func (s *scheduler) answered(a *attempt, data []byte, wireBytes int) {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	r, now := a.r, time.Now()
	r.in.Add(uint64(len(data)))
	took := now.Sub(a.sent)
	if r.service == 0 {
		r.service, r.spread = took, took/2
	} else {
		diff := took - r.service
		r.service += diff / 8
		r.spread += (max(diff, -diff) - r.spread) / 4
	}
	r.link.measure(r, len(data), now)
	a.lane.moved, a.lane.got = now, now
	f := s.settle(a)
	if f != nil {
		s.tellOf(f, StepGave, r, Step{Bytes: len(data), Took: took})
		s.finish(f, result{data: data, from: Source{Peer: r.name, Tier: r.tier, Wire: wireBytes}})
	}
	s.refill(r)
}

// refill wakes r's lanes when the window has room for a good batch, so that
// requests do not go out one block at a time.
func (s *scheduler) refill(r *remote) {
	k := &r.link
	if queued := k.pending - k.inflight; queued > 0 {
		window := r.window(s.h.cfg.Limits.InFlight)
		if room := window - k.inflight; room >= min(queued, window/4) || k.inflight == 0 {
			s.kick[r] = struct{}{}
		}
	}
	if len(s.kick) > 0 {
		s.flushLocked()
	}
}

// measure averages the rate at which r delivers while it has something to do.
func (k *link) measure(r *remote, n int, now time.Time) {
	k.gotBytes += n
	busy := now.Sub(k.busySince)
	if k.gotBytes < 256<<10 && busy < 50*time.Millisecond {
		return
	}
	// The first round trip of a busy time is waiting, not delivering.
	busy = max(busy-r.rtt, busy/4, 10*time.Microsecond)
	rate := float64(k.gotBytes) / busy.Seconds()
	if r.goodput == 0 {
		r.goodput = rate
	} else {
		r.goodput += (rate - r.goodput) / 4
	}
	k.busySince, k.gotBytes = now.Add(-r.rtt/2), 0
}
