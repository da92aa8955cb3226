package netns

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/floxctl/flox"
)

// Unplug pulls the host's cable: its interface loses the carrier.
func (h *Host) Unplug(ctx context.Context) error {
	h.network.log.Info("cable unplugged", "host", h.Name)
	return h.network.batch(ctx, h.network.router, "link set %s down", h.port)
}

// Plug puts the cable back.
func (h *Host) Plug(ctx context.Context) error {
	h.network.log.Info("cable plugged", "host", h.Name)
	return h.network.batch(ctx, h.network.router, "link set %s up", h.port)
}

// Mute makes the network swallow whatever the host sends or is sent; its
// interface looks well, and nothing is ever refused.
func (h *Host) Mute(ctx context.Context) error { return h.portState(ctx, "0") }

// Unmute ends Mute.
func (h *Host) Unmute(ctx context.Context) error { return h.portState(ctx, "3") }

// portState sets the bridge port's state: 0 is disabled, 3 is forwarding
// (linux/if_bridge.h).
func (h *Host) portState(ctx context.Context, state string) error {
	h.network.log.Info("bridge port state set", "host", h.Name, "state", state)
	_, err := h.network.run(ctx, "bridge", "-n", h.network.router, "link", "set", "dev", h.uplink, "state", state)
	return err
}

// BlackHole makes a firewall swallow whatever the host is sent, and on the way
// through the router what it sends: nothing is ever refused, and the link, its
// addresses and its neighbours look well, which they do not for long with Mute.
func (h *Host) BlackHole(ctx context.Context) error {
	h.network.log.Info("host in a black hole", "host", h.Name)
	return h.swallow(ctx, "-I")
}

// Restore ends one BlackHole.
func (h *Host) Restore(ctx context.Context) error {
	h.network.log.Info("host out of the black hole", "host", h.Name)
	return h.swallow(ctx, "-D")
}

func (h *Host) swallow(ctx context.Context, action string) error {
	if _, err := h.iptables(ctx, action, "INPUT", "-i", device, "-j", "DROP"); err != nil {
		return err
	}
	for _, chain := range []string{"INPUT", "FORWARD"} {
		_, err := h.network.run(ctx, "ip", "netns", "exec", h.network.router,
			"iptables", "-w", action, chain, "-s", h.addr.String(), "-j", "DROP")
		if err != nil {
			return err
		}
	}
	return nil
}

// Partition makes two hosts drop each other's packets on arrival (iptables
// DROP), while both still reach everybody else.
func (n *Network) Partition(ctx context.Context, a, b *Host) error {
	n.log.Info("hosts partitioned", "a", a.Name, "b", b.Name)
	return n.dropBoth(ctx, "-I", a, b)
}

// Heal ends one Partition of the two hosts.
func (n *Network) Heal(ctx context.Context, a, b *Host) error {
	n.log.Info("hosts healed", "a", a.Name, "b", b.Name)
	return n.dropBoth(ctx, "-D", a, b)
}

func (n *Network) dropBoth(ctx context.Context, action string, a, b *Host) error {
	if err := n.drop(ctx, action, b, a); err != nil {
		return err
	}
	return n.drop(ctx, action, a, b)
}

// Deafen makes one host drop what another sends to it, which still hears it: a
// partition one way.
func (n *Network) Deafen(ctx context.Context, deaf, to *Host) error {
	n.log.Info("host is deaf to another", "host", deaf.Name, "to", to.Name)
	return n.drop(ctx, "-I", to, deaf)
}

// Undeafen ends one Deafen of the two hosts.
func (n *Network) Undeafen(ctx context.Context, deaf, to *Host) error {
	n.log.Info("host hears another again", "host", deaf.Name, "to", to.Name)
	return n.drop(ctx, "-D", to, deaf)
}

// drop adds (-I) or removes (-D) the rule by which one host drops the other's packets.
func (n *Network) drop(ctx context.Context, action string, from, at *Host) error {
	_, err := at.iptables(ctx, action, "INPUT", "-s", from.Addr().String(), "-j", "DROP")
	return err
}

