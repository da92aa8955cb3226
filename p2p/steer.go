package p2p

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

const (
	// steeredHurry is how long those a storehouse sent us to may take before it is
	// asked to give the block itself, if somebody waits for it; steeredLater if not.
	steeredHurry = 300 * time.Millisecond
	steeredLater = 3 * time.Second
	// hintAddrs is how long the addresses of such a machine are believed.
	hintAddrs = 10 * time.Minute
	// maxDialing bounds the machines being met because of that, maxMissed those that
	// could not be or gave nothing, and are not tried again for missedFor.
	maxDialing = 32
	maxMissed  = 1024
	missedFor  = 30 * time.Second
)

// steered is what a flight knows of those a storehouse sent it to.
type steered struct {
	to     []peer.ID
	until  time.Time // the storehouse is not asked again before
	insist bool      // the storehouse is to give the block itself
}

// left reports whether there is still somebody the flight was sent to, and not asked
// in vain.
func (st *steered) left(f *flight) bool {
	return slices.ContainsFunc(st.to, func(id peer.ID) bool { return !slices.Contains(f.tried, id) })
}

// waits reports whether a storehouse is not to be asked for f yet, until when. Who gave
// nothing until then is not asked again soon because a storehouse says so: each time
// would cost a reader as much.
func (s *scheduler) waits(f *flight, now time.Time) (time.Time, bool) {
	st := &f.steered
	if len(st.to) == 0 || st.insist {
		return time.Time{}, false
	}
	if st.left(f) && now.Before(st.until) {
		return st.until, true
	}
	st.insist = true
	for _, id := range st.to {
		if r := s.h.peers.remotes[id]; r != nil && !slices.Contains(f.tried, id) && !r.link.gave(now) {
			s.miss(id, now)
		}
	}
	return time.Time{}, false
}

// miss remembers that a machine gave nothing.
func (s *scheduler) miss(id peer.ID, now time.Time) {
	if len(s.missed) >= maxMissed {
		dropOldest(s.missed, func(at time.Time) time.Time { return at })
	}
	s.missed[id] = now
}

// flagsFor says how r is asked for f.
func (s *scheduler) flagsFor(f *flight, r *remote) uint8 {
	switch {
	case f.key.length > 0:
		return wire.FlagSlice
	case r.storehouse:
		if s.h.cfg.Role == Agent && f.only == "" && !f.steered.insist {
			return wire.FlagSteer
		}
	case slices.Contains(f.steered.to, r.id):
		return wire.FlagSoon
	}
	return 0
}

// elsewhere takes a storehouse's answer that others have the block.
func (s *scheduler) elsewhere(a *attempt, holders []wire.HolderAddr) error {
	if !a.r.storehouse || a.flags&wire.FlagSteer == 0 {
		return fmt.Errorf("peer protocol: sent elsewhere, but did not ask for that: %w", flox.ErrCorrupt)
	}
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	a.lane.moved = time.Now()
	if f := s.settle(a); f != nil {
		s.sendTo(f, holders)
		s.tellOf(f, StepSent, a.r, Step{Count: len(f.steered.to), Took: a.waited(time.Now())})
		s.assign(f)
	}
	s.refill(a.r)
	return nil
}

// sendTo has a flight ask holders first; t.mu is held.
func (s *scheduler) sendTo(f *flight, holders []wire.HolderAddr) {
	now := time.Now()
	wait := steeredHurry
	if f.background {
		wait = steeredLater
	}
	f.steered = steered{until: now.Add(max(wait, s.h.cfg.patience))}
	for _, h := range holders {
		id := peer.ID(h.ID)
		if id.Validate() != nil || id == s.h.self || slices.Contains(f.tried, id) {
			continue
		}
		if at, missed := s.missed[id]; missed && now.Sub(at) < missedFor {
			continue
		}
		if r := s.h.peers.remotes[id]; r != nil && r.isReady || s.approach(id, h.Addrs) {
			f.steered.to = append(f.steered.to, id)
		}
	}
	f.steered.insist = len(f.steered.to) == 0
}

// approach connects to a machine; false = too many are under way. t.mu is held.
func (s *scheduler) approach(id peer.ID, addrs [][]byte) bool {
	if _, under := s.dialing[id]; under {
		return true
	}
	if len(s.dialing) >= maxDialing {
		return false
	}
	info := peer.AddrInfo{ID: id}
	for _, b := range addrs {
		if a, err := multiaddr.NewMultiaddrBytes(b); err == nil {
			info.Addrs = append(info.Addrs, a)
		}
	}
	s.dialing[id] = struct{}{}
	if s.h.spawn(func() { s.h.approach(info) }) {
		return true
	}
	delete(s.dialing, id)
	return false
}

// approach is run for each machine that a storehouse sent us to.
func (h *Host) approach(info peer.AddrInfo) {
	ctx, cancel := context.WithTimeout(h.base, lookupTimeout)
	defer cancel()
	h.net.Peerstore().AddAddrs(info.ID, info.Addrs, hintAddrs)
	h.greet(ctx, info)
	t, s := h.peers, h.sched
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(s.dialing, info.ID)
	if r := t.remotes[info.ID]; r == nil || !r.isReady {
		s.miss(info.ID, time.Now())
		for f := range s.parked { // who waited for it
			if slices.Contains(f.steered.to, info.ID) {
				f.tried = append(f.tried, info.ID)
			}
		}
	} else {
		delete(s.missed, info.ID)
	}
	s.poke()
}
