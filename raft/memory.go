package raft

import (
	"math"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Bounds of the block cache's default.
const (
	minCache   = 64 << 20
	maxCache   = 2 << 30
	cacheShare = 16 // of the memory, one part in so many
)

// defaultCache is a share of the memory this process may use. A cache that holds
// all facts answers twice as fast as one that reads them from the kernel's; it
// grows with what is read, not at once.
func defaultCache() int64 {
	return min(max(memoryLimit("/")/cacheShare, minCache), maxCache)
}

// memoryLimit gives the bytes of memory that this process may use: what the
// machine has, or less if its control groups say so. root is the root of the file
// system that says it.
func memoryLimit(root string) int64 {
	limit := int64(math.MaxInt64)
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err == nil {
		limit = int64(machine.Totalram) * int64(machine.Unit) //nolint:gosec // no machine has 8 EiB
	}
	own, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return limit
	}
	for line := range strings.Lines(string(own)) {
		group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::") // version 2
		if !ok {
			continue
		}
		for ; ; group = path.Dir(group) { // a limit holds for all below it
			b, err := os.ReadFile(filepath.Join(root, "sys/fs/cgroup", group, "memory.max"))
			if most, bad := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && bad == nil { // "max" is no limit
				limit = min(limit, most)
			}
			if group == "/" || group == "." {
				break
			}
		}
	}
	return limit
}
