package netns

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/need"
)

func TestMain(m *testing.M) {
	if os.Getenv("NETNS_TEST_CHILD") != "" {
		child()
	}
	goleak.VerifyTestMain(m)
}

// child makes a network with a host and a process on it, then waits to be killed.
func child() {
	ctx := context.Background()
	l, err := New(ctx, Config{})
	if err != nil {
		panic(err)
	}
	s, err := l.Subnet(ctx, "office", netip.Prefix{})
	if err != nil {
		panic(err)
	}
	h, err := l.Host(ctx, "a", s)
	if err != nil {
		panic(err)
	}
	sleeper := h.Command(ctx, "sleep", "1000")
	if err := sleeper.Start(); err != nil {
		panic(err)
	}
	_, _ = os.Stdout.WriteString(l.name + "\n")
	time.Sleep(time.Hour) // not select{}: without cgo the runtime calls that a deadlock
}

// office is a network of three subnets: a storehouse, office a with two hosts and
// office b with one.
type office struct {
	*Network
	storehouse, a, a2, b *Host
}

func newOffice(t *testing.T) office {
	t.Helper()
	need.Namespaces(t)
	l, err := New(t.Context(), Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		checkGone(t, l.name, l.dir)
	})
	o := office{Network: l}
	for _, spec := range []struct {
		subnet string
		names  []string
		hosts  []**Host
	}{
		{"core", []string{"storehouse"}, []**Host{&o.storehouse}},
		{"office-a", []string{"a", "a2"}, []**Host{&o.a, &o.a2}},
		{"office-b", []string{"b"}, []**Host{&o.b}},
	} {
		s, err := l.Subnet(t.Context(), spec.subnet, netip.Prefix{})
		if err != nil {
			t.Fatal(err)
		}
		for i, name := range spec.names {
			if *spec.hosts[i], err = l.Host(t.Context(), name, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	return o
}

func checkGone(t *testing.T, name, dir string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(runDir, name+"-*")); len(left) > 0 {
		t.Errorf("namespaces left behind: %v", left)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory left behind: %s (%v)", dir, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte(name)) {
		t.Errorf("mounts of %s left behind (%v)", name, err)
	}
}

// reaches pings once; failing is an answer, not an error.
func reaches(t *testing.T, from, to *Host) bool {
	t.Helper()
	_, err := from.Run(t.Context(), "ping", "-n", "-c", "1", "-W", "1", to.Addr().String())
	return err == nil
}

func TestHostsReachEachOtherThroughTheRouter(t *testing.T) {
	o := newOffice(t)
	for _, pair := range [][2]*Host{{o.a, o.a2}, {o.a, o.b}, {o.b, o.storehouse}, {o.storehouse, o.a}} {
		if !reaches(t, pair[0], pair[1]) {
			t.Errorf("%s does not reach %s", pair[0].Name, pair[1].Name)
		}
	}
	// Multicast is how hosts of a LAN find each other, and only they.
	for _, tt := range []struct {
		from, to *Host
		want     bool
	}{{o.a, o.a2, true}, {o.a, o.b, false}, {o.b, o.a, false}, {o.storehouse, o.a, false}} {
		got, err := MulticastReaches(t.Context(), tt.from, tt.to)
		if err != nil || got != tt.want {
			t.Errorf("multicast from %s to %s: got %v, %v, want %v", tt.from.Name, tt.to.Name, got, err, tt.want)
		}
	}
}

func TestHostHasItsOwnDirectories(t *testing.T) {
	o := newOffice(t)
	const script = `hostname; ls -A /nix/store /run/floxd /var/lib/floxd; echo "$0" | tee /etc/floxd.test /var/lib/floxd.test /var/lib/floxd/f /run/floxd/f /nix/f >/dev/null; cat /etc/floxd.test; echo "$HOME"`
	for _, h := range []*Host{o.a, o.b} {
		got, err := h.Run(t.Context(), "sh", "-c", script, "of "+h.Name)
		want := h.Name + "\n/nix/store:\n\n/run/floxd:\n\n/var/lib/floxd:\nof " + h.Name + "\n" + h.Dir + "/home\n"
		if err != nil || got != want {
			t.Errorf("%s: %v, got %q, want %q", h.Name, err, got, want)
		}
		for _, file := range []string{"state/f", "run/floxd/f", "nix/f"} {
			if got, err := os.ReadFile(filepath.Join(h.Dir, file)); string(got) != "of "+h.Name+"\n" {
				t.Errorf("%s from outside: %q, %v", file, got, err)
			}
		}
	}
	for _, file := range []string{"/etc/floxd.test", "/var/lib/floxd.test", "/nix/f"} {
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s appeared on the real machine", file)
		}
	}
}

