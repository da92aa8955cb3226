package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/floxctl/flox/p2p"
)

func TestPeersAreRememberedOverARestart(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "peers.json")
	stat := func(i int, role p2p.Role) p2p.PeerStat {
		return p2p.PeerStat{ID: p2p.PeerID(fmt.Sprintf("peer%03d", i)), Listens: []string{fmt.Sprintf("10.0.0.%d:7782", i)}, Role: role}
	}
	k := &knownPeers{file: file}
	if got := k.load(); len(got) != 0 {
		t.Fatalf("%d peers from nowhere", len(got))
	}
	if err := k.update([]p2p.PeerStat{stat(1, p2p.Agent), stat(2, p2p.Storehouse), {ID: "nowhere"}}); err != nil {
		t.Fatal(err)
	}
	// Who is away now stays known, behind those who are here.
	if err := k.update([]p2p.PeerStat{stat(3, p2p.Agent)}); err != nil {
		t.Fatal(err)
	}
	got := (&knownPeers{file: file}).load()
	if len(got) != 2 || got[0].ID != "peer003" || got[1].ID != "peer001" || got[1].Addrs[0] != "10.0.0.1:7782" {
		t.Errorf("after a restart: %v", got)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.update([]p2p.PeerStat{stat(1, p2p.Agent), stat(3, p2p.Agent)}); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(file); err != nil || !os.SameFile(before, after) {
		t.Errorf("the same peers were written again: %v", err)
	}
	var many []p2p.PeerStat
	for i := range 2 * maxKnown {
		many = append(many, stat(i, p2p.Agent))
	}
	if err := k.update(many); err != nil {
		t.Fatal(err)
	}
	if got := (&knownPeers{file: file}).load(); len(got) != maxKnown {
		t.Errorf("%d peers remembered, want %d", len(got), maxKnown)
	}
	if err := os.WriteFile(file, []byte("{torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := (&knownPeers{file: file}).load(); len(got) != 0 {
		t.Errorf("a damaged list gave %d peers", len(got))
	}
}

// TestPeersMetLastAreRemembered: who is met just before the end is known after it,
// at the address it listens on, also if it made the connection itself.
func TestPeersMetLastAreRemembered(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	met, stop := runAgent(t, h, nil, nil)
	other, _ := runAgent(t, h, nil, nil)
	if err := other.host.AddPeer(peerAddr(met)); err != nil {
		t.Fatal(err)
	}
	until(t, "the other made itself known", func() bool {
		return slices.ContainsFunc(met.host.Peers(), func(p p2p.PeerStat) bool { return p.ID == other.host.ID() })
	})
	stop()
	got := (&knownPeers{file: met.known.file}).load()
	if len(got) != 1 || got[0].ID != other.host.ID() || !slices.Contains(got[0].Addrs, other.host.Addrs()[0]) {
		t.Errorf("remembered %v, want %s at %v", got, other.host.ID(), other.host.Addrs())
	}
}
