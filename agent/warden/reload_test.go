package warden

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// program makes another program of this one: its name says how it behaves, and
// more how many bytes it has more, which is its version.
func (h *host) program(t *testing.T, name string, more int) (path, version string) {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(h.top, name)
	if err := errors.Join(os.WriteFile(path+".new", append(self, make([]byte, more)...), 0o755), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
	return path, fmt.Sprintf("v%d", len(self)+more)
}

// reloadable is a host whose warden takes orders.
func reloadable(t *testing.T) *host {
	h := newHost(t)
	h.cfg.Control = filepath.Join(h.top, strings.Repeat("long", 20), "control") // longer than a socket's name may be
	h.cfg.VersionArgs = []string{"version"}
	if err := os.Mkdir(filepath.Dir(h.cfg.Control), 0o755); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) reload(t *testing.T, program string) (Reloaded, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return Reload(ctx, h.cfg.Control, program)
}

// reading begins to read a file through a mapping, which waits for release
// however long that takes.
func (h *host) reading(t *testing.T) (end func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{modeEnv + "=map", "FLOX_WARDEN_MAP=" + h.path("hung")}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.awaitReader(t)
	return func() {
		t.Helper()
		if err := os.WriteFile(filepath.Join(h.cfg.RunDir, "release"), nil, 0o644); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("a reader in flight: %v: %s", err, &out)
		}
	}
}

