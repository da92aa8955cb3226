package daemon

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// patience is how long anything of a running floxd may take before it counts
// as hung; nothing is measured with it.
const patience = 60 * time.Second

// needRootAndFUSE skips a test where it cannot run, and fails it under CI.
func needRootAndFUSE(t *testing.T) {
	t.Helper()
	_, err := os.Stat("/dev/fuse")
	if os.Geteuid() == 0 && err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root and /dev/fuse, and CI must have both")
	}
	t.Skip("needs root and /dev/fuse")
}

// buildFloxd builds the program. Its directory stays private to root, as a build in
// somebody's home is.
func buildFloxd(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "floxd-bin-") // mode 0700
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program := filepath.Join(dir, "floxd")
	cmd := exec.Command("go", "build", "-o", program, "github.com/floxctl/flox/cmd/floxd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build floxd: %v\n%s", err, out)
	}
	return program
}

// machineDirs are one machine's directories and ports.
type machineDirs struct {
	root, store string
	flags       []string
}

func newMachine(t *testing.T) machineDirs {
	t.Helper()
	root, err := os.MkdirTemp("", "floxd-up-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o755); err != nil { // an ordinary user works below it
		t.Fatal(err)
	}
	m := machineDirs{root: root, store: root + "/store"}
	t.Cleanup(func() {
		_ = unix.Unmount(m.store, unix.MNT_DETACH) // only where a test failed before floxd did it
		_ = os.RemoveAll(root)
	})
	free := freeAddrs(t, 3)
	m.flags = []string{
		"up", "--config", root + "/config.toml", "--state-dir", root + "/state", "--run-dir", root + "/run", "--store-dir", m.store,
		"--agent-mdns=false", "--storehouse-mdns=false", "--storehouse-name", "test",
		"--storehouse-http", free[0], "--storehouse-listen", free[1], "--agent-listen", free[2],
	}
	if err := os.WriteFile(root+"/config.toml", []byte("user = \"nobody\"\nlog-level = \"info\"\n[agent]\ncache-reserve = \"1MiB\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

// freeAddrs gives addresses that nobody listens at, no two the same.
func freeAddrs(t *testing.T, n int) (addrs []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // when all are had: one that was closed may be given again
		addrs = append(addrs, l.Addr().String())
	}
	return addrs
}

// running is a floxd up.
type running struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  *lockedBuffer
	out  *lockedBuffer
	done chan error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs floxd up until it has said all that it says when it is ready.
func (m machineDirs) start(t *testing.T, program string) *running {
	t.Helper()
	// Under the mask of a hardened machine.
	r := &running{t: t, cmd: exec.Command("sh", append([]string{"-c", `umask 077; exec "$0" "$@"`, program}, m.flags...)...), log: &lockedBuffer{}, out: &lockedBuffer{}, done: make(chan error, 1)}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = r.log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	go func() {
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			fmt.Fprintln(r.out, lines.Text())
			if strings.HasPrefix(lines.Text(), "  curl ") {
				close(ready)
			}
		}
		r.done <- r.cmd.Wait()
	}()
	t.Cleanup(func() { _ = r.cmd.Process.Kill() })
	select {
	case <-ready:
	case err := <-r.done:
		t.Fatalf("floxd up ended: %v\n%s%s", err, r.out, r.log)
	case <-time.After(patience):
		t.Fatalf("floxd up is not ready after %s\n%s%s", patience, r.out, r.log)
	}
	return r
}

// stop presses Ctrl-C and waits for the end.
func (r *running) stop() {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		r.t.Fatal(err)
	}
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("Ctrl-C ended floxd up with %v\n%s", err, r.log)
		}
	case <-time.After(patience):
		r.t.Fatalf("floxd up does not end on Ctrl-C\n%s", r.log)
	}
}

// status asks the agent.
func (m machineDirs) status(t *testing.T) *floxv1.StatusResponse {
	t.Helper()
	client, done := cli.Agent(m.root + "/run/" + cli.SocketName)
	defer done()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	resp, err := client.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg
}

