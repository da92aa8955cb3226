package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/floxctl/flox"
)

// Server speaks the daemon's side of the protocol.
type Server struct {
	// Dir is the store directory every path is in.
	Dir flox.StoreDir
	// Version is shown to clients as the daemon's Nix version.
	Version string
	// Open gives the store of a new connection. An error refuses the client,
	// who reads its text.
	Open func(ctx context.Context, s *Session) (*Store, error)
}

// handshakeTime is how long a client may take to say which version it speaks.
const handshakeTime = 30 * time.Second

// errHungUp is why the context of an operation ended.
var errHungUp = fmt.Errorf("the client hung up: %w", flox.ErrClosed)

// Serve serves one connection until the client hangs up (nil), breaks the
// protocol, or ctx ends. It closes conn; peer is who is at its other end.
func (s *Server) Serve(ctx context.Context, conn io.ReadWriteCloser, peer Peer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	in := newInput(conn, func(err error) { cancel(fmt.Errorf("%w: %w", errHungUp, err)) })
	defer in.close()
	defer conn.Close()
	defer cancel(flox.ErrClosed)
	// A write to a client that reads nothing ends with the connection only.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	c := &connection{server: s, in: newDecoder(in, s.Dir), out: newEncoder(conn, s.Dir)}
	c.log = newLog(c.out)
	err := c.serve(ctx, cancel, peer)
	if errors.Is(err, errCleanEnd) || errors.Is(context.Cause(ctx), errHungUp) {
		return nil
	}
	return err
}

// errCleanEnd: the client hung up between two operations.
var errCleanEnd = errors.New("end of the connection")

// connection is the state of one client. in is used by its one goroutine, out
// only under log's lock while a window is open.
type connection struct {
	server  *Server
	in      *decoder
	out     *encoder
	log     *Log
	session *Session
	store   *Store
	version Version
}

func (c *connection) serve(ctx context.Context, cancel context.CancelCauseFunc, peer Peer) error {
	slow := time.AfterFunc(handshakeTime, func() {
		cancel(fmt.Errorf("no handshake within %s: %w", handshakeTime, flox.ErrUnreachable))
	})
	err := c.handshake(ctx, peer)
	slow.Stop()
	if c.store != nil && c.store.Release != nil {
		defer c.store.Release()
	}
	if err != nil {
		return err
	}
	for {
		code, err := c.nextOp()
		if err != nil {
			return err
		}
		if err := c.perform(ctx, code); err != nil {
			return fmt.Errorf("operation %d: %w", code, err)
		}
	}
}

// handshake is Nix's greeting; a client that may not come in reads why.
func (c *connection) handshake(ctx context.Context, peer Peer) error {
	if magic := c.in.u64(); c.in.err == nil && magic != clientMagic {
		return fmt.Errorf("handshake: first word %#x is not a Nix client's: %w", magic, flox.ErrBadInput)
	}
	c.out.u64(serverMagic)
	c.out.u64(uint64(MaxVersion))
	if err := c.out.flush(); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	client := Version(c.in.u64())
	c.version = min(client, MaxVersion)
	c.in.version, c.out.version = c.version, c.version
	if c.version >= v38 {
		c.in.strs() // what the client could do besides
		c.out.strs(nil)
		if err := c.out.flush(); err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
	}
	if client >= v14 && c.in.u64() != 0 {
		c.in.u64()
	}
	if client >= v11 {
		c.in.u64()
	}
	if c.in.err != nil {
		return fmt.Errorf("handshake: %w", c.in.err)
	}
	if c.version >= v33 {
		c.out.str(c.server.Version)
	}
	if c.version >= v35 {
		c.out.u64(uint64(peer.Trust))
	}
	c.session = newSession(peer, c.version, c.log)
	return c.admit(ctx, client)
}

// admit opens the store and tells the client that it may begin.
func (c *connection) admit(ctx context.Context, client Version) error {
	var err error
	if client>>8 != MinVersion>>8 || client < MinVersion {
		err = errorf(flox.ErrBadInput, "the Nix client version is too old")
		if client > MaxVersion {
			err = errorf(flox.ErrBadInput, "the Nix client speaks protocol %s, this daemon %s to %s", client, MinVersion, MaxVersion)
		}
	} else {
		c.store, err = c.server.Open(ctx, c.session)
	}
	c.log.begin()
	c.log.end(c.version, err)
	return errors.Join(err, c.out.flush())
}

// nextOp reads the number of the next operation.
func (c *connection) nextOp() (Op, error) {
	c.in.begin()
	var word [1]byte
	// The end of the stream is clean here and nowhere else.
	if _, err := io.ReadFull(c.in.r, word[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return 0, errCleanEnd
		}
		return 0, err
	}
	c.in.word = [8]byte{word[0]}
	if !c.in.full(c.in.word[1:]) {
		return 0, c.in.err
	}
	return Op(le(c.in.word)), nil
}
