package p2p

import (
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"

	"github.com/floxctl/flox"
)

// maxHouses bounds SetStorehouses.
const maxHouses = 64

// SetStorehouses replaces the machines to connect to always, which Config.Bootstrap
// began with. What Config.Storehouses answers is asked for anew for each peer.
// ErrBadInput: an address that is none, more than 64 machines; nothing changed then.
func (h *Host) SetStorehouses(list []PeerAddr) error {
	if len(list) > maxHouses {
		return fmt.Errorf("%d storehouse servers, want at most %d: %w", len(list), maxHouses, flox.ErrBadInput)
	}
	next := make([]peer.AddrInfo, 0, len(list))
	for _, p := range list {
		info, err := p.addrInfo()
		if err != nil {
			return fmt.Errorf("storehouse server: %w", err)
		}
		if info.ID != h.self {
			next = append(next, info)
		}
	}
	h.peers.fix(next)
	for _, info := range next {
		// What it was known by before goes by itself, unless it is told again.
		h.net.Peerstore().UpdateAddrs(info.ID, peerstore.PermanentAddrTTL, time.Hour)
		h.net.Peerstore().AddAddrs(info.ID, info.Addrs, peerstore.PermanentAddrTTL)
		h.net.ConnManager().Protect(info.ID, protectedHouse)
	}
	select {
	case h.wake <- struct{}{}:
	default:
	}
	return nil
}

// protectedHouse names why a connection is never closed for another's sake.
const protectedHouse = "bootstrap"

// fix makes exactly these peers fixed, and looks at everybody's standing anew.
func (t *peerTable) fix(list []peer.AddrInfo) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.boot = list
	fixed := make(map[peer.ID]bool, len(list))
	for _, info := range list {
		fixed[info.ID] = true
		r := t.get(info.ID)
		if r.fixed = true; !r.greeted {
			r.storehouse, r.tier = t.believes(r.id, true), TierStorehouse
		}
	}
	for id, r := range t.remotes {
		if r.fixed && !fixed[id] {
			r.fixed = false
			t.h.net.ConnManager().Unprotect(id, protectedHouse)
			if !r.connected {
				delete(t.remotes, id)
				t.h.sched.lost(r)
				continue
			}
		}
		if r.greeted {
			t.rank(r)
		}
	}
	t.h.sched.poke()
}

// bootstraps are the fixed peers.
func (t *peerTable) bootstraps() []peer.AddrInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.boot
}

// rank says what r is and how near, by its hello; t.mu is held.
func (t *peerTable) rank(r *remote) {
	r.storehouse = Role(r.hello.Role) == Storehouse && t.believes(r.id, r.fixed)
	r.tier = t.tier(r)
}

// Reach says whether a peer is connected, and its smoothed round trip, 0 before
// it was measured.
func (h *Host) Reach(id PeerID) (rtt time.Duration, connected bool) {
	pid, err := id.decode()
	if err != nil {
		return 0, false
	}
	t := h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.remotes[pid]
	if r == nil || !r.connected {
		return 0, false
	}
	return r.rtt, true
}
