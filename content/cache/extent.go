package cache

import "slices"

// extent is a run of bytes of one segment that were written: [off, end), with
// the newest generation any of them was written in.
type extent struct {
	off, end uint32
	gen      uint64
}

// insert gives list with [n.off, n.end) replaced by n, joined with the
// neighbours it touches where same allows. The argument is not changed: readers hold it.
func insert(list []extent, n extent, same func(a, b uint64) bool) []extent {
	out := make([]extent, 0, len(list)+2)
	i := 0
	for ; i < len(list) && list[i].off < n.off; i++ {
		out = append(out, list[i])
	}
	var tail extent
	if len(out) > 0 && out[len(out)-1].end > n.off {
		last := &out[len(out)-1]
		if last.end > n.end { // n lies inside of it
			tail = extent{n.end, last.end, last.gen}
		}
		last.end = n.off
	}
	out = append(out, n)
	if tail.end > tail.off {
		out = append(out, tail)
	}
	for _, e := range list[i:] {
		if e.end <= n.end {
			continue
		}
		e.off = max(e.off, n.end)
		out = append(out, e)
	}
	return join(out, same)
}

func join(list []extent, same func(a, b uint64) bool) []extent {
	out := list[:0]
	for _, e := range list {
		if k := len(out) - 1; k >= 0 && out[k].end == e.off && same(out[k].gen, e.gen) {
			out[k].end, out[k].gen = e.end, max(out[k].gen, e.gen)
			continue
		}
		out = append(out, e)
	}
	return out
}

// cut gives list without the bytes of [off, end) for which drop says so.
func cut(list []extent, off, end uint32, drop func(gen uint64) bool) []extent {
	out := make([]extent, 0, len(list)+1)
	for _, e := range list {
		if e.end <= off || e.off >= end || !drop(e.gen) {
			out = append(out, e)
			continue
		}
		if e.off < off {
			out = append(out, extent{e.off, off, e.gen})
		}
		if e.end > end {
			out = append(out, extent{end, e.end, e.gen})
		}
	}
	return out
}

// from is the index of the first extent that ends behind off.
func from(list []extent, off uint32) int {
	i, _ := slices.BinarySearchFunc(list, off, func(e extent, off uint32) int {
		if e.end <= off {
			return -1
		}
		return 1
	})
	return i
}

// state says what reading [off, end) would find.
func state(list []extent, off, end uint32, lost func(gen uint64) bool) State {
	st := Hit
	for i := from(list, off); off < end; i++ {
		if i == len(list) || list[i].off > off {
			return Miss
		}
		if lost(list[i].gen) {
			st = Unverified
		}
		off = list[i].end
	}
	return st
}

// gaps calls yield with each run of [off, end) that is in no extent.
func gaps(list []extent, off, end uint32, yield func(off, end uint32)) {
	for i := from(list, off); off < end; i++ {
		if i == len(list) || list[i].off >= end {
			yield(off, end)
			return
		}
		if list[i].off > off {
			yield(off, list[i].off)
		}
		off = list[i].end
	}
}

// blocks is what the extents take on disk, in bytes, 4 KiB blocks assumed.
func blocks(list []extent) (n int64) {
	const mask = 4095
	last := int64(0)
	for _, e := range list {
		lo, hi := max(int64(e.off)&^mask, last), (int64(e.end)+mask)&^mask
		n += max(hi-lo, 0)
		last = max(hi, last)
	}
	return n
}
