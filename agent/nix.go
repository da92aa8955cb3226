package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/worker"
)

// maxNixClients bounds the connections of Nix clients, nixClientsEach those of one
// user, so that no user keeps the others out. A connection needs some tens of
// kilobytes. Who comes when a bound is reached is told so, maxRefusals at once;
// more find the connection closed.
const (
	maxNixClients  = 4096
	nixClientsEach = 1536
	maxRefusals    = 64
)

// nixVersion is what clients are told of their daemon: the Nix whose behaviour
// this is.
const nixVersion = "2.8.0"

// nixDaemon serves stock Nix clients on a unix socket of their own.
type nixDaemon struct {
	a      *Agent
	server worker.Server
	roots  *nixRoots
	logs   *nixLogs
	places nixPlaces
}

func newNixDaemon(a *Agent) *nixDaemon {
	d := &nixDaemon{a: a, roots: openNixRoots(a), logs: &nixLogs{a: a, dir: filepath.Join(a.cfg.StateDir, "nix-logs")}, places: nixPlaces{most: maxNixClients, each: nixClientsEach}}
	d.server = worker.Server{Dir: a.cfg.StoreDir, Version: nixVersion, Open: d.open}
	return d
}

// open makes the store of one connection.
func (d *nixDaemon) open(_ context.Context, s *worker.Session) (*worker.Store, error) {
	roots := d.roots.session(s.Peer().PID)
	n := &nixSession{a: d.a, s: s, logs: d.logs, roots: roots}
	roots.own = int(int32(s.Peer().UID)) == os.Geteuid() //nolint:gosec // -1 = unknown
	return &worker.Store{
		Paths: n, Files: n, Substitutes: n, Derivations: n, Realisations: n, Adder: n, Builder: n, Roots: roots,
		Collector: nixCollector{n, d.roots}, Release: roots.release,
	}, nil
}

// run listens until ctx ends.
func (d *nixDaemon) run(ctx context.Context) error {
	name := d.a.cfg.NixSocket
	if name == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // the socket is for everybody
		return fmt.Errorf("socket for Nix: %w", err)
	}
	if err := clearSocket(ctx, name); err != nil {
		return fmt.Errorf("socket for Nix: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", name)
	if err != nil {
		return fmt.Errorf("socket for Nix: %w", err)
	}
	defer listener.Close()
	if err := os.Chmod(name, 0o666); err != nil { //nolint:gosec // the socket is for everybody
		return fmt.Errorf("socket for Nix: %w", err)
	}
	return d.serve(ctx, listener)
}

func (d *nixDaemon) serve(ctx context.Context, listener net.Listener) error {
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	var serving sync.WaitGroup
	defer serving.Wait()
	refusals := make(chan struct{}, maxRefusals)
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("socket for Nix: %w", err)
		}
		peer := nixPeer(conn)
		full := d.places.take(peer.UID)
		if full == nil {
			serving.Go(func() {
				defer d.places.leave(peer.UID)
				if err := d.server.Serve(ctx, conn, peer); err != nil && ctx.Err() == nil {
					d.a.log.Debug("connection of a Nix client ended", "error", err)
				}
			})
			continue
		}
		d.a.log.Warn("a Nix client was turned away", "uid", peer.UID, "error", full)
		select {
		case refusals <- struct{}{}:
			serving.Go(func() {
				defer func() { <-refusals }()
				refuse := d.server
				refuse.Open = func(context.Context, *worker.Session) (*worker.Store, error) { return nil, full }
				_ = refuse.Serve(ctx, conn, peer) // full is what it returns
			})
		default:
			conn.Close()
		}
	}
}

// nixPlaces counts the connections of all users and of each.
type nixPlaces struct {
	most, each int

	mu  sync.Mutex
	all int
	of  map[uint32]int // by user id; none that has no connection
}

// take takes a place for a user, or says in words for the client why there is none.
func (p *nixPlaces) take(uid uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.of[uid] >= p.each:
		return &worker.Error{Message: fmt.Sprintf("user %d has %d connections to the agent, at most %d are allowed: end some of them", int32(uid), p.of[uid], p.each), Cause: flox.ErrFull} //nolint:gosec // -1 = unknown
	case p.all >= p.most:
		return &worker.Error{Message: fmt.Sprintf("the agent has %d connections, at most %d are allowed: try again when some have ended", p.all, p.most), Cause: flox.ErrFull}
	}
	if p.of == nil {
		p.of = make(map[uint32]int)
	}
	p.all++
	p.of[uid]++
	return nil
}

func (p *nixPlaces) leave(uid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all--
	if p.of[uid]--; p.of[uid] == 0 {
		delete(p.of, uid)
	}
}

// nixPeer finds out who is at the other end. Root and the agent's own user are
// trusted with what is this machine's alone. In the storehouse that counts for
// nothing: it takes in only what proves itself, whoever sends it.
func nixPeer(conn net.Conn) worker.Peer {
	peer := worker.Peer{Trust: worker.NotTrusted, UID: ^uint32(0), GID: ^uint32(0)}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return peer
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return peer
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			peer.UID, peer.GID, peer.PID = cred.Uid, cred.Gid, cred.Pid
			if cred.Uid == 0 || int(cred.Uid) == os.Geteuid() {
				peer.Trust = worker.Trusted
			}
		}
	})
	return peer
}

// nixSession answers one Nix client.
type nixSession struct {
	a    *Agent
	s    *worker.Session
	logs *nixLogs
	// roots of the connection: as with Nix it keeps what it adds and builds while it lasts.
	roots *sessionRoots
}

// keep keeps a path while the connection lasts. One that keeps as much as it may keeps
// no more, and goes on.
func (n *nixSession) keep(ctx context.Context, p flox.StorePath) error {
	if err := n.roots.AddTemp(ctx, p); err != nil && !errors.Is(err, flox.ErrFull) {
		return err
	}
	return nil
}

// say puts an error in the words Nix has for it.
func (n *nixSession) say(p flox.StorePath, err error) error {
	if errors.Is(err, flox.ErrNotFound) {
		return worker.NotValid(n.a.cfg.StoreDir, p)
	}
	return err
}
