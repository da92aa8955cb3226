package p2p

import (
	"slices"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

const (
	// maxAside bounds the requests that wait for a block to arrive here.
	maxAside = 8192
	// soonFetched is how long one waits for a block that is being fetched, soonElse
	// for one that is about to be, or to be kept.
	soonFetched = 4 * time.Second
	soonElse    = 500 * time.Millisecond
)

// waitingRoom keeps requests for blocks that are on their way to this machine: who
// asks was told so by the storehouse.
type waitingRoom struct {
	mu    sync.Mutex
	waits map[flox.CID][]*aside
	count int
}

// aside is one such request. It stays due on its stream.
type aside struct {
	up    *upload
	it    upItem
	timer *time.Timer
}

// setAside has a request wait for its block; false = it may not.
func (up *upload) setAside(it upItem) bool {
	if it.flags&wire.FlagSoon == 0 || up.srv.h.cfg.Blocks == nil {
		return false
	}
	d := soonElse
	if up.srv.h.sched.flying(it.item.ID) {
		d = soonFetched
	}
	it.flags &^= wire.FlagSoon // once
	it.has = true
	w := &up.srv.waiting
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.count >= maxAside {
		return false
	}
	a := &aside{up: up, it: it}
	w.count++
	w.waits[it.item.ID] = append(w.waits[it.item.ID], a)
	a.timer = time.AfterFunc(d, func() { w.back(it.item.ID, a) })
	return true
}

// back has a request answered whose time is over.
func (w *waitingRoom) back(id flox.CID, a *aside) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(w.waits[id], a)
	if i < 0 {
		return // its block came meanwhile
	}
	if w.waits[id] = slices.Delete(w.waits[id], i, i+1); len(w.waits[id]) == 0 {
		delete(w.waits, id)
	}
	w.call(a)
}

// arrived has the requests answered that wait for blocks that are here now.
func (w *waitingRoom) arrived(ids []flox.CID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.count == 0 {
		return
	}
	for _, id := range ids {
		for _, a := range w.waits[id] {
			a.timer.Stop()
			w.call(a)
		}
		delete(w.waits, id)
	}
}

// call puts a request back into its stream's queue, which has room for all that is
// due there; w.mu is held.
func (w *waitingRoom) call(a *aside) {
	w.count--
	a.up.items <- a.it
}

// flying reports whether a block is being fetched.
func (s *scheduler) flying(id flox.CID) bool {
	s.h.peers.mu.Lock()
	defer s.h.peers.mu.Unlock()
	return s.flights[flightKey{id: id}] != nil
}
