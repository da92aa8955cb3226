package raft

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"
)

// slowLine passes connections on to a server, each byte after delay, both ways.
func slowLine(t *testing.T, to string, delay time.Duration) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	closed := false
	keep := func(conns ...net.Conn) bool {
		mu.Lock()
		defer mu.Unlock()
		open = append(open, conns...)
		return !closed
	}
	t.Cleanup(func() {
		mu.Lock()
		closed = true
		all := open
		mu.Unlock()
		for _, c := range all {
			c.Close()
		}
		l.Close()
		work.Wait()
	})
	work.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			if !keep(near, far) {
				near.Close()
				far.Close()
			}
			work.Go(func() { slowly(far, near, delay) })
			work.Go(func() { slowly(near, far, delay) })
		}
	})
	return l.Addr().String()
}

// slowly copies until one end closes.
func slowly(to, from net.Conn, delay time.Duration) {
	type part struct {
		b  []byte
		at time.Time
	}
	way := make(chan part, 1024)
	var work sync.WaitGroup
	work.Go(func() {
		var failed error
		for p := range way {
			time.Sleep(time.Until(p.at))
			if failed == nil {
				_, failed = to.Write(p.b)
			}
		}
		_ = errors.Join(to.Close(), from.Close())
	})
	for {
		b := make([]byte, 32<<10)
		n, err := from.Read(b)
		if n > 0 {
			way <- part{b[:n], time.Now().Add(delay)}
		}
		if err != nil {
			break
		}
	}
	close(way)
	work.Wait()
}

// Where round trips take longer than the heartbeat that is configured the leader stays:
// those that wait for it wait longer, and it waits longer for a majority. That a new
// connection takes longer than an answer is waited for keeps nobody from measuring.
func TestLeaderStaysOverLongWays(t *testing.T) {
	t.Parallel()
	const trip = 300 * time.Millisecond
	c := newFarCluster(t, trip, func(cfg *Config) { cfg.Heartbeat = 200 * time.Millisecond })
	// A machine that is too busy to send a heartbeat in time may change its leader
	// once, and not every time.
	stays := func(key string) error {
		lead := c.leader()
		before := c.nodes[lead].Status()
		for range 5 {
			if _, _, err := c.nodes[(lead+1)%3].NewSession().Propose(within(t), testKind, []byte("add "+key)); err != nil {
				return err
			}
		}
		c.same(key, 5)
		for _, n := range c.nodes {
			if st := n.Status(); st.Leader != before.Leader || st.Term != before.Term {
				return fmt.Errorf("%s led in term %d, and now %s in term %d", before.Leader, before.Term, st.Leader, st.Term)
			}
		}
		return nil
	}
	err := errors.New("not tried")
	for try := 0; err != nil && try < 5; try++ {
		err = stays(fmt.Sprint("x", try))
	}
	if err != nil {
		t.Error(err)
	}
	for _, n := range c.nodes {
		r := n.raft.Load()
		if wait, lease := r.ReloadableConfig().HeartbeatTimeout, leaseOf(r); wait < 4*trip || lease < 2*trip || lease > wait/2 {
			t.Errorf("with a round trip of %v a leader is waited for for %v, and waits for %v", trip, wait, lease)
		}
	}
}
