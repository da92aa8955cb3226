package p2p

import (
	"bytes"
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
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	manet "github.com/multiformats/go-multiaddr/net"
	mss "github.com/multiformats/go-multistream"

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
	t.Parallel()
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
	t.Parallel()
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

// Who is taken off the member list is cut off before Kick returns, is told why
// when it comes back, and is let in when it is on the list again.
func TestMemberList(t *testing.T) {
	t.Parallel()
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
	if left := a.Peers(); len(left) != 0 {
		t.Fatalf("connected after Kick: %+v", left)
	}
	eventually(t, "the other side sees it", func() bool { return len(b.Peers()) == 0 })
	_, err := b.Dial(within(t, time.Minute), a.ID(), "/flox/rpc/1")
	if !errors.Is(err, flox.ErrDenied) || !strings.Contains(fmt.Sprint(err), string(refusedMember)) {
		t.Fatalf("dial of who was removed: %v", err)
	}
	if _, err := a.Dial(within(t, time.Minute), b.ID(), "/flox/rpc/1"); !errors.Is(err, flox.ErrDenied) {
		t.Fatalf("dial of one we removed: %v", err)
	}
	out.Store(false)
	join(t, b, a)
}

// A transfer and a call end at once on both sides when one side is removed.
func TestKickEndsWhatIsInFlight(t *testing.T) {
	t.Parallel()
	var out atomic.Bool
	bID := idOf(t, 323)
	blocks := randomBlocks(322, 20, 100_000)
	held, asked := newMemory(blocks...), make(chan struct{}, len(blocks))
	held.get = func(ctx context.Context, _ flox.CID, data []byte) ([]byte, error) {
		asked <- struct{}{}
		<-ctx.Done() // a disk that takes its time
		return data, ctx.Err()
	}
	a := start(t, 322, func(c *Config) {
		c.Blocks = held
		c.Allowed = func(id PeerID) bool { return id != bID || !out.Load() }
	})
	b := start(t, 323, nil)
	l, err := a.Listen("/flox/rpc/1")
	if err != nil {
		t.Fatal(err)
	}
	join(t, b, a)
	call, err := b.Dial(within(t, time.Minute), a.ID(), "/flox/rpc/1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(served, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	fetched := make(chan error, 1)
	go func() {
		fetched <- b.Fetch(within(t, time.Minute), wantsOf(blocks), Hints{}, func(int, []byte, Source) {})
	}()
	<-asked
	out.Store(true)
	a.Kick()
	if _, err := served.Write([]byte("secret")); err == nil {
		t.Error("a call of a removed machine still takes an answer after Kick")
	}
	if got, err := io.ReadAll(call); err == nil || len(got) > 0 {
		t.Errorf("the removed machine's call ended with %q, %v", got, err)
	}
	if err := <-fetched; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the removed machine's transfer ended with %v", err)
	}
}

// A secret is rotated with an overlap: whoever has one in common talks.
func TestSecretsOverlap(t *testing.T) {
	t.Parallel()
	older, old, recent := []byte("the secret before the last one"), []byte("the secret until now, of course"), []byte("the secret from now on, surely")
	knows := func(n int, secrets ...[]byte) *Host {
		return start(t, n, func(c *Config) {
			c.Secret = nil
			c.Secrets = func() [][]byte { return secrets }
		})
	}
	var rotated atomic.Bool
	server := start(t, 340, func(c *Config) {
		c.Secret = older
		c.Secrets = func() [][]byte {
			if rotated.Load() {
				return [][]byte{recent, old}
			}
			return [][]byte{old}
		}
	})
	late, slow, quick := knows(341, older), knows(342, old), knows(343, recent)
	join(t, late, server)
	join(t, slow, server)
	if err := quick.AddPeer(addrOf(server)); err != nil {
		t.Fatal(err)
	}
	// The host itself may have tried a moment ago, and must wait before it does again.
	denied := func(what string, h, by *Host) {
		t.Helper()
		eventually(t, what+": denied", func() bool {
			_, err := h.Dial(within(t, time.Minute), by.ID(), "/flox/rpc/1")
			if err == nil {
				t.Fatalf("%s: let in", what)
			}
			return errors.Is(err, flox.ErrDenied)
		})
	}
	denied("a secret that is not valid yet", quick, server)
	rotated.Store(true)
	join(t, quick, server)
	if err := slow.AddPeer(addrOf(quick)); err != nil {
		t.Fatal(err)
	}
	denied("nothing in common", slow, quick)
}

// Who was away while the secret changed gets in where its key is enough, which
// both ends have to think of the other.
func TestKeyIsEnoughWhereBothSaySo(t *testing.T) {
	t.Parallel()
	server, back, other := idOf(t, 344), idOf(t, 345), idOf(t, 346)
	now, before := []byte("the secret from now on, surely"), []byte("the secret until now, of course")
	only := func(id PeerID) func(PeerID) bool { return func(p PeerID) bool { return p == id } }
	house := start(t, 344, func(c *Config) { c.Secret, c.Vouched = now, only(back) })
	join(t, start(t, 345, func(c *Config) { c.Secret, c.Vouched = before, only(server) }), house)
	for n, vouched := range map[int]func(PeerID) bool{346: only(server), 347: nil} {
		h := start(t, n, func(c *Config) { c.Secret, c.Vouched = before, vouched })
		if err := h.AddPeer(addrOf(house)); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Dial(within(t, time.Minute), server, "/flox/rpc/1"); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("host %d, whom the other does not vouch for: %v", n, err)
		}
	}
	// One that is vouched for, but is not sure of whom it talks to.
	unsure := start(t, 348, func(c *Config) { c.Secret, c.Vouched = now, only(other) })
	h := start(t, 346, func(c *Config) { c.Secret = before })
	if err := h.AddPeer(addrOf(unsure)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Dial(within(t, time.Minute), unsure.ID(), "/flox/rpc/1"); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a host that does not vouch for the other: %v", err)
	}
	// Beside eight secrets there is room for it.
	many := membership{secrets: func() [][]byte { return [][]byte{now, now, now, now, now, now, now, now} }, vouched: func(PeerID) bool { return true }}
	lost := membership{secrets: func() [][]byte { return [][]byte{before} }, vouched: func(PeerID) bool { return true }}
	if atDialer, atListener := shake(t, lost, many); atDialer != nil || atListener != nil {
		t.Errorf("dialing one with many secrets: %v, %v", atDialer, atListener)
	}
	if atDialer, atListener := shake(t, many, lost); atDialer != nil || atListener != nil {
		t.Errorf("with many secrets: %v, %v", atDialer, atListener)
	}
}

