package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
)

const (
	// dialTimeout bounds connecting, and the first byte of a connection.
	dialTimeout = 2 * time.Second
	// rpcTimeout bounds one call of raft's without much data.
	rpcTimeout = 10 * time.Second
	// maxConns bounds the connections between servers, both ways.
	maxConns = 512
)

// streamLayer shares a Layer between raft and our calls: the first byte of a
// connection says whose it is. It remembers open connections, since raft's
// transport leaves those it accepted, and their goroutines, open when it is closed.
type streamLayer struct {
	Layer
	address addr
	log     *slog.Logger
	calls   func(net.Conn) // serves a connection with our calls, and closes it

	raft chan net.Conn // accepted for raft
	done chan struct{} // closed by Close
	work sync.WaitGroup

	mu     sync.Mutex
	open   map[*trackedConn]struct{}
	closed bool
}

// newStreamLayer begins to accept.
func newStreamLayer(cfg Config, calls func(net.Conn)) *streamLayer {
	s := &streamLayer{
		Layer: cfg.Layer, address: addr(cfg.Address), log: cfg.Log, calls: calls,
		raft: make(chan net.Conn), done: make(chan struct{}), open: map[*trackedConn]struct{}{},
	}
	s.work.Go(s.accept)
	return s
}

// accept takes connections in until the Layer is closed.
func (s *streamLayer) accept() {
	const first, most = 5 * time.Millisecond, time.Second
	pause := first
	for {
		c, err := s.Layer.Accept()
		if err == nil {
			pause = first
			t, err := s.track(c)
			if err != nil {
				s.log.Warn("connection of a server dropped", "error", err)
				continue
			}
			s.work.Go(func() { s.sort(t) })
			continue
		}
		select {
		case <-s.done:
			return
		default:
		}
		s.log.Warn("accepting connections of other servers", "error", err, "again_in", pause)
		select {
		case <-time.After(pause):
			pause = min(2*pause, most)
		case <-s.done:
			return
		}
	}
}

// sort reads the first byte of a connection and hands it on.
func (s *streamLayer) sort(c net.Conn) {
	var tag [1]byte
	err := c.SetReadDeadline(time.Now().Add(dialTimeout))
	if err == nil {
		_, err = c.Read(tag[:])
	}
	if err = errors.Join(err, c.SetReadDeadline(time.Time{})); err != nil {
		c.Close() //nolint:errcheck // it said nothing
		return
	}
	switch tag[0] {
	case tagLog:
		select {
		case s.raft <- c:
		case <-s.done:
		}
	case tagCalls:
		s.calls(c)
	default:
		s.log.Warn("connection of a server dropped", "first_byte", tag[0])
		c.Close() //nolint:errcheck // it speaks something else
	}
}

// Accept is net.Listener, for raft.
func (s *streamLayer) Accept() (net.Conn, error) {
	select {
	case c := <-s.raft:
		return c, nil
	case <-s.done:
		return nil, fmt.Errorf("accept: %w", net.ErrClosed)
	}
}

// Dial is raft.StreamLayer.
func (s *streamLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return s.dial(string(address), tagLog, timeout)
}

// dial opens a connection that begins with tag.
func (s *streamLayer) dial(address string, tag byte, timeout time.Duration) (net.Conn, error) {
	timeout = min(timeout, dialTimeout)
	c, err := s.Layer.Dial(address, timeout)
	if err != nil {
		return nil, err
	}
	t, err := s.track(c)
	if err != nil {
		return nil, err
	}
	err = t.SetWriteDeadline(time.Now().Add(timeout))
	if err == nil {
		_, err = t.Write([]byte{tag})
	}
	if err = errors.Join(err, t.SetWriteDeadline(time.Time{})); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (s *streamLayer) track(c net.Conn) (net.Conn, error) {
	t := &trackedConn{Conn: c, layer: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	if len(s.open) >= maxConns {
		return nil, errors.Join(fmt.Errorf("%d connections between servers are open: %w", maxConns, flox.ErrFull), c.Close())
	}
	s.open[t] = struct{}{}
	return t, nil
}

// Close closes the Layer and every connection, and waits for those who serve them.
func (s *streamLayer) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.done)
	open := slices.Collect(maps.Keys(s.open))
	s.mu.Unlock()
	err := s.Layer.Close()
	for _, c := range open {
		c.Close() //nolint:errcheck // the other end is told, or gone
	}
	s.work.Wait()
	return err
}

