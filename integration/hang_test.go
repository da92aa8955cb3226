package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hangs says of a process that should have ended, and of all it has started, where
// they are: what the kernel is doing for them, where the goroutines of ours are (on
// standard error, or in the logs named), and the end of those logs. Ours end of it.
func hangs(t *testing.T, pid int, logs string) {
	t.Helper()
	for _, p := range family(pid) {
		name := read("/proc/%d/comm", p)
		t.Logf("process %d, %s: %s\nwaits in %s\n%s", p, name, strings.ReplaceAll(read("/proc/%d/cmdline", p), "\x00", " "),
			read("/proc/%d/wchan", p), read("/proc/%d/stack", p))
		if strings.HasPrefix(name, "flox") || strings.HasPrefix(name, "exe") {
			_ = syscall.Kill(p, syscall.SIGABRT) // they pass SIGQUIT on
		}
	}
	time.Sleep(2 * time.Second) // for the dumps, which nobody can wait for
	files, _ := filepath.Glob(logs)
	for _, file := range files {
		b, err := os.ReadFile(file)
		t.Logf("the end of %s (%v):\n%s", file, err, b[max(0, len(b)-30_000):])
	}
}

// family are a process and all it has started that is still its own.
func family(pid int) []int {
	all := []int{pid}
	dirs, _ := filepath.Glob("/proc/[0-9]*/stat")
	for grew := true; grew; {
		grew = false
		for _, file := range dirs {
			var p, parent int
			b, _ := os.ReadFile(file)
			head, rest, _ := strings.Cut(string(b), " (")
			_, _ = fmt.Sscan(head, &p)
			_, _ = fmt.Sscanf(rest[strings.LastIndexByte(rest, ')')+1:], " %1s %d", new(string), &parent)
			if p > 0 && slices.Contains(all, parent) && !slices.Contains(all, p) {
				all, grew = append(all, p), true
			}
		}
	}
	return all
}

func read(file string, pid int) string {
	b, err := os.ReadFile(fmt.Sprintf(file, pid))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// TestHangsShowsWhere: of a command that does not end, what it and its agent do is
// said. It is asked of one that waits for a line nobody writes.
func TestHangsShowsWhere(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-hangs")
	u.invite(t)
	r := u.start(t, "fuse", "echo ready; read x")
	if line := r.says(t); line != "ready" {
		t.Fatalf("it says %q", line)
	}
	hangs(t, r.cmd.Process.Pid, u.agentLogs())
	logs, err := filepath.Glob(u.agentLogs())
	if err != nil || len(logs) != 1 {
		t.Fatalf("logs %v, %v", logs, err)
	}
	b, err := os.ReadFile(logs[0])
	if err != nil || !strings.Contains(string(b), "SIGABRT") || !strings.Contains(string(b), "goroutine ") {
		t.Errorf("no goroutines in the agent's log (%v):\n%s", err, b)
	}
}

// agentLogs are the logs of a user's private agents.
func (u *stranger) agentLogs() string {
	return filepath.Join(u.home, ".local/state/floxd/[0-9]*/agent.log")
}
