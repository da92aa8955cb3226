package raft

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/hashicorp/raft"
)

// dialTimeout bounds connecting and one call without much data between servers.
const dialTimeout = 10 * time.Second

// streamLayer shows a Layer to raft.
type streamLayer struct {
	Layer
	address addr
}

// Dial is raft.StreamLayer.
func (s streamLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return s.Layer.Dial(string(address), timeout)
}

// Addr is the address others use, not the one listened on.
func (s streamLayer) Addr() net.Addr { return s.address }

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
		Stream:  streamLayer{cfg.Layer, addr(cfg.Address)},
		MaxPool: 3,
		Timeout: dialTimeout,
		Logger:  newRaftLog(cfg.Log),
	})
	return t, t.Close
}

// logAt writes one line if its level is wanted.
func logAt(log *slog.Logger, level slog.Level, msg string, args ...any) {
	log.Log(context.Background(), level, msg, args...)
}
