package p2p

import (
	"context"
	"encoding/binary"
	"log/slog"
	"math/bits"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

// A filter is a Bloom filter cut into lines of 512 bits, so that a question
// touches one cache line: a fetch asks every near peer's filter about every
// block. Keys are the first 16 bytes of a CID's digest, which is uniform already.
type filter struct {
	words []uint64
	count int
}

const (
	filterLine   = 8 // words
	filterHashes = 7 // of 9 bits each, out of 64
	// bitsPerKey makes about 1 % of the answers wrongly "yes" when the filter is full.
	bitsPerKey = 11
	minKeys    = 4096
)

type filterKey = [wire.KeySize]byte

func keyOf(id flox.CID) filterKey { return filterKey(id[:wire.KeySize]) }

// newFilter has room for n keys.
func newFilter(n int) *filter {
	words := max(n, minKeys)*bitsPerKey/64 + filterLine
	words = min(words-words%filterLine, wire.MaxFilterWords)
	return &filter{words: make([]uint64, words)}
}

func (f *filter) capacity() int { return len(f.words) * 64 / bitsPerKey }

func (f *filter) place(k filterKey) (line []uint64, pattern uint64) {
	at, _ := bits.Mul64(binary.LittleEndian.Uint64(k[:8]), uint64(len(f.words)/filterLine))
	return f.words[at*filterLine : at*filterLine+filterLine], binary.LittleEndian.Uint64(k[8:])
}

// add reports whether k was new.
func (f *filter) add(k filterKey) bool {
	line, pattern := f.place(k)
	fresh := false
	for range filterHashes {
		bit := uint64(1) << (pattern & 63)
		w := &line[pattern>>6&7]
		fresh = fresh || *w&bit == 0
		*w |= bit
		pattern >>= 9
	}
	if fresh {
		f.count++
	}
	return fresh
}

func (f *filter) has(k filterKey) bool {
	line, pattern := f.place(k)
	for range filterHashes {
		if line[pattern>>6&7]&(1<<(pattern&63)) == 0 {
			return false
		}
		pattern >>= 9
	}
	return true
}

// lost counts the bits that f has and now lacks, and those it has.
func (f *filter) lost(now *filter) (gone, all int) {
	for i, w := range f.words {
		gone += bits.OnesCount64(w &^ now.words[i])
		all += bits.OnesCount64(w)
	}
	return gone, all
}

// deltaLog is how many keys a hello stream may lie behind before it is sent
// the whole filter again.
const deltaLog = 1 << 15

// holdings is this machine's own filter, and a log of what was added to it
// lately for the peers that have an earlier state.
type holdings struct {
	src    Holder
	silent bool // a storehouse holds everything: it sends no filter

	mu      sync.Mutex
	f       *filter // nil until the first scan is done
	gen     uint32
	log     []filterKey // ring of the last deltaLog additions
	seq     uint64      // additions ever made
	changed chan struct{}
	full    chan struct{} // asks for a scan that makes a larger filter
}

func newHoldings(src Holder, role Role) *holdings {
	h := &holdings{src: src, silent: role == Storehouse, changed: make(chan struct{}), full: make(chan struct{}, 1)}
	if src == nil {
		h.f, h.gen = newFilter(0), 1
	}
	return h
}

// wake tells every hello stream; h.mu is held.
func (h *holdings) wake() {
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *holdings) add(ids []flox.CID) {
	if h.silent || len(ids) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	any := false
	for _, id := range ids {
		any = h.addLocked(keyOf(id)) || any
	}
	if h.f == nil {
		return // kept in the log until the first scan is told
	}
	if any {
		h.wake()
	}
	if h.f.count > h.f.capacity() && len(h.f.words) < wire.MaxFilterWords {
		select {
		case h.full <- struct{}{}:
		default:
		}
	}
}

func (h *holdings) addLocked(k filterKey) bool {
	if h.f != nil && !h.f.add(k) {
		return false
	}
	if len(h.log) < deltaLog {
		h.log = append(h.log, k)
	} else {
		h.log[h.seq%deltaLog] = k
	}
	h.seq++
	return true
}

// run scans the Holder now and then: it finds what Holding was not called for
// and drops what was evicted.
func (h *holdings) run(ctx context.Context, log *slog.Logger) error {
	if h.src == nil || h.silent {
		<-ctx.Done()
		return ctx.Err()
	}
	for {
		start := time.Now()
		h.scan(ctx)
		took := time.Since(start)
		log.Debug("scanned held blocks", "took", took)
		// At most half a percent of a core.
		wait := min(max(200*took, 30*time.Second), 10*time.Minute)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		case <-h.full:
		}
	}
}

// scan reads the Holder twice: to count, then to compare with what was told.
func (h *holdings) scan(ctx context.Context) {
	n := 0
	h.src.Each(func(flox.CID) bool { n++; return ctx.Err() == nil })
	h.mu.Lock()
	old, since := h.f, h.seq
	h.mu.Unlock()
	fresh := newFilter(2 * n) // room for what is added until the next scan
	if old != nil && n <= old.capacity() && n >= old.capacity()/8 {
		fresh = &filter{words: make([]uint64, len(old.words))}
	}
	var batch, untold []filterKey
	compare := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, k := range batch {
			if old != nil && len(untold) < deltaLog && !old.has(k) {
				untold = append(untold, k)
			}
		}
		batch = batch[:0]
	}
	h.src.Each(func(id flox.CID) bool {
		fresh.add(keyOf(id))
		if batch = append(batch, keyOf(id)); len(batch) == 1024 {
			compare()
		}
		return ctx.Err() == nil
	})
	compare()
	if ctx.Err() == nil {
		h.publish(old, fresh, untold, since)
	}
}

// publish tells peers what a scan found: the difference if it is small, else
// everything, which is also how evicted blocks disappear from their filters.
func (h *holdings) publish(old, fresh *filter, untold []filterKey, since uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if old != nil && len(old.words) == len(fresh.words) && len(untold) < deltaLog {
		// Additions made during the scan are in old but maybe not in fresh:
		// they count as lost here, which at worst sends a filter too many.
		if gone, all := old.lost(fresh); gone*10 <= all {
			for _, k := range untold {
				h.addLocked(k)
			}
			if len(untold) > 0 {
				h.wake()
			}
			return
		}
	}
	for i := max(since, h.seq-uint64(len(h.log))); i < h.seq; i++ {
		fresh.add(h.log[i%deltaLog])
	}
	h.f = fresh
	h.gen++
	h.wake()
}

// update is what a hello stream has to send to bring its peer up to date.
type update struct {
	gen   uint32
	pos   uint64      // additions the peer knows of afterwards
	whole *filter     // a copy, or nil
	keys  []filterKey // additions, if whole is nil
}

// since gives the update for a peer that knows generation gen (0 = nothing)
// and additions up to pos, and a channel that is closed at the next change.
func (h *holdings) since(gen uint32, pos uint64) (update, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	u := update{gen: h.gen, pos: h.seq}
	switch {
	case h.f == nil:
		return update{}, h.changed
	case gen != h.gen || h.seq-pos > uint64(len(h.log)):
		u.whole = &filter{words: append([]uint64(nil), h.f.words...), count: h.f.count}
	default:
		for ; pos < h.seq; pos++ {
			u.keys = append(u.keys, h.log[pos%deltaLog])
		}
	}
	return u, h.changed
}
