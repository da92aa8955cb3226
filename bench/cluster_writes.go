package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	cluster "github.com/floxctl/flox/raft"
	"github.com/floxctl/flox/raft/bare"
)

const (
	clusterServers = 3
	writeClients   = 64
	writeBytes     = 512
	// writeTime is how long each side writes in each round.
	writeTime = 3 * time.Second
	// clusterHeartbeat is what a server takes by itself on a LAN.
	clusterHeartbeat = 200 * time.Millisecond
	// clusterKind is the processor of the benchmark.
	clusterKind = 1000
)

// clusterBench measures the replicated log: three servers in this process, over
// loopback TCP, with their logs on the disk of the temporary directory; and what
// package storehouse measures of itself.
func clusterBench(ctx context.Context) ([]Row, error) {
	dir, err := os.MkdirTemp("", "flox-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	writes, err := writesBench(ctx, dir)
	if err != nil {
		return nil, err
	}
	changes, err := leaderBench(ctx, dir)
	if err != nil {
		return nil, err
	}
	figures, err := figuresBench(ctx, dir, clusterTargets, "NewServer", "PathInfos", "ManyPaths")
	return slices.Concat(writes, changes, figures), err
}

// killable is a Layer over TCP that can go as a killed process does.
type killable struct {
	net.Listener
	mu   sync.Mutex
	dead bool
	open map[net.Conn]struct{}
}

func listenKillable(address string) (*killable, error) {
	l, err := net.Listen("tcp", address) //nolint:noctx // binds and returns
	if err != nil {
		return nil, err
	}
	return &killable{Listener: l, open: map[net.Conn]struct{}{}}, nil
}

func (k *killable) keep(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	k.open[c] = struct{}{}
	return c, nil
}

// Accept is net.Listener.
func (k *killable) Accept() (net.Conn, error) { return k.keep(k.Listener.Accept()) }

// Dial is raft.Layer.
func (k *killable) Dial(address string, timeout time.Duration) (net.Conn, error) {
	return k.keep(net.DialTimeout("tcp", address, timeout)) //nolint:noctx // the interface has none
}

// Close is net.Listener. A killed one is closed.
func (k *killable) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead {
		return nil
	}
	return k.Listener.Close()
}

// gone reports whether it was killed.
func (k *killable) gone() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.dead
}

// kill cuts all connections and takes none any more.
func (k *killable) kill() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dead = true
	for c := range k.open {
		c.Close() //nolint:errcheck // that is the point
	}
	return k.Listener.Close()
}

// put is the Processor of the benchmark: a command is a key, a space and a value.
type put struct{}

// Apply is raft.Processor.
func (put) Apply(tx *cluster.Tx, command []byte, _ time.Time, _ uint64) ([]byte, error) {
	key, value, ok := bytes.Cut(command, []byte(" "))
	if !ok {
		return nil, fmt.Errorf("%d bytes: %w", len(command), cluster.ErrUnknownCommand)
	}
	return nil, tx.Set(key, value)
}

// ourServer is one server of ours.
type ourServer struct {
	cfg   cluster.Config
	layer *killable
	node  *cluster.Node
	stop  context.CancelFunc
	done  chan error
}

func (s *ourServer) start(address string) (err error) {
	if s.layer, err = listenKillable(address); err != nil {
		return err
	}
	s.cfg.Layer, s.cfg.Address = s.layer, s.layer.Addr().String()
	if s.node, err = cluster.Open(s.cfg); err != nil {
		return errors.Join(err, s.layer.Close())
	}
	s.node.Register(clusterKind, put{})
	ctx, stop := context.WithCancel(context.Background())
	s.stop, s.done = stop, make(chan error, 1)
	node, done := s.node, s.done
	go func() { done <- node.Run(ctx) }()
	return nil
}

func (s *ourServer) end() error {
	s.stop()
	return <-s.done
}

// ourCluster is three servers that vote.
type ourCluster []*ourServer

