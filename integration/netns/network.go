// Package netns makes hosts for tests out of Linux namespaces: each has its own
// network, mounts and host name, subnets are bridges, and a router joins them.
//
// It must not know what runs on the hosts. Nothing outlives the process that
// made it: a script waits beside it and removes everything when Close is
// called, and also when the process panics, is interrupted or killed.
package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/internal/reap"
)

// prefix begins the name of every namespace and directory of ours; the
// process id follows, then a number.
const prefix = "flox-"

// runDir is where `ip netns` keeps network namespaces.
const runDir = "/run/netns"

// remove ends what runs in the namespaces whose names begin with $1, removes
// them, and removes the directory $2.
const remove = `
pids() { for ns in /run/netns/"$1"-*; do [ ! -e "$ns" ] || ip netns pids "${ns##*/}"; done 2>/dev/null; }
for signal in TERM KILL; do
	for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
		found=$(pids "$1")
		[ -n "$found" ] || break 2
		[ "$i" != 1 ] || kill -s "$signal" $found 2>/dev/null
		sleep 0.1
	done
done
for ns in /run/netns/"$1"-*; do [ ! -e "$ns" ] || ip netns del "${ns##*/}"; done
[ -z "$2" ] || rm -rf --one-file-system "$2"
:`

var made atomic.Int64 // of this process, for names

// Config is what New needs; the zero value is usable.
type Config struct {
	// Dir holds a directory per network with the hosts' files; default os.TempDir().
	Dir string
	// Log gets a line per change of the network; nil discards.
	Log *slog.Logger
}

// Network is a set of hosts and subnets around one router. Its methods may be
// called from several goroutines.
type Network struct {
	log    *slog.Logger
	name   string // prefix of its namespaces
	dir    string
	router string // name of the router's namespace
	reaper *reap.Reaper

	mu      sync.Mutex
	subnets []*Subnet
	hosts   []*Host
	holders []*exec.Cmd
}

// Subnet is a link that all its hosts share; multicast stays within it.
type Subnet struct {
	Name   string
	Prefix netip.Prefix
	bridge string
	next   netip.Addr
}

// New makes a network with a router and nothing else, as root. It first removes
// what dead processes left. Errors: ErrDenied, or a program that is missing.
func New(ctx context.Context, cfg Config) (*Network, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("network namespaces need root: run with sudo: %w", flox.ErrDenied)
	}
	for _, program := range []string{"ip", "bridge", "tc", "nsenter", "unshare", "iptables"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%w: run scripts/setup", err)
		}
	}
	if err := Sweep(ctx); err != nil {
		return nil, err
	}
	n := &Network{log: cfg.Log, name: fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), made.Add(1))}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if cfg.Dir == "" {
		cfg.Dir = os.TempDir()
	}
	n.dir = filepath.Join(cfg.Dir, n.name)
	n.router = n.name + "-router"
	var err error
	if n.reaper, err = reap.Start(remove, n.name, n.dir); err != nil {
		return nil, err
	}
	if err := n.start(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Network) start(ctx context.Context) error {
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		return err
	}
	// Where there never was a network namespace or a Nix.
	if err := os.MkdirAll("/nix", 0o755); err != nil {
		return err
	}
	if err := n.addNamespace(ctx, n.router); err != nil {
		return err
	}
	_, err := n.run(ctx, "ip", "netns", "exec", n.router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	return err
}

// Close ends everything that runs on the hosts, first with SIGTERM and three
// seconds later with SIGKILL, and removes hosts, network and files.
func (n *Network) Close() error {
	err := n.reaper.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, holder := range n.holders {
		_ = holder.Wait() // its stdin is at its end, or it was killed
	}
	n.holders = nil
	for _, h := range n.hosts {
		if h.relay != nil {
			h.relay.close()
			h.relay = nil
		}
	}
	return err
}

// Dir is the directory with the hosts' files; it goes with Close.
func (n *Network) Dir() string { return n.dir }

