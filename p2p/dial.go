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

// unacknowledged is how long the other machine's kernel may leave what was sent
// to it unacknowledged, again and again, before a connection counts as dead. It
// goes by what TCP sees, so a busy machine or a full line is not mistaken for a
// dead one. Without it TCP tries for a quarter of an hour, in ever longer steps,
// and a call that waits learns of it with the next ping.
const unacknowledged = 5 * time.Second

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
