package agent

import (
	"container/list"
	"sync"
)

// maxNegatives bounds the names remembered as not valid; recentAdds bounds how
// far back an addition is remembered to catch an answer that crossed it.
const (
	maxNegatives = 1 << 16
	recentAdds   = 1 << 12
)

// negatives remembers store paths the storehouse said are not valid. They are
// used only while the watch stream is current: the stream names every path that
// becomes valid, so that additions need no invalidation in the kernel.
type negatives struct {
	mu    sync.Mutex
	order *list.List // of string, most recently asked first
	names map[string]*list.Element

	added   map[string]uint64 // hash part -> index, of the last recentAdds additions
	ring    []string
	next    int
	covered uint64 // additions after this index are all in added
	current bool
}

func newNegatives() *negatives {
	return &negatives{
		order: list.New(),
		names: make(map[string]*list.Element),
		added: make(map[string]uint64),
		ring:  make([]string, recentAdds),
	}
}

// remember keeps the answer "not valid at index". An answer that is older than an
// addition of the same path, or older than what the stream covers, is dropped.
func (n *negatives) remember(hashPart string, index uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if at, ok := n.added[hashPart]; (ok && at > index) || index < n.covered {
		return
	}
	if e, ok := n.names[hashPart]; ok {
		n.order.MoveToFront(e)
		return
	}
	n.names[hashPart] = n.order.PushFront(hashPart)
	if n.order.Len() > maxNegatives {
		oldest := n.order.Back()
		n.order.Remove(oldest)
		delete(n.names, oldest.Value.(string)) //nolint:forcetypeassert // only strings are pushed
	}
}

// holds reports whether hashPart is known not to be valid, right now.
func (n *negatives) holds(hashPart string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	e, ok := n.names[hashPart]
	if ok && n.current {
		n.order.MoveToFront(e)
	}
	return ok && n.current
}

// add takes in that a path became valid at index.
func (n *negatives) add(hashPart string, index uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e, ok := n.names[hashPart]; ok {
		n.order.Remove(e)
		delete(n.names, hashPart)
	}
	if old := n.ring[n.next]; old != "" {
		n.covered = max(n.covered, n.added[old])
		delete(n.added, old)
	}
	n.ring[n.next] = hashPart
	n.next = (n.next + 1) % len(n.ring)
	n.added[hashPart] = index
}

// setCurrent says whether the watch stream is current.
func (n *negatives) setCurrent(current bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.current = current
}

// reset forgets everything: the stream begins anew at index.
func (n *negatives) reset(index uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.order.Init()
	clear(n.names)
	clear(n.added)
	clear(n.ring)
	n.next, n.covered = 0, index
}
