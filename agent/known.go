package agent

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox/p2p"
)

const (
	// maxKnown is how many peers are remembered over a restart.
	maxKnown = 64
	// saveKnownEvery is how often that list is written, if it changed.
	saveKnownEvery = 5 * time.Second
)

// knownPeers remembers where other agents were, so that a machine that starts
// while the storehouse is away finds the swarm again.
type knownPeers struct {
	file  string
	saved []p2p.PeerAddr
}

// load reads the list; a missing or damaged file is an empty one.
func (k *knownPeers) load() []p2p.PeerAddr {
	b, err := os.ReadFile(k.file)
	if err != nil || json.Unmarshal(b, &k.saved) != nil {
		k.saved = nil
	}
	k.saved = k.saved[:min(len(k.saved), maxKnown)]
	return k.saved
}

// update writes who is connected now, newest list first, older ones behind them.
func (k *knownPeers) update(now []p2p.PeerStat) error {
	list := make([]p2p.PeerAddr, 0, maxKnown)
	for _, p := range now {
		if p.Role == p2p.Agent && len(p.Listens) > 0 && len(list) < maxKnown {
			list = append(list, p2p.PeerAddr{ID: p.ID, Addrs: p.Listens})
		}
	}
	for _, p := range k.saved {
		known := slices.ContainsFunc(list, func(have p2p.PeerAddr) bool { return have.ID == p.ID })
		if !known && len(list) < maxKnown {
			list = append(list, p)
		}
	}
	order := slices.Clone(list)
	slices.SortFunc(order, func(a, b p2p.PeerAddr) int { return strings.Compare(string(a.ID), string(b.ID)) })
	before := slices.Clone(k.saved)
	slices.SortFunc(before, func(a, b p2p.PeerAddr) int { return strings.Compare(string(a.ID), string(b.ID)) })
	if slices.EqualFunc(order, before, func(a, b p2p.PeerAddr) bool { return a.ID == b.ID && slices.Equal(a.Addrs, b.Addrs) }) {
		return nil
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	tmp := k.file + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, k.file); err != nil {
		return err
	}
	k.saved = list
	return nil
}

// rememberPeers meets the peers known from before and keeps the list. Who is
// there at the end is on it, so the network must outlast this.
func (a *Agent) rememberPeers(ctx context.Context) error {
	for _, p := range a.known.load() {
		if err := a.host.AddPeer(p); err != nil {
			a.log.Debug("remembered peer not taken", "peer", string(p.ID), "error", err)
		}
	}
	tick := time.NewTicker(saveKnownEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			a.saveKnown()
			return nil
		}
		a.saveKnown()
	}
}

func (a *Agent) saveKnown() {
	if err := a.known.update(a.host.Peers()); err != nil {
		a.log.Warn("list of peers not saved", "error", err)
	}
}