func startOurs(ctx context.Context, dir string) (c ourCluster, err error) {
	for i := range clusterServers {
		s := &ourServer{cfg: cluster.Config{
			Dir: filepath.Join(dir, fmt.Sprint(i)), ID: fmt.Sprint("s", i), Bootstrap: i == 0, PromoteAfter: 100 * time.Millisecond, SnapshotEvery: 1 << 62,
		}}
		if err := s.start("127.0.0.1:0"); err != nil {
			return c, err
		}
		c = append(c, s)
		if i == 0 {
			err = s.node.Ready(ctx)
		} else {
			err = c[0].node.AddServer(ctx, s.cfg.ID, s.cfg.Address, true)
		}
		if err != nil {
			return c, err
		}
	}
	return c, c.healthy(ctx)
}

// healthy waits until all servers vote and keep up.
func (c ourCluster) healthy(ctx context.Context) error {
	for {
		list, err := c[0].node.Servers(ctx)
		if err != nil {
			return err
		}
		good := 0
		for _, m := range list {
			if m.Voter && m.Healthy {
				good++
			}
		}
		if good == len(c) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (c ourCluster) end() (err error) {
	for _, s := range c {
		err = errors.Join(err, s.end())
	}
	return err
}

// leader gives the server that leads.
func (c ourCluster) leader(ctx context.Context) (*ourServer, error) {
	for ctx.Err() == nil {
		for _, s := range c {
			if s.node.Status().State == "leader" {
				return s, nil
			}
		}
		time.Sleep(time.Millisecond)
	}
	return nil, ctx.Err()
}

// writesBench compares acknowledged writes per second with bare raft. Clients of
// both ask the leader in its own process.
func writesBench(ctx context.Context, dir string) ([]Row, error) {
	var p pairs
	for round := range rounds {
		c, err := startOurs(ctx, filepath.Join(dir, fmt.Sprint("ours", round)))
		if err != nil {
			return nil, err
		}
		leader, err := c.leader(ctx)
		if err != nil {
			return nil, err
		}
		sessions := make([]*cluster.Session, writeClients)
		for i := range sessions {
			sessions[i] = leader.node.NewSession()
		}
		ours, err := writeRate(ctx, func(ctx context.Context, client int, command []byte) error {
			_, _, err := sessions[client].Propose(ctx, clusterKind, command)
			return err
		})
		if err = errors.Join(err, c.end()); err != nil {
			return nil, err
		}
		peer, err := bareRate(ctx, filepath.Join(dir, fmt.Sprint("bare", round)))
		if err != nil {
			return nil, err
		}
		p.add(ours, peer)
	}
	row := p.row("acknowledged writes, 3 servers, 64 clients, 512 B", "writes/s", "hashicorp/raft + raft-wal, state in a map, no sessions")
	row.Target, row.Met = ">= 0.6x", row.Ratio >= 0.6
	return []Row{row}, nil
}

// bareRate is the peer's side of a round.
func bareRate(ctx context.Context, dir string) (rate float64, err error) {
	layers, members := make([]*killable, clusterServers), make([]string, clusterServers)
	for i := range layers {
		if layers[i], err = listenKillable("127.0.0.1:0"); err != nil {
			return 0, err
		}
		members[i] = layers[i].Addr().String()
	}
	var servers []*bare.Server
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.Close())
		}
	}()
	for i, l := range layers {
		s, err := bare.Start(filepath.Join(dir, fmt.Sprint(i)), l, members, clusterHeartbeat)
		if err != nil {
			return 0, err
		}
		servers = append(servers, s)
	}
	for ctx.Err() == nil {
		for _, s := range servers {
			if s.Leads() {
				return writeRate(ctx, func(_ context.Context, _ int, command []byte) error { return s.Propose(command) })
			}
		}
		time.Sleep(time.Millisecond)
	}
	return 0, ctx.Err()
}

// writeRate lets all clients write, each when the one before is acknowledged.
func writeRate(ctx context.Context, write func(ctx context.Context, client int, command []byte) error) (float64, error) {
	var acked atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for i := range writeClients {
		g.Go(func() error {
			command := append(fmt.Appendf(nil, "key%d ", i), make([]byte, writeBytes)...)[:writeBytes]
			for time.Since(start) < writeTime {
				if err := write(ctx, i, command); err != nil {
					return err
				}
				acked.Add(1)
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(acked.Load()) / time.Since(start).Seconds(), err
}