func TestLinksFailAndRecover(t *testing.T) {
	o := newOffice(t)
	ctx := t.Context()
	tests := []struct {
		name        string
		fail, mend  func() error
		lost, still [2]*Host
	}{
		{"unplug", func() error { return o.a.Unplug(ctx) }, func() error { return o.a.Plug(ctx) }, [2]*Host{o.b, o.a}, [2]*Host{o.b, o.a2}},
		{"mute", func() error { return o.a.Mute(ctx) }, func() error { return o.a.Unmute(ctx) }, [2]*Host{o.a, o.a2}, [2]*Host{o.b, o.a2}},
		{"partition", func() error { return o.Partition(ctx, o.a, o.b) }, func() error { return o.Heal(ctx, o.a, o.b) }, [2]*Host{o.a, o.b}, [2]*Host{o.a, o.storehouse}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.fail(); err != nil {
				t.Fatal(err)
			}
			if reaches(t, tt.lost[0], tt.lost[1]) {
				t.Errorf("%s still reaches %s", tt.lost[0].Name, tt.lost[1].Name)
			}
			if !reaches(t, tt.still[0], tt.still[1]) {
				t.Errorf("%s lost %s too", tt.still[0].Name, tt.still[1].Name)
			}
			if err := tt.mend(); err != nil {
				t.Fatal(err)
			}
			// The kernel notices a carrier, and asks for an address again, within a
			// few seconds.
			for tries := 0; !reaches(t, tt.lost[0], tt.lost[1]); tries++ {
				if tries == 20 {
					t.Fatalf("%s does not reach %s again", tt.lost[0].Name, tt.lost[1].Name)
				}
			}
		})
	}
}

