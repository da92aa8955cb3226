package p2p

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// roster is a member list that changes.
type roster struct {
	mu  sync.Mutex
	out map[PeerID]bool
}

func (r *roster) allowed(id PeerID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.out[id]
}

func (r *roster) revoke(id PeerID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out == nil {
		r.out = map[PeerID]bool{}
	}
	r.out[id] = true
}

func newTestLine(t *testing.T, n int, r *roster, secret []byte) *Line {
	t.Helper()
	l, err := NewLine(LineConfig{
		Key: seededKey(n), Listen: "127.0.0.1:0", Allowed: r.allowed,
		Secrets: func() [][]byte { return [][]byte{secret} },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// pair connects two lines.
func pair(t *testing.T, from, to *Line) (dialled, accepted net.Conn) {
	t.Helper()
	dialled, err := from.Dial(to.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if accepted, err = to.Accept(); err != nil {
		t.Fatal(err)
	}
	return dialled, accepted
}

func TestLineCarriesBytesBetweenProvenServers(t *testing.T) {
	t.Parallel()
	var everybody roster
	a, b := newTestLine(t, 1, &everybody, testSecret), newTestLine(t, 2, &everybody, testSecret)
	dialled, accepted := pair(t, a, b)
	if got := accepted.RemoteAddr().String(); got != string(a.self) {
		t.Errorf("accepted from %q, want %q", got, a.self)
	}
	go dialled.Write([]byte("vote")) //nolint:errcheck // the read below sees it
	got := make([]byte, 4)
	if _, err := io.ReadFull(accepted, got); err != nil || string(got) != "vote" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestLineRefusesWhoIsNoServer(t *testing.T) {
	t.Parallel()
	var everybody, strict roster
	a, b := newTestLine(t, 1, &everybody, testSecret), newTestLine(t, 2, &strict, testSecret)
	stranger := newTestLine(t, 3, &everybody, []byte("another secret of 32 bytes or so"))
	if _, err := stranger.Dial(b.Addr().String(), 5*time.Second); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("dial with another secret: %v, want ErrDenied", err)
	}
	if _, err := a.Dial(LineAddress(stranger.self, b.tcp.Addr().String()), 5*time.Second); err == nil {
		t.Error("a server under another one's name was accepted")
	}
	dialled, accepted := pair(t, a, b)
	strict.revoke(a.self)
	b.Kick()
	if _, err := accepted.Read(make([]byte, 1)); err == nil {
		t.Error("the connection of a removed server is open on its old friend")
	}
	if err := dialled.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := dialled.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("read on the removed server: %v, want the end", err)
	}
	// Redialled, it is cut again before a byte of ours goes through.
	again, err := a.Dial(b.Addr().String(), 5*time.Second)
	if err == nil {
		if err := again.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := again.Read(make([]byte, 1)); err == nil {
			t.Error("a removed server got through")
		}
	}
}

func TestLineSurvivesHalfOpenConnections(t *testing.T) {
	t.Parallel()
	var everybody roster
	a, b := newTestLine(t, 1, &everybody, testSecret), newTestLine(t, 2, &everybody, testSecret)
	for range 3 * maxLineHandshakes {
		c, err := net.Dial("tcp", b.tcp.Addr().String()) //nolint:noctx // loopback
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	// The oldest are given up for a server: it need not wait until they are over.
	if _, err := a.Dial(b.Addr().String(), proofTimeout); err != nil {
		t.Fatalf("no server gets in beside half-open connections: %v", err)
	}
}

func TestLineTakesAnySecretOfAnOverlap(t *testing.T) {
	t.Parallel()
	var everybody roster
	old := newTestLine(t, 2, &everybody, testSecret)
	ahead, err := NewLine(LineConfig{
		Key: seededKey(1), Listen: "127.0.0.1:0", Allowed: everybody.allowed,
		Secrets: func() [][]byte { return [][]byte{[]byte("the next secret of the swarm, 32."), testSecret} },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ahead.Close() })
	pair(t, ahead, old)
	pair(t, old, ahead)
}

func TestLineAddresses(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"", "10.0.0.1:1", "@10.0.0.1:1", "12D3@10.0.0.1:1", string(LineAddress("x", "")), "x@y"} {
		if _, _, err := ParseLineAddress(bad); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q: %v, want ErrBadInput", bad, err)
		}
	}
}
