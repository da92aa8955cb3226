package p2p

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/floxctl/flox"
)

// maxAddrs is how many addresses of one peer are looked at.
const maxAddrs = 16

// parseAddr takes a multiaddr or host:port. A peer ID at the end of a
// multiaddr is cut off.
func parseAddr(s string) (multiaddr.Multiaddr, error) {
	if strings.HasPrefix(s, "/") {
		a, err := multiaddr.NewMultiaddr(s)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w: %w", s, err, flox.ErrBadInput)
		}
		if transport, _ := peer.SplitAddr(a); transport != nil {
			return transport, nil
		}
		return a, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return nil, fmt.Errorf("address %q: want host:port or a multiaddr such as /ip4/10.0.0.1/tcp/4711: %w", s, flox.ErrBadInput)
	}
	kind := "dns"
	if host == "" {
		host = "0.0.0.0"
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		kind = "ip6"
		if ip.Is4() {
			kind = "ip4"
		}
	}
	a, err := multiaddr.NewMultiaddr("/" + kind + "/" + host + "/tcp/" + port)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w: %w", s, err, flox.ErrBadInput)
	}
	return a, nil
}

// CheckAddr refuses what is neither a multiaddr nor host:port. ErrBadInput.
func CheckAddr(addr string) error {
	_, err := parseAddr(addr)
	return err
}

func parseAddrs(list []string) ([]multiaddr.Multiaddr, error) {
	var out []multiaddr.Multiaddr
	for _, s := range list[:min(len(list), maxAddrs)] {
		a, err := parseAddr(s)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// addrInfo turns p into what libp2p dials.
func (p PeerAddr) addrInfo() (peer.AddrInfo, error) {
	id, err := p.ID.decode()
	if err != nil {
		return peer.AddrInfo{}, err
	}
	addrs, err := parseAddrs(p.Addrs)
	if err != nil {
		return peer.AddrInfo{}, fmt.Errorf("peer %s: %w", p.ID, err)
	}
	return peer.AddrInfo{ID: id, Addrs: addrs}, nil
}

func fromAddrInfo(info peer.AddrInfo) PeerAddr {
	return PeerAddr{ID: PeerID(info.ID.String()), Addrs: addrStrings(info.Addrs)}
}

func addrStrings(addrs []multiaddr.Multiaddr) []string {
	var out []string
	for _, a := range addrs[:min(len(addrs), maxAddrs)] {
		out = append(out, a.String())
	}
	return out
}

// sameSubnet reports whether remote is this machine or on a subnet that one of
// our interfaces is directly on.
func sameSubnet(remote multiaddr.Multiaddr) bool {
	ip, err := manet.ToIP(remote)
	if err != nil {
		return false
	}
	addr, ok := netip.AddrFromSlice(ip)
	return ok && onSubnet(addr.Unmap())
}

// onLAN reports whether an address is private and of this machine's own network.
func onLAN(remote net.Addr) bool {
	at, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return false
	}
	addr := at.Addr().Unmap().WithZone("")
	return (addr.IsPrivate() || addr.IsLoopback() || addr.IsLinkLocalUnicast()) && onSubnet(addr)
}

// onSubnet reports whether an address is this machine's or on a subnet that one
// of our interfaces is directly on.
func onSubnet(addr netip.Addr) bool {
	if addr.IsLoopback() || addr.IsLinkLocalUnicast() {
		return true
	}
	ifaces, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(ifaces, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Contains(addr)
	})
}