func (h *Host) iptables(ctx context.Context, args ...string) (string, error) {
	return h.Run(ctx, "iptables", append([]string{"-w"}, args...)...)
}

// Rate limits the host's link, each way, to so many bits per second; 0 ends
// the limit. What exceeds it waits in a queue of 50 ms.
func (h *Host) Rate(ctx context.Context, bitsPerSecond int64) error {
	if bitsPerSecond < 0 {
		return fmt.Errorf("rate %d bit/s of host %s: want 0 or more: %w", bitsPerSecond, h.Name, flox.ErrBadInput)
	}
	for namespace, link := range map[string]string{h.network.router: h.port, h.namespace: device} {
		args := []string{"-n", namespace, "qdisc", "replace", "dev", link, "root"}
		if bitsPerSecond == 0 {
			args = append(args, "noqueue")
		} else {
			// The bucket holds 4 ms at full rate (a kernel tick at 250 Hz), and never
			// less than two of the large packets that segmentation offload makes.
			burst := max(bitsPerSecond/8/250, 128<<10)
			args = append(args, "tbf", "rate", strconv.FormatInt(bitsPerSecond, 10)+"bit",
				"burst", strconv.FormatInt(burst, 10), "latency", "50ms")
		}
		if _, err := h.network.run(ctx, "tc", args...); err != nil {
			return err
		}
	}
	return nil
}

// Counters are what went over a host's link since it was made.
type Counters struct {
	RxBytes, RxPackets uint64 // to the host
	TxBytes, TxPackets uint64 // from the host
}

// Sub is what was counted between before and c.
func (c Counters) Sub(before Counters) Counters {
	return Counters{c.RxBytes - before.RxBytes, c.RxPackets - before.RxPackets, c.TxBytes - before.TxBytes, c.TxPackets - before.TxPackets}
}

// Counters reads the link's counters, headers included.
func (h *Host) Counters() (c Counters, err error) {
	err = h.Do(func() error {
		// Of this thread's network namespace; the process may be in another.
		table, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		c, err = parseCounters(string(table), device)
		return err
	})
	return c, err
}

// parseCounters reads a line of proc_net_dev(5): bytes and packets are the
// first two of eight columns, once received, once sent.
func parseCounters(table, device string) (Counters, error) {
	for line := range strings.Lines(table) {
		name, rest, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(name) != device {
			continue
		}
		columns := strings.Fields(rest)
		if len(columns) < 10 {
			break
		}
		var n [4]uint64
		for i, column := range []int{0, 1, 8, 9} {
			v, err := strconv.ParseUint(columns[column], 10, 64)
			if err != nil {
				return Counters{}, fmt.Errorf("counters of %s: %w", device, err)
			}
			n[i] = v
		}
		return Counters{n[0], n[1], n[2], n[3]}, nil
	}
	return Counters{}, fmt.Errorf("counters of %s: not in /proc/net/dev: %w", device, flox.ErrNotFound)
}

// CountFrom begins to count what arrives from peer.
func (h *Host) CountFrom(ctx context.Context, peer *Host) error {
	_, err := h.iptables(ctx, "-I", "INPUT", "-s", peer.Addr().String(), "-m", "comment", "--comment", "count")
	return err
}

// BytesFrom is how many bytes of IP packets arrived from peer since CountFrom.
// ErrNotFound if it was not called.
func (h *Host) BytesFrom(ctx context.Context, peer *Host) (uint64, error) {
	rules, err := h.iptables(ctx, "-nvxL", "INPUT")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(rules) {
		f := strings.Fields(line)
		if len(f) > 2 && strings.Contains(line, "/* count */") && strings.Contains(line, " "+peer.Addr().String()+" ") {
			return strconv.ParseUint(f[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("bytes from %s to %s are not counted: %w", peer.Name, h.Name, flox.ErrNotFound)
}
