package warden

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox/fuse"
)

// Processes that hold the lock of their memory while they wait for bytes of the
// mount keep nobody from seeing the others, and what they use.
func TestProcessesThatHoldTheirMemory(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.start(t)
	h.report(t, 1)
	mount, err := fuse.FindMount(h.cfg.MountDir)
	if err != nil {
		t.Fatal(err)
	}
	scans, err := newScanner(mount.Device)
	if err != nil {
		t.Fatal(err)
	}
	scans.memory = reads{patience: 300 * time.Millisecond, share: maxStuckProcesses}
	finder := &rootFinder{storeDir: h.cfg.MountDir, stateDir: h.top, proc: "/proc", memory: &scans.memory}
	c := line(t, &clerk{mountDir: h.cfg.MountDir, log: slog.New(slog.DiscardHandler), scans: scans, roots: finder})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	const holders = 3
	var held []*exec.Cmd
	for range holders {
		cmd := exec.Command(h.path("prog"))
		cmd.Env = append(os.Environ(), modeEnv+"=hold", "FLOX_WARDEN_MAP="+h.path("hung"))
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		held = append(held, cmd)
	}
	t.Cleanup(func() { release(t, h, held) })
	for _, cmd := range held {
		for !errors.Is(pagesError(ctx, c, cmd), ErrUnread) {
			if ctx.Err() != nil {
				t.Fatal("a process that holds its memory tells what it has mapped")
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	for range 4 * askedAtOnce { // nobody's place is taken for long
		if err := pagesError(ctx, c, held[0]); !errors.Is(err, ErrUnread) {
			t.Fatal(err)
		}
	}
	if err := pagesError(ctx, c, nil); err != nil {
		t.Errorf("another process: %v", err)
	}
	if used, err := c.InUse(ctx); err != nil || len(used) == 0 {
		t.Errorf("%d inodes in use, %v", len(used), err)
	}
	for range 2 {
		roots, unread, err := c.Roots(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, cmd := range held {
			dir := filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid))
			if !slices.Contains(unread, dir) {
				t.Errorf("%s is not in %q", dir, unread)
			}
			if !slices.ContainsFunc(roots, func(r Root) bool { return r.Link == dir+"/exe" && r.Name == storePath }) {
				t.Errorf("what %s runs is no root", dir)
			}
		}
	}
	scans.memory.mu.Lock()
	stuck := len(scans.memory.stuck)
	scans.memory.mu.Unlock()
	if stuck != holders {
		t.Errorf("%d reads are stuck, want one for each of %d processes", stuck, holders)
	}
	release(t, h, held)
	if _, unread, err := c.Roots(ctx); err != nil || slices.ContainsFunc(unread, func(unit string) bool {
		return slices.ContainsFunc(held, func(cmd *exec.Cmd) bool { return strings.HasSuffix(unit, strconv.Itoa(cmd.Process.Pid)) })
	}) {
		t.Errorf("unread %q when all was over, %v", unread, err)
	}
}

func pagesError(ctx context.Context, c *Conn, cmd *exec.Cmd) error {
	pid := os.Getpid()
	if cmd != nil {
		pid = cmd.Process.Pid
	}
	_, err := c.Pages(ctx, uint32(pid))
	return err
}

// release lets go of all who wait for the mount, and waits for them.
func release(t *testing.T, h *host, held []*exec.Cmd) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(h.cfg.RunDir, "release"), nil, 0o644); err != nil {
		t.Error(err)
	}
	for _, cmd := range held {
		if cmd.ProcessState == nil {
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		}
	}
}

// Whatever a process mapped before it did not tell any more counts as mapped; what
// one reads itself that never told may be.
func TestScanOfAProcessThatDoesNotTell(t *testing.T) {
	t.Parallel()
	proc := t.TempDir()
	process := func(pid, maps string) {
		t.Helper()
		dir := filepath.Join(proc, pid)
		if err := os.MkdirAll(filepath.Join(dir, "task", pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "maps"), []byte("7f00-7f01 r--p 00000000 00:2f "+maps+" /nix/store/x\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	process("17", "170")
	process("18", "180")
	var said lockedBuffer
	s := &scanner{minor: 0x2f, proc: proc, log: newLog(&said), memory: reads{patience: 100 * time.Millisecond}}
	scan := func() usage {
		t.Helper()
		s.mu.Lock()
		s.at = time.Time{}
		s.mu.Unlock()
		u, err := s.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	scan()
	process("18", "181")
	process("19", "190")
	for _, pid := range []string{"17", "19"} { // a pipe without a writer is as one that waits
		pipe := filepath.Join(proc, pid, "maps")
		if err := errors.Join(os.Remove(pipe), syscall.Mkfifo(pipe, 0o600)); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if w, err := os.OpenFile(pipe, os.O_RDWR, 0); err == nil {
				w.Close()
			}
		}()
	}
	for range 3 {
		u := scan()
		for _, c := range []struct {
			what   string
			node   uint64
			thread uint32
			want   bool
		}{
			{"what 17 had", 170, 18, true},
			{"what 18 had", 180, 18, false},
			{"what 18 has", 181, 17, true},
			{"what 19 reads", 190, 19, true},
			{"what 19 reads, for another", 190, 18, false},
			{"what nobody knows who reads", 190, 0, true},
		} {
			if got := s.uses(u, c.node, c.thread); got != c.want {
				t.Errorf("%s is mapped: %v", c.what, got)
			}
		}
	}
	s.memory.mu.Lock()
	stuck := len(s.memory.stuck)
	s.memory.mu.Unlock()
	if stuck != 2 {
		t.Errorf("%d reads are stuck", stuck)
	}
	if n := strings.Count(said.String(), "does not tell"); n != 2 {
		t.Errorf("said %d times: %s", n, said.String())
	}
}
