package p2p

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/sec"

	"github.com/floxctl/flox"
)

const (
	maxGuests      = 32 // at once
	guestsEach     = 2  // of one machine; of one address, without an invite
	guestTime      = 30 * time.Second
	maxInviteID    = 128 // bytes
	maxGuestProto  = 64  // bytes
	guestLastWords = 2 * time.Second
)

// The reasons why a guest is not taken, and what ends a handshake that was one's.
const (
	refusedInvite = refusal("that invite is not valid (any more): it may be used up, expired or withdrawn; ask for a new one")
	refusedWindow = refusal("the storehouse takes nobody without an invite now; ask for one, or let its operator open a window")
	refusedFar    = refusal("the storehouse takes machines without an invite from its own LAN alone, and this one asks from elsewhere; ask for an invite")
	refusedDoor   = refusal("that machine takes no guests for this: it is no storehouse, or one of another release")
)

var (
	errGuests = fmt.Errorf("the storehouse has as many guests as it takes; try again in half a minute: %w", flox.ErrBusy)
	errServed = errors.New("the connection was a guest's")
)

// guestDoor lets machines that are no members speak one protocol for a moment.
// A guest's connection never reaches libp2p's swarm: it is lent, as it comes
// out of the handshake, to who listens for guests. So it has no streams, is
// nobody's peer and takes no room from members.
type guestDoor struct {
	invites func(string) ([]byte, bool)
	window  func() bool
	members func(PeerID) bool   // nil = none
	near    func(net.Addr) bool // whether an address is of this LAN
	time    time.Duration
	done    chan struct{} // closed with the host

	mu        sync.Mutex
	open      map[string]int // by machine, or address
	all       int
	listeners map[string]*guestListener
	closed    bool
}

func newGuestDoor(cfg Config) *guestDoor {
	return &guestDoor{
		invites: cfg.Invites, window: cfg.Window, members: cfg.Vouched, near: onLAN, time: orDefault(cfg.guestTime, guestTime),
		done: make(chan struct{}), open: map[string]int{}, listeners: map[string]*guestListener{},
	}
}

// ListenGuests accepts connections of machines that are no members and want to
// speak a protocol ("/flox/join/1"): those with an invite that Config.Invites
// knows, any of this LAN while Config.Window is open, and those that Config.Vouched says are
// members after all. There are at most 32 at once and
// 2 of one machine, for at most 30 s each. RemoteAddr is the machine's proven
// ID; see GuestInvite. The listener ends with the host.
func (h *Host) ListenGuests(proto string) (net.Listener, error) {
	if err := checkProtocol(proto); err != nil {
		return nil, err
	}
	if h.cfg.Invites == nil && h.cfg.Window == nil {
		return nil, fmt.Errorf("listen for guests: neither Invites nor Window is configured, so none could come: %w", flox.ErrBadInput)
	}
	d := h.guests
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, fmt.Errorf("listen for guests: %w", flox.ErrClosed)
	case d.listeners[proto] != nil:
		return nil, fmt.Errorf("guests of protocol %s are listened for already: %w", proto, flox.ErrBusy)
	}
	l := &guestListener{door: d, proto: proto, self: h.ID(), in: make(chan *guestConn, maxGuests), done: make(chan struct{})}
	d.listeners[proto] = l
	return l, nil
}

// GuestInvite tells which invite an accepted connection of ListenGuests was
// opened with ("" = none, within the window or of a member) and by which machine. Both are
// proven. For any other connection the peer is "".
func GuestInvite(conn net.Conn) (inviteID string, peer PeerID) {
	if c, ok := conn.(*guestConn); ok {
		return c.invite, c.peer
	}
	return "", ""
}

// GuestAddr is the host:port that an accepted connection of ListenGuests comes from, ""
// for any other connection.
func GuestAddr(conn net.Conn) string {
	if c, ok := conn.(*guestConn); ok && c.from != nil {
		return c.from.String()
	}
	return ""
}

// welcome runs the rest of a guest's handshake and then lends the connection
// out, until it ends or its time is up. It always gives an error.
func (d *guestDoor) welcome(conn sec.SecureConn, p *proving, from net.Addr) error {
	invite, err := readText(conn, maxInviteID)
	if err != nil {
		return err
	}
	proto, err := readText(conn, maxGuestProto)
	if err != nil {
		return err
	}
	l := d.listener(proto)
	secret, code := d.secret(invite, PeerID(conn.RemotePeer().String()), from)
	switch {
	case l == nil:
		return refuse(conn, refusedDoor, verdictDoor)
	case code != verdictOK:
		return refuse(conn, verdicts[code], code)
	}
	p.keys, p.claims = keysOf(guestProof, secret), []string{invite, proto}
	if err := p.demand(conn); err != nil {
		return err
	}
	c := &guestConn{Conn: conn, from: from, invite: invite, self: l.self, peer: PeerID(conn.RemotePeer().String()), ended: make(chan struct{})}
	leave, ok := d.enter(c)
	if !ok {
		return refuse(conn, errGuests, verdictGuests)
	}
	defer leave()
	if _, err := conn.Write([]byte{proofVersion, verdictOK}); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	return d.lend(l, c)
}

