package warden

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/fuse"
)

// status is a field of a /proc/PID/status.
func status(s, field string) string {
	_, rest, _ := strings.Cut(s, "\n"+field+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}

// alive reports whether a process is there and no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err == nil && !strings.HasPrefix(status(string(b), "State"), "Z")
}

func TestChildIsUnprivilegedAndServes(t *testing.T) {
	h := newHost(t)
	stop, _ := h.start(t)
	r := h.report(t, 1)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	got := map[string]string{}
	want := map[string]string{
		"Uid": "65533\t65533\t65533\t65533", "Gid": "65532\t65532\t65532\t65532", "Groups": "", "NoNewPrivs": "1",
		"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapInh": "0000000000000000", "CapAmb": "0000000000000000",
		"CapBnd": "0000000000000000",
	}
	for field := range want {
		got[field] = status(r.Status, field)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the child (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{modeEnv + "=child"}, r.Env); diff != "" {
		t.Errorf("its environment (-want +got):\n%s", diff)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if m, err := fuse.FindMount(h.cfg.MountDir); m != nil || err != nil {
		t.Errorf("still mounted: %v %v", m, err)
	}
	if alive(r.PID) {
		t.Error("the child is still there")
	}
	// And once more at the same place.
	h.start(t)
	h.report(t, 2)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
}

func TestKilledChildIsReplacedUnderItsUsers(t *testing.T) {
	for name, without := range map[string]bool{"resend": false, "journal": true} {
		t.Run(name, func(t *testing.T) { killChildren(t, without) })
	}
}

func killChildren(t *testing.T, withoutResend bool) {
	h := newHost(t)
	h.cfg.WithoutResend = withoutResend
	h.start(t)
	first := h.report(t, 1)
	reader := exec.Command("cat", h.path("hung"))
	var out bytes.Buffer
	reader.Stdout, reader.Stderr = &out, &out
	prog := exec.Command(h.path("sleep"), "1")
	prog.Stderr = os.Stderr
	if err := errors.Join(prog.Start(), reader.Start()); err != nil {
		t.Fatal(err)
	}
	h.awaitReader(t)
	for n := 1; n <= 3; n++ {
		if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		next := h.report(t, n+1)
		if next.PID == first.PID {
			t.Fatal("the same child again")
		}
		if next.Took.Resend == withoutResend || (next.Took.Resumed > 0) != withoutResend {
			t.Errorf("taken over by %+v", next.Took)
		}
		first = next
	}
	os.WriteFile(filepath.Join(h.cfg.RunDir, "release"), nil, 0o644)
	if err := reader.Wait(); err != nil || out.Len() != fileSize {
		t.Errorf("a reader in flight: %v, %d bytes: %.80s", err, out.Len(), &out)
	}
	if err := prog.Wait(); err != nil {
		t.Errorf("a running program: %v", err)
	}
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
}

func TestLinksLiveAsLongAsTheStore(t *testing.T) {
	h := newHost(t)
	stop, _ := h.start(t)
	pid := h.report(t, 1).PID
	for n := range 3 {
		// Through the link, each time by a name that was not looked up before.
		if got := run(t, "cat %s", filepath.Join(h.cfg.LinksDir, []string{"o/n", "O/n", "o/../o/n"}[n], "conf")); got != "hello\n" {
			t.Errorf("read %q", got)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		pid = h.report(t, n+2).PID
	}
	if got := run(t, "ls %s", h.cfg.LinksDir); got != "o\n" {
		t.Errorf("listed %q", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if m, err := fuse.FindMount(h.cfg.LinksDir); m != nil || err != nil {
		t.Errorf("still mounted: %+v, %v", m, err)
	}
}

func TestLinksThatCannotBeMounted(t *testing.T) {
	h := newHost(t)
	h.cfg.LinksDir = filepath.Join(h.top, "full")
	if err := os.MkdirAll(filepath.Join(h.cfg.LinksDir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), h.cfg); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("a full directory: %v", err)
	}
	h.cfg.LinksOptional = true
	h.start(t)
	h.report(t, 1)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
}

// A child that was killed while a thread of it waits in the kernel for its own
// answer can neither be reaped nor closes its pipe.
func TestUnreapableChildIsReplaced(t *testing.T) {
	h := newHost(t)
	if err := errors.Join(os.Mkdir(h.cfg.RunDir, 0o777), os.Chmod(h.cfg.RunDir, 0o777),
		os.WriteFile(filepath.Join(h.cfg.RunDir, "touch-yourself"), nil, 0o666)); err != nil {
		t.Fatal(err)
	}
	h.start(t)
	first := h.report(t, 1)
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.report(t, 2)
	os.WriteFile(filepath.Join(h.cfg.RunDir, "release"), nil, 0o644)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	for range 500 {
		if !alive(first.PID) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the dead child is still there after its successor answered")
}

// A child that only closed what tells the warden of its end does not live on
// beside the next.
func TestChildThatLetsGoIsEnded(t *testing.T) {
	h := newHost(t)
	stop, _ := h.start(t)
	for n := 1; n <= 2; n++ {
		r := h.report(t, n)
		b, _ := json.Marshal(query{Ask: "let go"})
		in := filepath.Join(h.cfg.RunDir, "ask")
		if err := errors.Join(os.WriteFile(in+".new", b, 0o666), os.Rename(in+".new", in)); err != nil {
			t.Fatal(err)
		}
		h.report(t, n+1)
		for i := 0; alive(r.PID); i++ {
			if i == 500 {
				t.Fatalf("child %d, process %d, lives on", n, r.PID)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
			t.Errorf("read %q", got)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestMappedFilesWaitAndOpenOnesDoNot(t *testing.T) {
	h := newHost(t)
	h.start(t)
	h.report(t, 1)
	// Only open: given up at the deadline. The test's server waits 1.5 s.
	out, err := exec.Command("cat", h.path("hung")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Input/output error") {
		t.Errorf("an open file: %v: %s", err, out)
	}
	// Mapped: waits.
	mapper := exec.Command("/proc/self/exe")
	mapper.Env = append(os.Environ(), modeEnv+"=map", "FLOX_WARDEN_MAP="+h.path("hung"))
	var said bytes.Buffer
	mapper.Stdout, mapper.Stderr = &said, &said
	if err := mapper.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2500 * time.Millisecond)
	os.WriteFile(filepath.Join(h.cfg.RunDir, "release"), nil, 0o644)
	if err := mapper.Wait(); err != nil {
		t.Errorf("a mapped file: %v: %s", err, &said)
	}
}

func TestQuestions(t *testing.T) {
	h := newHost(t)
	h.start(t)
	child := h.report(t, 1)
	prog := exec.Command(h.path("sleep"), "60")
	// A process that only stands in the store path and has a file open.
	stander := exec.Command("sleep", "60")
	stander.Dir = h.path("")
	conf, err := os.Open(h.path("conf"))
	if err != nil {
		t.Fatal(err)
	}
	defer conf.Close()
	if err := errors.Join(prog.Start(), stander.Start()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		prog.Process.Kill()
		stander.Process.Kill()
		prog.Wait()
		stander.Wait()
	}()
	time.Sleep(200 * time.Millisecond) // until both are past exec
	before := h.ask(t, query{Ask: askReadAhead, KiB: 32})
	// Whoever asks for its attributes now, has to ask the file system.
	if dropped := h.ask(t, query{Ask: "drop"}); dropped.Err != "" {
		t.Error(dropped.Err)
	}
	used := h.ask(t, query{Ask: askInUse})
	if diff := cmp.Diff([]string{"", "conf", "sleep"}, used.InUse); diff != "" {
		t.Errorf("in use (-want +got): %s", diff)
	}
	if diff := cmp.Diff([]string{"sleep"}, used.Mapped); diff != "" {
		t.Errorf("mapped (-want +got): %s", diff)
	}
	if used.Fetched != before.Fetched {
		t.Errorf("the scan asked the file system %d times", used.Fetched-before.Fetched)
	}
	m, _ := fuse.FindMount(h.cfg.MountDir)
	if b, _ := os.ReadFile(filepath.Join("/sys/class/bdi", m.Device, "read_ahead_kb")); string(b) != "32\n" || before.Err != "" {
		t.Errorf("read-ahead is %q: %s", b, before.Err)
	}
	link := func(name, target string) string {
		p := filepath.Join(h.top, name)
		if err := os.Symlink(target, p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	inside := h.path("")
	for _, c := range []struct {
		name      string
		q         query
		text, err string
	}{
		{"a process", query{Ask: askExe, PID: uint32(prog.Process.Pid)}, h.path("sleep"), ""},
		{"the child itself", query{Ask: askExe, PID: uint32(child.PID)}, h.cfg.Child[0], ""},
		{"no process", query{Ask: askExe, PID: 1<<22 - 1}, "", "not found"},
		{"a kernel thread", query{Ask: askExe, PID: 2}, "", "not found"},
		{"an impossible process", query{Ask: askExe, PID: 1 << 30}, "", "bad input"},
		{"a root", query{Ask: askRoot, Link: link("result", inside)}, inside, ""},
		{"a link elsewhere", query{Ask: askRoot, Link: link("secret", "/root/secret")}, "", "not found"},
		{"a link that begins alike", query{Ask: askRoot, Link: link("alike", h.cfg.MountDir+"-not")}, "", "not found"},
		{"a link with dots", query{Ask: askRoot, Link: link("dots", h.cfg.MountDir+"/../run")}, "", "not found"},
		{"a file", query{Ask: askRoot, Link: h.cfg.Child[0]}, "", "not found"},
		{"inside the mount", query{Ask: askRoot, Link: h.path("hung")}, "", "not found"},
		{"a relative link", query{Ask: askRoot, Link: "result"}, "", "bad input"},
		{"too much read-ahead", query{Ask: askReadAhead, KiB: 1 << 20}, "", "bad input"},
	} {
		got := h.ask(t, c.q)
		if got.Text != c.text || (c.err == "") != (got.Err == "") || !strings.Contains(got.Err, c.err) {
			t.Errorf("%s: %q, %q; want %q, %q", c.name, got.Text, got.Err, c.text, c.err)
		}
	}
}

// The scan must end while everything in the mount hangs.
func TestScanWaitsForNobody(t *testing.T) {
	h := newHost(t)
	h.start(t)
	h.report(t, 1)
	var hung []*exec.Cmd
	for _, args := range [][]string{{"ls", filepath.Join(h.cfg.MountDir, hungPath)}, {"/proc/self/exe"}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), modeEnv+"=map", "FLOX_WARDEN_MAP="+h.path("hung"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		hung = append(hung, cmd)
	}
	var used query
	for range 100 { // until the second has come to its mapping
		if used = h.ask(t, query{Ask: askInUse}); used.Err != "" || slices.Contains(used.Mapped, "hung") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if !slices.Contains(used.Mapped, "hung") {
		t.Errorf("%+v", used)
	}
	for _, cmd := range hung {
		cmd.Process.Kill()
		cmd.Wait()
	}
}

func TestKilledWardenLeavesNothingThatHinders(t *testing.T) {
	h := newHost(t)
	cfg := h.cfg
	cfg.Log = nil
	b, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	first := exec.Command("/proc/self/exe")
	first.Env = append(os.Environ(), modeEnv+"=warden", "FLOX_WARDEN_CONFIG="+string(b))
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	r := h.report(t, 1)
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Fatalf("read %q", got)
	}
	// Meanwhile nobody else gets in.
	if err := Run(t.Context(), h.cfg); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), h.cfg.RunDir) {
		t.Errorf("a second warden: %v", err)
	}
	first.Process.Kill()
	first.Wait()
	h.start(t)
	h.report(t, 2)
	for _, name := range []string{h.path("conf"), filepath.Join(h.cfg.LinksDir, "o/n/conf")} {
		if got := run(t, "cat %s", name); got != "hello\n" {
			t.Errorf("read %q", got)
		}
	}
	if alive(r.PID) {
		t.Error("the child of the killed warden lives on")
	}
}

func TestUnmountedByOthers(t *testing.T) {
	h := newHost(t)
	_, wait := h.start(t)
	h.report(t, 1)
	run(t, "umount %s", h.cfg.MountDir)
	if err := wait(); !errors.Is(err, flox.ErrClosed) || !strings.Contains(err.Error(), "start the agent again") {
		t.Errorf("Run ended with %v", err)
	}
}

func TestChildThatKeepsDyingIsStartedMoreSlowly(t *testing.T) {
	h := newHost(t)
	h.cfg.Env = []string{modeEnv + "=exit"}
	log := &lockedBuffer{}
	h.cfg.Log = newLog(log)
	stop, _ := h.start(t)
	for range 1000 {
		if strings.Count(log.String(), "pause=") >= 4 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"pause=0s", "pause=50ms", "pause=100ms", "pause=200ms", "exit status 3"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, log)
		}
	}
}

// One that served is missed at once, however often it is killed.
func TestChildThatServedIsStartedAtOnce(t *testing.T) {
	h := newHost(t)
	log := &lockedBuffer{}
	h.cfg.Log = newLog(log)
	h.start(t)
	const kills = 8
	for n := 1; n <= kills; n++ {
		r := h.report(t, n)
		h.ask(t, query{Ask: "reading"}) // so that it has said that it is ready
		time.Sleep(2 * useful)
		if err := syscall.Kill(r.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	h.report(t, kills+1)
	if got := strings.Count(log.String(), "pause=0s"); got != kills {
		t.Errorf("%d of %d were started at once:\n%s", got, kills, log.String())
	}
}

func TestRunRefuses(t *testing.T) {
	h := newHost(t)
	full := filepath.Join(h.top, "full")
	if err := os.MkdirAll(filepath.Join(full, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		want   error
	}{
		"relative mount":    {func(c *Config) { c.MountDir = "store" }, flox.ErrBadInput},
		"no run directory":  {func(c *Config) { c.RunDir = "" }, flox.ErrBadInput},
		"no child":          {func(c *Config) { c.Child = nil }, flox.ErrBadInput},
		"child from PATH":   {func(c *Config) { c.Child = []string{"floxd"} }, flox.ErrBadInput},
		"read-ahead":        {func(c *Config) { c.ReadAheadKiB = -1 }, flox.ErrBadInput},
		"a full directory":  {func(c *Config) { c.MountDir = full }, flox.ErrBusy},
		"links above":       {func(c *Config) { c.LinksDir = filepath.Dir(c.MountDir) }, flox.ErrBadInput},
		"a foreign mount":   {func(c *Config) { c.MountDir = "/proc" }, flox.ErrBusy},
		"run dir is a file": {func(c *Config) { c.RunDir = c.Child[0] }, syscall.ENOTDIR},
	} {
		cfg := h.cfg
		c.change(&cfg)
		if err := Run(t.Context(), cfg); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := os.Stat(filepath.Join(full, "sub")); err != nil {
		t.Error(err)
	}
}
