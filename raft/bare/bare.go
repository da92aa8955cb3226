// Package bare is hashicorp/raft with raft-wal and nothing around them: what
// package raft is measured against. Its state is a map in memory, it has no
// sessions, and programs do not use it.
package bare

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/floxctl/flox"
)

// Layer connects the servers, as raft.Layer of package raft does.
type Layer interface {
	net.Listener
	Dial(address string, timeout time.Duration) (net.Conn, error)
}

// Server is one server.
type Server struct {
	raft  *raft.Raft
	trans *raft.NetworkTransport
	log   *wal.WAL
}

// stream shows a Layer to raft.
type stream struct{ Layer }

// Dial is raft.StreamLayer.
func (s stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return s.Layer.Dial(string(address), timeout)
}

// machine keeps the last value of every key.
type machine struct{ values map[string][]byte }

// Apply is raft.FSM: a command is a key, a space and a value.
func (m *machine) Apply(l *raft.Log) any {
	key, value, _ := bytes.Cut(l.Data, []byte(" "))
	m.values[string(key)] = value
	return nil
}

// Snapshot is raft.FSM. Measurements end before there is one.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	return nil, fmt.Errorf("no snapshots: %w", flox.ErrBadInput)
}

// Restore is raft.FSM.
func (m *machine) Restore(io.ReadCloser) error {
	return fmt.Errorf("no snapshots: %w", flox.ErrBadInput)
}

// Start starts a server in dir; members are the addresses, and IDs, of all.
// Timeouts are those of package raft.
func Start(dir string, layer Layer, members []string, heartbeat time.Duration) (*Server, error) {
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o700); err != nil {
		return nil, err
	}
	w, err := wal.Open(filepath.Join(dir, "log"), wal.WithLogger(hclog.NewNullLogger()))
	if err != nil {
		return nil, err
	}
	s := &Server{log: w}
	s.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: stream{layer}, MaxPool: 3, Timeout: 10 * time.Second, Logger: hclog.NewNullLogger(),
	})
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(layer.Addr().String())
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = heartbeat, heartbeat, heartbeat
	c.CommitTimeout = heartbeat / 20
	c.SnapshotThreshold = 1 << 62
	c.Logger = hclog.NewNullLogger()
	var all raft.Configuration
	for _, m := range members {
		all.Servers = append(all.Servers, raft.Server{ID: raft.ServerID(m), Address: raft.ServerAddress(m)})
	}
	snapshots := raft.NewDiscardSnapshotStore()
	if err := raft.BootstrapCluster(c, w, w, snapshots, s.trans, all); err != nil {
		return nil, errors.Join(err, s.trans.Close(), w.Close())
	}
	if s.raft, err = raft.NewRaft(c, &machine{values: map[string][]byte{}}, w, w, snapshots, s.trans); err != nil {
		return nil, errors.Join(err, s.trans.Close(), w.Close())
	}
	return s, nil
}

// Leads reports whether this server leads.
func (s *Server) Leads() bool { return s.raft.State() == raft.Leader }

// Propose puts a command into the log and waits until it is applied.
func (s *Server) Propose(command []byte) error { return s.raft.Apply(command, 5*time.Second).Error() }

// Close ends the server.
func (s *Server) Close() error {
	err := s.raft.Shutdown().Error()
	s.trans.CloseStreams()
	return errors.Join(err, s.trans.Close(), s.log.Close())
}
