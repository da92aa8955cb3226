package p2p

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/discovery/mdns"
)

const (
	mdnsService = "_flox._udp"
	// neighbours is how many agents an agent keeps in touch with by itself, so
	// that the DHT lives on when the storehouse, whom all know, is gone.
	neighbours    = 16
	maintainEvery = 30 * time.Second
	suspicious    = 2 * time.Second // without a due answer: is it alive?
)

// maintain keeps the bootstrap peers and some neighbours connected: soon after
// the start in short steps, then now and then.
func (h *Host) maintain(ctx context.Context) error {
	every := maintainEvery
	if h.cfg.maintainIn > 0 {
		every = h.cfg.maintainIn
	}
	step := min(500*time.Millisecond, every)
	for {
		h.maintainOnce(ctx)
		step = min(2*step, every)
		timer := time.NewTimer(step)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case info := <-h.found:
			h.meetAll(ctx, h.drainFound(info))
			step = min(time.Second, every)
		case <-h.wake:
			step = min(time.Second, every)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// drainFound takes what else was found meanwhile, so that one dead peer does
// not hold up the others.
func (h *Host) drainFound(first peer.AddrInfo) []peer.AddrInfo {
	infos := []peer.AddrInfo{first}
	for {
		select {
		case info := <-h.found:
			infos = append(infos, info)
		default:
			return infos
		}
	}
}

func (h *Host) maintainOnce(ctx context.Context) {
	var away []peer.AddrInfo
	near := 0
	h.peers.mu.Lock()
	for _, r := range h.peers.remotes {
		switch {
		case r.fixed && !r.connected:
			away = append(away, peer.AddrInfo{ID: r.id})
		case r.connected && !r.storehouse:
			near++
		}
	}
	h.peers.mu.Unlock()
	h.meetAll(ctx, away)
	if ctx.Err() != nil {
		return
	}
	if h.dht.RoutingTable().Size() == 0 && len(h.net.Network().Peers()) > 0 {
		h.dht.RefreshRoutingTable()
	}
	if near < neighbours {
		lookCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		h.meet(lookCtx, SiteKey(h.cfg.Site), neighbours)
	}
}

// meetAll connects to peers, a few at a time.
func (h *Host) meetAll(ctx context.Context, infos []peer.AddrInfo) {
	ctx, cancel := context.WithTimeout(ctx, patientDial)
	defer cancel()
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for _, info := range infos {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			h.clearBackoff(info.ID)
			err := h.net.Connect(ctx, info)
			h.peers.mu.Lock()
			if r := h.peers.remotes[info.ID]; r != nil {
				r.failed = err != nil
			}
			h.peers.mu.Unlock()
			if err != nil {
				h.log.Debug("cannot connect to peer", "peer", info.ID, "err", err)
			}
		})
	}
	wg.Wait()
}

// watch finds peers that are dead, mute or stalled, once a second.
func (h *Host) watch(ctx context.Context) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-ticker.C:
			for _, id := range h.peers.inspect(now) {
				h.hangUp(id)
			}
		}
	}
}

// hangUp closes every connection to id.
func (h *Host) hangUp(id peer.ID) {
	if err := h.net.Network().ClosePeer(id); err != nil {
		h.log.Debug("close connection", "peer", id, "err", err)
	}
}

// inspect gives the peers whose connections should be closed.
func (t *peerTable) inspect(now time.Time) []peer.ID {
	t.mu.Lock()
	defer t.mu.Unlock()
	var dead []peer.ID
	for _, r := range t.remotes {
		if !r.connected {
			if !r.fixed && now.Sub(r.since) > time.Minute {
				delete(t.remotes, r.id) // somebody waited for it, it was gone already
			}
			continue
		}
		moved := t.lanesOf(r, now)
		switch {
		case len(r.sessions) == 0 && now.Sub(r.since) > mute:
			t.h.log.Info("closing peer that does not greet", "peer", r.name)
			dead = append(dead, r.id)
		case !r.askedAt.IsZero() && now.Sub(r.askedAt) > t.h.pongWait() && now.Sub(moved) > t.h.pongWait():
			t.h.log.Info("closing peer that does not answer", "peer", r.name)
			dead = append(dead, r.id)
		}
	}
	for id, b := range t.bans {
		if b.until.Before(now) {
			delete(t.bans, id)
		}
	}
	return dead
}

// lanesOf gives when an answer last came from r; it pings a peer that is late
// and drops one that was late for too long.
func (t *peerTable) lanesOf(r *remote, now time.Time) time.Time {
	var moved time.Time
	stalled := false
	for _, l := range r.link.lanes {
		if l.moved.After(moved) {
			moved = l.moved
		}
		if len(l.out) == 0 {
			continue
		}
		late := now.Sub(l.moved)
		stalled = stalled || late > t.h.stall()
		if late > suspicious {
			for _, ses := range r.sessions {
				select {
				case ses.ping <- struct{}{}:
				default:
				}
			}
		}
	}
	if stalled {
		t.punish(r, t.h.cfg.Limits.Ban, "no whole answer for "+t.h.stall().String())
	}
	return moved
}

func (h *Host) pongWait() time.Duration {
	if h.cfg.pongWait > 0 {
		return h.cfg.pongWait
	}
	return defaultPongWait
}

func (h *Host) stall() time.Duration {
	if h.cfg.stall > 0 {
		return h.cfg.stall
	}
	return defaultStall
}

// discoverLAN finds peers by multicast. Who is found still has to prove that
// it is a member, as everybody who connects.
func (h *Host) discoverLAN(ctx context.Context) error {
	if h.cfg.NoMDNS {
		<-ctx.Done()
		return ctx.Err()
	}
	if hasMulticast() {
		service := mdns.NewMdnsService(h.net, mdnsService, lanNotifee{h})
		if err := service.Start(); err != nil {
			// Not fatal: a machine without multicast has the DHT.
			h.log.Warn("no discovery on the LAN", "err", err)
		} else {
			defer func() { _ = service.Close() }() // gives no error
		}
	} else {
		h.log.Info("no discovery on the LAN: no network interface can multicast")
	}
	<-ctx.Done()
	return ctx.Err()
}

func hasMulticast() bool {
	ifaces, err := net.Interfaces()
	if err != nil {
		return false
	}
	const usable = net.FlagUp | net.FlagMulticast
	return slices.ContainsFunc(ifaces, func(i net.Interface) bool {
		return i.Flags&usable == usable && i.Flags&net.FlagLoopback == 0
	})
}

type lanNotifee struct{ h *Host }

func (n lanNotifee) HandlePeerFound(info peer.AddrInfo) {
	if info.ID == n.h.self {
		return
	}
	n.h.peers.sawOnLAN(info.ID)
	if n.h.net.Network().Connectedness(info.ID) != network.Connected {
		n.h.heardOf(info)
	}
}

// heardOf has a machine be met that may be at some addresses.
func (h *Host) heardOf(info peer.AddrInfo) {
	h.net.Peerstore().AddAddrs(info.ID, info.Addrs, peerstore.TempAddrTTL)
	select {
	case h.found <- info:
	default: // it is shown again
	}
}
