package warden

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// others are the live processes of h's program besides one of them.
func (h *host) others(t *testing.T, than int) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		line, readErr := os.ReadFile(file)
		argv0, _, _ := bytes.Cut(line, []byte{0})
		if err == nil && readErr == nil && string(argv0) == h.cfg.Child[0] && pid != than && alive(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// awaitSpare waits for the one process that is there besides the child.
func (h *host) awaitSpare(t *testing.T, child int) int {
	t.Helper()
	for range 1000 {
		if pids := h.others(t, child); len(pids) == 1 {
			return pids[0]
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("processes besides child %d: %v, want one", child, h.others(t, child))
	return 0
}

// TestSpareTakesOver: while a child serves, the next one waits, and is what an
// ordinary one is when it takes over. Without it, one is started.
func TestSpareTakesOver(t *testing.T) {
	h := newHost(t)
	stop, _ := h.start(t)
	first := h.report(t, 1)
	waits := h.awaitSpare(t, first.PID)
	kill := func(pid int) {
		t.Helper()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	kill(first.PID)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	second := h.report(t, 2)
	if second.PID != waits {
		t.Errorf("child %d took over, and %d had waited", second.PID, waits)
	}
	if diff := cmp.Diff(first.Env, second.Env); diff != "" {
		t.Errorf("its environment (-first +second):\n%s", diff)
	}
	for _, field := range []string{"Uid", "Gid", "Groups", "NoNewPrivs", "CapEff", "CapPrm", "CapBnd"} {
		if got, want := status(second.Status, field), status(first.Status, field); got != want {
			t.Errorf("%s is %q, of the first child %q", field, got, want)
		}
	}
	lost := h.awaitSpare(t, second.PID)
	kill(lost)
	for range 1000 {
		if !alive(lost) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	kill(second.PID)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	third := h.report(t, 3)
	if third.PID == lost {
		t.Error("a dead process took over")
	}
	h.awaitSpare(t, third.PID)
	if err := stop(); err != nil {
		t.Error(err)
	}
	if left := h.others(t, 0); len(left) > 0 {
		t.Errorf("processes left: %s", fmt.Sprint(left))
	}
}
