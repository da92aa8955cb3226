package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"

	"github.com/floxctl/flox"
)

func mustInfo(t testing.TB, p PeerAddr) peer.AddrInfo {
	t.Helper()
	info, err := p.addrInfo()
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// A peer that does not know the secret opens no stream of any protocol, dialing
// or dialed, whatever security it speaks.
func TestNonMembersGetNothing(t *testing.T) {
	victim := start(t, 300, func(c *Config) { c.Blocks = newMemory() })
	l, err := victim.Listen("/flox/rpc/1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var streams atomic.Int64
	victim.net.Network().Notify(&network.NotifyBundle{ConnectedF: func(network.Network, network.Conn) { streams.Add(1) }})
	protocols := victim.net.Mux().Protocols()
	if len(protocols) < 4 {
		t.Fatalf("protocols %v", protocols)
	}
	key := func(n int) crypto.PrivKey {
		k, err := crypto.UnmarshalEd25519PrivateKey(seededKey(n))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	stranger := func(n int, opts ...libp2p.Option) host.Host {
		h, err := libp2p.New(append(opts, libp2p.Identity(key(n)), libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"), libp2p.DisableMetrics(), libp2p.DisableRelay())...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		return h
	}
	strangers := map[string]host.Host{
		"plain libp2p":       stranger(301),
		"our name, no proof": stranger(302, libp2p.Security(string(securityID), libp2ptls.New)),
		"another secret":     stranger(303, libp2p.Security(string(securityID), newProof([]byte("another secret, long enough")))),
		"empty secret":       stranger(304, libp2p.Security(string(securityID), newProof(nil))),
	}
	for name, h := range strangers {
		for _, p := range append(protocols, "/ipfs/id/1.0.0", "/ipfs/ping/1.0.0") {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			h.Network().(interface{ ClosePeer(peer.ID) error }).ClosePeer(victim.self)
			err := h.Connect(ctx, mustInfo(t, addrOf(victim)))
			var s network.Stream
			if err == nil {
				s, err = h.NewStream(ctx, victim.self, p)
			}
			if err == nil { // the dialer may think it is connected: nothing must come of it
				s.SetDeadline(time.Now().Add(time.Second))
				s.Write([]byte("x"))
				if n, _ := io.Copy(io.Discard, s); n > 0 {
					t.Errorf("%s: %d bytes over %s", name, n, p)
				}
			}
			cancel()
		}
		if err := victim.connect(within(t, 3*time.Second), peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}); err == nil {
			t.Errorf("%s: we connected to it", name)
		}
	}
	if n := streams.Load(); n != 0 {
		t.Fatalf("%d connections were accepted", n)
	}
}

// The error of a wrong invite says so.
func TestWrongSecretIsDenied(t *testing.T) {
	a := start(t, 310, nil)
	b := start(t, 311, func(c *Config) { c.Secret = []byte("some other swarm's secret") })
	if err := b.AddPeer(addrOf(a)); err != nil {
		t.Fatal(err)
	}
	_, err := b.Dial(within(t, 5*time.Second), a.ID(), "/flox/rpc/1")
	if !errors.Is(err, flox.ErrDenied) {
		t.Fatal(err)
	}
}

// Who is taken off the member list is cut off, and comes back when on it again.
func TestMemberList(t *testing.T) {
	var out atomic.Bool
	bID := idOf(t, 321)
	a := start(t, 320, func(c *Config) {
		c.Secret = nil
		c.Allowed = func(id PeerID) bool { return id != bID || !out.Load() }
	})
	b := start(t, 321, func(c *Config) {
		c.Secret = nil
		c.Allowed = func(PeerID) bool { return true }
	})
	join(t, b, a)
	out.Store(true)
	a.Kick()
	eventually(t, "cut off", func() bool { return len(a.Peers()) == 0 && len(b.Peers()) == 0 })
	// The dialer learns of the refusal after its own handshake: give it a stream to fail on.
	if c, err := b.Dial(within(t, 3*time.Second), a.ID(), "/flox/rpc/1"); err == nil {
		if _, err := io.ReadAll(c); err == nil {
			t.Fatal("a stream to who does not allow us")
		}
	}
	out.Store(false)
	join(t, b, a)
}

// Streams are good enough for an HTTP server, which sees the proven machine.
func TestHTTPOverStreams(t *testing.T) {
	a, b := start(t, 330, nil), start(t, 331, nil)
	l, err := a.Listen("/flox/rpc/1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Listen("/flox/rpc/1"); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("second listener: %v", err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s sent %d bytes", r.RemoteAddr, len(body))
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	if err := b.AddPeer(addrOf(a)); err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return b.Dial(ctx, a.ID(), "/flox/rpc/1")
	}}
	client := &http.Client{Transport: tr, Timeout: 10 * time.Second}
	for _, n := range []int{0, 5_000_000} {
		resp, err := client.Post("http://peer/", "text/plain", strings.NewReader(strings.Repeat("x", n)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := fmt.Sprintf("%s sent %d bytes", b.ID(), n); err != nil || string(got) != want {
			t.Fatalf("got %q, want %q (%v)", got, want, err)
		}
	}
	tr.CloseIdleConnections()
	srv.Close()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Fatal(err)
	}
	if _, err := b.Dial(within(t, time.Second), a.ID(), "/flox/rpc/1"); err == nil {
		c, _ := b.Dial(within(t, time.Second), a.ID(), "/flox/rpc/1")
		if _, err := io.ReadAll(c); err == nil {
			t.Error("a stream to a closed listener")
		}
	}
}

// Impossible configurations are refused with the reason.
func TestConfigErrors(t *testing.T) {
	good := func() Config { return Config{Key: seededKey(1), Secret: testSecret, Listen: []string{"127.0.0.1:0"}} }
	for name, change := range map[string]func(*Config){
		"no key":          func(c *Config) { c.Key = nil },
		"no membership":   func(c *Config) { c.Secret = nil },
		"short secret":    func(c *Config) { c.Secret = []byte("x") },
		"bad listen":      func(c *Config) { c.Listen = []string{"nonsense"} },
		"bad port":        func(c *Config) { c.Listen = []string{"127.0.0.1:99999"} },
		"bad bootstrap":   func(c *Config) { c.Bootstrap = []PeerAddr{{ID: "x"}} },
		"bad address":     func(c *Config) { c.Bootstrap = []PeerAddr{{ID: idOf(t, 1), Addrs: []string{"/ip4/x"}}} },
		"long site label": func(c *Config) { c.Site = strings.Repeat("x", 200) },
		"unknown role":    func(c *Config) { c.Role = 9 },
	} {
		c := good()
		change(&c)
		if h, err := New(c); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				h.Close()
			}
		}
	}
	a, err := New(good())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	c := good()
	c.Listen = a.Addrs()
	if h, err := New(c); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("port in use: %v", err)
		if err == nil {
			h.Close()
		}
	}
}

// A machine keeps its name; a key others could read is refused.
func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	a, err := LoadOrCreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadOrCreateKey(path)
	if err != nil || !a.Equal(b) {
		t.Fatal(err)
	}
	id := idOf(t, 5)
	if pub, err := id.PublicKey(); err != nil || !pub.Equal(seededKey(5).Public()) {
		t.Errorf("key of %s: %v", id, err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateKey(path); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("readable key: %v", err)
	}
	if err := os.WriteFile(path, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateKey(path); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("junk: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".key-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
