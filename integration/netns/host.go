package netns

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// Host is one machine of a network. It shares the real machine's files except for
// /nix, /run and /var/lib/floxd, which are empty at first and lie in Dir, and
// for /etc and the rest of /var/lib, where its changes are its own.
type Host struct {
	Name   string
	Subnet *Subnet
	// Dir holds the host's nix/, run/, state/ (/var/lib/floxd) and home/ as they
	// are seen from outside; its mounts are not seen there.
	Dir string

	addr      netip.Addr
	namespace string
	network   *Network
	port      string // the router's end of the cable
	uplink    string // the bridge's port: the same, or the relay's with a Delay
	relay     *relay // of Delay; nil = none
	pid       int    // of the process that keeps the mount namespace
}

// Addr is the host's address.
func (h *Host) Addr() netip.Addr { return h.addr }

// NetNS is the file of the host's network namespace, /run/netns/NAME.
func (h *Host) NetNS() string { return filepath.Join(runDir, h.namespace) }

// Root is the host's file system as seen from outside, with what is mounted
// there. Who serves one of those mounts must not go through it.
func (h *Host) Root() string { return "/proc/" + strconv.Itoa(h.pid) + "/root" }

// device is a host's only interface besides lo.
const device = "eth0"

// inhabit gives the namespaces it runs in the host's own directories, then
// waits for its standard input to end. $1 is the host's Dir, $2 its name.
const inhabit = `set -e
hostname "$2"
mount -t tmpfs tmpfs "$1/scratch"
for dir in /etc /var/lib; do
	mkdir -p "$1/scratch$dir" "$1/scratch/work$dir"
	mount -t overlay -o "lowerdir=$dir,upperdir=$1/scratch$dir,workdir=$1/scratch/work$dir" overlay "$dir"
done
echo "127.0.0.1 localhost $2" >/etc/hosts
mkdir -p /var/lib/floxd
mount --bind "$1/state" /var/lib/floxd
mount --bind "$1/nix" /nix
mount --bind "$1/run" /run
echo ready
exec cat >/dev/null`

// Host adds a host to a subnet.
func (n *Network) Host(ctx context.Context, name string, s *Subnet) (*Host, error) {
	if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || name == "router" {
		return nil, fmt.Errorf("host name %q: want lower case letters, digits and dashes, and not \"router\": %w", name, flox.ErrBadInput)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	namespace := n.name + "-" + name
	h := &Host{
		Name: name, Subnet: s, addr: s.next, namespace: namespace, Dir: filepath.Join(n.dir, name),
		network: n, port: "p" + strconv.Itoa(len(n.hosts)),
	}
	h.uplink = h.port
	if !s.Prefix.Contains(h.addr.Next()) {
		return nil, fmt.Errorf("host %s: subnet %s has no address left: %w", name, s.Prefix, flox.ErrFull)
	}
	for _, dir := range []string{"nix/store", "run/floxd", "run/lock", "state", "home", "scratch"} {
		if err := os.MkdirAll(filepath.Join(h.Dir, dir), 0o755); err != nil {
			return nil, err
		}
	}
	if err := n.addNamespace(ctx, namespace); err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	err := n.batch(ctx, n.router,
		"link add name %s type veth peer name %s netns %s", h.port, device, namespace,
		"link set %s master %s", h.port, s.bridge,
		"link set %s up", h.port)
	if err == nil {
		err = n.batch(ctx, namespace,
			"addr add %s/%d dev %s", h.addr, s.Prefix.Bits(), device,
			"link set %s up", device,
			"route add default via %s", s.Prefix.Addr().Next())
	}
	if err == nil {
		err = h.hold(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	s.next = s.next.Next()
	n.hosts = append(n.hosts, h)
	n.log.Info("host added", "name", name, "addr", h.addr)
	return h, nil
}

// hold starts the process that keeps the host's mounts; it ends with the network.
func (h *Host) hold(ctx context.Context) error {
	cmd := exec.Command("nsenter", "--net="+h.NetNS(), "--", //nolint:noctx // lives as long as the network
		"unshare", "--mount", "--uts", "--propagation", "private", "--", "sh", "-c", inhabit, "inhabit", h.Dir, h.Name)
	cmd.Dir = "/"
	cmd.Stdin = h.network.reaper.Life()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // out of Ctrl-C's reach
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	h.pid = cmd.Process.Pid
	h.network.holders = append(h.network.holders, cmd)
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	line, _ := bufio.NewReader(out).ReadString('\n')
	if !stop() {
		return context.Cause(ctx)
	}
	if line != "ready\n" {
		return fmt.Errorf("its directories could not be mounted (is overlayfs in the kernel?), see standard error")
	}
	return nil
}

// Command prepares a command that runs on the host, as root, in /, with HOME
// in the host's own directory. The process that is started is the command
// itself: signals reach it.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := append(append(h.enter(), name), args...)
	cmd := exec.CommandContext(ctx, enter[0], enter[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "HOME="+filepath.Join(h.Dir, "home"))
	return cmd
}

// Run runs a command on the host and gives its standard output; standard error
// is part of the error.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := output(h.Command(ctx, name, args...))
	return string(out), err
}

// Shell is a command line that opens a shell on the host, for a person.
func (h *Host) Shell() string { return strings.Join(h.enter(), " ") + " bash" }

func (h *Host) enter() []string {
	// Not NetNS: who is in another host's mounts (DoMounted) has another /run.
	ns := "/proc/" + strconv.Itoa(h.pid) + "/ns/"
	return []string{"nsenter", "--net=" + ns + "net", "--mount=" + ns + "mnt", "--uts=" + ns + "uts", "--wd=/", "--"}
}

// Do runs fn in this process, in the host's network namespace: sockets that
// the calling goroutine opens are the host's and stay so. fn must not leave
// the opening of sockets to other goroutines.
func (h *Host) Do(fn func() error) error {
	return apart(func() error {
		if err := setns(h.NetNS(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", h.namespace, err)
		}
		return fn()
	})
}

// DoMounted runs fn in this process with the host's mounts: the files that the
// calling goroutine opens and the commands that it starts see the host's, and
// what they mount nobody else sees. The network stays this process's.
func (h *Host) DoMounted(fn func() error) error {
	return apart(func() error {
		// A thread that shares its working directory may not change mounts.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = setns("/proc/"+strconv.Itoa(h.pid)+"/ns/mnt", unix.CLONE_NEWNS)
		}
		if err != nil {
			return fmt.Errorf("enter the mounts of %s: %w", h.namespace, err)
		}
		return fn()
	})
}

// apart runs fn on a thread that nobody has before or after it.
func apart(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and nobody else gets a
		// thread in the wrong namespace.
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The main thread does not end, and where it is the whole process is said
			// to be. While this goroutine sits on it, another cannot get it.
			result <- apart(fn)
			return
		}
		result <- fn()
	}()
	return <-result
}

func setns(file string, kind int) error {
	ns, err := os.Open(file)
	if err != nil {
		return err
	}
	defer ns.Close()
	return unix.Setns(int(ns.Fd()), kind)
}

// Dial connects from the host to an address, which must be numeric. It fits
// http.Transport.DialContext.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from %s: %w: want a numeric address and port", h.Name, err)
	}
	err = h.Do(func() error {
		var dialer net.Dialer
		conn, err = dialer.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens on the host, for example on "tcp", "0.0.0.0:80".
func (h *Host) Listen(ctx context.Context, network, address string) (listener net.Listener, err error) {
	err = h.Do(func() error {
		var config net.ListenConfig
		listener, err = config.Listen(ctx, network, address)
		return err
	})
	return listener, err
}
