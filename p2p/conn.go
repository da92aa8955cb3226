package p2p

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/floxctl/flox"
)

// backlog is how many streams may wait to be accepted, and how many of them
// may be one peer's; further ones are reset.
const (
	backlog     = 128
	peerBacklog = 32
)

// Listen accepts streams of a protocol ("/flox/rpc/1") from members. The
// remote address of an accepted connection is the peer's ID, so an HTTP
// server's Request.RemoteAddr names the proven machine. The listener ends with
// the host; a second one for the same protocol is ErrBusy.
func (h *Host) Listen(protocolID string) (net.Listener, error) {
	if err := checkProtocol(protocolID); err != nil {
		return nil, err
	}
	if h.base.Err() != nil {
		return nil, fmt.Errorf("listen for %s: %w", protocolID, flox.ErrClosed)
	}
	for _, p := range h.net.Mux().Protocols() {
		if string(p) == protocolID {
			return nil, fmt.Errorf("protocol %s is listened for already: %w", protocolID, flox.ErrBusy)
		}
	}
	l := &listener{h: h, id: protocol.ID(protocolID), in: make(chan network.Stream, backlog), waiting: map[peer.ID]int{}, done: make(chan struct{})}
	h.net.SetStreamHandler(l.id, l.handle)
	return l, nil
}

// Dial opens a stream of a protocol to a member, connecting if need be.
// Errors: ErrUnreachable, ErrDenied if one side does not take the other for a
// member, with words for the person at this machine.
func (h *Host) Dial(ctx context.Context, id PeerID, protocolID string) (net.Conn, error) {
	pid, err := id.decode()
	if err != nil {
		return nil, err
	}
	h.forgetBackoff(pid) // a caller wants to hear what is, not what was a moment ago
	if err := h.reach(ctx, pid); err != nil {
		return nil, err
	}
	s, err := h.net.NewStream(ctx, pid, protocol.ID(protocolID))
	if err != nil {
		return nil, fmt.Errorf("open %s to peer %s: %w: %w", protocolID, id, flox.ErrUnreachable, err)
	}
	return &streamConn{Stream: s, h: h}, nil
}

type listener struct {
	h       *Host
	id      protocol.ID
	in      chan network.Stream
	mu      sync.Mutex // orders handle before Close; guards waiting
	waiting map[peer.ID]int
	done    chan struct{}
	once    sync.Once
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
	id := s.Conn().RemotePeer()
	if l.waiting[id] >= peerBacklog || len(l.in) == cap(l.in) {
		drop(s)
		return
	}
	l.waiting[id]++
	l.in <- s // has room: nobody else puts in
}

// taken counts s out.
func (l *listener) taken(s network.Stream) net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	id := s.Conn().RemotePeer()
	if l.waiting[id]--; l.waiting[id] <= 0 {
		delete(l.waiting, id)
	}
	return &streamConn{Stream: s, h: l.h}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case s := <-l.in:
		return l.taken(s), nil
	default:
	}
	select {
	case s := <-l.in:
		return l.taken(s), nil
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

// streamConn is a stream as net.Conn. It lets one Read through at a time: a
// stream wakes only one of two waiting readers, and an HTTP server still reads
// while it closes.
type streamConn struct {
	network.Stream
	h *Host

	reading sync.Mutex // held during a Read
	mu      sync.Mutex // guards closed, and with it the deadlines
	closed  bool
}

// linger is how long a closed connection still takes in what the other side
// sends, so that it gets to read our last words.
const linger = 5 * time.Second

func (c *streamConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	n, err := c.Stream.Read(p)
	if err != nil && c.isClosed() {
		err = net.ErrClosed
	}
	return n, err
}

func (c *streamConn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *streamConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.Stream.SetReadDeadline(t)
}

func (c *streamConn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// Close ends the connection as a socket's close does: what was written still
// arrives, and the other side's writes fail soon after instead of waiting for
// ever for somebody to read them, which a stream's own Close leaves them to.
func (c *streamConn) Close() error {
	c.mu.Lock()
	was := c.closed
	c.closed = true
	if !was {
		_ = c.Stream.SetReadDeadline(time.Unix(1, 0)) // ends a Read that waits
	}
	c.mu.Unlock()
	if was {
		return nil
	}
	err := c.CloseWrite()
	if err != nil || !c.h.spawn(c.drain) {
		drop(c.Stream)
	}
	return err
}

// drain takes in what still comes until the other side closes, linger is over,
// or the host closes.
func (c *streamConn) drain() {
	c.reading.Lock()
	defer c.reading.Unlock()
	defer drop(c.Stream)
	defer context.AfterFunc(c.h.base, func() { drop(c.Stream) })()
	if c.Stream.SetReadDeadline(time.Now().Add(linger)) == nil {
		_, _ = io.Copy(io.Discard, c.Stream)
	}
}

func (c *streamConn) LocalAddr() net.Addr  { return peerAddr(c.Conn().LocalPeer().String()) }
func (c *streamConn) RemoteAddr() net.Addr { return peerAddr(c.Conn().RemotePeer().String()) }

// peerAddr is a machine's name as a net.Addr.
type peerAddr string

func (peerAddr) Network() string  { return "flox" }
func (a peerAddr) String() string { return string(a) }
