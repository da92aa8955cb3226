// Package p2p is the only door to libp2p: one host per machine, membership,
// finding peers (LAN, DHT), choosing the nearest holder of a block, and moving
// blocks. It also lends streams between members as net.Conn, for calls and
// for consensus.
//
// It must not know what a block means: manifests, store paths as files, caches
// and mounts are the business of the packages above. No libp2p type appears
// in its exported API.
package p2p

import (
	"context"
	"crypto/ed25519"
	"log/slog"
	"time"

	"github.com/floxctl/flox"
)

// MaxBlock is the largest block, in plain bytes, that is ever asked for or served.
const MaxBlock = 1 << 20

// PeerID names a machine: the text form of the libp2p peer ID, which is
// derived from the machine's Ed25519 key ("12D3KooW…").
type PeerID string

// PeerAddr says where a machine may be reached: multiaddrs without the peer ID
// ("/ip4/10.0.0.1/tcp/4001"), or host:port.
type PeerAddr struct {
	ID    PeerID
	Addrs []string
}

// Role is what a machine is to the others.
type Role uint8

// The roles. Values are part of the hello protocol.
const (
	Agent      Role = 0
	Storehouse Role = 1
)

func (r Role) String() string {
	if r == Storehouse {
		return "storehouse"
	}
	return "agent"
}

// Tier is how near a peer is; a nearer one is asked first.
type Tier uint8

// The tiers, nearest first. A storehouse is always the last, wherever it stands.
const (
	TierLAN        Tier = iota // same subnet, same machine, or found by multicast
	TierSite                   // same non-empty site label
	TierFar                    // any other agent
	TierStorehouse             // the last resort, and the one that knows
)

func (t Tier) String() string {
	switch t {
	case TierLAN:
		return "lan"
	case TierSite:
		return "site"
	case TierFar:
		return "far"
	}
	return "storehouse"
}

// Holder is what this machine serves to its peers. Methods are called from
// many goroutines.
type Holder interface {
	// Get returns the plain bytes of a block, checked against id; ErrNotFound
	// when it is not (or no longer) here. It must not ask the network.
	Get(ctx context.Context, id flox.CID) ([]byte, error)
	// Has reports for each id whether Get would most likely succeed.
	Has(ids []flox.CID) []bool
	// Each yields every block held, those of unfinished downloads included,
	// until yield returns false.
	Each(yield func(flox.CID) bool)
}

// PackedHolder is a Holder that keeps blocks compressed. What it holds is sent as
// it is kept: compressing it anew took longer than everything else together.
type PackedHolder interface {
	Holder
	// Packed returns a block as it is kept, undamaged: one zstd frame that unpacks
	// to size bytes, or the plain bytes if zstd is false. ErrNotFound as Get.
	Packed(ctx context.Context, id flox.CID) (data []byte, size int, zstd bool, err error)
}

// Config says how a Host takes part. Key and one of Secret, Secrets and
// Allowed are needed; every other zero value is the default.
type Config struct {
	// Key is the machine's identity; see LoadOrCreateKey.
	Key ed25519.PrivateKey
	// Listen are multiaddrs ("/ip4/0.0.0.0/tcp/4711") or host:port to accept
	// connections on. Default: any address, a TCP port the system chooses.
	Listen []string
	// Announce are the addresses told to others instead of the ones listened
	// on, for a machine behind a port forward. Default: what is listened on.
	Announce []string
	// Secret is shared by all members, at least 16 bytes. Both ends of a
	// connection prove that they know it before any protocol runs.
	Secret []byte
	// Secrets, if set, gives the secrets that are valid now, newest first, for a
	// secret that changes: a connection is made if both ends have one in common.
	// It is asked for every connection and must not block. Secrets shorter than
	// 16 bytes and those beyond the first 8 are passed over; Secret, if set, is
	// the oldest of them.
	Secrets func() [][]byte
	// Allowed, if set, is asked on both ends of every connection whether that
	// peer is a member now; who is not is told so and gets ErrDenied. It must not
	// block. Kick closes connections after a change.
	Allowed func(PeerID) bool
	// Vouched, if set, says whose key alone is proof enough, if they think the
	// same of this machine: who was away while the secret changed comes back so.
	// It must be sure of the peer, by a list that only the storehouse makes. It
	// must not block.
	Vouched func(PeerID) bool
	// Refused, if set, hears of every machine that asked to be let in and was not.
	// It must not block.
	Refused func(Refusal)
	// Invites, if set, gives the secret (at least 16 bytes) of an invite that may
	// still be used. Who proves that it knows it may open what ListenGuests
	// listens for, without being a member. It must not block.
	Invites func(id string) (secret []byte, ok bool)
	// Window, if set, says whether guests without an invite are taken now: from
	// this LAN, while somebody watches. A storehouse tells the LAN so, for
	// FindStorehouses. It is asked every second and must not block.
	Window func() bool
	// Name is what a storehouse is called on the LAN: printable, at most 64 bytes.
	Name string
	// Site is the label of the place this machine is at, at most 128 bytes; "" = none.
	Site string
	// Role of this machine. Default Agent.
	Role Role
	// Bootstrap are the machines to connect to first and always: the storehouses.
	Bootstrap []PeerAddr
	// Storehouses, if set, decides who is believed to be a storehouse, so whose
	// "not found" is final. Default: exactly the peers of Bootstrap that say so.
	Storehouses func(PeerID) bool
	// Tracker, if set, is asked beside the DHT who announced a key, at most max
	// peers: it finds faster while it is there. It must end with ctx.
	Tracker func(ctx context.Context, key flox.CID, max int) ([]PeerAddr, error)
	// DHTClient makes this machine ask the DHT without storing for others: for
	// machines on battery or behind NAT.
	DHTClient bool
	// NoMDNS turns multicast discovery on the LAN off.
	NoMDNS bool
	// Blocks is what to serve; nil = nothing.
	Blocks Holder
	// Limits bound memory, traffic and time.
	Limits Limits
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger

	// hooks of the package's tests
	tierOf     func(PeerID) (Tier, bool)
	recordTTL  time.Duration
	maintainIn time.Duration
	stall      time.Duration
	pongWait   time.Duration
	patience   time.Duration // the least before a peer is overtaken
	guestTime  time.Duration
}

