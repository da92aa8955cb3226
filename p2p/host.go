package p2p

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/gologshim"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/multiformats/go-multiaddr"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
)

// The protocols spoken between members.
const (
	protoHello  = "/flox/hello/1"
	protoBlocks = "/flox/blocks/1"
	protoDHT    = dhtPrefix + "/kad/1.0.0"
)

// Host is one machine's end of the peer network.
type Host struct {
	cfg  Config
	log  *slog.Logger
	self peer.ID
	net  host.Host
	dht  *dht.IpfsDHT
	door *dhtDoor

	peers  *peerTable
	sched  *scheduler
	held   *holdings
	serve  *server
	frames *frames
	finds  *lookups
	keys   *announcer

	guests *guestDoor

	// base is the context of work that belongs to the host and not to a
	// caller: a fetch goes on when one of its callers goes away.
	base    context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup // goroutines started outside Run
	spawnMu sync.Mutex     // orders wg.Add before Close's wg.Wait
	running atomic.Bool
	closed  sync.Once
	found   chan peer.AddrInfo // peers seen on the LAN, to connect to
	wake    chan struct{}      // asks the maintenance loop to look now
}

// New checks cfg, binds the listening sockets and joins nobody yet; Run does.
// A Host that is not run must be closed. Errors: ErrBadInput for the
// configuration, ErrBusy for a port in use.
func New(cfg Config) (*Host, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	quiet()
	cfg.Limits = cfg.Limits.withDefaults(cfg.Role)
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &Host{cfg: cfg, log: log, guests: newGuestDoor(cfg), found: make(chan peer.AddrInfo, 64), wake: make(chan struct{}, 1)}
	boot := make([]peer.AddrInfo, 0, len(cfg.Bootstrap))
	for _, p := range cfg.Bootstrap {
		info, err := p.addrInfo()
		if err != nil {
			return nil, fmt.Errorf("bootstrap: %w", err)
		}
		boot = append(boot, info)
	}
	if err := h.open(); err != nil {
		return nil, err
	}
	h.base, h.stop = context.WithCancel(context.Background())
	h.peers = newPeerTable(h, boot)
	h.sched = newScheduler(h)
	h.held = newHoldings(cfg.Blocks, cfg.Role)
	h.serve = newServer(h)
	h.frames = newFrames()
	h.finds = newLookups(h)
	h.keys = newAnnouncer(cfg.Site)
	if err := h.openDHT(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	for _, b := range boot {
		h.net.Peerstore().AddAddrs(b.ID, b.Addrs, peerstore.PermanentAddrTTL)
		h.net.ConnManager().Protect(b.ID, protectedHouse)
	}
	h.net.SetStreamHandler(protoHello, h.acceptHello)
	h.net.SetStreamHandler(protoBlocks, h.serve.accept)
	h.net.Network().Notify(h.peers)
	return h, nil
}

func (c *Config) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("peer configuration: "+format+": %w", append(args, flox.ErrBadInput)...)
	}
	switch {
	case len(c.Key) != ed25519.PrivateKeySize:
		return bad("a machine key is needed")
	case len(c.Secret) == 0 && c.Secrets == nil && c.Allowed == nil:
		return bad("the secret of an invite is needed, or a member list")
	case len(c.Secret) > 0 && len(c.Secret) < minSecret:
		return bad("the secret has %d bytes, want at least %d", len(c.Secret), minSecret)
	case len(c.Site) > 128:
		return bad("the site label has %d bytes, want at most 128", len(c.Site))
	case !plain(c.Name):
		return bad("the name %q has %d bytes or cannot be printed, want at most %d bytes", c.Name, len(c.Name), maxName)
	case c.Role > Storehouse:
		return bad("unknown role %d", c.Role)
	}
	return nil
}

