package schedule

import (
	"slices"
	"time"
)

// Next decides which build is done next, and by whom, at a time, and takes note of the
// lease. ok is false if nothing can be done now.
func (s *Scheduler) Next(now time.Time) (l Lease, ok bool) {
	s.settle(maxSteps)
	for range maxSteps {
		if s.later.len() == 0 || s.later.top().notBefore.After(now) {
			break
		}
		n := s.later.top()
		s.later.remove(n)
		s.open(n, now)
	}
	if s.ready == 0 {
		return Lease{}, false
	}
	s.decision++
	for _, w := range s.order {
		if !w.free() {
			continue
		}
		n, by, reason := s.choose(w, now)
		if n == nil {
			continue
		}
		reason.Interactive, reason.Priority, reason.Owner = n.Interactive, n.Priority, n.Owner
		reason.Share = s.owner(n.Owner).share(s.cfg.Window, now)
		reason.Path, reason.Users, reason.Fetch, reason.Of = n.path, n.wanted(), by.lacks(n), s.ready
		s.lease(n, by)
		return Lease{Build: n.ID, Worker: by.ID, Reason: reason}, true
	}
	return Lease{}, false
}

// choose finds a build for a free worker, or for one like it that does it better; nil =
// there is none.
func (s *Scheduler) choose(w *worker, now time.Time) (*node, *worker, Reason) {
	if w.held != nil {
		if w.fits(w.held.class) {
			return w.held, w, Reason{Overdue: true}
		}
		return nil, nil, Reason{}
	}
	if w.leases%overdueTurn == overdueTurn-1 {
		if n := w.overdue(now.Add(-s.cfg.Patience)); n != nil {
			if w.fits(n.class) {
				return n, w, Reason{Overdue: true}
			}
			// It would never fit where smaller ones are always let in before.
			n.held, w.held = w, n
			return nil, nil, Reason{}
		}
	}
	candidates := s.candidates(w, now)
	if len(candidates) == 0 {
		return nil, nil, Reason{}
	}
	n, by := s.nearest(candidates, w)
	return n, by, Reason{}
}

// overdue gives the build that was ready for longest, if it was before a time, of those
// that a worker can do and no other keeps room for.
func (w *worker) overdue(before time.Time) (oldest *node) {
	for _, c := range w.classes {
		if c.age.len() == 0 {
			continue
		}
		if n := c.age.top(); n.since.Before(before) && n.held == nil && (oldest == nil || older(n, oldest)) {
			oldest = n
		}
	}
	return oldest
}

// candidates gives the builds that come first for a worker, best first: those of the
// first rank there is, of the owner that has used least, with about the longest chain.
func (s *Scheduler) candidates(w *worker, now time.Time) (best []*node) {
	var tiers []*tier
	for _, c := range w.classes {
		if len(c.tiers) == 0 || !w.fits(c) {
			continue
		}
		t := c.tiers[0]
		if len(tiers) > 0 && tiers[0].rank.before(t.rank) {
			continue
		}
		if len(tiers) > 0 && t.rank.before(tiers[0].rank) {
			tiers = tiers[:0]
		}
		tiers = append(tiers, t)
	}
	if len(tiers) == 0 {
		return nil
	}
	least, name := s.modest(tiers[0], now)
	for _, t := range tiers[1:] {
		if share, other := s.modest(t, now); share < least || share == least && other < name {
			least, name = share, other
		}
	}
	var heaps []*heap[*node]
	for _, t := range tiers {
		if h := t.owners[name]; h != nil {
			heaps = append(heaps, h)
		}
	}
	for _, h := range heaps {
		taken := 0
		h.first(func(n *node) bool {
			best = append(best, n)
			taken++
			return taken < maxCandidates
		})
	}
	slices.SortFunc(best, func(a, b *node) int {
		if earlier(a, b) {
			return -1
		}
		return 1
	})
	if len(best) > maxCandidates {
		best = best[:maxCandidates]
	}
	for i, n := range best {
		if n.path < best[0].path-best[0].path/10 {
			return best[:i]
		}
	}
	return best
}

// modest finds which owner in a tier has used least. It is found once in a decision.
func (s *Scheduler) modest(t *tier, now time.Time) (share float64, name string) {
	if t.at == s.decision {
		return t.share, t.least
	}
	first := true
	for owner := range t.owners {
		o := s.owner(owner)
		if o.at != s.decision {
			o.at, o.now = s.decision, o.share(s.cfg.Window, now)
		}
		if first || o.now < t.share || o.now == t.share && owner < t.least {
			t.share, t.least, first = o.now, owner, false
		}
	}
	t.at = s.decision
	return t.share, t.least
}

// nearest finds where the least time is lost with fetching and slow building: which of
// some builds, on a worker or another free one.
func (s *Scheduler) nearest(candidates []*node, w *worker) (n *node, by *worker) {
	n, by = candidates[0], w
	if len(candidates) == 1 && len(n.Inputs) == 0 {
		return n, by // none is faster than w
	}
	least := -1.0
	try := func(c *node, o *worker) {
		lost := float64(o.lacks(c))/s.cfg.Bandwidth + c.Expect.Seconds()*(1/o.Speed-1/w.Speed)
		if least < 0 || lost < least {
			n, by, least = c, o, max(lost, 0)
		}
	}
	for _, c := range candidates {
		try(c, w)
	}
	compared := 0
	for _, o := range s.order {
		if compared >= maxCompared || least == 0 {
			break
		}
		if o == w || !o.free() || o.held != nil {
			continue
		}
		compared++
		for _, c := range candidates {
			if o.fits(c.class) && o.can(c.class) == "" {
				try(c, o)
			}
		}
	}
	return n, by
}