// Addr is the address others use, not the one listened on.
func (s *streamLayer) Addr() net.Addr { return s.address }

// trackedConn leaves its layer's list when it is closed.
type trackedConn struct {
	net.Conn
	layer *streamLayer
}

// Close is net.Conn.
func (t *trackedConn) Close() error {
	t.layer.mu.Lock()
	delete(t.layer.open, t)
	t.layer.mu.Unlock()
	return t.Conn.Close()
}

// addr is an address as members write it.
type addr string

func (a addr) Network() string { return "flox" }
func (a addr) String() string  { return string(a) }

// connect gives raft its transport, and us the calls between servers. Without a
// Layer it connects to nobody. The function closes both.
func (n *Node) connect() (raft.Transport, func() error) {
	if n.cfg.Layer == nil {
		_, t := raft.NewInmemTransport(raft.ServerAddress(n.cfg.Address))
		return t, t.Close
	}
	ctx, cancel := context.WithCancel(context.Background())
	layer := newStreamLayer(n.cfg, func(c net.Conn) { n.serve(ctx, c) })
	p := newPeers(layer, n.cfg.Log)
	n.peers.Store(p)
	t := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:  layer,
		MaxPool: 3,
		Timeout: rpcTimeout,
		Logger:  newRaftLog(n.cfg.Log),
	})
	var transport raft.Transport = standing{t, n}
	if n.rejoining.Load() {
		transport = newForgetful(standing{t, n}, ctx.Done())
	}
	return transport, func() error {
		n.beats.Lock() // and never unlocked
		cancel()
		p.close()
		t.CloseStreams()
		return t.Close() // closes layer
	}
}

// standing is the transport of a server that may be drained: it then asks
// nobody for a vote, and so stays a follower.
type standing struct {
	*raft.NetworkTransport
	node *Node
}

var _ raft.WithPreVote = standing{}

// SetHeartbeatHandler is raft.Transport. Heartbeats are handled beside raft's own
// goroutine, so one may be under way after raft has shut down: it writes the term
// to the log, which must be open.
func (s standing) SetHeartbeatHandler(handle func(raft.RPC)) {
	s.NetworkTransport.SetHeartbeatHandler(s.node.whileOpen(handle))
}

// whileOpen calls handle until the node ends, which waits for it.
func (n *Node) whileOpen(handle func(raft.RPC)) func(raft.RPC) {
	return func(q raft.RPC) {
		if !n.beats.TryRLock() {
			return // nobody is answered; the connection is about to be closed
		}
		defer n.beats.RUnlock()
		handle(q)
	}
}

var errDrained = fmt.Errorf("this server is drained and does not stand for election: %w", flox.ErrDenied)

// RequestVote is raft.Transport.
func (s standing) RequestVote(id raft.ServerID, target raft.ServerAddress, q *raft.RequestVoteRequest, a *raft.RequestVoteResponse) error {
	// A leader that hands over knows better: this server may not have heard yet
	// that it is drained no more.
	if s.node.rejoining.Load() || (!q.LeadershipTransfer && !s.node.mayStand()) {
		return errDrained
	}
	return s.NetworkTransport.RequestVote(id, target, q, a)
}

// RequestPreVote is raft.WithPreVote.
func (s standing) RequestPreVote(id raft.ServerID, target raft.ServerAddress, q *raft.RequestPreVoteRequest, a *raft.RequestPreVoteResponse) error {
	if !s.node.mayStand() {
		return errDrained
	}
	return s.NetworkTransport.RequestPreVote(id, target, q, a)
}

// mayStand reports whether this server may become the leader: it is not
// drained, or nobody else did for long.
func (n *Node) mayStand() bool {
	if n.rejoining.Load() {
		return false
	}
	if !n.drained.Load() {
		return true
	}
	last := n.started
	if r := n.raft.Load(); r != nil && r.LastContact().After(last) {
		last = r.LastContact()
	}
	return time.Since(last) > 10*n.cfg.Heartbeat
}

// logAt writes one line of a library, whose words are not ours to choose.
func logAt(log *slog.Logger, level slog.Level, msg string, args ...any) {
	log.Log(context.Background(), level, msg, args...) //nolint:sloglint // see above
}