// listener finds who takes guests of a protocol; a host without a door has none.
func (d *guestDoor) listener(proto string) *guestListener {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.listeners[proto]
}

// secret gives what a guest has to know, or why it is not taken. A member needs
// no invite: the answer that made it one may have been lost.
func (d *guestDoor) secret(invite string, peer PeerID, from net.Addr) ([]byte, byte) {
	switch {
	case d == nil:
		return nil, verdictDoor
	case invite == "" && d.members != nil && d.members(peer):
		return nil, verdictOK // TLS proves who it is
	case invite == "" && (d.window == nil || !d.window()):
		return nil, verdictWindow
	case invite == "" && !d.near(from):
		return nil, verdictFar
	case invite == "":
		return nil, verdictOK // whether it may join is decided later
	case d.invites == nil:
		return nil, verdictInvite
	}
	secret, ok := d.invites(invite)
	if !ok || len(secret) < minSecret {
		return nil, verdictInvite
	}
	return secret, verdictOK
}

// enter counts c in, if there is room.
func (d *guestDoor) enter(c *guestConn) (leave func(), ok bool) {
	keys := []string{string(c.peer)}
	if c.invite == "" { // keys cost nothing, addresses do
		host, _, _ := net.SplitHostPort(c.from.String())
		keys = append(keys, "address "+host)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.all >= maxGuests {
		return nil, false
	}
	for _, k := range keys {
		if d.open[k] >= guestsEach {
			return nil, false
		}
	}
	for _, k := range keys {
		d.open[k]++
	}
	d.all++
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.all--
		for _, k := range keys {
			if d.open[k]--; d.open[k] == 0 {
				delete(d.open, k)
			}
		}
	}, true
}

// lend hands c to l and waits until it is given back.
func (d *guestDoor) lend(l *guestListener, c *guestConn) error {
	over := time.NewTimer(d.time)
	defer over.Stop()
	select {
	case <-l.done:
		return net.ErrClosed
	case l.in <- c: // has room for all that enter
	}
	select {
	case <-c.ended:
		// What the guest still sends is taken in, so that it gets to read our
		// last words: closing at once would make its system throw them away.
		if c.Conn.SetReadDeadline(time.Now().Add(guestLastWords)) == nil {
			_, _ = io.Copy(io.Discard, c.Conn)
		}
	case <-over.C:
	case <-l.done:
	case <-d.done:
	}
	c.closed.Store(true)
	return errServed
}

func (d *guestDoor) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.closed = true
		close(d.done)
	}
}

// guestListener is what ListenGuests gives.
type guestListener struct {
	door  *guestDoor
	proto string
	self  PeerID
	in    chan *guestConn
	done  chan struct{}
	once  sync.Once
}

func (l *guestListener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
	case <-l.door.done:
	case c := <-l.in:
		return c, nil
	}
	return nil, net.ErrClosed
}

// Close ends the guests that are there as well.
func (l *guestListener) Close() error {
	l.once.Do(func() {
		l.door.mu.Lock()
		defer l.door.mu.Unlock()
		delete(l.door.listeners, l.proto)
		close(l.done)
	})
	return nil
}

func (l *guestListener) Addr() net.Addr { return peerAddr(l.self) }

// guestConn is a guest's connection, at either end. ended is nil at the guest's.
type guestConn struct {
	net.Conn
	from       net.Addr // nil at the guest's
	invite     string
	self, peer PeerID
	ended      chan struct{}
	closed     atomic.Bool
}

func (c *guestConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	return n, err
}

// SetReadDeadline does nothing once c is closed: the door reads then.
func (c *guestConn) SetReadDeadline(t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *guestConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// Close ends the connection; what was written still arrives.
func (c *guestConn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	if c.ended == nil {
		return c.Conn.Close()
	}
	defer close(c.ended)
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0)) // ends a Read that waits
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

func (c *guestConn) LocalAddr() net.Addr  { return peerAddr(c.self) }
func (c *guestConn) RemoteAddr() net.Addr { return peerAddr(c.peer) }

// readText takes a text that its length precedes.
func readText(r io.Reader, limit int) (string, error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return "", err
	}
	if int(n[0]) > limit {
		return "", fmt.Errorf("a guest's text has %d bytes, want at most %d: %w", n[0], limit, flox.ErrCorrupt)
	}
	text := make([]byte, n[0])
	_, err := io.ReadFull(r, text)
	return string(text), err
}
