package agent

import (
	"net"
	"net/http"
	"testing"
)

// One user cannot take every place at the socket, all of them not root's, and a
// connection that ends makes room for one.
func TestClientsAreBounded(t *testing.T) {
	t.Parallel()
	uid := 0
	c := newClients(func(net.Conn) int { return uid })
	begin := func(as int) (net.Conn, bool) {
		t.Helper()
		near, far := net.Pipe()
		t.Cleanup(func() { near.Close(); far.Close() })
		uid = as
		c.changed(near, http.StateNew)
		_, in := c.uids[near]
		return near, in
	}
	fill := func(as int) (in []net.Conn) {
		for range 2 * maxUserClients {
			conn, ok := begin(as)
			if !ok {
				if _, err := conn.Write([]byte("x")); err == nil {
					t.Error("a client that is one too many is not hung up on")
				}
				return in
			}
			in = append(in, conn)
		}
		return in
	}
	first := fill(1000)
	if len(first) != maxUserClients {
		t.Errorf("one user has %d connections, want at most %d", len(first), maxUserClients)
	}
	for as := 1001; len(fill(as)) > 0; as++ {
		if as == 1100 {
			t.Fatal("the users together have no bound")
		}
	}
	if n := len(c.uids); n != maxClients {
		t.Errorf("%d connections, want at most %d", n, maxClients)
	}
	if _, in := begin(0); !in {
		t.Error("root is kept out by the others")
	}
	c.changed(first[0], http.StateClosed)
	c.changed(first[0], http.StateClosed) // counts once
	if _, in := begin(2000); !in {
		t.Error("a connection that ended makes no room")
	}
	if _, in := begin(2000); in {
		t.Error("a connection that ended makes room for two")
	}
}
