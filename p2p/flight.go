package p2p

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/floxctl/flox"
)

// flightKey names what is fetched once, whoever waits for it.
type flightKey struct {
	id          flox.CID
	off, length uint32 // length 0 = the whole block
}

// sizes are what is known of a block's size in bytes; 0 = nothing.
type sizes struct {
	exact uint32 // from a signed manifest
	about uint32 // from hearsay
}

// leastCost bounds how many blocks hearsay can make be asked for at once.
const leastCost = 1 << 10

// cost is what a fetch is counted as.
func (k flightKey) cost(s sizes) int {
	switch {
	case k.length > 0:
		return int(k.length) + sliceOverhead(k.length)
	case s.exact > 0:
		return int(s.exact)
	case s.about > 0:
		return max(int(s.about), leastCost)
	}
	return 64 << 10 // the usual chunk
}

// flight is one block on its way. It belongs to the block: it goes on while
// any caller waits. Guarded by peerTable.mu, as all of the scheduler.
type flight struct {
	key     flightKey
	size    sizes
	filter  filterKey
	waiters []waiter
	active  []*attempt // asked now, at most maxActive
	tried   []peer.ID  // asked in vain
	only    peer.ID    // "" = anybody
	search  *search
	steered steered
	// notBefore is until when the storehouse is not asked, so that a look-up
	// may find somebody nearer.
	notBefore  time.Time
	deadline   time.Time // the earliest of the waiters'; zero = none
	background bool      // nobody waits at a screen for it
	again      bool      // a storehouse that was lost gets one more try
	absent     bool      // a storehouse said that there is no such block
	parked     bool
	timer      *time.Timer
	lastErr    error
}

type waiter struct {
	c     *call
	index int
}

// attempt is one peer asked for a flight.
type attempt struct {
	f          *flight // nil once nobody wants the answer
	r          *remote
	key        flightKey
	size       uint32
	cost       int
	flags      uint8 // of the request
	background bool
	lane       *lane     // that it was sent on; nil = still in the queue
	id         uint32    // on that lane
	sent       time.Time // when
	extended   bool      // was given more time because only a storehouse is left
}

const (
	maxActive = 2
	minHedge  = 30 * time.Millisecond
	maxHedge  = 2 * time.Second
	busyPause = 50 * time.Millisecond
	downPause = time.Second
	// movedLately is how long ago a peer may have given a block to count as delivering.
	movedLately = 2 * time.Second
	// patientDial is how long connecting may take where nobody waits, or there
	// is nobody else: half a dozen round trips around the world.
	patientDial = 3 * time.Second
)

// scheduler decides who is asked for what. It shares the peer table's lock.
type scheduler struct {
	h       *Host
	flights map[flightKey]*flight // those that others may join
	all     map[*flight]struct{}
	parked  map[*flight]struct{}   // nobody to ask now; looked at when something changes
	kick    map[*remote]struct{}   // have new work: woken together by flush
	calls   map[*call]struct{}     // background ones, of which not all is open yet
	early   map[flox.CID]time.Time // in a hurry before their fetch began
	dialing map[peer.ID]struct{}   // being met because a storehouse sent us there
	missed  map[peer.ID]time.Time  // could not be, when
	closed  bool
}

func newScheduler(h *Host) *scheduler {
	return &scheduler{
		h: h, flights: map[flightKey]*flight{}, all: map[*flight]struct{}{}, parked: map[*flight]struct{}{}, kick: map[*remote]struct{}{},
		calls: map[*call]struct{}{}, early: map[flox.CID]time.Time{}, dialing: map[peer.ID]struct{}{}, missed: map[peer.ID]time.Time{},
	}
}

// join makes c wait for a block, and starts fetching it if nobody did.
func (s *scheduler) join(c *call, index int, key flightKey, size sizes, urgent bool) error {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.closed {
		return fmt.Errorf("peer host: %w", flox.ErrClosed)
	}
	f := s.flights[key]
	if f != nil && (f.only != c.only || (size.exact != 0 && f.size.exact != 0 && size.exact != f.size.exact)) {
		f = nil // of a FetchFrom, or of another idea of its size: a flight of its own
	}
	fresh, background := f == nil, c.background && !urgent
	if fresh {
		f = &flight{key: key, size: size, filter: keyOf(key.id), only: c.only, search: c.search, background: background}
		s.all[f] = struct{}{}
		if s.flights[key] == nil && c.only == "" {
			s.flights[key] = f
		}
	}
	if at, waits := c.later[key.id]; waits && at == index {
		delete(c.later, key.id)
	}
	f.waiters = append(f.waiters, waiter{c, index})
	c.open[f]++
	if !c.deadline.IsZero() && (f.deadline.IsZero() || c.deadline.Before(f.deadline)) {
		f.deadline = c.deadline
	}
	if fresh {
		s.assign(f)
	} else if f.background && !background {
		s.hurry(f)
	}
	return nil
}

