package p2p

import (
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"

	"github.com/floxctl/flox"
)

const (
	minSecret = 16 // bytes
	// maxSecrets is how many are tried: the current one and those it replaces.
	maxSecrets = 8
)

// membership says who is a member: who knows a secret, and whom the list holds.
type membership struct {
	// secrets are asked anew for every handshake, so that they can be rotated.
	// None means that nobody can prove anything.
	secrets func() [][]byte
	allowed func(PeerID) bool // nil = the secret decides alone
	vouched func(PeerID) bool // nil = nobody's key is enough
	refused func(Refusal)     // nil = nobody asks
	guests  *guestDoor        // nil = none are taken
}

// membership joins the two ways to configure secrets.
func (c *Config) membership() membership {
	m := membership{allowed: c.Allowed, vouched: c.Vouched, refused: c.Refused}
	if c.Secrets == nil { // without a secret the list decides alone
		m.secrets = func() [][]byte { return [][]byte{c.Secret} }
		return m
	}
	m.secrets = func() [][]byte {
		var out [][]byte
		for _, s := range slices.Concat(c.Secrets(), [][]byte{c.Secret}) {
			if len(s) >= minSecret && len(out) < maxSecrets {
				out = append(out, s)
			}
		}
		return out
	}
	return m
}

// member reports whether the list holds id.
func (m membership) member(id peer.ID) bool {
	return m.allowed == nil || m.allowed(PeerID(id.String()))
}

// keys are what this machine can prove to id, or ask it to prove, best first.
// Where its key is enough, the last of them is no secret.
func (m membership) keys(id peer.ID) [][32]byte {
	secrets := m.secrets()
	if m.vouched == nil || !m.vouched(PeerID(id.String())) {
		return keysOf(memberProof, secrets...)
	}
	keys := keysOf(memberProof, secrets[:min(len(secrets), maxSecrets-1)]...)
	return append(keys, keysOf(keyProof, nil)...)
}

// refusal is an answer of a handshake: why two machines do not talk. It is ErrDenied.
type refusal string

func (r refusal) Error() string { return string(r) }
func (r refusal) Unwrap() error { return flox.ErrDenied }

// The reasons of the machine that refuses us, and ours.
const (
	refusedMember  = refusal("this machine is not (or no longer) a member of the other one's swarm; join it with an invite")
	refusedSecret  = refusal("one of the two machines does not know this swarm's secret (another invite?), or was away while it changed twice")
	refusedVersion = refusal("the two machines prove membership in different ways; bring both to the same release of flox")
	refusedOther   = refusal("the other machine refuses this one for a reason that this release of flox does not know")
	noMember       = refusal("the other machine is not (or no longer) a member of this swarm")
)

// gater refuses peers that the member list does not hold once more: what the
// handshake asked may have changed before a connection is handed out.
type gater struct{ membership }

func (g gater) InterceptPeerDial(id peer.ID) bool                   { return g.member(id) }
func (g gater) InterceptAddrDial(peer.ID, multiaddr.Multiaddr) bool { return true }
func (g gater) InterceptAccept(network.ConnMultiaddrs) bool         { return true }

func (g gater) InterceptSecured(_ network.Direction, id peer.ID, _ network.ConnMultiaddrs) bool {
	return g.member(id)
}

func (g gater) InterceptUpgraded(c network.Conn) (bool, control.DisconnectReason) {
	return g.member(c.RemotePeer()), 0
}

// Kick closes every connection of peers that Config.Allowed no longer allows,
// and returns when they are closed: what was in flight on them has ended, and
// no new one is made. Call it after every change of what Allowed answers.
func (h *Host) Kick() {
	slots := make(chan struct{}, 16) // a dead connection takes a moment to close
	var wg sync.WaitGroup
	for _, id := range h.net.Network().Peers() {
		if h.cfg.membership().member(id) {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			h.log.Info("closing the connection of a machine that is no member any more", "peer", id)
			h.hangUp(id)
			h.peers.disconnected(h.net.Network(), id) // libp2p tells only after a while
		})
	}
	wg.Wait()
}
