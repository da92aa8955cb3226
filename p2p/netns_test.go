package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/zeroconf/v2"

	"github.com/floxctl/flox"
)

// Peers on one LAN find each other by multicast alone. It runs in a network
// namespace of its own, so that nothing is sent to the machine's networks.
func TestMulticastDiscovery(t *testing.T) {
	t.Parallel()
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	command(t, "ip link set lo up",
		"ip link add v0 type veth peer name v1",
		"ip addr add 10.9.9.1/24 dev v0",
		"ip link set v0 up",
		"ip link set v1 up",
		"ip route add default dev v0")
	lan := func(c *Config) { c.NoMDNS = false; c.Listen = nil }
	a, b := start(t, 600, lan), start(t, 601, lan)
	eventually(t, "multicast finds them", func() bool { return a.knows(b) && b.knows(a) })
	if p := a.Peers()[0]; p.ID != b.ID() || p.Tier != TierLAN {
		t.Errorf("%+v", p)
	}
}

// Where multicast is not carried they find each other by broadcast, several on one
// machine as well, and a machine of another subnet is not met.
func TestBroadcastDiscovery(t *testing.T) {
	t.Parallel()
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	command(t, "ip link set lo up",
		"ip link add v0 type veth peer name v1",
		"ip link set v0 multicast off",
		"ip addr add 10.9.9.1/24 dev v0",
		"ip link set v0 up",
		"ip link set v1 up",
		"ip route add default dev v0")
	if hasMulticast() {
		command(t, "ip link set v1 multicast off")
	}
	lan := func(c *Config) { c.NoMDNS = false; c.Listen = nil }
	a, b := start(t, 620, lan), start(t, 621, lan)
	eventually(t, "broadcast finds them", func() bool { return a.knows(b) && b.knows(a) })
	if p := a.Peers()[0]; p.ID != b.ID() || p.Tier != TierLAN {
		t.Errorf("%+v", p)
	}
	// What others send is looked at, not believed: nonsense, and more of it than is heard.
	line, err := (&net.Dialer{}).DialContext(t.Context(), "udp4", "10.9.9.1:7782")
	if err != nil {
		t.Fatal(err)
	}
	defer line.Close()
	for range 300 {
		_, _ = line.Write([]byte("flox1 nonsense 70000"))
	}
	c := start(t, 622, lan)
	eventually(t, "a third one is found all the same", func() bool { return a.knows(c) && b.knows(c) && c.knows(a) })
}

// What anybody on the LAN may send as a broadcast.
func TestBroadcasts(t *testing.T) {
	t.Parallel()
	id := string(idOf(t, 623))
	near, far := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 7782}, &net.UDPAddr{IP: net.IPv4(198, 51, 100, 7), Port: 7782}
	info, err := parseBroadcast([]byte("flox1 "+id+" 4000"), near)
	if err != nil || info.ID.String() != id || len(info.Addrs) != 1 || info.Addrs[0].String() != "/ip4/127.0.0.1/tcp/4000" {
		t.Errorf("%+v, %v", info, err)
	}
	for name, c := range map[string]struct {
		packet string
		from   net.Addr
	}{
		"nothing": {"", near}, "another service": {"hello " + id + " 4000", near}, "no ID": {"flox1 x 4000", near}, "no port": {"flox1 " + id + " 0", near},
		"a port too large": {"flox1 " + id + " 70000", near}, "more": {"flox1 " + id + " 4000 x", near}, "another subnet": {"flox1 " + id + " 4000", far},
		"IPv6": {"flox1 " + id + " 4000", &net.UDPAddr{IP: net.IPv6loopback}}, "no UDP": {"flox1 " + id + " 4000", &net.TCPAddr{IP: near.IP}},
	} {
		if _, err := parseBroadcast([]byte(c.packet), c.from); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", name, err)
		}
	}
	if to := broadcastOf(net.IPv4(198, 51, 100, 7)); to != nil {
		t.Errorf("%s is to be sent to, for an address that this machine has not", to)
	}
}

