package raft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Every server takes writes and reads. What was written through one is there at
// once in its own state, and in linearizable reads of all; a retry through
// another server gets the first answer; a refusal keeps its sentinel.
func TestFollowersForward(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	leader := c.leader()
	for round := range 20 {
		for i, n := range c.nodes {
			opt := ProposeOptions{Session: fmt.Sprint("s", round, i), Sequence: 1}
			key := fmt.Sprint("k", round)
			if got := add(t, n, key, opt); got != uint64(i+1) {
				t.Fatalf("server %d: answered %d, want %d", i, got, i+1)
			}
			if got := count(t, n, Local, key); got != uint64(i+1) {
				t.Fatalf("server %d does not see its own write: %d", i, got)
			}
			other := c.nodes[(i+1)%3]
			if got := count(t, other, Linearizable, key); got != uint64(i+1) {
				t.Fatalf("linearizable read of server %d: %d, want %d", (i+1)%3, got, i+1)
			}
			if got := add(t, other, key, opt); got != uint64(i+1) {
				t.Fatalf("retry through another server: %d, want the first answer %d", got, i+1)
			}
		}
	}
	follower := c.nodes[(leader+1)%3]
	_, index, err := follower.NewSession().Propose(within(t), testKind, []byte("fail bob"))
	if !errors.Is(err, ErrRefused) || !errors.Is(err, flox.ErrDenied) || err.Error() != "bob may not: denied" {
		t.Errorf("refusal through a follower: %v", err)
	}
	if index == 0 || follower.Applied() < index {
		t.Errorf("refused at %d, applied here %d", index, follower.Applied())
	}
	big := append([]byte("add "), bytes.Repeat([]byte{'b'}, 1<<20)...)
	if _, _, err := follower.NewSession().Propose(within(t), testKind, big); err != nil {
		t.Errorf("command of 1 MiB through a follower: %v", err)
	}
}

// The leader goes away under writers at all other servers: nobody sees an
// error, nothing is lost or applied twice, none of them retries itself.
func TestCallersOutliveLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	first := c.leader()
	var answered atomic.Uint64
	halfway := make(chan struct{})
	const writers, each = 6, 40
	g, ctx := errgroup.WithContext(within(t))
	for w := range writers {
		n := c.nodes[(first+1+w%2)%3]
		g.Go(func() error {
			s := n.NewSession()
			for i := range each {
				key := fmt.Sprint("w", w)
				reply, _, err := s.Propose(ctx, testKind, []byte("add "+key))
				if err != nil {
					return err
				}
				if got := binary.BigEndian.Uint64(reply); got != uint64(i+1) {
					return fmt.Errorf("writer %d: answered %d, want %d", w, got, i+1)
				}
				if _, err := n.ReadIndex(ctx); err != nil {
					return err
				}
				if answered.Add(1) == writers*each/2 {
					close(halfway)
				}
			}
			return nil
		})
	}
	select {
	case <-halfway:
	case <-ctx.Done():
		t.Fatal(g.Wait())
	}
	if err := c.stop[first](); err != nil {
		t.Errorf("stop of the leader: %v", err)
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for w := range writers {
		c.same(fmt.Sprint("w", w), each)
	}
}

// Without a majority callers wait until their context ends, and are told that
// nothing was done.
func TestNoMajority(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	leader := c.leader()
	for i := 1; i < 3; i++ {
		if err := c.stop[(leader+i)%3](); err != nil {
			t.Fatal(err)
		}
	}
	n := c.nodes[leader]
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var err error
	for err == nil { // so shortly after their last answers they can have elected nobody else
		var v *Reader
		if v, err = n.View(ctx, testKind, Linearizable); err == nil {
			v.Close()
		}
	}
	if !errors.Is(err, flox.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("linearizable read: %v, want ErrUnreachable and the deadline", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, _, err := n.NewSession().Propose(ctx, testKind, []byte("add x")); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("propose: %v, want ErrUnreachable", err)
	}
	if got := count(t, n, Local, "x"); got != 0 {
		t.Errorf("local read: %d, want 0", got)
	}
}

// dialCalls opens a connection as another server would.
func dialCalls(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte{tagCalls}); err != nil {
		t.Fatal(err)
	}
	return conn
}

// A leader that has too much to do says so without keeping what it was sent,
// and goes on; what is no frame ends its connection only.
func TestServePushesBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, func(cfg *Config) { cfg.MaxInFlight = 2 })
	leader := c.leader()
	n, address := c.nodes[leader], c.cfg[leader].Address
	for len(n.served) < cap(n.served) {
		n.served <- struct{}{}
	}
	follower := c.nodes[(leader+1)%3]
	if _, _, err := follower.Propose(within(t), testKind, []byte("add x"), ProposeOptions{}); !errors.Is(err, flox.ErrFull) {
		t.Errorf("full leader: %v, want ErrFull", err)
	}
	for len(n.served) > 0 {
		<-n.served
	}
	if !n.servedBytes.TryAcquire(maxBytesInFlight - 100) {
		t.Fatal("bytes are held by nobody")
	}
	if _, _, err := follower.Propose(within(t), testKind, []byte("add "+strings.Repeat("x", 200)), ProposeOptions{}); !errors.Is(err, flox.ErrFull) {
		t.Errorf("leader that holds much: %v, want ErrFull", err)
	}
	n.servedBytes.Release(maxBytesInFlight - 100)

	for _, bad := range [][]byte{
		{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},             // shorter than its own head
		{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 1}, // 4 GiB
		{0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0xff},       // no message
	} {
		conn := dialCalls(t, address)
		if _, err := conn.Write(bad); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(conn); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("frame %v: %v, want the connection closed", bad, err)
		}
	}
	other, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(other); len(b) > 0 {
		t.Errorf("a stranger was answered %q", b)
	}
	if got := add(t, follower, "x", ProposeOptions{}); got != 1 {
		t.Errorf("after all that: %d, want 1", got)
	}
}

// What an error means survives the way between servers.
func TestFailureOverTheWire(t *testing.T) {
	t.Parallel()
	for _, kind := range append([]error{ErrUnknownOutcome, ErrNotLeader, ErrUnknownCommand, ErrSessionExpired}, refusalKinds[1:9]...) {
		for _, refused := range []error{nil, ErrRefused} {
			err := fmt.Errorf("doing this: %w", kind)
			if refused != nil {
				err = &refusal{kind: kind, message: err.Error()}
			}
			got := decodeFailure(encodeFailure(err))
			if !errors.Is(got, kind) || errors.Is(got, ErrRefused) != (refused != nil) || got.Error() != err.Error() {
				t.Errorf("%v became %v", err, got)
			}
		}
	}
	if err := decodeFailure(&floxv1.ClusterFailure{Kind: 4000, Message: "new"}); err.Error() != "new" || errors.Is(err, ErrNotLeader) {
		t.Errorf("kind of a newer program: %v", err)
	}
}
