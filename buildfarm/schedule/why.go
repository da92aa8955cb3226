package schedule

import (
	"fmt"
	"slices"
	"time"
)

// maxNamed bounds the builds and workers that an Explanation names.
const maxNamed = 10

// Explanation is why a build stands where it does.
type Explanation struct {
	// State is waiting (for others), put off, ready or building.
	State string
	// Needs are some of the builds it waits for, of so many.
	Needs   []string
	NeedsOf int
	// Until is when it is tried again.
	Until time.Time
	// Worker builds it, or keeps room for it.
	Worker string
	// Able are the workers that can do it, Free how many of them would now. Unable says
	// why others cannot, by how many of them.
	Able   []string
	Free   int
	Unable map[string]int
	// Ahead is how many ready builds that the same workers can do go before it, by what
	// puts them there.
	Ahead map[string]int
	// Reason is what it is ranked by.
	Reason Reason
}

// What puts a build ahead of another.
const (
	byClass    = "interactive"
	byPriority = "priority"
	byShare    = "share" // its owner has used less
	byPath     = "chain" // a longer chain begins with it
	byUsers    = "dependents"
	byAge      = "age"
)

var stateWords = map[state]string{waits: "waiting", put: "put off", isOpen: "ready", leased: "building"}

// Why explains a build; ok is false if there is none of that name.
func (s *Scheduler) Why(id string, now time.Time) (e Explanation, ok bool) {
	n := s.nodes[id]
	if n == nil {
		return e, false
	}
	e = Explanation{State: stateWords[n.state], Unable: map[string]int{}, Ahead: map[string]int{}}
	e.Reason = Reason{
		Overdue: n.state == isOpen && n.since.Before(now.Add(-s.cfg.Patience)), Interactive: n.Interactive, Priority: n.Priority, Owner: n.Owner,
		Share: s.owner(n.Owner).share(s.cfg.Window, now), Path: n.path, Users: n.wanted(), Of: s.ready,
	}
	for _, in := range n.needs {
		if !in.gone {
			if e.NeedsOf++; len(e.Needs) < maxNamed {
				e.Needs = append(e.Needs, in.ID)
			}
		}
	}
	for _, w := range s.order {
		if why := w.can(n.class); why != "" {
			e.Unable[why]++
			continue
		}
		e.Able = append(e.Able, w.ID)
		if w.free() && w.fits(n.class) && (w.held == nil || w.held == n) {
			e.Free++
		}
	}
	switch {
	case n.state == put:
		e.Until = n.notBefore
	case n.worker != nil:
		e.Worker = n.worker.ID
	case n.held != nil:
		e.Worker = n.held.ID
	}
	if n.state == isOpen {
		s.ahead(n, now, e.Ahead)
	}
	return e, true
}

// Before is how many builds go before it.
func (e Explanation) Before() (n int) {
	for _, count := range e.Ahead {
		n += count
	}
	return n
}

// ahead counts the builds that go before a ready one.
func (s *Scheduler) ahead(n *node, now time.Time, count map[string]int) {
	share := s.owner(n.Owner).share(s.cfg.Window, now)
	for _, c := range s.classes {
		if !slices.ContainsFunc(s.order, func(w *worker) bool { return w.can(n.class) == "" && w.can(c) == "" }) {
			continue
		}
		for _, t := range c.tiers {
			if n.rank().before(t.rank) {
				break
			}
			for name, h := range t.owners {
				other := s.owner(name).share(s.cfg.Window, now)
				for _, o := range h.all {
					if why := goesBefore(o, n, other, share); why != "" {
						count[why]++
					}
				}
			}
		}
	}
}

// goesBefore says why a ready build goes before another, "" = it does not.
func goesBefore(o, n *node, share, than float64) string {
	switch {
	case o == n || n.rank().before(o.rank()):
		return ""
	case o.Interactive != n.Interactive:
		return byClass
	case o.Priority != n.Priority:
		return byPriority
	case o.Owner != n.Owner && (share < than || share == than && o.Owner < n.Owner):
		return byShare
	case o.Owner != n.Owner || !earlier(o, n):
		return ""
	case o.path != n.path:
		return byPath
	case o.wanted() != n.wanted():
		return byUsers
	}
	return byAge
}

// Unfit says in words why workers cannot build it, by how many of them.
func (e Explanation) Unfit() (words []string) {
	for _, why := range []struct{ key, words string }{
		{"system", "for other systems"},
		{"features", "without a feature it requires"},
		{"mandatory", "kept for builds that require a feature of theirs"},
		{"size", "with too little memory or disk"},
	} {
		if n := e.Unable[why.key]; n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, why.words))
		}
	}
	return words
}

// Rivals says in words what puts how many builds before it.
func (e Explanation) Rivals() (words []string) {
	for _, why := range []struct{ key, words string }{
		{byClass, "that somebody waits for"},
		{byPriority, "of a higher priority"},
		{byShare, "of owners who have used less"},
		{byPath, "that begin longer chains"},
		{byUsers, "that more builds wait for"},
		{byAge, "that have waited longer"},
	} {
		if n := e.Ahead[why.key]; n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, why.words))
		}
	}
	return words
}