// A machine without an invite finds the storehouses whose windows are open, and
// only those, and can speak to them as a guest.
func TestFindStorehouses(t *testing.T) {
	t.Parallel()
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	command(t, "ip link set lo up")
	if _, err := FindStorehouses(within(t, time.Minute)); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("without a network: %v", err)
	}
	command(t, "ip link add v0 type veth peer name v1",
		"ip addr add 10.9.9.1/24 dev v0",
		"ip link set v0 up",
		"ip link set v1 up",
		"ip route add default dev v0")
	var open [2]atomic.Bool
	var stores [2]*Host
	for i := range stores {
		stores[i], _ = porch(t, 610+i, open[i].Load, func(c *Config) {
			c.NoMDNS, c.Listen, c.Name = false, nil, []string{`Büro "\\1"`, "cellar"}[i]
		})
	}
	start(t, 612, func(c *Config) { c.NoMDNS, c.Listen, c.Name = false, nil, "agent" })
	find := func(want ...int) []Found {
		t.Helper()
		var found []Found
		eventually(t, "the open ones are found", func() bool {
			var err error
			if found, err = FindStorehouses(within(t, time.Minute)); err != nil {
				t.Fatal(err)
			}
			return len(found) == len(want)
		})
		for i, f := range found {
			if s := stores[want[i]]; f.ID != s.ID() || f.Name != s.cfg.Name || len(f.Addrs) == 0 {
				t.Errorf("found %+v, want %s", f, s.ID())
			}
		}
		return found
	}
	find()
	open[0].Store(true)
	f := find(0)[0]
	if want := "/ip4/10.9.9.1/tcp/"; !strings.HasPrefix(f.Addrs[0], want) {
		t.Errorf("addresses %v, want %s…", f.Addrs, want)
	}
	if _, err := visit(t, 613, PeerAddr{ID: f.ID, Addrs: f.Addrs}, Guest{}); err != nil {
		t.Errorf("the way it says: %v", err)
	}
	// Somebody else's nonsense hides nobody.
	if junk, err := zeroconf.RegisterProxy("junk", houseService, "local", 1, "junk", []string{"10.9.9.1"},
		[]string{"id=junk", "name=%1b[31m", "addr=/dns/evil.example/tcp/1"}, nil); err != nil {
		t.Error(err)
	} else {
		defer junk.Shutdown()
	}
	open[1].Store(true)
	find(0, 1)
	open[0].Store(false)
	find(1)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := FindStorehouses(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
}

// What anybody on the LAN may send.
func TestAdverts(t *testing.T) {
	t.Parallel()
	id := "id=" + string(idOf(t, 614))
	good := advert(idOf(t, 614), "name", []string{"/ip4/10.0.0.1/tcp/1", "/ip6/2001:db8::1/tcp/2"})
	f, err := parseAdvert(good)
	if err != nil || f.ID != idOf(t, 614) || f.Name != "name" || len(f.Addrs) != 2 {
		t.Errorf("%+v, %v", f, err)
	}
	for name, texts := range map[string][]string{
		"nothing":    nil,
		"no id":      {"addr=/ip4/10.0.0.1/tcp/1"},
		"bad id":     {"id=x", "addr=/ip4/10.0.0.1/tcp/1"},
		"no address": {id},
		"a name":     {id, "addr=/dns4/example.org/tcp/1"},
		"loopback":   {id, "addr=/ip4/127.0.0.1/tcp/1"},
		"any":        {id, "addr=/ip6/::/tcp/1"},
		"multicast":  {id, "addr=/ip4/224.0.0.1/tcp/1"},
		"link local": {id, "addr=/ip6/fe80::1/tcp/1"},
		"udp":        {id, "addr=/ip4/10.0.0.1/udp/1"},
		"more":       {id, "addr=/ip4/10.0.0.1/tcp/1/ws"},
		"host:port":  {id, "addr=10.0.0.1:1"},
	} {
		if f, err := parseAdvert(texts); err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
	many := []string{id, "name=" + strings.Repeat("x", 65)}
	for n := range 100 {
		many = append(many, fmt.Sprintf("addr=/ip4/10.0.0.1/tcp/%d", n+1))
	}
	if f, err := parseAdvert(many); err != nil || f.Name != "" || len(f.Addrs) != maxAddrs {
		t.Errorf("%+v, %v", f, err)
	}
}

// No advertisement is taken that could harm who reads or dials it.
func FuzzAdvert(f *testing.F) {
	f.Add("id=12D3KooWJR4aBUcF92nDAGni5HgFxVEL3uakhUZvNx4swwwUZGmD\nname=x\naddr=/ip4/10.0.0.1/tcp/1")
	f.Fuzz(func(t *testing.T, texts string) {
		found, err := parseAdvert(strings.Split(texts, "\n"))
		if err != nil {
			return
		}
		if _, err := (PeerAddr{ID: found.ID, Addrs: found.Addrs}).addrInfo(); err != nil {
			t.Errorf("%+v: %v", found, err)
		}
		if !plain(found.Name) {
			t.Errorf("name %q", found.Name)
		}
		again, err := parseAdvert(advert(found.ID, found.Name, found.Addrs))
		if err != nil || again.ID != found.ID || again.Name != found.Name || !slices.Equal(again.Addrs, found.Addrs) {
			t.Errorf("%+v, again %+v: %v", found, again, err)
		}
	})
}

// A storehouse that vanishes without a word (a pulled cable: no packet comes
// back) stops nobody from reading what a peer holds, and what nobody holds is
// an error well before the deadline.
func TestUnpluggedStorehouse(t *testing.T) {
	t.Parallel()
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	command(t, "ip link set lo up")
	blocks := randomBlocks(700, 100, 10_000)
	store := start(t, 700, func(c *Config) {
		c.Role = Storehouse
		c.Blocks = newMemory(blocks...)
		c.Listen = []string{"127.0.0.1:7700"}
	})
	boot := func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.pongWait = time.Second
		c.Limits.DialTimeout = 0
	}
	a := start(t, 701, func(c *Config) { boot(c); c.Blocks = newMemory(blocks[:50]...) })
	b := start(t, 702, boot)
	eventually(t, "all know each other", func() bool { return b.knows(a) && b.knows(store) && a.knows(store) })
	command(t, "iptables -A INPUT -p tcp --dport 7700 -j DROP", "iptables -A INPUT -p tcp --sport 7700 -j DROP")

	hints := Hints{Paths: []flox.StorePath{testPath}}
	began := time.Now()
	var g got
	if err := b.Fetch(within(t, 25*time.Second), wantsOf(blocks[:50]), hints, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, blocks[:50])
	t.Logf("what a peer holds: %s", time.Since(began))
	for range 2 {
		began = time.Now()
		err := b.Fetch(within(t, 25*time.Second), wantsOf(blocks[90:91]), hints, nil)
		if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		t.Logf("what nobody holds: %s", time.Since(began))
	}
	command(t, "iptables -F INPUT")
	eventually(t, "the storehouse is back", func() bool {
		return b.Fetch(within(t, 5*time.Second), wantsOf(blocks[90:91]), hints, func(int, []byte, Source) {}) == nil
	})
}

