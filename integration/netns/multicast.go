package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mdns is the group and port of RFC 6762.
var mdns = &net.UDPAddr{IP: net.IPv4(224, 0, 0, 251), Port: 5353}

// MulticastReaches reports whether a packet to the mDNS group goes from one
// host to another: within a subnet it must, between subnets it must not. A
// packet that has not come after half a second never will.
func MulticastReaches(ctx context.Context, from, to *Host) (bool, error) {
	var listener *net.UDPConn
	err := to.Do(func() error {
		link, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		listener, err = net.ListenMulticastUDP("udp4", link, mdns)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("listen to mDNS on %s: %w", to.Name, err)
	}
	defer func() { _ = listener.Close() }()
	var sender net.Conn
	err = from.Do(func() error {
		// As mDNS does it: a hop limit of 255, so that only the router's own
		// refusal keeps it from other subnets.
		dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			var sockErr error
			err := raw.Control(func(fd uintptr) {
				sockErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_TTL, 255)
			})
			return errors.Join(err, sockErr)
		}}
		var err error
		sender, err = dialer.DialContext(ctx, "udp4", mdns.String())
		return err
	})
	if err != nil {
		return false, fmt.Errorf("send mDNS from %s: %w", from.Name, err)
	}
	defer sender.Close()
	const question = "flox multicast probe"
	if _, err := sender.Write([]byte(question)); err != nil {
		return false, fmt.Errorf("send mDNS from %s: %w", from.Name, err)
	}
	if err := listener.SetReadDeadline(time.Now().Add(time.Second / 2)); err != nil {
		return false, err
	}
	for buf := make([]byte, 1500); ; {
		n, _, err := listener.ReadFromUDP(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false, nil
		}
		if err != nil || string(buf[:n]) == question {
			return err == nil, err
		}
	}
}