// children lists the processes below pid, with their command lines.
func children(t *testing.T, pid int) map[int]string {
	t.Helper()
	found := map[int]string{}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, stat := range stats {
		b, err := os.ReadFile(stat)
		if err != nil {
			continue // it just ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 2 || fields[1] != strconv.Itoa(pid) {
			continue
		}
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
		if err != nil {
			continue
		}
		line, _ := os.ReadFile(filepath.Dir(stat) + "/cmdline") // empty when it just ended
		found[child] = strings.ReplaceAll(string(line), "\x00", " ")
	}
	return found
}

// complete reports whether floxd up's processes all run: the storehouse, the agent,
// and the next agent, which waits.
func complete(children map[int]string) bool {
	agents, storehouses := 0, 0
	for _, line := range children {
		switch {
		case strings.Contains(line, " agent --child"):
			agents++
		case strings.Contains(line, " storehouse "):
			storehouses++
		}
	}
	return agents == 2 && storehouses == 1 && len(children) == 3
}

// eventually waits for something that must happen.
func eventually(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !happened(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

// TestUp is what a newcomer does: start everything, look, stop it; and what
// happens to them: a process is killed, the program is killed, it is started
// again, a second one is started.
func TestUp(t *testing.T) {
	needRootAndFUSE(t)
	program := buildFloxd(t)
	m := newMachine(t)
	r := m.start(t, program)

	for _, want := range []string{"as user nobody", "mounted at " + m.store, "upload-token", "floxctl status --socket " + m.root + "/run/agent.sock"} {
		if !strings.Contains(r.out.String(), want) {
			t.Errorf("floxd up does not say %q:\n%s", want, r.out)
		}
	}
	eventually(t, "all processes run", func() bool { return complete(children(t, r.cmd.Process.Pid)) })
	m.checkServed(t)
	m.checkBuilds(t, r)
	m.checkOwners(t)
	m.checkPrivileges(t, r.cmd.Process.Pid)

	second := exec.Command(program, m.flags...)
	if out, err := second.CombinedOutput(); second.ProcessState.ExitCode() != cli.CodeBusy || !strings.Contains(string(out), "in use by another floxd up (pid "+strconv.Itoa(r.cmd.Process.Pid)) {
		t.Errorf("a second floxd up: %v\n%s", err, out)
	}

	// A storehouse that is killed comes back by itself.
	for pid, line := range children(t, r.cmd.Process.Pid) {
		if strings.Contains(line, " storehouse ") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the storehouse is started again", func() bool {
				for again, line := range children(t, r.cmd.Process.Pid) {
					if again != pid && strings.Contains(line, " storehouse ") {
						return true
					}
				}
				return false
			})
		}
	}

	// Killed itself, it leaves no process behind, and is started again as if nothing had been.
	eventually(t, "all processes run", func() bool { return complete(children(t, r.cmd.Process.Pid)) })
	before := children(t, r.cmd.Process.Pid)
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-r.done
	for pid, line := range before {
		eventually(t, line+"ends with its parent", func() bool { return syscall.Kill(pid, 0) != nil || zombie(pid) })
	}
	r = m.start(t, program)
	m.checkServed(t)

	r.stop()
	if fs, err := mountedType(m.store); err != nil || fs != "" {
		t.Errorf("after Ctrl-C %q is mounted at %s (%v)", fs, m.store, err)
	}
	if !strings.Contains(r.out.String(), "Stopped; nothing is mounted") {
		t.Errorf("floxd up does not say that it stopped:\n%s", r.out)
	}
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

