package cache

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/floxctl/flox"
)

// key names a segment of a file: a run of Config.segment bytes at a fixed
// place. Segments are what is evicted, so that a file larger than the cache does
// not go as one, and so that a list of extents stays short.
type key struct {
	id  flox.CID
	seg uint32
}

// content says where a segment's bytes are. It is never changed once
// published: readers work on the one they loaded, without a lock.
type content struct {
	size   int64  // of the whole file
	object uint64 // number of the object (pack or own file) with the bytes; 0 = nothing is here
	base   int64  // where in the object the segment begins
	length int64  // of the segment
	block  bool   // put by PutBlock
	kept   bool
	packed bool
	ext    []extent // sorted, apart
}

// charge is what the segment takes on disk, in bytes.
func (ct *content) charge() int64 {
	switch {
	case ct.object == 0:
		return 0
	case ct.packed:
		return ct.length
	}
	return blocks(ct.ext)
}

func (ct *content) same(o *content) bool { return ct.object == o.object && ct.base == o.base }

// maxNodes bounds how many inodes of the mount are remembered per segment;
// equal files of several store paths share one segment.
const maxNodes = 8

// nodes are inodes that read a segment, newest last. Never changed once published.
type nodes []uint64

// record is a segment in memory. Fields but mu and pins are atomics: the path of
// a warm read takes no lock of the record.
type record struct {
	key   key
	mu    sync.Mutex              // held by whoever changes cur, while the change is written
	cur   atomic.Pointer[content] // nil: not loaded yet
	nodes atomic.Pointer[nodes]
	ref   atomic.Int32 // passes of the clock's hand this segment will survive
	warm  atomic.Bool  // read since the memory's hand passed
	dirty atomic.Bool  // ref or nodes differ from the index
	pins  int          // guarded by the shard
	cost  int64        // guarded by the shard
}

// chances is how many passes of the hand a use is good for. Blocks of
// manifests are small and everything begins with them: they go last.
func chances(block bool) int32 {
	if block {
		return 3
	}
	return 1
}

// use notes that node read the segment. It writes shared memory only when something changes.
func (r *record) use(node uint64, block bool) {
	if want := chances(block); r.ref.Load() < want {
		r.ref.Store(want)
		r.dirty.Store(true)
	}
	if !r.warm.Load() {
		r.warm.Store(true)
	}
	for node != 0 {
		old := r.nodes.Load()
		if old != nil && slices.Contains(*old, node) {
			return
		}
		var next nodes
		if old != nil {
			next = slices.Clone((*old)[max(0, len(*old)-maxNodes+1):])
		}
		next = append(next, node)
		if r.nodes.CompareAndSwap(old, &next) {
			r.dirty.Store(true)
			return
		}
	}
}

// readers gives the inodes that are known to have read the segment.
func (r *record) readers() []uint64 {
	if n := r.nodes.Load(); n != nil {
		return *n
	}
	return nil
}

func (r *record) memory() int64 {
	n := int64(256 + 8*len(r.readers()))
	if ct := r.cur.Load(); ct != nil {
		n += 16 * int64(len(ct.ext))
	}
	return n
}

const (
	flagBlock = 1 << iota
	flagKept
	flagPacked
	flagsAll = 1<<iota - 1
)

// encode gives the value of the record in the index.
func encode(ct *content, ref int32, readers []uint64) []byte {
	b := make([]byte, 1, 48+12*len(ct.ext))
	if ct.block {
		b[0] |= flagBlock
	}
	if ct.kept {
		b[0] |= flagKept
	}
	if ct.packed {
		b[0] |= flagPacked
	}
	for _, v := range []uint64{uint64(ct.size), ct.object, uint64(ct.base), uint64(ct.length), uint64(max(ref, 0)), uint64(len(readers))} {
		b = binary.AppendUvarint(b, v)
	}
	for _, v := range readers {
		b = binary.AppendUvarint(b, v)
	}
	b = binary.AppendUvarint(b, uint64(len(ct.ext)))
	at := uint32(0)
	for _, e := range ct.ext {
		b = binary.AppendUvarint(b, uint64(e.off-at))
		b = binary.AppendUvarint(b, uint64(e.end-e.off))
		b = binary.AppendUvarint(b, e.gen)
		at = e.end
	}
	return b
}

// decode reads what encode gave. ErrCorrupt: it is something else.
func decode(b []byte) (ct *content, ref int32, readers []uint64, err error) {
	d := decoder{b: b}
	flags := d.byte()
	ct = &content{block: flags&flagBlock != 0, kept: flags&flagKept != 0, packed: flags&flagPacked != 0}
	ct.size = int64(d.uvarint(1 << 62))
	ct.object = d.uvarint(1<<63 - 1)
	ct.base = int64(d.uvarint(1 << 62))
	ct.length = int64(d.uvarint(maxSegment))
	ref = int32(d.uvarint(127))
	for range d.uvarint(maxNodes) {
		readers = append(readers, d.uvarint(1<<64-1))
	}
	count := d.uvarint(uint64(len(d.b)) / 3) // an extent takes three bytes at least
	ct.ext = make([]extent, 0, count)
	at := uint64(0)
	for range count {
		off := at + d.uvarint(maxSegment)
		end := off + d.uvarint(maxSegment)
		if end <= off || end > uint64(ct.length) {
			d.bad = true
			break
		}
		ct.ext = append(ct.ext, extent{uint32(off), uint32(end), d.uvarint(1<<64 - 1)})
		at = end
	}
	if d.bad || len(d.b) != 0 || flags&^byte(flagsAll) != 0 || ct.object == 0 {
		return nil, 0, nil, fmt.Errorf("record of %d bytes in the cache's index: %w", len(b), flox.ErrCorrupt)
	}
	return ct, ref, readers, nil
}

// decoder takes numbers off b until one is missing or too large.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.bad = true
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) uvarint(limit uint64) uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || v > limit {
		d.b, d.bad = nil, true
		return 0
	}
	d.b = d.b[n:]
	return v
}