// hurry moves what is still queued behind other background work to the front.
func (s *scheduler) hurry(f *flight) {
	f.background = false
	for _, a := range slices.Clone(f.active) {
		if a.lane == nil {
			s.callOff(a)
			f.active = slices.DeleteFunc(f.active, func(b *attempt) bool { return a == b })
			s.ask(f, a.r)
		}
	}
}

// abandon takes c out of all it waits for; what nobody waits for stops.
func (s *scheduler) abandon(c *call) {
	t := s.h.peers
	t.mu.Lock()
	for f := range c.open {
		f.waiters = slices.DeleteFunc(f.waiters, func(w waiter) bool { return w.c == c })
		if len(f.waiters) == 0 {
			s.end(f)
		}
	}
	clear(c.open)
	delete(s.calls, c)
	t.mu.Unlock()
	s.flush()
}

// finish gives every waiter the outcome.
func (s *scheduler) finish(f *flight, res result) {
	for _, w := range f.waiters {
		res.index = w.index
		w.c.results <- res // has room for all that the call has open
		if w.c.open[f]--; w.c.open[f] == 0 {
			delete(w.c.open, f)
		}
	}
	f.waiters = nil
	s.end(f)
}

// end forgets a flight and calls its attempts off.
func (s *scheduler) end(f *flight) {
	if s.flights[f.key] == f {
		delete(s.flights, f.key)
	}
	delete(s.all, f)
	s.unpark(f)
	if f.timer != nil {
		f.timer.Stop()
	}
	for _, a := range f.active {
		s.callOff(a)
	}
	f.active = nil
}

func (s *scheduler) unpark(f *flight) {
	if f.parked {
		f.parked = false
		delete(s.parked, f)
	}
}

// assign asks the next peer for f, parks it until there is one, or ends it.
func (s *scheduler) assign(f *flight) {
	s.unpark(f)
	r, retry := s.pick(f)
	switch {
	case r != nil:
		s.ask(f, r)
	case f.absent && len(f.active) == 0:
		s.finish(f, result{err: fmt.Errorf("block %s: no such block, says the storehouse: %w", f.key.id, flox.ErrNotFound)})
	case retry > 0:
		f.parked = true
		s.parked[f] = struct{}{}
		s.arm(f, retry)
	case len(f.active) > 0:
		f.parked = true // an answer is awaited; somebody new may overtake it
		s.parked[f] = struct{}{}
	default:
		s.finish(f, result{err: s.nobody(f)})
	}
}

func (s *scheduler) nobody(f *flight) error {
	if f.only != "" {
		if f.lastErr != nil {
			return fmt.Errorf("block %s from peer %s: %w", f.key.id, f.only, f.lastErr)
		}
		return fmt.Errorf("block %s: peer %s cannot be asked now: %w", f.key.id, f.only, flox.ErrUnreachable)
	}
	if f.lastErr != nil {
		return fmt.Errorf("block %s: %d peers asked in vain and no storehouse reached; last: %s: %w", f.key.id, len(f.tried), f.lastErr.Error(), flox.ErrUnreachable)
	}
	return fmt.Errorf("block %s: no peer is known to hold it and no storehouse can be reached: %w", f.key.id, flox.ErrUnreachable)
}

// pick chooses whom to ask next: the nearest tier that has a candidate, in it
// the one expected to be done first. Without one, retry says when to look
// again; 0 = there is nothing to wait for.
func (s *scheduler) pick(f *flight) (*remote, time.Duration) {
	if len(f.active) >= maxActive {
		return nil, 0
	}
	now := time.Now()
	var best *remote
	var retry time.Duration
	later := func(at time.Time) {
		if d := at.Sub(now); retry == 0 || d < retry {
			retry = max(d, time.Millisecond)
		}
	}
	for _, r := range s.h.peers.remotes {
		if (best != nil && r.tier > best.tier) || !s.candidate(f, r, now) {
			continue
		}
		if r.busyUntil.After(now) {
			later(r.busyUntil)
			continue
		}
		if r.tier == TierStorehouse && !s.lookedUp(f, now) {
			later(f.notBefore)
			continue
		}
		if r.tier == TierStorehouse {
			if until, waits := s.waits(f, now); waits {
				later(until)
				continue
			}
		}
		if best == nil || better(r, best, f) {
			best = r
		}
	}
	if best != nil {
		return best, 0
	}
	if retry == 0 && f.search != nil && len(f.active) == 0 {
		if f.search.begin(); !f.search.finished() {
			retry = maxHedge // woken when the look-up ends
		}
	}
	return nil, retry
}

// lookedUp reports whether a storehouse may be asked for f: nobody nearer is
// known, and a look-up had its time to find somebody.
func (s *scheduler) lookedUp(f *flight, now time.Time) bool {
	if f.search == nil {
		return true
	}
	begun := f.search.begin()
	if begun.IsZero() || f.search.finished() {
		return true
	}
	if f.notBefore.IsZero() {
		f.notBefore = begun.Add(s.h.cfg.Limits.LookupWait)
	}
	return !f.notBefore.After(now)
}

