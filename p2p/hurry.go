package p2p

import (
	"time"

	"github.com/floxctl/flox"
)

const (
	// maxEarly bounds the blocks remembered that are in a hurry and not asked for yet.
	maxEarly = 4096
	// earlyFor is how long they are: a fetch begins a moment after it was decided.
	earlyFor = 5 * time.Second
)

// Hurry says that somebody waits for blocks that are fetched in the background:
// they go to the front of what waits to be asked for, also of what a Fetch has
// not opened yet or is about to want.
func (h *Host) Hurry(ids []flox.CID) {
	s := h.sched
	h.peers.mu.Lock()
	for _, id := range ids {
		s.hurryID(id)
	}
	h.peers.mu.Unlock()
	s.flush()
}

// hurryID is Hurry of one block; peerTable.mu is held.
func (s *scheduler) hurryID(id flox.CID) {
	if f := s.flights[flightKey{id: id}]; f != nil {
		if f.background {
			s.hurry(f)
		}
		return
	}
	for c := range s.calls {
		i, waits := c.later[id]
		if !waits {
			continue
		}
		delete(c.later, id)
		c.urgent = append(c.urgent, i)
		select {
		case c.hurry <- struct{}{}:
		default:
		}
		return
	}
	if len(s.early) >= maxEarly {
		dropOldest(s.early, func(at time.Time) time.Time { return at })
	}
	s.early[id] = time.Now()
}

// register makes what a background call wants known to Hurry.
func (s *scheduler) register(c *call, n int, want func(int) (flightKey, sizes)) {
	if !c.background {
		return
	}
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	c.later, c.rushed, c.hurry = make(map[flox.CID]int, n), make(map[int]struct{}), make(chan struct{}, 1)
	s.calls[c] = struct{}{}
	for i := range n {
		key, _ := want(i)
		if key.length > 0 {
			continue
		}
		at, early := s.early[key.id]
		delete(s.early, key.id)
		if early && time.Since(at) < earlyFor {
			c.urgent = append(c.urgent, i)
		} else if _, twice := c.later[key.id]; !twice {
			c.later[key.id] = i
		}
	}
}

// nextOf gives the want to open next: those in a hurry first, then from next on
// in their order, passing over what was in a hurry.
func (s *scheduler) nextOf(c *call, next *int, n int) (i int, urgent, ok bool) {
	if !c.background {
		return *next, false, *next < n
	}
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(c.urgent) > 0 {
		i, c.urgent = c.urgent[0], c.urgent[1:]
		c.rushed[i] = struct{}{}
		return i, true, true
	}
	for ; *next < n; *next++ {
		if _, open := c.rushed[*next]; !open {
			return *next, false, true
		}
	}
	return 0, false, false
}