// Who is deaf to a host is still heard by it.
func TestDeafnessIsOneWay(t *testing.T) {
	o := newOffice(t)
	listen := func(h *Host) (conn net.PacketConn) {
		err := h.Do(func() (err error) {
			conn, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", net.JoinHostPort(h.Addr().String(), "4711"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	a, b := listen(o.a), listen(o.b)
	hears := func(to, from net.PacketConn) bool {
		_ = to.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := from.WriteTo([]byte("x"), to.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		_, _, err := to.ReadFrom(make([]byte, 1))
		return err == nil
	}
	if err := o.Deafen(t.Context(), o.a, o.b); err != nil {
		t.Fatal(err)
	}
	if hears(a, b) {
		t.Error("the deaf host hears")
	}
	if !hears(b, a) {
		t.Error("the deaf host is not heard")
	}
	if err := o.Undeafen(t.Context(), o.a, o.b); err != nil {
		t.Fatal(err)
	}
	if !hears(a, b) {
		t.Error("the host stays deaf")
	}
}

func TestRateIsSetBothWays(t *testing.T) {
	o := newOffice(t)
	show := func() string {
		t.Helper()
		inside, err := o.a.Run(t.Context(), "tc", "qdisc", "show", "dev", device)
		if err != nil {
			t.Fatal(err)
		}
		outside, err := o.run(t.Context(), "tc", "-n", o.router, "qdisc", "show", "dev", o.a.port)
		if err != nil {
			t.Fatal(err)
		}
		return inside + string(outside)
	}
	if err := o.a.Rate(t.Context(), 100e6); err != nil {
		t.Fatal(err)
	}
	if got := show(); strings.Count(got, "rate 100Mbit") != 2 {
		t.Errorf("100 Mb/s: got %s", got)
	}
	if err := o.a.Rate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if got := show(); strings.Contains(got, "tbf") {
		t.Errorf("no limit: got %s", got)
	}
	if err := o.a.Rate(t.Context(), -1); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("negative rate: got %v", err)
	}
}

// TestSocketsOfThisProcessAndTheirBytes sends through a listener and a dialer
// of the test process and finds the bytes in the counters of both ends.
func TestSocketsOfThisProcessAndTheirBytes(t *testing.T) {
	o := newOffice(t)
	ctx := t.Context()
	const size = 1 << 20
	listener, err := o.a.Listen(ctx, "tcp", net.JoinHostPort(o.a.Addr().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Write(make([]byte, size))
		_ = conn.Close()
	}()
	if _, err := o.b.BytesFrom(ctx, o.a); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("bytes before CountFrom: got %v", err)
	}
	for _, peer := range []*Host{o.a, o.storehouse} {
		if err := o.b.CountFrom(ctx, peer); err != nil {
			t.Fatal(err)
		}
	}
	before, err := o.b.Counters()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := o.b.Dial(ctx, "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
		t.Fatalf("received %d bytes: %v", n, err)
	}
	after, err := o.b.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if d := after.Sub(before); d.RxBytes < size || d.RxBytes > size*5/4 || d.TxBytes > size/4 {
		t.Errorf("counters of %d bytes: %+v", size, d)
	}
	if n, err := o.b.BytesFrom(ctx, o.a); n < size || err != nil {
		t.Errorf("bytes from a: %d, %v", n, err)
	}
	if n, err := o.b.BytesFrom(ctx, o.storehouse); n != 0 || err != nil {
		t.Errorf("bytes from the storehouse: %d, %v", n, err)
	}
	if _, err := o.b.Dial(ctx, "tcp", "localhost:80"); err == nil {
		t.Error("a name was resolved")
	}
}

func TestCloseEndsWhatRunsOnHosts(t *testing.T) {
	o := newOffice(t) // its clean-up checks that nothing is left
	sleeper := o.a.Command(t.Context(), "sleep", "1000")
	stubborn := o.b.Command(t.Context(), "sh", "-c", `trap "" TERM; echo up; while :; do sleep 1; done`)
	out, err := stubborn.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []*exec.Cmd{sleeper, stubborn} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "up\n" {
		t.Fatalf("got %q", line)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sleeper.Wait(); err == nil || err.Error() != "signal: terminated" {
		t.Errorf("a willing process: %v, want terminated", err)
	}
	if err := stubborn.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("a stubborn process: %v, want killed", err)
	}
}

func TestKilledProcessLeavesNothing(t *testing.T) {
	need.Namespaces(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "NETNS_TEST_CHILD=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	// The waiting script inherits this end: it reads to the end once that is done.
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd.Stderr = write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = write.Close()
	name, err := bufio.NewReader(out).ReadString('\n')
	name = strings.TrimSpace(name)
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(runDir, name+"-*")); len(left) != 2 {
		t.Fatalf("the child's namespaces are %v, want two", left)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	complaints, err := io.ReadAll(read)
	if err != nil || len(complaints) > 0 {
		t.Errorf("clean-up said %q (%v)", complaints, err)
	}
	_ = cmd.Wait()
	checkGone(t, name, filepath.Join(os.TempDir(), name))
}

func TestSweepRemovesOnlyTheDead(t *testing.T) {
	o := newOffice(t)
	// No process has this number: it is above the kernel's limit of 2^22.
	const dead = prefix + "4194305-1"
	if _, err := o.run(t.Context(), "ip", "netns", "add", dead+"-a"); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(os.TempDir(), dead)
	if err := os.MkdirAll(filepath.Join(dir, "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkGone(t, dead, dir)
	if _, err := os.Stat(o.a.NetNS()); err != nil {
		t.Errorf("a living network was swept: %v", err)
	}
}

func TestBadTopologyIsRefused(t *testing.T) {
	o := newOffice(t)
	ctx := t.Context()
	if _, err := o.Subnet(ctx, "again", o.a.Subnet.Prefix); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("overlapping subnet: got %v", err)
	}
	if _, err := o.Subnet(ctx, "v6", netip.MustParsePrefix("fd00::/64")); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("IPv6 subnet: got %v", err)
	}
	for _, name := range []string{"", "A", "a/b", "router"} {
		if _, err := o.Host(ctx, name, o.a.Subnet); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("host %q: got %v", name, err)
		}
	}
	if _, err := o.Host(ctx, "a", o.a.Subnet); err == nil {
		t.Error("a second host of one name was made")
	}
}

func TestParseCounters(t *testing.T) {
	const table = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
  eth0: 1118    13    0    0    0     0          0         0      946      12    0    0    0     0       0          0
  eth1:1 2
  eth2: x    13    0    0    0     0          0         0      946      12    0    0    0     0       0          0
`
	got, err := parseCounters(table, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Counters{RxBytes: 1118, RxPackets: 13, TxBytes: 946, TxPackets: 12}, got); d != "" {
		t.Error(d)
	}
	for _, device := range []string{"eth1", "eth2", "eth3"} {
		if c, err := parseCounters(table, device); err == nil {
			t.Errorf("%s: got %+v", device, c)
		}
	}
}