// The handshake works over any connection, and each end learns what is wrong.
func TestHandshake(t *testing.T) {
	t.Parallel()
	one, two := []byte("one secret, long enough"), []byte("two secrets are longer")
	secrets := func(s ...[]byte) func() [][]byte { return func() [][]byte { return s } }
	nobody := func(PeerID) bool { return false }
	for name, c := range map[string]struct {
		dialer, listener membership
		atDialer         error
		atListener       error // nil with a refusal at the dialer: it only sees the connection end
	}{
		"the same":                 {dialer: membership{secrets: secrets(one)}, listener: membership{secrets: secrets(one)}},
		"in another order":         {dialer: membership{secrets: secrets(two, one)}, listener: membership{secrets: secrets(one, two)}},
		"the last of eight":        {dialer: membership{secrets: secrets(two)}, listener: membership{secrets: secrets(one, one, one, one, one, one, one, two)}},
		"different":                {membership{secrets: secrets(one)}, membership{secrets: secrets(two)}, refusedSecret, refusedSecret},
		"the listener has none":    {membership{secrets: secrets(one)}, membership{secrets: secrets()}, refusedSecret, refusedSecret},
		"the dialer has none":      {membership{secrets: secrets()}, membership{secrets: secrets(one)}, refusedSecret, refusedSecret},
		"neither has one":          {membership{secrets: secrets()}, membership{secrets: secrets()}, refusedSecret, refusedSecret},
		"the dialer is no member":  {membership{secrets: secrets(one)}, membership{secrets: secrets(one), allowed: nobody}, refusedMember, noMember},
		"the listener is none":     {membership{secrets: secrets(one), allowed: nobody}, membership{secrets: secrets(one)}, noMember, nil},
		"no member and no secret":  {membership{secrets: secrets(two)}, membership{secrets: secrets(one), allowed: nobody}, refusedMember, noMember},
		"an empty one is a secret": {membership{secrets: secrets(nil)}, membership{secrets: secrets(one)}, refusedSecret, refusedSecret},
	} {
		t.Run(name, func(t *testing.T) {
			atDialer, atListener := shake(t, c.dialer, c.listener)
			if !errors.Is(atDialer, c.atDialer) || (c.atDialer == nil) != (atDialer == nil) {
				t.Errorf("dialer: %v, want %v", atDialer, c.atDialer)
			}
			if c.atListener != nil && !errors.Is(atListener, c.atListener) || (c.atDialer == nil) != (atListener == nil) {
				t.Errorf("listener: %v, want %v", atListener, c.atListener)
			}
			if atDialer != nil && !errors.Is(atDialer, flox.ErrDenied) {
				t.Errorf("dialer: %v is not ErrDenied", atDialer)
			}
		})
	}
}

