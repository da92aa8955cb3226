package p2p

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/floxctl/flox"
)

const joinProto = "/flox/join/1"

var inviteSecret = []byte("the secret of one invite")

// porch starts a storehouse that takes guests and echoes what they send. It
// knows one invite; window tells whether it takes others.
func porch(t *testing.T, n int, window func() bool, change func(*Config)) (*Host, *atomic.Int64) {
	t.Helper()
	h := start(t, n, func(c *Config) {
		c.Role = Storehouse
		c.Window = window
		c.Invites = func(id string) ([]byte, bool) { return inviteSecret, id == "good" }
		if change != nil {
			change(c)
		}
	})
	var swarm atomic.Int64 // connections that reached it
	h.net.Network().Notify(&network.NotifyBundle{ConnectedF: func(network.Network, network.Conn) { swarm.Add(1) }})
	l, err := h.ListenGuests(joinProto)
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the host
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				id, peer := GuestInvite(conn)
				fmt.Fprintf(conn, "%s of %s, %s\n", id, peer, conn.RemoteAddr())
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return h, &swarm
}

// visit opens a guest connection and says something.
func visit(t *testing.T, n int, to PeerAddr, g Guest) (net.Conn, error) {
	t.Helper()
	conn, err := DialGuest(within(t, time.Minute), seededKey(n), to, g, joinProto)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	want := fmt.Sprintf("%s of %s, %s\nhello", g.InviteID, idOf(t, n), idOf(t, n))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return nil, err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil {
		return nil, err
	}
	if string(got) != want {
		t.Fatalf("got %q, want %q", got, want)
	}
	return conn, nil
}

// noGuests waits until the last one has left.
func noGuests(t *testing.T, store *Host) {
	t.Helper()
	eventually(t, "the guests are gone", func() bool {
		store.guests.mu.Lock()
		defer store.guests.mu.Unlock()
		return store.guests.all == 0 && len(store.guests.open) == 0
	})
}

// Who has an invite gets in, without becoming anybody's peer; who has none, the
// wrong one, or talks to another machine is told what is wrong.
func TestGuests(t *testing.T) {
	t.Parallel()
	var open atomic.Bool
	store, swarm := porch(t, 360, open.Load, nil)
	good := Guest{"good", inviteSecret}
	conn, err := visit(t, 361, addrOf(store), good)
	if err != nil {
		t.Fatal(err)
	}
	if conn.RemoteAddr().String() != string(store.ID()) {
		t.Errorf("remote address %s", conn.RemoteAddr())
	}
	if id, who := GuestInvite(conn); id != "good" || who != store.ID() {
		t.Errorf("invite %s of %s", id, who)
	}
	other := start(t, 362, nil)
	impostor := addrOf(other)
	impostor.ID = store.ID()
	for name, c := range map[string]struct {
		to    PeerAddr
		guest Guest
		proto string
		want  error
	}{
		"unknown invite":  {addrOf(store), Guest{"bad", inviteSecret}, joinProto, refusedInvite},
		"wrong secret":    {addrOf(store), Guest{"good", []byte("some other secret")}, joinProto, refusedSecret},
		"no window":       {addrOf(store), Guest{}, joinProto, refusedWindow},
		"a member's door": {addrOf(store), good, protoBlocks, refusedDoor},
		"no storehouse":   {addrOf(other), good, joinProto, refusedDoor},
		"an impostor":     {impostor, good, joinProto, refusedImpostor},
	} {
		c2, err := DialGuest(within(t, time.Minute), seededKey(363), c.to, c.guest, c.proto)
		if !errors.Is(err, c.want) || !errors.Is(err, flox.ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			c2.Close()
		}
	}
	open.Store(true)
	if _, err := visit(t, 364, addrOf(store), Guest{}); err != nil {
		t.Errorf("in the window: %v", err)
	}
	if n, peers := swarm.Load(), store.Peers(); n != 0 || len(peers) != 0 {
		t.Errorf("guests made %d connections of members, peers %v", n, peers)
	}
	conn.Close()
	if _, err := store.ListenGuests(joinProto); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("second listener: %v", err)
	}
	if _, err := other.ListenGuests(joinProto); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("no invites: %v", err)
	}
	member := start(t, 365, nil)
	join(t, member, store)
}

