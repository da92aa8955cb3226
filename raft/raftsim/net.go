package raftsim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/floxctl/flox/raft"
)

// network connects servers inside one bubble of simulated time. Every direction
// between two can be cut on its own: what is sent then waits, as with a network
// that drops packets, until the cut is mended or the sender gives up.
type network struct {
	mu     sync.Mutex
	layers map[string]*layer
	cut    map[[2]string]bool // from, to
	rng    *rand.Rand
}

func newNetwork(rng *rand.Rand) *network {
	return &network{layers: map[string]*layer{}, cut: map[[2]string]bool{}, rng: rng}
}

// heal mends everything.
func (s *network) heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.cut)
}

// sever cuts the way from one server to another.
func (s *network) sever(from, to string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut[[2]string{from, to}] = true
}

func (s *network) severed(from, to string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut[[2]string{from, to}]
}

func (s *network) delay() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Duration(100+s.rng.IntN(900)) * time.Microsecond
}

// listen gives a server its Layer; a former one of that address must be closed.
func (s *network) listen(address string) *layer {
	l := &layer{net: s, address: address, accepted: make(chan net.Conn), closed: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[address] = l
	return l
}

// layer is a Layer in a network.
type layer struct {
	net      *network
	address  string
	accepted chan net.Conn
	closed   chan struct{}
	once     sync.Once
}

var _ raft.Layer = (*layer)(nil)

// addr is the address of a server in a network.
type addr string

func (addr) Network() string  { return "simulated" }
func (a addr) String() string { return string(a) }

func (l *layer) Addr() net.Addr { return addr(l.address) }

func (l *layer) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *layer) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *layer) Dial(address string, timeout time.Duration) (net.Conn, error) {
	until := time.Now().Add(timeout)
	for l.net.severed(l.address, address) || l.net.severed(address, l.address) {
		if time.Now().After(until) {
			return nil, fmt.Errorf("dial %s: %w", address, os.ErrDeadlineExceeded)
		}
		time.Sleep(50 * time.Millisecond)
	}
	l.net.mu.Lock()
	to := l.net.layers[address]
	l.net.mu.Unlock()
	if to == nil {
		return nil, errors.New("connection refused")
	}
	here, there := net.Pipe()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case to.accepted <- &conn{Conn: there, net: l.net, from: address, to: l.address, closed: make(chan struct{})}:
		return &conn{Conn: here, net: l.net, from: l.address, to: address, closed: make(chan struct{})}, nil
	case <-to.closed:
		return nil, errors.New("connection refused")
	case <-timer.C:
		return nil, os.ErrDeadlineExceeded
	}
}

// conn is one end of a connection in a network.
type conn struct {
	net.Conn
	net      *network
	from, to string
	closed   chan struct{}
	once     sync.Once

	mu    sync.Mutex
	until time.Time
}

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.until = t
	c.mu.Unlock()
	return c.Conn.SetWriteDeadline(t)
}

func (c *conn) Write(b []byte) (int, error) {
	wait := c.net.delay()
	for {
		select {
		case <-time.After(wait):
		case <-c.closed:
			return 0, net.ErrClosed
		}
		if !c.net.severed(c.from, c.to) {
			return c.Conn.Write(b)
		}
		c.mu.Lock()
		until := c.until
		c.mu.Unlock()
		if !until.IsZero() && time.Now().After(until) {
			return 0, os.ErrDeadlineExceeded
		}
		wait = 20 * time.Millisecond
	}
}

func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