// A call on a connection that nothing comes through any more ends soon, although
// no block is due on it that would be asked after, and the next one finds the
// way as soon as there is one again.
func TestACallNoticesASilentDeath(t *testing.T) {
	t.Parallel()
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	command(t, "ip link set lo up")
	store := start(t, 710, func(c *Config) { c.Role = Storehouse; c.Listen = []string{"127.0.0.1:7710"} })
	b := start(t, 711, func(c *Config) {
		c.Bootstrap = []PeerAddr{addrOf(store)}
		c.pongWait = 10 * time.Minute // a ping is not what tells
		c.Limits.DialTimeout = 0
	})
	const echo = "/flox/echo/1"
	l, err := store.Listen(echo)
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the listener, which ends with the host
		for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
			go func() { _, _ = io.Copy(conn, conn); _ = conn.Close() }()
		}
	}()
	call := func(conn net.Conn) error {
		if _, err := conn.Write([]byte("x")); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 1))
		return err
	}
	conn, err := b.Dial(within(t, time.Minute), store.ID(), echo)
	if err == nil {
		err = call(conn)
	}
	if err != nil {
		t.Fatal(err)
	}
	command(t, "iptables -A INPUT -p tcp --dport 7710 -j DROP", "iptables -A INPUT -p tcp --sport 7710 -j DROP")
	began, ended := time.Now(), make(chan error, 1)
	go func() { ended <- call(conn) }()
	select {
	case err := <-ended:
		if err == nil {
			t.Fatal("answered through a wall")
		}
		t.Logf("the call ended after %s: %v", time.Since(began), err)
	case <-time.After(30 * time.Second):
		t.Fatal("the call still waits after 30 s")
	}
	_ = conn.Close()
	time.Sleep(5 * time.Second)
	command(t, "iptables -F INPUT")
	began = time.Now()
	eventually(t, "the next call is answered", func() bool {
		conn, err := b.Dial(within(t, time.Minute), store.ID(), echo)
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		return call(conn) == nil
	})
	t.Logf("a call is answered %s after the return", time.Since(began))
}

func command(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		args := strings.Fields(line)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
}

// inNamespace runs the calling test again in a process with its own network.
func inNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("a network namespace needs root")
		}
		t.Skip("a network namespace needs root")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", fmt.Sprintf("-test.short=%v", testing.Short()))
	cmd.Env = append(os.Environ(), "FLOXD_TEST_NETNS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}
