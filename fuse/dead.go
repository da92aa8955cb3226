package fuse

import (
	"errors"
	"sync"
	"time"
)

// deadReads remembers reads given up a moment ago. The kernel's read-ahead asks
// first, for many pages; when that fails, the same reader asks again for one,
// and would wait a second time.
type deadReads struct {
	mu   sync.Mutex
	next int
	ring [64]deadRead
}

type deadRead struct {
	pid      uint32
	node     uint64
	from, to int64
	at       time.Time
}

// deadReadAge is how long a reader has to come back.
const deadReadAge = time.Second

var errGaveUp = errors.New("the read-ahead of the same reader just waited in vain")

func (d *deadReads) note(r *request, off int64, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ring[d.next] = deadRead{r.pid, r.node, off, off + int64(n), time.Now()}
	d.next = (d.next + 1) % len(d.ring)
}

func (d *deadReads) check(r *request, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.ring {
		if e.node == r.node && e.pid == r.pid && off >= e.from && off < e.to && time.Since(e.at) < deadReadAge {
			return errGaveUp
		}
	}
	return nil
}

// Who waits for a name that somebody else looks up has no request, and waits deaf
// even to SIGKILL (Linux 6.18 fs/dcache.c d_wait_lookup): they die when that
// look-up ends, after the look-up timeout at the latest. Answering it ESTALE,
// once, makes the kernel walk the path again, and does not help: its caller is
// first again before those it wakes run (10 of 10 times).

// deadNames remembers names of the store directory nobody could tell anything
// about within the time a look-up may take. The kernel sends one look-up of a
// name at a time: of many who want the same, each would wait for the one before
// to fail, and then as long for itself.
type deadNames struct {
	mu   sync.Mutex
	next int
	ring [64]deadName
}

type deadName struct {
	name string
	at   time.Time
}

const (
	// deadNameAge is how long those who stood in line have to come forward.
	deadNameAge = time.Second
	// deadNameWait is how long they wait: enough if the answer is here by now.
	deadNameWait = 2 * time.Millisecond
)

func (d *deadNames) note(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ring[d.next] = deadName{name, time.Now()}
	d.next = (d.next + 1) % len(d.ring)
}

func (d *deadNames) has(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.ring {
		if e.name == name && time.Since(e.at) < deadNameAge {
			return true
		}
	}
	return false
}
