package p2p

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// Peers on one LAN find each other by multicast alone. It runs in a network
// namespace of its own, so that nothing is sent to the machine's networks.
func TestMulticastDiscovery(t *testing.T) {
	if os.Getenv("FLOXD_TEST_NETNS") == "" {
		inNamespace(t)
		return
	}
	for _, cmd := range []string{
		"ip link set lo up",
		"ip link add v0 type veth peer name v1",
		"ip addr add 10.9.9.1/24 dev v0",
		"ip link set v0 up",
		"ip link set v1 up",
		"ip route add default dev v0",
	} {
		args := strings.Fields(cmd)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", cmd, err, out)
		}
	}
	lan := func(c *Config) { c.NoMDNS = false; c.Listen = nil }
	a, b := start(t, 600, lan), start(t, 601, lan)
	eventually(t, "multicast finds them", func() bool { return a.knows(b) && b.knows(a) })
	if p := a.Peers()[0]; p.ID != b.ID() || p.Tier != TierLAN {
		t.Errorf("%+v", p)
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
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
