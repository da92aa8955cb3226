package p2p

import (
	"context"
	"crypto/ed25519"
	"net"

	"github.com/floxctl/flox"
)

// LoadOrCreateKey reads the machine's key from path, or makes one there (mode
// 0600, its directory must exist).
func LoadOrCreateKey(path string) (ed25519.PrivateKey, error) { return nil, nil }

// IDFromKey gives the name of the machine that owns key.
func IDFromKey(key ed25519.PublicKey) (PeerID, error) { return "", nil }

// PathKey is the key under which holders of a store path announce themselves.
func PathKey(p flox.StorePath) flox.CID { return flox.CID{} }

// SiteKey is the key under which the machines of a site find each other.
func SiteKey(site string) flox.CID { return flox.CID{} }

// Host is one machine's end of the peer network.
type Host struct{}

// New checks cfg, binds the listening sockets and joins nobody yet; Run does.
// A Host that is not run must be closed.
func New(cfg Config) (*Host, error) { return &Host{}, nil }

// Run connects, announces and keeps doing so until ctx ends, then closes the
// host. It returns nil when ctx ended.
func (h *Host) Run(ctx context.Context) error { return nil }

// Close ends every connection and frees the sockets. It may be called twice.
func (h *Host) Close() error { return nil }

// ID is the name of this machine.
func (h *Host) ID() PeerID { return "" }

// Addrs are the addresses others can reach this machine at, as multiaddrs.
func (h *Host) Addrs() []string { return nil }

// AddPeer remembers where a peer is and connects to it when Run next looks.
func (h *Host) AddPeer(p PeerAddr) error { return nil }

// Kick closes the connections of every peer that Config.Allowed no longer allows.
func (h *Host) Kick() {}

// Peers lists connected members, nearest first.
func (h *Host) Peers() []PeerStat { return nil }

// Holding tells that the Holder now also has ids, so that peers hear of them
// within a second or so. Without it they hear at the next scan.
func (h *Host) Holding(ids ...flox.CID) {}

// Listen accepts streams of a protocol ("/flox/rpc/1") from members. The
// remote address of an accepted connection is the peer's ID.
func (h *Host) Listen(protocol string) (net.Listener, error) { return nil, nil }

// Dial opens a stream of a protocol to a member, connecting if need be.
func (h *Host) Dial(ctx context.Context, id PeerID, protocol string) (net.Conn, error) {
	return nil, nil
}

// Announce replaces the set of keys this machine is found under; the site key
// is always among them.
func (h *Host) Announce(keys []flox.CID) error { return nil }

// FindProviders asks the DHT who announced key; at most max peers.
func (h *Host) FindProviders(ctx context.Context, key flox.CID, max int) ([]PeerAddr, error) {
	return nil, nil
}

// Fetch gets blocks from the nearest holders and calls deliver with each.
func (h *Host) Fetch(ctx context.Context, wants []Want, hints Hints, deliver func(i int, data []byte, from Source)) error {
	return nil
}

// FetchFrom gets blocks from one peer and nobody else.
func (h *Host) FetchFrom(ctx context.Context, id PeerID, wants []Want, deliver func(i int, data []byte, from Source)) error {
	return nil
}

// FetchRange gets length bytes at off of one block, verified by a BLAKE3 tree proof.
func (h *Host) FetchRange(ctx context.Context, want Want, off, length uint32, hints Hints) ([]byte, Source, error) {
	return nil, Source{}, nil
}
