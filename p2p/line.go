package p2p

import (
	"container/list"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"

	"github.com/floxctl/flox"
)

// Bounds of a Line.
const (
	maxLineHandshakes = 64  // half-open connections; for a further one the oldest is closed
	maxLineConns      = 256 // accepted connections in all
	maxLinePerPeer    = 16  // of one peer
	lineQuiet         = 10 * time.Second
)

// LineConfig says how a Line is reached and who may use it. All but Announce
// and Log are needed.
type LineConfig struct {
	// Key is the machine's identity.
	Key ed25519.PrivateKey
	// Listen is the host:port to accept connections at.
	Listen string
	// Announce is the host:port told to others. Default: the one listened at.
	Announce string
	// Secrets are those of the swarm, newest first; one in common will do.
	Secrets func() [][]byte
	// Allowed is asked on both ends of every connection. It must not block.
	Allowed func(PeerID) bool
	// Vouched, if set, says whose key alone is proof enough; see Config.
	Vouched func(PeerID) bool
	// Refused, if set, hears of every machine that was not let in. It must not block.
	Refused func(Refusal)
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger
}

// Line is the servers' own way to each other, for consensus alone: one TCP
// connection per Dial, with the identity and the proof of membership of a Host's
// connections but without a multiplexer, so that no heartbeat ever waits behind
// bulk (measured: 50 to 90 ms behind a transfer at 100 Mb/s). A connection whose
// other end falls silent ends within 20 s.
type Line struct {
	cfg   LineConfig
	key   crypto.PrivKey
	self  PeerID
	addr  lineAddr
	tcp   net.Listener
	ready chan net.Conn
	base  context.Context //nolint:containedctx // ends handshakes that belong to no caller
	stop  context.CancelFunc
	wg    sync.WaitGroup
	slots chan struct{} // handshakes, those given up that have not noticed yet among them

	mu     sync.Mutex
	half   *list.List // of net.Conn that prove themselves, oldest first
	open   map[*lineConn]struct{}
	closed bool
}

// LineAddress is how a server is named on Lines: "PEERID@host:port".
func LineAddress(id PeerID, hostPort string) string { return string(id) + "@" + hostPort }

// ParseLineAddress takes a LineAddress apart. ErrBadInput.
func ParseLineAddress(address string) (id PeerID, hostPort string, err error) {
	name, hostPort, found := strings.Cut(address, "@")
	if _, _, split := net.SplitHostPort(hostPort); !found || split != nil {
		return "", "", fmt.Errorf("server address %q: want PEERID@host:port: %w", address, flox.ErrBadInput)
	}
	if _, err := PeerID(name).decode(); err != nil {
		return "", "", fmt.Errorf("server address %q: %w", address, err)
	}
	return PeerID(name), hostPort, nil
}

// NewLine binds the socket and accepts connections until Close. Errors:
// ErrBadInput, ErrBusy for a port in use.
func NewLine(cfg LineConfig) (*Line, error) {
	if len(cfg.Key) != ed25519.PrivateKeySize || cfg.Secrets == nil || cfg.Allowed == nil {
		return nil, fmt.Errorf("line between servers: Key, Secrets and Allowed are needed: %w", flox.ErrBadInput)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	key, err := crypto.UnmarshalEd25519PrivateKey(cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("machine key: %w: %w", err, flox.ErrBadInput)
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("machine key: %w: %w", err, flox.ErrBadInput)
	}
	tcp, err := (&net.ListenConfig{KeepAliveConfig: keepLine}).Listen(context.Background(), "tcp", cfg.Listen)
	if err != nil {
		return nil, listenError(cfg.Listen, err)
	}
	if cfg.Announce == "" {
		cfg.Announce = tcp.Addr().String()
	}
	l := &Line{
		cfg: cfg, key: key, self: PeerID(id.String()), tcp: tcp, ready: make(chan net.Conn),
		slots: make(chan struct{}, 2*maxLineHandshakes), half: list.New(), open: map[*lineConn]struct{}{},
	}
	l.addr = lineAddr(LineAddress(l.self, cfg.Announce))
	l.base, l.stop = context.WithCancel(context.Background())
	l.wg.Go(l.accept)
	return l, nil
}

// keepLine finds out that the other end is gone.
var keepLine = net.KeepAliveConfig{Enable: true, Idle: lineQuiet, Interval: lineQuiet / 4, Count: 4}

// lineAddr is a LineAddress as net.Addr.
type lineAddr string

func (lineAddr) Network() string  { return "flox" }
func (a lineAddr) String() string { return string(a) }

// Addr is the LineAddress of this server.
func (l *Line) Addr() net.Addr { return l.addr }

// Accept gives the next connection of a member. Its remote address is the
// peer's ID.
func (l *Line) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.base.Done():
		return nil, net.ErrClosed
	}
}

// accept takes connections in and has each prove itself.
func (l *Line) accept() {
	for {
		raw, err := l.tcp.Accept()
		if err != nil {
			if l.base.Err() != nil {
				return
			}
			l.cfg.Log.Warn("no connection can be accepted", "address", l.cfg.Listen, "error", err)
			select {
			case <-time.After(100 * time.Millisecond): // out of descriptors, most likely
				continue
			case <-l.base.Done():
				return
			}
		}
		end := l.begin(raw)
		select {
		case l.slots <- struct{}{}:
		case <-l.base.Done():
			_ = raw.Close()
			return
		}
		l.wg.Go(func() {
			defer func() { <-l.slots }()
			l.admit(raw, end)
		})
	}
}

