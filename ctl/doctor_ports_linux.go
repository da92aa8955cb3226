package ctl

import (
	"context"
	"errors"
	"net"
	"strconv"
	"syscall"

	"github.com/floxctl/flox/ctl/cli"
)

// ports are what floxd listens at by default.
var ports = []struct {
	number int
	use    string
	fix    string
}{
	{cli.DefaultHTTPPort, "binary cache of the storehouse", "storehouse.http"},
	{cli.DefaultStorehousePort, "storehouse to machines", "storehouse.listen"},
	{cli.DefaultAgentPort, "agent to machines", "agent.listen"},
}

// checkPorts listens for a moment: the only way to know that one can.
func checkPorts(ctx context.Context, p patient) []finding {
	var list []finding
	free := ""
	for _, port := range ports {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", ":"+strconv.Itoa(port.number))
		if err == nil {
			l.Close()
			free += " " + strconv.Itoa(port.number)
			continue
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			list = append(list, warning("ports", "see the error", "cannot listen at port %d: %v", port.number, err))
			continue
		}
		owner, known := cli.PortOwner(port.number)
		switch {
		case known && owner.Command == "floxd":
			list = append(list, ok("ports", "%d (%s) is floxd's, pid %d", port.number, port.use, owner.PID))
		case !known && p.agent != nil:
			list = append(list, ok("ports", "%d (%s) is in use, likely by floxd", port.number, port.use))
		default:
			list = append(list, warning("ports", "stop it, or give floxd another port: "+port.fix+" in "+cli.DefaultConfigFile,
				"%d (%s) is in use by %s", port.number, port.use, owner))
		}
	}
	if free != "" {
		list = append(list, ok("ports", "free:%s", free))
	}
	return list
}