// The window is open to this LAN alone: who asks from elsewhere is told so, and
// an invite is good from anywhere.
func TestWindowIsForTheLAN(t *testing.T) {
	t.Parallel()
	store, _ := porch(t, 366, func() bool { return true }, nil)
	store.guests.near = func(net.Addr) bool { return false }
	if _, err := visit(t, 367, addrOf(store), Guest{}); !errors.Is(err, refusedFar) || !errors.Is(err, flox.ErrDenied) {
		t.Errorf("from elsewhere: %v", err)
	}
	if _, err := visit(t, 367, addrOf(store), Guest{"good", inviteSecret}); err != nil {
		t.Errorf("from elsewhere, with an invite: %v", err)
	}
	own := net.IPv4(127, 0, 0, 1)
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsPrivate() {
			own = ip.IP
		}
	}
	for addr, want := range map[string]bool{
		"127.0.0.1:1": true, "[::1]:1": true, "[::ffff:127.0.0.1]:1": true, "[fe80::1%eth0]:1": true,
		net.JoinHostPort(own.String(), "1"): true,
		"8.8.8.8:1":                         false, "[2001:4860::1]:1": false, "10.254.253.252:1": false, "[fd12:3456::1]:1": false, "nonsense": false,
	} {
		if got := onLAN(text(addr)); got != want {
			t.Errorf("%s is on this LAN: %v, want %v", addr, got, want)
		}
	}
}

// text is an address as it is written.
type text string

func (text) Network() string  { return "tcp" }
func (a text) String() string { return string(a) }

// Whoever is refused is heard of, with who it is, where from and why.
func TestRefusalsAreHeardOf(t *testing.T) {
	t.Parallel()
	heard := make(chan Refusal, 16)
	out := idOf(t, 369)
	store, _ := porch(t, 368, func() bool { return false }, func(c *Config) {
		c.Allowed = func(id PeerID) bool { return id != out }
		c.Refused = func(r Refusal) { heard <- r }
	})
	expect := func(n int, why error) {
		t.Helper()
		select {
		case r := <-heard:
			host, _, err := net.SplitHostPort(r.Addr)
			if r.Peer != idOf(t, n) || !errors.Is(r.Why, why) || err != nil || host != "127.0.0.1" {
				t.Errorf("heard %+v, want %v of %s", r, why, idOf(t, n))
			}
		case <-time.After(20 * time.Second):
			t.Errorf("nothing is heard of %v", why)
		}
	}
	if _, err := visit(t, 365, addrOf(store), Guest{"bad", inviteSecret}); err == nil {
		t.Error("a bad invite is taken")
	}
	expect(365, refusedInvite)
	if _, err := visit(t, 365, addrOf(store), Guest{}); err == nil {
		t.Error("no window is open")
	}
	expect(365, refusedWindow)
	wrong := start(t, 364, func(c *Config) { c.Secret = []byte("some other swarm's secret") })
	for _, h := range []*Host{wrong, start(t, 369, nil)} {
		if err := h.AddPeer(addrOf(store)); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Dial(within(t, time.Minute), store.ID(), "/flox/rpc/1"); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("let in: %v", err)
		}
		if h == wrong {
			expect(364, refusedSecret)
			for len(heard) > 0 { // it has tried by itself, too
				<-heard
			}
			_ = wrong.Close()
		}
	}
	for r := range heard {
		if r.Peer == out {
			if !errors.Is(r.Why, noMember) {
				t.Errorf("why: %v", r.Why)
			}
			return
		}
	}
}

// A machine gets two connections, all guests together 32, and each its time.
func TestGuestLimits(t *testing.T) {
	t.Parallel()
	store, _ := porch(t, 370, func() bool { return true }, nil)
	good := Guest{"good", inviteSecret}
	full := func(n int, g Guest) {
		t.Helper()
		if _, err := visit(t, n, addrOf(store), g); !errors.Is(err, flox.ErrBusy) {
			t.Errorf("too many: %v", err)
		}
	}
	var open []net.Conn
	for i := range maxGuests {
		conn, err := visit(t, 400+i/2, addrOf(store), good)
		if err != nil {
			t.Fatal(err)
		}
		if open = append(open, conn); i == 1 {
			full(400, good)
		}
	}
	full(399, good)
	for _, conn := range open {
		conn.Close()
	}
	noGuests(t, store)
	for n := range 2 {
		if _, err := visit(t, 440+n, addrOf(store), Guest{}); err != nil {
			t.Fatal(err)
		}
	}
	full(442, Guest{}) // a third one at this address
	if _, err := visit(t, 443, addrOf(store), good); err != nil {
		t.Errorf("with an invite: %v", err)
	}
}