// checkBuilds: with nothing configured, stock Nix builds here, and nothing of this
// machine but a shell is there for what builds.
func (m machineDirs) checkBuilds(t *testing.T, r *running) {
	t.Helper()
	if _, err := exec.LookPath("nix-build"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("stock Nix is needed: %v", err)
		}
		return
	}
	nix := exec.CommandContext(t.Context(), "nix-build", "--no-out-link", "-E", `derivation {
		name = "new"; system = builtins.currentSystem; builder = "/bin/sh";
		args = [ "-c" "[ ! -e /etc/hostname ] && echo the builder speaks && echo built > $out" ];
	}`)
	nix.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "NIX_CONF_DIR=/nowhere", "NIX_USER_CONF_FILES=", "NIX_STORE_DIR=" + m.store,
		"NIX_STATE_DIR=" + t.TempDir(), "NIX_REMOTE=unix://" + m.root + "/run/" + cli.NixSocketName,
	}
	out, err := nix.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "the builder speaks") {
		t.Errorf("nix-build: %v\n%s%s", err, out, r.log)
		return
	}
	lines := strings.Fields(string(out))
	if b, err := os.ReadFile(lines[len(lines)-1]); err != nil || string(b) != "built\n" {
		t.Errorf("what was built is %q, %v", b, err)
	}
}

// checkServed: the agent has the store mounted and the binary cache answers.
func (m machineDirs) checkServed(t *testing.T) {
	t.Helper()
	s := m.status(t)
	if !s.GetMounted() || s.GetMountDir() != m.store {
		t.Errorf("status: mounted %v at %s", s.GetMounted(), s.GetMountDir())
	}
	if fs, err := mountedType(m.store); err != nil || fs != cli.FilesystemType {
		t.Errorf("%q is mounted at %s (%v)", fs, m.store, err)
	}
	b, err := os.ReadFile(m.root + "/state/storehouse/invite.json")
	if err != nil {
		t.Fatal(err)
	}
	var invite struct {
		HTTPURL string `json:"http_url"`
	}
	if err := json.Unmarshal(b, &invite); err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(invite.HTTPURL + "/nix-cache-info")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the binary cache answers %s", resp.Status)
	}
}

// checkOwners: what holds secrets belongs to the ordinary user alone.
func (m machineDirs) checkOwners(t *testing.T) {
	t.Helper()
	if info, err := os.Stat(m.root + "/run"); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the run directory, which everybody must pass to the socket: %v, %v", info, err)
	}
	for path, mode := range map[string]os.FileMode{
		"state/agent": 0o700, "state/storehouse": 0o700,
		"state/storehouse/invite.json": 0o600, "state/agent/invite.json": 0o600, "state/storehouse/upload-token": 0o600,
	} {
		info, err := os.Stat(m.root + "/" + path)
		if err != nil {
			t.Error(err)
			continue
		}
		if st := info.Sys().(*syscall.Stat_t); info.Mode().Perm() != mode || st.Uid != 65534 {
			t.Errorf("%s has mode %04o and owner %d, want %04o and 65534", path, info.Mode().Perm(), st.Uid, mode)
		}
	}
}

// checkPrivileges: nothing that talks to the network runs as root.
func (m machineDirs) checkPrivileges(t *testing.T, pid int) {
	t.Helper()
	for child, line := range children(t, pid) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", child))
		if err != nil {
			t.Error(err)
		}
		for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"} {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s (pid %d) lacks %q:\n%s", line, child, want, b)
			}
		}
		if session, err := unix.Getsid(child); err != nil || session != child {
			t.Errorf("%s is in session %d (%v), whose terminal it could type at", line, session, err)
		}
		if groups := groupsOf(string(b)); groups != "" {
			t.Errorf("%s keeps the groups %s", line, groups)
		}
	}
}

// groupsOf gives the supplementary groups in a /proc/PID/status.
func groupsOf(status string) string {
	for line := range strings.Lines(status) {
		if groups, isGroups := strings.CutPrefix(line, "Groups:"); isGroups {
			return strings.Trim(groups, " \t\n")
		}
	}
	return ""
}

// An ordinary user is told why that does not work, before anything is touched.
func TestUpNeedsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	path, err := exec.LookPath("floxd")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "floxd-nobody-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/floxd", program, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"up", "agent"} {
		cmd := exec.Command(dir+"/floxd", command, "--state-dir", dir+"/state")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != cli.CodeDenied || !strings.Contains(string(out), "run it with sudo") {
			t.Errorf("floxd %s as nobody: %v\n%s", command, err, out)
		}
	}
	if _, err := os.Stat(dir + "/state"); err == nil {
		t.Error("it made a state directory all the same")
	}
}