// open makes the libp2p host.
func (h *Host) open() error {
	key, err := crypto.UnmarshalEd25519PrivateKey(h.cfg.Key)
	if err != nil {
		return fmt.Errorf("machine key: %w: %w", err, flox.ErrBadInput)
	}
	if h.self, err = peer.IDFromPrivateKey(key); err != nil {
		return fmt.Errorf("machine key: %w: %w", err, flox.ErrBadInput)
	}
	listen := h.cfg.Listen
	if len(listen) == 0 {
		listen = []string{"/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"}
	}
	listenOn, err := parseAddrs(listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	announce, err := parseAddrs(h.cfg.Announce)
	if err != nil {
		return fmt.Errorf("announce: %w", err)
	}
	if err := h.startLibp2p(key, announce); err != nil {
		return err
	}
	if len(h.cfg.Listen) == 0 {
		// One will do: many machines have no IPv6.
		if err := h.net.Network().Listen(listenOn...); err != nil {
			return errors.Join(listenError("any address", err), h.net.Close())
		}
		return nil
	}
	for i, a := range listenOn {
		if err := h.net.Network().Listen(a); err != nil {
			return errors.Join(listenError(listen[i], err), h.net.Close())
		}
	}
	return nil
}

// startLibp2p makes the host without listening: libp2p.New leaves goroutines
// behind when it cannot listen.
func (h *Host) startLibp2p(key crypto.PrivKey, announce []multiaddr.Multiaddr) error {
	resources, err := resourceManager(h.cfg.Role, h.cfg.Limits.Peers)
	if err != nil {
		return fmt.Errorf("resource limits: %w", err)
	}
	conns, err := connmgr.NewConnManager(h.cfg.Limits.Peers*3/4, h.cfg.Limits.Peers, connmgr.WithGracePeriod(time.Minute))
	if err != nil {
		return errors.Join(fmt.Errorf("connection limits: %w", err), resources.Close())
	}
	members := h.cfg.membership()
	members.guests = h.guests
	opts := []libp2p.Option{
		libp2p.Identity(key),
		libp2p.NoListenAddrs,
		// Without port reuse: it would let a second program share our port unnoticed.
		libp2p.Transport(tcp.NewTCPTransport, tcp.DisableReuseport(), tcp.WithDialerForAddr(dialer)),
		libp2p.Security(string(securityID), newProofOf(members)),
		libp2p.Muxer(yamux.ID, muxer(h.cfg.Role)),
		libp2p.ConnectionGater(gater{members}),
		libp2p.ResourceManager(resources),
		libp2p.ConnectionManager(conns),
		libp2p.UserAgent("flox"),
		libp2p.WithDialTimeout(patientDial),
		libp2p.DisableRelay(),
		libp2p.DisableMetrics(),
		libp2p.DisableIdentifyAddressDiscovery(),
		libp2p.Ping(false),
	}
	if len(announce) > 0 {
		opts = append(opts, libp2p.AddrsFactory(func([]multiaddr.Multiaddr) []multiaddr.Multiaddr { return announce }))
	}
	h.net, err = libp2p.New(opts...)
	if err != nil {
		return errors.Join(fmt.Errorf("start libp2p: %w", err), conns.Close(), resources.Close())
	}
	return nil
}

func listenError(on string, err error) error {
	// libp2p keeps only the text of the cause.
	if strings.Contains(err.Error(), syscall.EADDRINUSE.Error()) {
		return fmt.Errorf("listen on %s: the port is in use by another program; stop it or configure another port: %w: %w", on, err, flox.ErrBusy)
	}
	return fmt.Errorf("listen on %s: %w", on, err)
}

// quiet turns libp2p's own logging to stderr off, once: what matters of it
// comes back as errors.
var quiet = sync.OnceFunc(func() {
	gologshim.SetDefaultHandler(slog.DiscardHandler)
	golog.SetAllLoggers(golog.LevelFatal)
})

// Run connects, announces and keeps doing so until ctx ends, then closes the
// host. It returns nil when ctx ended.
func (h *Host) Run(ctx context.Context) error {
	if !h.running.CompareAndSwap(false, true) {
		return fmt.Errorf("peer host runs already: %w", flox.ErrBusy)
	}
	if h.base.Err() != nil {
		return fmt.Errorf("peer host: %w", flox.ErrClosed)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return h.maintain(ctx) })
	group.Go(func() error { return h.watch(ctx) })
	group.Go(func() error { return h.announceLoop(ctx) })
	group.Go(func() error { return h.held.run(ctx, h.log) })
	group.Go(func() error { return h.discoverLAN(ctx) })
	if !h.cfg.NoMDNS {
		group.Go(func() error { return h.broadcast(ctx) })
	}
	group.Go(func() error { return h.advertise(ctx) })
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.base.Done():
			return fmt.Errorf("peer host: %w", flox.ErrClosed)
		}
	})
	err := group.Wait()
	closeErr := h.Close()
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return closeErr
	}
	return errors.Join(err, closeErr)
}

// Close ends every connection and frees the sockets. It may be called twice.
func (h *Host) Close() error {
	var err error
	h.closed.Do(func() {
		h.spawnMu.Lock()
		h.stop()
		h.spawnMu.Unlock()
		h.sched.close()
		h.frames.close()
		h.guests.close() // libp2p waits for them
		if h.dht != nil {
			err = h.dht.Close()
		}
		err = errors.Join(err, h.net.Close())
		h.wg.Wait()
	})
	return err
}

// spawn runs f in a goroutine that Close waits for; f must end soon after
// h.base does. It reports false when the host is closed.
func (h *Host) spawn(f func()) bool {
	h.spawnMu.Lock()
	defer h.spawnMu.Unlock()
	if h.base.Err() != nil {
		return false
	}
	h.wg.Go(f)
	return true
}

// ID is the name of this machine.
func (h *Host) ID() PeerID { return PeerID(h.self.String()) }

// Addrs are the addresses others can reach this machine at, as multiaddrs.
func (h *Host) Addrs() []string {
	if len(h.cfg.Announce) > 0 {
		return addrStrings(h.net.Addrs())
	}
	// Not the host's: those lag behind what the network listens on.
	addrs, err := h.net.Network().InterfaceListenAddresses()
	if err != nil {
		return addrStrings(h.net.Addrs())
	}
	return addrStrings(addrs)
}

// AddPeer remembers where a peer is and connects to it soon.
func (h *Host) AddPeer(p PeerAddr) error {
	info, err := p.addrInfo()
	if err != nil {
		return err
	}
	h.net.Peerstore().AddAddrs(info.ID, info.Addrs, time.Hour)
	h.forgetBackoff(info.ID) // there is news of it
	select {
	case h.found <- info:
	default: // the maintenance loop is behind; it finds the peer by the site key
	}
	return nil
}

// Holding tells that the Holder now also has ids, so that peers hear of them
// within a second or so. Without it they hear at the next scan of the Holder.
func (h *Host) Holding(ids ...flox.CID) {
	h.held.add(ids)
	h.serve.waiting.arrived(ids)
}

// connect reaches a peer within the dial timeout, at addresses known for it.
func (h *Host) connect(ctx context.Context, info peer.AddrInfo) error {
	if h.net.Network().Connectedness(info.ID) == network.Connected {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, h.cfg.Limits.DialTimeout)
	defer cancel()
	return h.net.Connect(ctx, info)
}
