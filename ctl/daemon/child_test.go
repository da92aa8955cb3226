package daemon

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/floxctl/flox/agent/warden"
)

// TestChildrenOfARunningMachine is what happens to a machine while floxd runs:
// somebody makes a mistake in the configuration file, processes die, and an
// update puts another file behind the name floxd was started by.
func TestChildrenOfARunningMachine(t *testing.T) {
	needRootAndFUSE(t)
	program := buildFloxd(t)
	m := newMachine(t)
	link, mistaken := m.root+"/floxd", m.root+"/etc/floxd/config.toml"
	if err := os.Symlink(program, link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.root+"/secret", []byte("root's"), 0o600); err != nil {
		t.Fatal(err)
	}
	// With an /etc of its own, and started by somebody who left a file open.
	flags := m.flags
	m.flags = append([]string{"-m", "sh", "-c", strings.ReplaceAll(`umask 022; cp -a /etc ROOT/etc && mkdir -p ROOT/etc/floxd && : >ROOT/etc/floxd/config.toml &&
mount --bind ROOT/etc /etc && exec 9<ROOT/secret && exec ROOT/floxd "$@"`, "ROOT", m.root), "sh"}, flags...)
	r := m.start(t, "unshare")
	pid := r.cmd.Process.Pid
	if !holds(t, pid, m.root+"/secret") {
		t.Fatal("the parent was not given the open file")
	}
	eventually(t, "all processes run", func() bool { return complete(children(t, pid)) })
	before := children(t, pid)
	for child, line := range before {
		if holds(t, child, m.root+"/secret") {
			t.Errorf("%s has what its parent was given", line)
		}
	}
	if err := os.WriteFile(mistaken, []byte("no-such-key = 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for child := range before {
		if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "both processes serve again", func() bool {
		for child := range children(t, pid) {
			if _, old := before[child]; old {
				return false
			}
		}
		return complete(children(t, pid)) && m.answers(t)
	})
	m.checkReload(t, program, link)
	r.stop()
}

// checkReload: a reload takes what is behind the name now, and says so when
// that is what ran before.
func (m machineDirs) checkReload(t *testing.T, program, link string) {
	t.Helper()
	reload := func(args ...string) string {
		cmd := exec.Command(program, append([]string{"agent", "reload", "--config", m.root + "/config.toml", "--state-dir", m.root + "/state"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("reload: %v\n%s", err, out)
		}
		return string(out)
	}
	if out := reload(); !strings.Contains(out, "from "+link) || !strings.Contains(out, "the file and the version that ran before") {
		t.Errorf("a reload of what runs says\n%s", out)
	}
	updated := filepath.Join(m.root, "floxd-2")
	if out, err := exec.Command("cp", program, updated).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Symlink(updated, link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	var got warden.Reloaded
	if err := json.Unmarshal([]byte(reload("--json")), &got); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", got.PID))
	if err != nil || exe != updated || got.Program != link || got.Unchanged {
		t.Errorf("reloaded %+v, which runs %s (%v), want %s", got, exe, err, updated)
	}
}

// answers reports whether the agent serves.
func (m machineDirs) answers(t *testing.T) bool {
	t.Helper()
	return agentMounted(t.Context(), m.root+"/run/agent.sock")
}

// holds reports whether a process has a file open.
func holds(t *testing.T, pid int, file string) bool {
	t.Helper()
	open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range open {
		if to, err := os.Readlink(fd); err == nil && to == file {
			return true
		}
	}
	return false
}