// The file that is there now is started in the place of what was started from
// it before, and readers do not notice.
func TestReload(t *testing.T) {
	h := reloadable(t)
	path, before := h.program(t, "prog", 0)
	h.start(t)
	first := h.report(t, 1)
	prog := exec.Command(h.path("sleep"), "1")
	prog.Stderr = os.Stderr
	if err := prog.Start(); err != nil {
		t.Fatal(err)
	}
	end := h.reading(t)
	_, after := h.program(t, "prog", 5)
	// One that only died is started again as it was.
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := h.report(t, 2)
	r, err := h.reload(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if r.Program != path || r.From != before || r.To != after || r.Unserved <= 0 || r.Unserved > 20*time.Second {
		t.Errorf("reloaded %+v, want %s to %s", r, before, after)
	}
	if alive(second.PID) || !alive(r.PID) {
		t.Errorf("of %d and %d the second should be alive", second.PID, r.PID)
	}
	end()
	if err := prog.Wait(); err != nil {
		t.Errorf("a running program: %v", err)
	}
	// Another file by its name, which stays the one to start.
	other, last := h.program(t, "other", 9)
	if r, err = h.reload(t, other); err != nil || r.Program != other || r.From != after || r.To != last {
		t.Errorf("reloaded %+v, %v", r, err)
	}
	if err := errors.Join(os.Remove(other), syscall.Kill(r.PID, syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	if r, err = h.reload(t, path); err != nil || r.From != last || r.To != after {
		t.Errorf("reloaded %+v, %v", r, err)
	}
}

// A program that lies in the mount it is to serve, as one that Nix installed
// does, is in need of nobody there when it is started.
func TestReloadToAProgramInTheMount(t *testing.T) {
	h := reloadable(t)
	h.start(t)
	h.report(t, 1)
	r, err := h.reload(t, h.path("prog"))
	if err != nil || r.Program != h.path("prog") {
		t.Fatalf("reloaded %+v, %v", r, err)
	}
	for n := 3; n <= 4; n++ { // and again and again
		if err := syscall.Kill(h.report(t, n-1).PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		h.report(t, n)
		if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
			t.Errorf("read %q", got)
		}
	}
}

// A program in somebody else's mount outlives that.
func TestProgramInAMountThatGoes(t *testing.T) {
	other := newHost(t)
	stop, _ := other.start(t)
	other.report(t, 1)
	h := newHost(t)
	h.cfg.Child[0] = other.path("prog")
	h.start(t)
	first := h.report(t, 1)
	if err := errors.Join(stop(), syscall.Kill(first.PID, syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	h.report(t, 2)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
}

// What cannot serve takes nothing away from what does.
func TestReloadOfWhatCannotServe(t *testing.T) {
	h := reloadable(t)
	h.cfg.ReadyTimeout = 5 * time.Second
	h.start(t)
	h.report(t, 1)
	end := h.reading(t)
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(h.top, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	made := func(name string) string { path, _ := h.program(t, name, 3); return path }
	open := made("open")
	writing, err := os.OpenFile(open, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writing.Close()
	fifo := filepath.Join(h.top, "fifo")
	if err := syscall.Mkfifo(fifo, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, program string
		kind          error
		want          string
		disturbs      bool
	}{
		{"missing", filepath.Join(h.top, "nothing"), flox.ErrNotFound, "nothing was changed", false},
		{"relative", "prog", flox.ErrBadInput, "absolute", false},
		{"a directory", h.top, flox.ErrBadInput, "not a file", false},
		{"a pipe", fifo, flox.ErrBadInput, "not a file", false},
		{"not executable", write("plain", "x", 0o644), flox.ErrBadInput, "chmod +x", false},
		{"no program", write("text", "hello", 0o755), nil, "cannot be executed", false},
		{"being written", open, nil, "text file busy", false},
		{"without a version", made("silent"), flox.ErrBadInput, "what do you  want?", false},
		{"older than what there is", made("older"), flox.ErrBadInput, "which knows the agent's state up to format 1, and floxd v", false},
		{"ends at once", made("exits"), nil, "exit status 3; " + h.cfg.Child[0] + " serves again", true},
		{"is never ready", made("mute"), nil, "not ready within 5s; " + h.cfg.Child[0] + " serves again", true},
	} {
		r, err := h.reload(t, c.program)
		if err == nil || !strings.Contains(err.Error(), c.want) || c.kind != nil && !errors.Is(err, c.kind) {
			t.Errorf("%s: %+v, %v; want %q", c.name, r, err, c.want)
		}
		if changed := err == nil || !strings.Contains(err.Error(), "nothing was changed"); changed != c.disturbs && c.name != "relative" {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
			t.Errorf("%s: read %q", c.name, got)
		}
	}
	end()
}

// There is one reload at a time, and one that comes while the child keeps dying
// is what helps.
func TestReloadsMeetOthers(t *testing.T) {
	h := reloadable(t)
	h.cfg.ReadyTimeout = 5 * time.Second
	good := h.cfg.Child[0]
	h.cfg.Child[0], _ = h.program(t, "exits", 0)
	log := &lockedBuffer{}
	h.cfg.Log = newLog(log)
	if _, err := h.reload(t, ""); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("without a warden: %v", err)
	}
	h.start(t)
	for range 1000 {
		if strings.Contains(log.String(), "pause=200ms") {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := h.reload(t, ""); err == nil || !strings.Contains(err.Error(), "does not either") {
		t.Errorf("from one that dies to one that dies: %v", err)
	}
	// It meets the pause behind one that died, or the next one before it dies.
	if r, err := h.reload(t, good); err != nil || r.PID == 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	mute, _ := h.program(t, "mute", 0)
	slow := make(chan error)
	go func() {
		_, err := Reload(context.Background(), h.cfg.Control, mute)
		for errors.Is(err, flox.ErrBusy) { // one of those below came first
			time.Sleep(time.Millisecond)
			_, err = Reload(context.Background(), h.cfg.Control, mute)
		}
		slow <- err
	}()
	busy := false
	for range 200 {
		_, err := h.reload(t, filepath.Join(h.top, "nothing"))
		if busy = errors.Is(err, flox.ErrBusy); busy {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if !busy {
		t.Error("a second reload beside the first was not refused")
	}
	if err := <-slow; err == nil || !strings.Contains(err.Error(), "serves again") {
		t.Error(err)
	}
	// Only root.
	cmd := exec.Command(good)
	cmd.Env = []string{modeEnv + "=reload", "FLOX_WARDEN_CONTROL=" + h.cfg.Control}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.cfg.UID, Gid: h.cfg.GID}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "true ") {
		t.Errorf("as an ordinary user: %v: %s", err, out)
	}
}

// The warden ends while a reload waits for a program that does not come.
func TestWardenEndsDuringReload(t *testing.T) {
	h := reloadable(t)
	h.cfg.ReadyTimeout = time.Minute
	stop, _ := h.start(t)
	h.report(t, 1)
	mute, _ := h.program(t, "mute", 0)
	slow := make(chan error)
	go func() {
		_, err := Reload(context.Background(), h.cfg.Control, mute)
		slow <- err
	}()
	h.report(t, 2)
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := <-slow; !errors.Is(err, flox.ErrClosed) {
		t.Errorf("the reload: %v", err)
	}
	if _, err := os.Stat(h.cfg.Control); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// What the kernel waits for is known also when the child does not know it.
func TestWaitingIsTheKernels(t *testing.T) {
	h := newHost(t)
	h.start(t)
	h.report(t, 1)
	end := h.reading(t)
	got := h.ask(t, query{Ask: askWaiting})
	if got.Err != "" || got.Waiting < 1 || got.Waiting > 2 {
		t.Errorf("%d requests wait (%s), want the one of the reader, or two", got.Waiting, got.Err)
	}
	end()
}
