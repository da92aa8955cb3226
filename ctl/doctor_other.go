//go:build !linux

package ctl

import (
	"context"
	"runtime"
)

// localChecks on a machine that can run floxctl but no agent.
func localChecks(ctx context.Context, p patient) []finding {
	all := []finding{warning("kernel", "run the agent on Linux, in a virtual machine for example, and name its socket with --socket",
		"an agent needs Linux; this is %s", runtime.GOOS)}
	all = append(all, checkDisk(ctx, p)...)
	return append(all, checkKeys(ctx, p)...)
}

// stoppedServer stands in for what only Linux can tell.
func stoppedServer(context.Context, string) (pid int, stopped bool) { return 0, false }

// mount stands in for what only Linux has.
type mount struct{}

func storeMount(patient) *mount { return nil }
