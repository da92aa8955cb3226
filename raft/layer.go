package raft

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// dialTimeout bounds connecting and one call without much data between servers.
const dialTimeout = 10 * time.Second

// streamLayer shows a Layer to raft. It remembers open connections, since
// raft's transport leaves those it accepted, and their goroutines, open when it is closed.
type streamLayer struct {
	Layer
	address addr

	mu     sync.Mutex
	open   map[*trackedConn]struct{}
	closed bool
}

// Accept is net.Listener.
func (s *streamLayer) Accept() (net.Conn, error) {
	c, err := s.Layer.Accept()
	if err != nil {
		return nil, err
	}
	return s.track(c)
}

// Dial is raft.StreamLayer.
func (s *streamLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	c, err := s.Layer.Dial(string(address), timeout)
	if err != nil {
		return nil, err
	}
	return s.track(c)
}

func (s *streamLayer) track(c net.Conn) (net.Conn, error) {
	t := &trackedConn{Conn: c, layer: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	s.open[t] = struct{}{}
	return t, nil
}

// Close closes the Layer and every connection.
func (s *streamLayer) Close() error {
	err := s.Layer.Close()
	s.mu.Lock()
	open := slices.Collect(maps.Keys(s.open))
	s.closed = true
	s.mu.Unlock()
	for _, c := range open {
		c.Close() //nolint:errcheck // the other end is told, or gone
	}
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

// newTransport connects raft to cfg.Layer; without one, to nobody. The function
// closes it.
func newTransport(cfg Config) (raft.Transport, func() error) {
	if cfg.Layer == nil {
		_, t := raft.NewInmemTransport(raft.ServerAddress(cfg.Address))
		return t, t.Close
	}
	t := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:  &streamLayer{Layer: cfg.Layer, address: addr(cfg.Address), open: map[*trackedConn]struct{}{}},
		MaxPool: 3,
		Timeout: dialTimeout,
		Logger:  newRaftLog(cfg.Log),
	})
	return t, func() error { t.CloseStreams(); return t.Close() }
}

// logAt writes one line of a library, whose words are not ours to choose.
func logAt(log *slog.Logger, level slog.Level, msg string, args ...any) {
	log.Log(context.Background(), level, msg, args...) //nolint:sloglint // see above
}
