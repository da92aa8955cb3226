package p2p

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// Many networks do not carry multicast: switches that snoop it, access points that
// drop it. There each machine says who it is to its subnet, in one UDP packet.
const (
	// broadcastPort is where all machines listen, several of one host as well.
	broadcastPort = 7782
	// broadcastMagic begins a packet: "flox1 PEER-ID TCP-PORT". The address is the sender's.
	broadcastMagic = "flox1"
	maxBroadcast   = 256
	// broadcastFirst is the first pause between packets, which doubles up to broadcastEvery.
	broadcastFirst = 500 * time.Millisecond
	broadcastEvery = time.Minute
	// maxHeard is how many packets of others are looked at per second, heardAgain after how
	// long one that names the same machine is, and maxKnown how many of those are known.
	maxHeard, heardAgain, maxKnown = 64, 30 * time.Second, 1024
)

// broadcast tells the subnets of this machine of it, and hears of others there. Who
// is heard of still has to prove that it is a member.
func (h *Host) broadcast(ctx context.Context) error {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }) //nolint:gosec // a descriptor
		return errors.Join(err, failed)
	}}
	conn, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf(":%d", broadcastPort))
	if err != nil {
		h.log.Info("no discovery on the LAN by broadcast", "err", err)
		<-ctx.Done()
		return ctx.Err()
	}
	heard := make(chan struct{})
	go func() { // ends with conn
		defer close(heard)
		h.hearBroadcasts(conn)
	}()
	defer func() {
		_ = conn.Close()
		<-heard
	}()
	for pause := broadcastFirst; ; pause = min(2*pause, broadcastEvery) {
		h.shout(conn)
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// shout sends one packet to each subnet that the host listens in.
func (h *Host) shout(conn net.PacketConn) {
	listening, err := h.net.Network().InterfaceListenAddresses()
	if err != nil {
		return
	}
	for _, a := range listening {
		a, ok := lanAddr(a.String())
		if !ok {
			continue
		}
		ip, err := manet.ToIP(a)
		if err != nil {
			continue
		}
		if to := broadcastOf(ip); to != nil {
			packet := fmt.Sprintf("%s %s %s", broadcastMagic, h.ID(), a[1].Value())
			_, _ = conn.WriteTo([]byte(packet), &net.UDPAddr{IP: to, Port: broadcastPort}) // one that is lost is sent again
		}
	}
}

// broadcastOf gives the broadcast address of the subnet an address of this machine is
// in; nil = there is none.
func broadcastOf(ip net.IP) net.IP {
	ifaces, err := net.Interfaces()
	if err != nil || ip.To4() == nil {
		return nil
	}
	for _, i := range ifaces {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagBroadcast == 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok || !n.IP.Equal(ip) || len(n.Mask) != net.IPv4len {
				continue
			}
			if ones, bits := n.Mask.Size(); ones > bits-2 {
				return nil // a line to one other machine
			}
			to := make(net.IP, net.IPv4len)
			for j, b := range ip.To4() {
				to[j] = b | ^n.Mask[j]
			}
			return to
		}
	}
	return nil
}

// hearBroadcasts takes packets until conn is closed.
func (h *Host) hearBroadcasts(conn net.PacketConn) {
	packet := make([]byte, maxBroadcast)
	second, n := time.Now(), 0
	known := make(map[peer.ID]time.Time)
	for {
		size, from, err := conn.ReadFrom(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if now := time.Now(); now.Sub(second) > time.Second {
			second, n = now, 0
		}
		if n++; n > maxHeard {
			time.Sleep(time.Second / maxHeard) // whoever sends without end is not listened to without end
			continue
		}
		if err != nil {
			continue
		}
		info, err := parseBroadcast(packet[:size], from)
		if err != nil || info.ID == h.self || time.Since(known[info.ID]) < heardAgain || h.net.Network().Connectedness(info.ID) == network.Connected {
			continue
		}
		if len(known) >= maxKnown {
			dropOldest(known, func(at time.Time) time.Time { return at })
		}
		known[info.ID] = time.Now()
		h.heardOf(info)
	}
}

// parseBroadcast takes what anybody on the LAN may have sent. Its sender must be of
// one of our subnets.
func parseBroadcast(packet []byte, from net.Addr) (peer.AddrInfo, error) {
	bad := func(why string) (peer.AddrInfo, error) {
		return peer.AddrInfo{}, fmt.Errorf("broadcast from %s: %s: %w", from, why, flox.ErrBadInput)
	}
	fields := strings.Fields(string(packet))
	if len(fields) != 3 || fields[0] != broadcastMagic {
		return bad("not one of ours")
	}
	id, err := PeerID(fields[1]).decode()
	if err != nil {
		return bad("no peer ID")
	}
	port, err := strconv.ParseUint(fields[2], 10, 16)
	if err != nil || port == 0 {
		return bad("no port")
	}
	udp, ok := from.(*net.UDPAddr)
	if !ok || udp.IP.To4() == nil {
		return bad("no IPv4 address")
	}
	addr, err := multiaddr.NewMultiaddr(fmt.Sprintf("/ip4/%s/tcp/%d", udp.IP, port))
	if err != nil || !sameSubnet(addr) {
		return bad("not of a subnet of this machine")
	}
	return peer.AddrInfo{ID: id, Addrs: []multiaddr.Multiaddr{addr}}, nil
}