// candidate reports whether r may be asked for f at all.
func (s *scheduler) candidate(f *flight, r *remote, now time.Time) bool {
	if f.only != "" {
		if r.id != f.only {
			return false
		}
	} else if !r.storehouse && (r.filter == nil || !r.filter.has(f.filter)) && !slices.Contains(f.steered.to, r.id) {
		return false
	}
	if r.bannedUntil.After(now) || r.downUntil.After(now) || (!r.connected && !r.fixed) {
		return false
	}
	return !slices.Contains(f.tried, r.id) &&
		!slices.ContainsFunc(f.active, func(a *attempt) bool { return a.r == r })
}

func better(a, b *remote, f *flight) bool {
	if a.tier != b.tier {
		return a.tier < b.tier
	}
	size := f.key.cost(f.size)
	return a.expected(size) < b.expected(size)
}

// ask queues f at r and sets the time after which it is overtaken.
func (s *scheduler) ask(f *flight, r *remote) {
	a := &attempt{f: f, r: r, key: f.key, size: f.size.exact, cost: f.key.cost(f.size), flags: s.flagsFor(f, r), background: f.background}
	f.active = append(f.active, a)
	s.tellOf(f, StepAsked, r, Step{})
	r.link.push(a)
	s.kick[r] = struct{}{}
	s.arm(f, s.patience(a))
}

// patience is how long a is waited for before the next peer is asked too.
func (s *scheduler) patience(a *attempt) time.Duration {
	r := a.r
	due := r.expected(0) // a's bytes are among the pending
	d := max(2*due, r.service+4*r.spread, minHedge)
	if r.service == 0 {
		d = max(d, 100*time.Millisecond) // nothing is known of it yet
	}
	d = min(d, due+maxHedge) // long queues are no reason, being late is
	d = max(d, s.h.cfg.patience)
	if left := time.Until(a.f.deadline); !a.f.deadline.IsZero() {
		d = min(d, max(left/3, 5*time.Millisecond))
	}
	return d
}

func (s *scheduler) arm(f *flight, d time.Duration) {
	if f.timer == nil {
		f.timer = time.AfterFunc(d, func() { s.hedge(f) })
	} else {
		f.timer.Reset(d)
	}
}

// hedge is run when f took longer than it should: an attempt still in a queue
// moves to another peer, one that was sent is overtaken.
func (s *scheduler) hedge(f *flight) {
	t := s.h.peers
	t.mu.Lock()
	if len(f.waiters) > 0 && !s.closed {
		s.hedgeLocked(f)
	}
	t.mu.Unlock()
	s.flush()
}

func (s *scheduler) hedgeLocked(f *flight) {
	if len(f.active) == 0 {
		s.assign(f)
		return
	}
	r, retry := s.pick(f)
	if r == nil {
		if retry > 0 {
			s.arm(f, retry)
		}
		if !f.parked && len(f.active) < maxActive {
			f.parked = true
			s.parked[f] = struct{}{}
		}
		return
	}
	last := f.active[len(f.active)-1]
	if r.tier == TierStorehouse && (!last.patient() || f.background && last.moving()) {
		last.extended = true
		s.arm(f, s.patience(last)+rand.N(minHedge))
		return
	}
	s.tellOf(f, StepLate, last.r, Step{Took: last.waited(time.Now())})
	if last.lane == nil && r.tier != TierStorehouse {
		s.callOff(last)
		f.active = f.active[:len(f.active)-1]
	}
	s.unpark(f)
	s.ask(f, r)
}

// patient reports whether the storehouse may be asked now.
func (a *attempt) patient() bool {
	left := time.Until(a.f.deadline)
	return a.extended || a.r.tier == TierStorehouse || (!a.f.deadline.IsZero() && left < maxHedge)
}

// moving reports whether who is asked for a block delivers others: a crowd's lines are
// full, and asking the storehouse as well would fill its line too.
func (a *attempt) moving() bool {
	left := time.Until(a.f.deadline)
	return a.r.tier != TierStorehouse && (a.f.deadline.IsZero() || left > maxHedge) && a.r.link.moving(time.Now())
}

// poke looks again at what waits for a change: a new peer, a filter, the end
// of a look-up. peerTable.mu is held.
func (s *scheduler) poke() {
	for f := range s.parked {
		if len(f.active) == 0 {
			s.assign(f)
		} else if r, _ := s.pick(f); r != nil && r.tier < f.active[0].r.tier {
			s.unpark(f)
			s.ask(f, r)
		}
	}
	if len(s.kick) > 0 {
		s.flushLocked()
	}
}

// close ends every flight.
func (s *scheduler) close() {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	s.closed = true
	for f := range s.all {
		s.finish(f, result{err: fmt.Errorf("peer host: %w", flox.ErrClosed)})
	}
	for _, r := range t.remotes {
		r.link.reset()
	}
}
