package raft

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

// simNet connects servers inside one bubble of simulated time. Every direction
// between two can be cut on its own: what is sent then waits, as with a network
// that drops packets, until the cut is mended or the sender gives up.
type simNet struct {
	mu     sync.Mutex
	layers map[string]*simLayer
	cut    map[[2]string]bool // from, to
	rng    *rand.Rand
}

func newSimNet(rng *rand.Rand) *simNet {
	return &simNet{layers: map[string]*simLayer{}, cut: map[[2]string]bool{}, rng: rng}
}

// heal mends everything.
func (s *simNet) heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.cut)
}

// sever cuts the way from one server to another.
func (s *simNet) sever(from, to string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut[[2]string{from, to}] = true
}

func (s *simNet) severed(from, to string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut[[2]string{from, to}]
}

func (s *simNet) delay() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Duration(100+s.rng.IntN(900)) * time.Microsecond
}

// listen gives a server its Layer; a former one of that address must be closed.
func (s *simNet) listen(address string) *simLayer {
	l := &simLayer{net: s, address: address, accepted: make(chan net.Conn), closed: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[address] = l
	return l
}

// simLayer is a Layer in a simNet.
type simLayer struct {
	net      *simNet
	address  string
	accepted chan net.Conn
	closed   chan struct{}
	once     sync.Once
}

var _ Layer = (*simLayer)(nil)

func (l *simLayer) Addr() net.Addr { return addr(l.address) }

func (l *simLayer) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *simLayer) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *simLayer) Dial(address string, timeout time.Duration) (net.Conn, error) {
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
	case to.accepted <- &simConn{Conn: there, net: l.net, from: address, to: l.address, closed: make(chan struct{})}:
		return &simConn{Conn: here, net: l.net, from: l.address, to: address, closed: make(chan struct{})}, nil
	case <-to.closed:
		return nil, errors.New("connection refused")
	case <-timer.C:
		return nil, os.ErrDeadlineExceeded
	}
}

// simConn is one end of a connection in a simNet.
type simConn struct {
	net.Conn
	net      *simNet
	from, to string
	closed   chan struct{}
	once     sync.Once

	mu    sync.Mutex
	until time.Time
}

func (c *simConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *simConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.until = t
	c.mu.Unlock()
	return c.Conn.SetWriteDeadline(t)
}

func (c *simConn) Write(b []byte) (int, error) {
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

func (c *simConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