// begin lists a connection that has to prove itself. If there are too many, the
// oldest is given up: who opens connections and says nothing keeps nobody out.
func (l *Line) begin(raw net.Conn) (end func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.half.Len() >= maxLineHandshakes {
		oldest, _ := l.half.Remove(l.half.Front()).(net.Conn)
		_ = oldest.Close() // its handshake ends with that
	}
	e := l.half.PushBack(raw)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.half.Remove(e) // nothing, if it was given up
	}
}

// admit hands a connection to Accept once its other end is proven to be a member.
func (l *Line) admit(raw net.Conn, end func()) {
	ctx, cancel := context.WithTimeout(l.base, proofTimeout)
	defer cancel()
	c, err := l.secure(ctx, raw, "")
	end()
	if err != nil {
		l.cfg.Log.Debug("a connection between servers was refused", "from", raw.RemoteAddr().String(), "error", err)
		return
	}
	select {
	case l.ready <- c:
	case <-ctx.Done():
		_ = c.Close() // nobody takes it in
	}
}

// Dial connects to a server by its LineAddress. Errors: ErrUnreachable,
// ErrDenied when one end does not take the other for a member, ErrBadInput.
func (l *Line) Dial(address string, timeout time.Duration) (net.Conn, error) {
	id, hostPort, err := ParseLineAddress(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(l.base, timeout)
	defer cancel()
	dialer := net.Dialer{KeepAliveConfig: keepLine}
	raw, err := dialer.DialContext(ctx, "tcp", hostPort)
	if err != nil {
		return nil, fmt.Errorf("dial server %s: %w: %w", address, err, flox.ErrUnreachable)
	}
	c, err := l.secure(ctx, raw, id)
	if err != nil {
		return nil, fmt.Errorf("dial server %s: %w", address, err)
	}
	return c, nil
}

// secure runs TLS and the proof of membership over raw, which it closes if they
// fail. With want the other end must be that peer, and this end is the dialer.
func (l *Line) secure(ctx context.Context, raw net.Conn, want PeerID) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn, err := l.handshake(ctx, raw, want)
	if err != nil {
		return nil, errors.Join(err, ignoreClosed(raw.Close()))
	}
	c := &lineConn{Conn: conn, line: l, peer: PeerID(conn.RemotePeer().String())}
	if err := l.track(c); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func (l *Line) handshake(ctx context.Context, raw net.Conn, want PeerID) (sec.SecureConn, error) {
	quietAfter(raw, 2*lineQuiet)
	proof, err := newProofOf(membership{secrets: l.cfg.Secrets, allowed: l.cfg.Allowed, vouched: l.cfg.Vouched, refused: l.cfg.Refused})(securityID, l.key, nil)
	if err != nil {
		return nil, err
	}
	if want == "" {
		return proof.SecureInbound(ctx, raw, "")
	}
	id, err := want.decode()
	if err != nil {
		return nil, err
	}
	return proof.SecureOutbound(ctx, raw, id)
}

// track lists an open connection, if its peer is a member and has room.
func (l *Line) track(c *lineConn) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	// Asked under the lock: a Kick that comes later finds the connection.
	if !l.cfg.Allowed(c.peer) {
		return fmt.Errorf("%s is no server of this storehouse: %w", c.peer, flox.ErrDenied)
	}
	same := 0
	for o := range l.open {
		if o.peer == c.peer {
			same++
		}
	}
	if same >= 2*maxLinePerPeer || len(l.open) >= maxLineConns {
		return fmt.Errorf("%d connections with server %s are open, %d in all: %w", same, c.peer, len(l.open), flox.ErrFull)
	}
	l.open[c] = struct{}{}
	return nil
}

// Kick closes the connections of those who are allowed no more. Call it after
// every change of what Allowed answers.
func (l *Line) Kick() {
	var out []*lineConn
	l.mu.Lock()
	for c := range l.open {
		if !l.cfg.Allowed(c.peer) {
			out = append(out, c)
		}
	}
	l.mu.Unlock()
	for _, c := range out {
		_ = c.Close() // the other end is told, or gone
	}
}

// Close stops accepting and closes every connection.
func (l *Line) Close() error {
	l.mu.Lock()
	was := l.closed
	l.closed = true
	open := make([]*lineConn, 0, len(l.open))
	for c := range l.open {
		open = append(open, c)
	}
	l.mu.Unlock()
	if was {
		return nil
	}
	l.stop()
	err := l.tcp.Close()
	for _, c := range open {
		_ = c.Close() // the other end is told, or gone
	}
	l.wg.Wait()
	return err
}

// lineConn leaves its Line's list when it is closed.
type lineConn struct {
	net.Conn
	line *Line
	peer PeerID
}

// RemoteAddr is the proven peer.
func (c *lineConn) RemoteAddr() net.Addr { return peerAddr(c.peer) }

// Close is net.Conn.
func (c *lineConn) Close() error {
	c.line.mu.Lock()
	delete(c.line.open, c)
	c.line.mu.Unlock()
	return c.Conn.Close()
}

// ignoreClosed drops the error of closing what is closed.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
