package p2p

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/multiformats/go-multiaddr"
	"golang.org/x/sys/unix"
)

// unacknowledged is how long what was sent may stay unacknowledged, or wait for
// room at the other end, before a connection counts as dead. A full line or a
// machine whose programs are slow is not mistaken for a dead one, because its
// kernel goes on acknowledging; one that reads nothing of a connection for so
// long, while more is there than its window holds, is. So this is longer than
// what a busy machine holds its programs up for, and not much longer than a
// look-up may take (5 s): without it TCP tries for a quarter of an hour, in ever
// longer steps, and a call that waits learns of it with the next ping.
const unacknowledged = 10 * time.Second

// dialer makes connections that notice when nothing comes through any more.
func dialer(multiaddr.Multiaddr) (tcp.ContextDialer, error) {
	return &net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		ctlErr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacknowledged.Milliseconds()))
		})
		return os.NewSyscallError("setsockopt", errors.Join(ctlErr, err))
	}}, nil
}