// Subnet adds a subnet and joins it to the router. The zero prefix picks
// 10.77.N.0/24. The router has the first address, hosts follow.
func (n *Network) Subnet(ctx context.Context, name string, p netip.Prefix) (*Subnet, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	count := len(n.subnets)
	if !p.IsValid() {
		p = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(count), 0}), 24)
	}
	p = p.Masked()
	if !p.Addr().Is4() || p.Bits() > 28 || count > 250 {
		return nil, fmt.Errorf("subnet %s %s: want an IPv4 prefix of at most 28 bits: %w", name, p, flox.ErrBadInput)
	}
	for _, s := range n.subnets {
		if s.Prefix.Overlaps(p) {
			return nil, fmt.Errorf("subnet %s %s overlaps %s %s: %w", name, p, s.Name, s.Prefix, flox.ErrBadInput)
		}
	}
	s := &Subnet{Name: name, Prefix: p, bridge: "br" + strconv.Itoa(count), next: p.Addr().Next().Next()}
	// An address of its own: otherwise it is the least of its ports', and changes
	// under the hosts that know it when a port comes or goes.
	err := n.batch(ctx, n.router,
		"link add name %s address 02:00:00:00:%02x:%02x type bridge mcast_snooping 0", s.bridge, count>>8, count&0xff,
		"addr add %s/%d dev %s", p.Addr().Next(), p.Bits(), s.bridge,
		"link set %s up", s.bridge)
	if err != nil {
		return nil, fmt.Errorf("subnet %s: %w", name, err)
	}
	n.subnets = append(n.subnets, s)
	n.log.Info("subnet added", "name", name, "prefix", p)
	return s, nil
}

func (n *Network) addNamespace(ctx context.Context, name string) error {
	if _, err := n.run(ctx, "ip", "netns", "add", name); err != nil {
		return err
	}
	// IPv4 only: every address in a test is one the test gave out.
	_, err := n.run(ctx, "ip", "netns", "exec", name, "sh", "-c",
		"[ ! -d /proc/sys/net/ipv6 ] || echo 1 | tee /proc/sys/net/ipv6/conf/all/disable_ipv6 >/proc/sys/net/ipv6/conf/default/disable_ipv6; ip link set lo up")
	return err
}

// batch runs `ip` commands in a namespace, given as formats, each followed by
// its arguments.
func (n *Network) batch(ctx context.Context, namespace string, formatsAndArgs ...any) error {
	var script strings.Builder
	for rest := formatsAndArgs; len(rest) > 0; {
		format, _ := rest[0].(string)
		args := 1 + strings.Count(format, "%")
		fmt.Fprintf(&script, format+"\n", rest[1:args]...)
		rest = rest[args:]
	}
	cmd := exec.CommandContext(ctx, "ip", "-n", namespace, "-batch", "-")
	cmd.Stdin = strings.NewReader(script.String())
	_, err := output(cmd)
	return err
}

func (n *Network) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	return output(exec.CommandContext(ctx, name, args...))
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

var leftover = regexp.MustCompile(`^(` + prefix + `([0-9]+)-[0-9]+)(-|$)`)

// Sweep removes namespaces and files of processes that are gone and could not
// clean up, such as after SIGKILL of the whole process group.
func Sweep(ctx context.Context) error {
	found := map[string]string{} // network -> directory, "" if none
	spaces, _ := filepath.Glob(filepath.Join(runDir, prefix+"*"))
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	for _, path := range append(spaces, dirs...) {
		m := leftover.FindStringSubmatch(filepath.Base(path))
		if m == nil {
			continue
		}
		if _, err := os.Stat("/proc/" + m[2]); err == nil {
			continue // still running, or its number was given out again
		}
		if filepath.Dir(path) != runDir {
			found[m[1]] = path
		} else if found[m[1]] == "" {
			found[m[1]] = ""
		}
	}
	for name, dir := range found {
		if _, err := output(exec.CommandContext(ctx, "sh", "-c", remove, "sweep", name, dir)); err != nil {
			return fmt.Errorf("remove what %s left: %w", name, err)
		}
	}
	return nil
}
