package raft

import (
	"os"
	"path/filepath"
	"testing"
)

// The block cache of a server in a small container is small.
func TestMemoryLimitOfControlGroups(t *testing.T) {
	t.Parallel()
	machine := memoryLimit(t.TempDir())
	if machine < 64<<20 {
		t.Fatalf("the machine has %d bytes of memory", machine)
	}
	for name, c := range map[string]struct {
		limits map[string]string
		want   int64
	}{
		"none":         {nil, machine},
		"no limit":     {map[string]string{"system.slice/floxd.service": "max"}, machine},
		"its own":      {map[string]string{"system.slice/floxd.service": "33554432", "system.slice": "max"}, 32 << 20},
		"of the slice": {map[string]string{"system.slice/floxd.service": "33554432", "system.slice": "16777216"}, 16 << 20},
		"unreadable":   {map[string]string{"system.slice/floxd.service": "a lot", "system.slice": "16777216"}, 16 << 20},
		"of others":    {map[string]string{"user.slice": "1"}, machine},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			write := func(text string, name ...string) {
				file := filepath.Join(append([]string{root}, name...)...)
				if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write("1:cpu:/other\n0::/system.slice/floxd.service", "proc/self/cgroup")
			for group, limit := range c.limits {
				write(limit, "sys/fs/cgroup", group, "memory.max")
			}
			if got := memoryLimit(root); got != c.want {
				t.Errorf("%d bytes, want %d", got, c.want)
			}
		})
	}
}
