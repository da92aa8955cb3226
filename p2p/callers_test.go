package p2p

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// A client is kept per peer, calls use its connection again, and only those of
// the peers asked last are kept.
func TestCallersKeepWhoWasAskedLast(t *testing.T) {
	t.Parallel()
	server := start(t, 500, nil)
	l, err := server.Listen("/flox/rpc/1")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.RemoteAddr)
	})}
	go func() { _ = web.Serve(l) }()
	defer web.Close()
	asking := start(t, 501, nil)
	join(t, asking, server)
	dials := 0
	c := NewCallers(func(ctx context.Context, peer PeerID, protocol string) (net.Conn, error) {
		dials++
		return asking.Dial(ctx, peer, protocol)
	}, "/flox/rpc/1", 2)
	defer c.Close()
	call := func() {
		t.Helper()
		resp, err := c.Client(server.ID()).Get("http://peer/")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != string(asking.ID()) {
			t.Errorf("answer %q, %v", b, err)
		}
	}
	for range 3 {
		call()
	}
	if dials != 1 {
		t.Errorf("%d connections for calls one after the other, want 1", dials)
	}
	first := c.Client(server.ID())
	c.Client("a")
	c.Client(server.ID())
	c.Client("b") // one too many: a was not asked for longest
	if c.Client(server.ID()) != first || len(c.peers) != 2 || c.peers["a"] != nil {
		t.Errorf("kept are %v", c.peers)
	}
}
