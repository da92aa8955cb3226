package storehouse

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/floxctl/flox"
)

// Bounds of the tracker. It is memory only: agents announce again long before
// what they announced is forgotten.
const (
	trackerTTL      = 15 * time.Minute
	maxPeerKeys     = 512     // keys of one peer
	maxTrackedKeys  = 1 << 20 // keys of all peers together
	maxTracked      = 1 << 14 // peers, also of those that announce addresses only
	maxPeerAddrs    = 16
	maxAddrBytes    = 256
	maxWhoHasKeys   = 64
	maxProviders    = 64 // answered per call
	defaultProvider = 8
)

// tracker knows who announced what lately.
type tracker struct {
	mu    sync.Mutex
	now   func() time.Time
	peers map[string]*announced
	keys  map[flox.CID]map[string]struct{} // peers by key
	total int                              // keys of all peers
}

// announced is one peer's set.
type announced struct {
	addrs []string
	keys  []flox.CID
	until time.Time
}

func newTracker() *tracker {
	return &tracker{now: time.Now, peers: map[string]*announced{}, keys: map[flox.CID]map[string]struct{}{}}
}

// announce replaces what peer holds. Errors: ErrBadInput, ErrFull.
func (t *tracker) announce(peer string, keys []flox.CID, addrs []string) error {
	if len(keys) > maxPeerKeys || len(addrs) > maxPeerAddrs {
		return fmt.Errorf("announce: %d keys and %d addresses, want at most %d and %d: %w", len(keys), len(addrs), maxPeerKeys, maxPeerAddrs, flox.ErrBadInput)
	}
	for _, a := range addrs {
		if a == "" || len(a) > maxAddrBytes {
			return fmt.Errorf("announce: address of %d bytes, want 1 to %d: %w", len(a), maxAddrBytes, flox.ErrBadInput)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forget(peer)
	if t.total+len(keys) > maxTrackedKeys || len(t.peers) >= maxTracked {
		return fmt.Errorf("announce: %d keys of %d peers are known already: %w", t.total, len(t.peers), flox.ErrFull)
	}
	set := map[flox.CID]struct{}{}
	a := &announced{addrs: addrs, until: t.now().Add(trackerTTL)}
	for _, k := range keys {
		if _, twice := set[k]; twice {
			continue
		}
		set[k] = struct{}{}
		a.keys = append(a.keys, k)
		if t.keys[k] == nil {
			t.keys[k] = map[string]struct{}{}
		}
		t.keys[k][peer] = struct{}{}
	}
	t.total += len(a.keys)
	t.peers[peer] = a
	return nil
}

// forget drops a peer's set. The caller holds the lock.
func (t *tracker) forget(peer string) {
	a := t.peers[peer]
	if a == nil {
		return
	}
	for _, k := range a.keys {
		delete(t.keys[k], peer)
		if len(t.keys[k]) == 0 {
			delete(t.keys, k)
		}
	}
	t.total -= len(a.keys)
	delete(t.peers, peer)
}

// provider is a peer that announced a key.
type provider struct {
	peer  string
	addrs []string
}

// find gives at most max peers that announced key, but not asker, in random
// order, so that a crowd spreads.
func (t *tracker) find(key flox.CID, asker string, max int) []provider {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	var found []provider
	for peer := range t.keys[key] {
		a := t.peers[peer]
		if peer == asker || !now.Before(a.until) {
			continue
		}
		found = append(found, provider{peer, a.addrs})
	}
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	return found[:min(len(found), max)]
}

// expire forgets peers that did not announce again.
func (t *tracker) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	for peer, a := range t.peers {
		if !now.Before(a.until) {
			t.forget(peer)
		}
	}
}

// run expires until ctx ends.
func (t *tracker) run(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.expire()
		case <-ctx.Done():
			return nil
		}
	}
}
