package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// An address of this word switches a door off: the binary cache, and that of the
// other servers.
const (
	noHTTP      = "none"
	noConsensus = noHTTP
)

// parseListen gives the host:port of an address to listen at, also of a TCP
// multiaddr such as /ip4/0.0.0.0/tcp/7781.
func parseListen(addr string) (string, error) {
	hostPort := addr
	if strings.HasPrefix(addr, "/") {
		parts := strings.Split(addr, "/")
		if len(parts) < 5 || parts[1] != "ip4" && parts[1] != "ip6" || parts[3] != "tcp" {
			return "", cli.Explain(flox.ErrBadInput, "address %q: want host:port or /ip4/ADDRESS/tcp/PORT", addr)
		}
		hostPort = net.JoinHostPort(parts[2], parts[4])
	}
	_, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		return "", cli.Explain(flox.ErrBadInput, "address %q: want host:port, such as 0.0.0.0:7781", addr)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return "", cli.Explain(flox.ErrBadInput, "address %q: want a port from 0 to 65535", addr)
	}
	return hostPort, nil
}

// checkPort says who is in the way if addr, the value of a key that flag sets,
// cannot be listened at. Finding it out first makes a better message than a
// child that keeps dying.
func checkPort(ctx context.Context, key, flag, addr string) error {
	hostPort, err := parseListen(addr)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", hostPort)
	if err == nil {
		return l.Close()
	}
	if !errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s: cannot listen at %s: %w: %w", key, addr, err, flox.ErrBadInput)
	}
	_, port, _ := net.SplitHostPort(hostPort) // it was parsed above
	number, _ := strconv.Atoi(port)
	by := "another process"
	if owner, known := cli.PortOwner(number); known {
		by = owner.String()
	}
	return cli.Explain(flox.ErrBusy, "port %s (%s) is in use by %s: stop it, or choose another address with --%s",
		port, key, by, flag)
}
