package p2p

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
)

const (
	lookupTimeout = 2 * time.Second
	lookupTTL     = 15 * time.Second // a look-up is not made again for so long
	lookupPaths   = 4                // the path itself and some referrers
	lookupPeers   = 8                // holders connected to for one key
	maxLookups    = 16               // at once
	maxKeySearch  = 1024             // remembered
	readyWait     = 300 * time.Millisecond
	// vainLookups is how many look-ups are waited for, from the last on that met
	// somebody new: a program's start touches dozens of store paths, and each would
	// wait for a look-up of its own. The further ones go on beside the storehouse.
	vainLookups = 3
)

// lookups finds and connects to peers that announced a path or a site. What
// they hold is then known from their filters; nothing is asked of a peer only
// because it announced.
type lookups struct {
	h    *Host
	mu   sync.Mutex
	keys map[flox.CID]*keySearch
	busy int
	vain int // look-ups begun since one met somebody new
}

// keySearch is the look-up of one key, shared by all who want it.
type keySearch struct {
	begun time.Time
	done  chan struct{}
	met   int // once done is closed
}

// search is what one Fetch looks up. It begins when the first block has no
// near holder.
type search struct {
	of    *lookups
	keys  []flox.CID
	steps func(Step) // nil = nobody asks

	mu      sync.Mutex
	started bool
	begun   time.Time // of the youngest part; zero = there is none
	parts   []*keySearch
	tell    bool // that it is over, once it is
}

func newLookups(h *Host) *lookups { return &lookups{h: h, keys: map[flox.CID]*keySearch{}} }

func (l *lookups) search(hints Hints) *search {
	s := &search{of: l, steps: hints.Steps}
	for _, p := range hints.Paths[:min(len(hints.Paths), lookupPaths)] {
		s.keys = append(s.keys, PathKey(p))
	}
	s.keys = append(s.keys, SiteKey(l.h.cfg.Site))
	return s
}

// begin starts the look-ups unless they were, and says when the last of them began,
// for whomever; zero when they are not worth waiting for.
func (s *search) begin() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.started {
		s.started = true
		now := time.Now()
		for _, k := range s.keys {
			if part := s.of.start(k); part != nil {
				s.parts = append(s.parts, part)
				s.begun = later(s.begun, part.begun)
			}
		}
		if s.steps != nil && !s.begun.Before(now) { // else somebody else did it lately
			s.tell = true
			s.steps(Step{At: now, Kind: StepSearch})
		}
	}
	if s.of.inVain() {
		return time.Time{}
	}
	return s.begun
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// inVain reports whether look-ups met nobody lately.
func (l *lookups) inVain() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.vain > vainLookups
}

func (s *search) finished() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.started {
		return false
	}
	for _, p := range s.parts {
		select {
		case <-p.done:
		default:
			return false
		}
	}
	if s.tell {
		s.tell = false
		found := Step{At: time.Now(), Kind: StepFound, Took: time.Since(s.begun)}
		for _, p := range s.parts {
			found.Count += p.met
		}
		s.steps(found)
	}
	return true
}

// start gives the look-up of key: a running or recent one, or a new one; nil
// if too many are running.
func (l *lookups) start(key flox.CID) *keySearch {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.keys[key]; k != nil && time.Since(k.begun) < lookupTTL {
		return k
	}
	if l.busy >= maxLookups {
		return nil
	}
	if len(l.keys) >= maxKeySearch {
		dropOldest(l.keys, func(k *keySearch) time.Time { return k.begun })
	}
	k := &keySearch{begun: time.Now(), done: make(chan struct{})}
	l.keys[key] = k
	l.busy++
	l.vain++
	if !l.h.spawn(func() { l.run(key, k) }) {
		l.busy--
		close(k.done)
	}
	return k
}

func (l *lookups) run(key flox.CID, k *keySearch) {
	ctx, cancel := context.WithTimeout(l.h.base, lookupTimeout)
	defer cancel()
	met := l.h.meet(ctx, key, lookupPeers)
	l.mu.Lock()
	l.busy--
	if met > 0 {
		l.vain = 0
	}
	k.met = met
	close(k.done)
	l.mu.Unlock()
	t := l.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	l.h.sched.poke()
}

// meet connects to peers found under key and waits until they said what they
// hold; it gives the number of new ones.
func (h *Host) meet(ctx context.Context, key flox.CID, max int) int {
	var group errgroup.Group
	group.SetLimit(lookupPeers)
	var met atomic.Int64
	found := func(info peer.AddrInfo) {
		group.Go(func() error {
			if h.greet(ctx, info) {
				met.Add(1)
			}
			return nil
		})
	}
	tracked := make(chan struct{})
	go func() { // waited for below
		defer close(tracked)
		h.askTracker(ctx, key, max, found)
	}()
	err := h.eachProvider(ctx, key, max, found)
	if err != nil {
		h.log.Debug("look-up found nobody", "key", key, "err", err)
	}
	<-tracked
	_ = group.Wait() // its functions give no error
	return int(met.Load())
}

// askTracker calls found with at most max peers the tracker knows under key.
func (h *Host) askTracker(ctx context.Context, key flox.CID, max int, found func(peer.AddrInfo)) {
	if h.cfg.Tracker == nil {
		return
	}
	peers, err := h.cfg.Tracker(ctx, key, max)
	if err != nil {
		h.log.Debug("tracker did not answer", "key", key, "err", err)
		return
	}
	for _, p := range peers[:min(len(peers), max)] {
		info, err := p.addrInfo()
		if err != nil || info.ID == h.self {
			continue
		}
		found(info)
	}
}

// greet connects to a peer that is not connected; it reports whether that
// worked and the peer has said who it is.
func (h *Host) greet(ctx context.Context, info peer.AddrInfo) bool {
	h.peers.mu.Lock()
	r := h.peers.remotes[info.ID]
	skip := r != nil && (r.isReady || r.downUntil.After(time.Now()))
	h.peers.mu.Unlock()
	if skip {
		return false
	}
	if err := h.connect(ctx, info); err != nil {
		h.log.Debug("cannot connect to peer", "peer", info.ID, "err", err)
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, max(readyWait, h.cfg.Limits.LookupWait))
	defer cancel()
	return h.peers.waitReady(ctx, info.ID) == nil
}