// A guest that stays is shown out, and does not keep the host from closing.
func TestGuestTime(t *testing.T) {
	t.Parallel()
	store, _ := porch(t, 371, nil, func(c *Config) { c.guestTime = time.Second })
	conn, err := visit(t, 372, addrOf(store), Guest{"good", inviteSecret})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); len(got) > 0 || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%q, %v", got, err)
	}
	slow, _ := porch(t, 373, nil, nil)
	if conn, err = visit(t, 374, addrOf(slow), Guest{"good", inviteSecret}); err != nil {
		t.Fatal(err)
	}
	if err := slow.Close(); err != nil {
		t.Error(err)
	}
	if got, _ := io.ReadAll(conn); len(got) > 0 {
		t.Errorf("%q after the host was closed", got)
	}
}

// An HTTP server serves guests; one that refuses early is still heard out.
func TestGuestHTTP(t *testing.T) {
	t.Parallel()
	store := start(t, 375, func(c *Config) {
		c.Invites = func(id string) ([]byte, bool) { return inviteSecret, id == "good" }
	})
	l, err := store.ListenGuests(joinProto)
	if err != nil {
		t.Fatal(err)
	}
	type invite struct{}
	srv := &http.Server{
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			id, _ := GuestInvite(c)
			return context.WithValue(ctx, invite{}, id)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusForbidden) // the body is not read
			fmt.Fprintf(w, "%v: %s", r.Context().Value(invite{}), strings.Repeat("no ", 100_000))
		}),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return DialGuest(ctx, seededKey(376), addrOf(store), Guest{"good", inviteSecret}, joinProto)
	}}
	for range 5 {
		resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Post("http://store/", "text/plain", bytes.NewReader(make([]byte, 1<<20)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := "good: " + strings.Repeat("no ", 100_000); err != nil || string(got) != want {
			t.Fatalf("%d bytes, want %d (%v)", len(got), len(want), err)
		}
		noGuests(t, store)
	}
	tr.CloseIdleConnections()
	srv.Close()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
	_, err = DialGuest(within(t, time.Minute), seededKey(376), addrOf(store), Guest{"good", inviteSecret}, joinProto)
	if !errors.Is(err, refusedDoor) {
		t.Errorf("after the listener was closed: %v", err)
	}
}

// What cannot work is refused before anything is sent; a dead address does not
// hide a living one.
func TestDialGuestErrors(t *testing.T) {
	t.Parallel()
	store, _ := porch(t, 377, nil, nil)
	good, at := Guest{"good", inviteSecret}, addrOf(store)
	for name, dial := range map[string]func(context.Context) (net.Conn, error){
		"no key": func(ctx context.Context) (net.Conn, error) { return DialGuest(ctx, nil, at, good, joinProto) },
		"no address": func(ctx context.Context) (net.Conn, error) {
			return DialGuest(ctx, seededKey(378), PeerAddr{ID: at.ID}, good, joinProto)
		},
		"bad address": func(ctx context.Context) (net.Conn, error) {
			return DialGuest(ctx, seededKey(378), PeerAddr{at.ID, []string{"x"}}, good, joinProto)
		},
		"bad peer": func(ctx context.Context) (net.Conn, error) {
			return DialGuest(ctx, seededKey(378), PeerAddr{"x", at.Addrs}, good, joinProto)
		},
		"short secret": func(ctx context.Context) (net.Conn, error) {
			return DialGuest(ctx, seededKey(378), at, Guest{"good", []byte("x")}, joinProto)
		},
		"long invite": func(ctx context.Context) (net.Conn, error) {
			return DialGuest(ctx, seededKey(378), at, Guest{strings.Repeat("x", 200), inviteSecret}, joinProto)
		},
		"not our proto": func(ctx context.Context) (net.Conn, error) {
			return DialGuest(ctx, seededKey(378), at, good, "/ipfs/id/1.0.0")
		},
	} {
		if _, err := dial(within(t, time.Minute)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	web := &http.Server{Handler: http.NotFoundHandler()}
	go web.Serve(mute)
	defer web.Close()
	at.Addrs = append([]string{"127.0.0.1:1", mute.Addr().String()}, at.Addrs...)
	if _, err := visit(t, 379, at, good); err != nil {
		t.Errorf("the third address is alive: %v", err)
	}
	at.Addrs = at.Addrs[:2]
	if _, err := visit(t, 379, at, good); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("no address is alive: %v", err)
	}
}
