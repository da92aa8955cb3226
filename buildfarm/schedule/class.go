package schedule

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

// class is the builds that the same workers can do. Memory and disk wanted are rounded
// up, by an eighth at most, so that there are few.
type class struct {
	key          string
	system       string
	features     []string
	memory, disk uint64
	users        int     // builds, ready or not
	tiers        []*tier // of those that are ready, first ones first; none is empty
	age          heap[*node]
}

// rank is what is asked before anything else.
type rank struct {
	interactive bool
	priority    int
}

// before reports whether a goes before b.
func (a rank) before(b rank) bool {
	if a.interactive != b.interactive {
		return a.interactive
	}
	return a.priority > b.priority
}

func (n *node) rank() rank { return rank{n.Interactive, n.Priority} }

// tier is the ready builds of a rank, by owner.
type tier struct {
	rank   rank
	owners map[string]*heap[*node]

	at    uint64 // decision in which was found:
	least string // the owner that has used least
	share float64
}

// earlier is the order of one owner's builds of a rank: the longest chain, what most
// wait for, and what has waited longest.
func earlier(a, b *node) bool {
	switch {
	case a.path != b.path:
		return a.path > b.path
	case a.wanted() != b.wanted():
		return a.wanted() > b.wanted()
	case !a.Queued.Equal(b.Queued):
		return a.Queued.Before(b.Queued)
	}
	return a.seq < b.seq
}

func older(a, b *node) bool {
	if !a.since.Equal(b.since) {
		return a.since.Before(b.since)
	}
	return a.seq < b.seq
}

// roundUp gives a number of four binary digits and zeros that is not less.
func roundUp(n uint64) uint64 {
	zeros := max(bits.Len64(n)-4, 0)
	up := (n >> zeros) << zeros
	if up < n {
		up += 1 << zeros
	}
	return max(up, n) // at the end of what there is
}

// classOf gives the class of a build, with it counted.
func (s *Scheduler) classOf(n *node) *class {
	features := slices.Compact(slices.Sorted(slices.Values(n.Features)))
	memory, disk := roundUp(n.Memory), roundUp(n.Disk)
	key := fmt.Sprintf("%s\x00%s\x00%d\x00%d", n.System, strings.Join(features, "\x00"), memory, disk)
	c := s.classes[key]
	if c == nil {
		c = &class{key: key, system: n.System, features: features, memory: memory, disk: disk}
		c.age = heap[*node]{slot: slotAge, before: older}
		s.classes[key] = c
		for _, w := range s.order {
			if w.can(c) == "" {
				w.classes = append(w.classes, c)
			}
		}
	}
	c.users++
	return c
}

func (s *Scheduler) dropClass(c *class) {
	for _, w := range s.order {
		w.classes = without(w.classes, c)
	}
	delete(s.classes, c.key)
}

// tier finds the ready builds of a rank, or where they would be.
func (c *class) tier(r rank) (i int, found bool) {
	return slices.BinarySearchFunc(c.tiers, r, func(t *tier, r rank) int {
		switch {
		case t.rank == r:
			return 0
		case t.rank.before(r):
			return -1
		}
		return 1
	})
}

func (c *class) push(n *node) {
	i, found := c.tier(n.rank())
	if !found {
		c.tiers = slices.Insert(c.tiers, i, &tier{rank: n.rank(), owners: map[string]*heap[*node]{}})
	}
	t := c.tiers[i]
	if t.owners[n.Owner] == nil {
		t.owners[n.Owner] = &heap[*node]{slot: slotOrder, before: earlier}
	}
	t.owners[n.Owner].push(n)
	c.age.push(n)
}

func (c *class) drop(n *node) {
	c.age.remove(n)
	i, _ := c.tier(n.rank())
	t := c.tiers[i]
	h := t.owners[n.Owner]
	if h.remove(n); h.len() == 0 {
		delete(t.owners, n.Owner)
	}
	if len(t.owners) == 0 {
		c.tiers = slices.Delete(c.tiers, i, i+1)
	}
}

// fix puts a ready build where it belongs.
func (c *class) fix(n *node) {
	i, _ := c.tier(n.rank())
	c.tiers[i].owners[n.Owner].fix(n)
}

// look notes that those a build needs are to be told how long the chain from it is; anew
// = once that was found from what needs it, because it may be shorter.
func (s *Scheduler) look(n *node, anew bool) {
	n.anew = n.anew || anew
	if n.at[slotStale] < 0 {
		s.stale.push(n)
	}
}

// settle does at most so many steps of what look noted. What comes last is looked at
// first, so that each build is looked at once.
func (s *Scheduler) settle(steps int) {
	for s.stale.len() > 0 && steps > 0 {
		n := s.stale.top()
		s.stale.remove(n)
		steps -= 1 + s.measure(n)
	}
}

// measure finds how long the chain from a build is, if that is not known, and tells those
// it needs. It gives how many builds it looked at.
func (s *Scheduler) measure(n *node) (looked int) {
	was := n.path
	if n.anew {
		n.anew, n.path = false, n.Expect
		for _, u := range n.users {
			if !u.gone {
				n.path = max(n.path, n.Expect+u.path)
			}
		}
		looked = len(n.users) / 16 // it is quick
		if n.path != was {
			n.moved()
		}
	}
	for _, in := range n.needs {
		switch {
		case in.gone:
		case in.Expect+n.path > in.path:
			in.path = in.Expect + n.path
			in.moved()
			s.look(in, false)
		case n.path < was && in.path == in.Expect+was:
			s.look(in, true)
		}
	}
	return looked + len(n.needs)
}

// without gives a slice without v, in another order.
func without[T comparable](all []T, v T) []T {
	if i := slices.Index(all, v); i >= 0 {
		all[i] = all[len(all)-1]
		var zero T
		all[len(all)-1] = zero
		all = all[:len(all)-1]
	}
	return all
}