// shake runs one handshake over a plain TCP connection.
func shake(t *testing.T, dialer, listener membership) (atDialer, atListener error) {
	t.Helper()
	key := func(n int) (crypto.PrivKey, peer.ID) {
		k, err := crypto.UnmarshalEd25519PrivateKey(seededKey(n))
		if err != nil {
			t.Fatal(err)
		}
		id, err := peer.IDFromPrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return k, id
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialing, _ := key(350)
	listening, id := key(351)
	ended := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			ended <- err
			return
		}
		defer raw.Close()
		proof, err := newProofOf(listener)(securityID, listening, nil)
		if err == nil {
			_, err = proof.SecureInbound(context.Background(), raw, "")
		}
		ended <- err
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	proof, err := newProofOf(dialer)(securityID, dialing, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, atDialer = proof.SecureOutbound(within(t, time.Minute), raw, id)
	if atDialer != nil {
		raw.Close()
	}
	atListener = <-ended
	raw.Close()
	return atDialer, atListener
}

// Whoever speaks an older or a newer version, or is something unheard of, is told so.
func TestHandshakeVersion(t *testing.T) {
	t.Parallel()
	a := start(t, 352, nil)
	k, err := crypto.UnmarshalEd25519PrivateKey(seededKey(353))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := libp2ptls.New(securityID, k, nil)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := manet.ToNetAddr(mustInfo(t, addrOf(a)).Addrs[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, first := range [][]byte{{1, 0}, {proofVersion + 1, asMember}, {proofVersion, 77}} {
		raw, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		if _, err := mss.SelectOneOf([]protocol.ID{securityID}, raw); err != nil {
			t.Fatal(err)
		}
		conn, err := plain.SecureOutbound(within(t, time.Minute), raw, a.self)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(append(first, make([]byte, nonceSize)...)); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 2)
		if _, err := io.ReadFull(conn, answer); err != nil || answer[1] != verdictVersion {
			t.Errorf("%v is answered %v, %v", first, answer, err)
		}
		if _, err := (&proving{}).readAnswer(bytes.NewReader(answer)); !errors.Is(err, refusedVersion) {
			t.Errorf("the answer means %v", err)
		}
		conn.Close()
	}
}

// Streams are good enough for an HTTP server, which sees the proven machine.
func TestHTTPOverStreams(t *testing.T) {
	t.Parallel()
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
	t.Parallel()
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
		"unprintable":     func(c *Config) { c.Name = "a\x1b[31mred" },
		"long name":       func(c *Config) { c.Name = strings.Repeat("x", 65) },
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
	t.Parallel()
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

// newProof gives the constructor libp2p.Security wants, for one secret that
// never changes.
func newProof(secret []byte) func(protocol.ID, crypto.PrivKey, []upgrader.StreamMuxer) (*proofTransport, error) {
	return newProofOf(membership{secrets: func() [][]byte { return [][]byte{secret} }})
}
