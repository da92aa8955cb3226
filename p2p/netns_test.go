package p2p

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// Peers on one LAN find each other by multicast alone. It runs in a network
// namespace of its own, so that nothing is sent to the machine's networks.
func TestMulticastDiscovery(t *testing.T) {
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

// A storehouse that vanishes without a word (a pulled cable: no packet comes
// back) stops nobody from reading what a peer holds, and what nobody holds is
// an error well before the deadline.
func TestUnpluggedStorehouse(t *testing.T) {
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
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "FLOXD_TEST_NETNS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}
