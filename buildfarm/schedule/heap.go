package schedule

// The heaps a node can be in; each has a place in node.at.
const (
	slotOrder = iota
	slotAge
	slotLater
	slotStale
	slots
)

// placed is what lies in a heap and knows where.
type placed interface {
	place(slot int) *int
}

func (n *node) place(slot int) *int { return &n.at[slot] }

// heap is a binary heap whose members can be taken out of its middle.
type heap[T placed] struct {
	slot   int
	before func(a, b T) bool
	all    []T
}

func (h *heap[T]) len() int { return len(h.all) }
func (h *heap[T]) top() T   { return h.all[0] }

func (h *heap[T]) set(i int, v T) {
	h.all[i] = v
	*v.place(h.slot) = i
}

func (h *heap[T]) push(v T) {
	h.all = append(h.all, v)
	h.up(len(h.all)-1, v)
}

// remove takes v out if it is in.
func (h *heap[T]) remove(v T) {
	i := *v.place(h.slot)
	if i < 0 {
		return
	}
	last := h.all[len(h.all)-1]
	var zero T
	h.all[len(h.all)-1] = zero
	h.all = h.all[:len(h.all)-1]
	*v.place(h.slot) = -1
	if i < len(h.all) {
		h.set(i, last)
		h.fix(last)
	}
}

// fix puts v, which is in, where it belongs.
func (h *heap[T]) fix(v T) {
	i := *v.place(h.slot)
	if i < 0 {
		return
	}
	h.up(i, v)
	h.down(*v.place(h.slot), v)
}

func (h *heap[T]) up(i int, v T) {
	for i > 0 {
		parent := (i - 1) / 2
		if !h.before(v, h.all[parent]) {
			break
		}
		h.set(i, h.all[parent])
		i = parent
	}
	h.set(i, v)
}

func (h *heap[T]) down(i int, v T) {
	for {
		child := 2*i + 1
		if child >= len(h.all) {
			break
		}
		if child+1 < len(h.all) && h.before(h.all[child+1], h.all[child]) {
			child++
		}
		if !h.before(h.all[child], v) {
			break
		}
		h.set(i, h.all[child])
		i = child
	}
	h.set(i, v)
}

// first calls yield with the members in order, until it returns false.
func (h *heap[T]) first(yield func(T) bool) {
	if len(h.all) == 0 {
		return
	}
	edge := []int{0} // the smallest of the rest is in it
	for len(edge) > 0 {
		least := 0
		for k := range edge {
			if h.before(h.all[edge[k]], h.all[edge[least]]) {
				least = k
			}
		}
		i := edge[least]
		edge[least] = edge[len(edge)-1]
		edge = edge[:len(edge)-1]
		if !yield(h.all[i]) {
			return
		}
		for child := 2*i + 1; child <= 2*i+2 && child < len(h.all); child++ {
			edge = append(edge, child)
		}
	}
}
