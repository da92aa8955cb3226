package p2p

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// quietAfter ends a TCP connection whose other end has not acknowledged anything
// sent for so long: without it the kernel tries for a quarter of an hour.
func quietAfter(c net.Conn, d time.Duration) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return // closed already: the next call says so
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds())) // only slower without it
	})
}