// Refusal is a machine that was not let in.
type Refusal struct {
	Peer PeerID // proven
	Addr string // where it came from, host:port
	Why  error
}

// Limits bound what a Host uses. A zero field is its default.
type Limits struct {
	// InFlight is how many bytes may be asked of one peer and not yet be
	// answered. Default 8 MiB.
	InFlight int
	// CallBytes is how many bytes one Fetch keeps asked for or undelivered.
	// Default 16 MiB.
	CallBytes int
	// UploadSlots is how many blocks are read and sent at once; beyond it peers
	// are answered "busy". Default 32 for an agent, 256 for a storehouse.
	UploadSlots int
	// Peers is how many connections are kept before the least useful are
	// closed. Default 160 for an agent, 4096 for a storehouse.
	Peers int
	// FilterBytes is the memory for the filters that peers send of what they
	// hold. Default 32 MiB.
	FilterBytes int
	// DialTimeout bounds connecting while a reader waits. Default 500 ms.
	DialTimeout time.Duration
	// LookupWait is how long a block waits for the look-up of peers before the
	// storehouse is asked. Default 20 ms.
	LookupWait time.Duration
	// Ban is how long a peer that sent wrong bytes is not asked again.
	// Default 15 min; a storehouse a hundredth of that.
	Ban time.Duration
}

// Want is a block to fetch.
type Want struct {
	ID flox.CID
	// Size is the plain size in bytes if known, 0 if not. It must be right: a
	// peer that answers with another size is taken for a liar, before any of
	// its answer is read.
	Size uint32
	// About is the size as somebody said who may be wrong, if Size is 0. It plans
	// how much is asked for at once; nobody is held to it.
	About uint32
}

// Source says where a block came from.
type Source struct {
	Peer PeerID
	Tier Tier
	// Wire is how many bytes the reply took on the wire, before encryption.
	Wire int
}

// Hints help to find holders.
type Hints struct {
	// Paths are the store path the blocks belong to, then known referrers,
	// best first. Only the first few are looked up.
	Paths []flox.StorePath
	// Background says that nobody waits for these blocks: where a peer has both
	// to answer, others go first.
	Background bool
	// AnyOrder says that the blocks are needed all, in no order: machines that fetch
	// the same then ask for different ones first, and can give them to each other.
	AnyOrder bool
	// Steps hears what is done to get the blocks; nil = nobody asks. It is called from
	// many goroutines while the host is locked: it must be quick and not call the host.
	Steps func(Step)
}

// PeerStat is what is known of a connected peer.
type PeerStat struct {
	ID    PeerID
	Addrs []string // the other ends of its connections, as multiaddrs
	// Listens are where it can be reached again, as multiaddrs: what it was reached
	// at first, then what it says. A connection it made itself shows neither.
	Listens   []string
	Tier      Tier
	Role      Role
	Site      string
	RTT       time.Duration // smoothed; 0 = not measured yet
	Goodput   float64       // plain bytes per second received from it while busy; 0 = not measured yet
	BytesIn   uint64        // plain bytes of blocks received and verified
	BytesOut  uint64        // plain bytes of blocks served to it
	Connected time.Time
	// Holds is how many blocks it says it holds; -1 = it did not say.
	Holds int
	// Score ranks peers of one tier: expected seconds for 256 KiB, less is better.
	Score float64
	// Why says in words what the score is made of, and of a ban.
	Why string
}
