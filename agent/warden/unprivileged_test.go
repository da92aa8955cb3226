package warden

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// ordinary starts a warden as an ordinary user, root of a user namespace only.
// The program that is returned is the warden.
func (h *host) ordinary(t *testing.T) *exec.Cmd {
	t.Helper()
	h.cfg.Unprivileged, h.cfg.Log, h.cfg.LinksDir = true, nil, "" // in the directory above it may not make one
	for _, dir := range []string{h.cfg.MountDir, h.cfg.RunDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, int(h.cfg.UID), int(h.cfg.GID)); err != nil {
			t.Fatal(err)
		}
	}
	device := filepath.Join(h.top, "fuse")
	if err := unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(device, 0o666); err != nil {
		t.Fatal(err)
	}
	cfg, err := json.Marshal(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--", "sh", "-ec", `mount --bind "$1" /dev/fuse; shift; exec "$@"`, "sh", device,
		"setpriv", "--reuid="+strconv.Itoa(int(h.cfg.UID)), "--regid="+strconv.Itoa(int(h.cfg.GID)), "--clear-groups", "--",
		"unshare", "--user", "--mount", "--map-root-user", "--", h.cfg.Child[0])
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), modeEnv + "=warden", "FLOX_WARDEN_CONFIG=" + string(cfg)}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// inside runs a command as the user, in the namespaces of a warden.
func inside(t *testing.T, warden *exec.Cmd, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	all := append([]string{"--target=" + strconv.Itoa(warden.Process.Pid), "--user", "--mount", "--setuid=0", "--setgid=0", "--", name}, args...)
	out, err := exec.CommandContext(ctx, "nsenter", all...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// An ordinary user's warden mounts in its namespace, its child can do nothing
// there, and is replaced like any other.
func TestWardenOfAnOrdinaryUser(t *testing.T) {
	h := newHost(t)
	warden := h.ordinary(t)
	r := h.report(t, 1)
	if got := inside(t, warden, "cat", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	got := map[string]string{}
	want := map[string]string{
		"Uid": "65533\t65533\t65533\t65533", "Gid": "65532\t65532\t65532\t65532", "NoNewPrivs": "1",
		"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapInh": "0000000000000000", "CapAmb": "0000000000000000",
	}
	for field := range want {
		got[field] = status(r.Status, field)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the child (-want +got):\n%s", diff)
	}
	ns := func(pid int) string {
		link, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/user")
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	if ns(r.PID) == ns(warden.Process.Pid) {
		t.Error("the child is in the namespace that has the mount")
	}
	bdi := strings.Fields(inside(t, warden, "mountpoint", "-d", h.cfg.MountDir))
	if kib := strings.TrimSpace(run(t, "cat /sys/class/bdi/%s/read_ahead_kb", bdi[0])); kib != "16" {
		t.Errorf("the kernel reads %s KiB ahead, want 16", kib)
	}
	if err := syscall.Kill(r.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := inside(t, warden, "ls", h.path("")); !strings.Contains(got, "conf\n") { // asked for the first time
		t.Errorf("listed %q", got)
	}
	second := h.report(t, 2)
	if err := warden.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); alive(second.PID); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the child outlives its warden")
		}
	}
}
