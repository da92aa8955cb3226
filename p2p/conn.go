package p2p

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/floxctl/flox"
)

// backlog is how many accepted streams may wait; further ones are reset.
const backlog = 128

// Listen accepts streams of a protocol ("/flox/rpc/1") from members. The
// remote address of an accepted connection is the peer's ID, so an HTTP
// server's Request.RemoteAddr names the proven machine. The listener ends with
// the host; a second one for the same protocol is ErrBusy.
func (h *Host) Listen(protocolID string) (net.Listener, error) {
	if !strings.HasPrefix(protocolID, "/flox/") {
		return nil, fmt.Errorf("protocol %q: want /flox/name/version: %w", protocolID, flox.ErrBadInput)
	}
	if h.base.Err() != nil {
		return nil, fmt.Errorf("listen for %s: %w", protocolID, flox.ErrClosed)
	}
	for _, p := range h.net.Mux().Protocols() {
		if string(p) == protocolID {
			return nil, fmt.Errorf("protocol %s is listened for already: %w", protocolID, flox.ErrBusy)
		}
	}
	l := &listener{h: h, id: protocol.ID(protocolID), in: make(chan network.Stream, backlog), done: make(chan struct{})}
	h.net.SetStreamHandler(l.id, l.handle)
	return l, nil
}

// Dial opens a stream of a protocol to a member, connecting if need be.
// Errors: ErrUnreachable, ErrDenied if one side does not take the other for a
// member.
func (h *Host) Dial(ctx context.Context, id PeerID, protocolID string) (net.Conn, error) {
	pid, err := id.decode()
	if err != nil {
		return nil, err
	}
	if err := h.reach(ctx, pid); err != nil {
		return nil, err
	}
	s, err := h.net.NewStream(ctx, pid, protocol.ID(protocolID))
	if err != nil {
		return nil, fmt.Errorf("open %s to peer %s: %w: %w", protocolID, id, flox.ErrUnreachable, err)
	}
	return streamConn{s}, nil
}

type listener struct {
	h    *Host
	id   protocol.ID
	in   chan network.Stream
	mu   sync.Mutex // orders handle before Close
	done chan struct{}
	once sync.Once
}

func (l *listener) handle(s network.Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.done:
		drop(s)
		return
	default:
	}
	select {
	case l.in <- s:
	default:
		drop(s)
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case s := <-l.in:
		return streamConn{s}, nil
	default:
	}
	select {
	case s := <-l.in:
		return streamConn{s}, nil
	case <-l.done:
	case <-l.h.base.Done():
	}
	return nil, net.ErrClosed
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.h.net.RemoveStreamHandler(l.id)
		l.mu.Lock()
		defer l.mu.Unlock()
		close(l.done)
		for {
			select {
			case s := <-l.in:
				drop(s)
			default:
				return
			}
		}
	})
	return nil
}

func (l *listener) Addr() net.Addr { return peerAddr(l.h.self.String()) }

// drop ends a stream both ways. Its error would only say that it was over already.
func drop(s network.Stream) { _ = s.Reset() }

// streamConn is a stream as net.Conn.
type streamConn struct{ network.Stream }

func (c streamConn) LocalAddr() net.Addr  { return peerAddr(c.Conn().LocalPeer().String()) }
func (c streamConn) RemoteAddr() net.Addr { return peerAddr(c.Conn().RemotePeer().String()) }

// peerAddr is a machine's name as a net.Addr.
type peerAddr string

func (peerAddr) Network() string  { return "flox" }
func (a peerAddr) String() string { return string(a) }
