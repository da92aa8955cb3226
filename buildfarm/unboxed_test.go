package buildfarm

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Where Nix's sandbox cannot be made, builds run without it only as users of their own,
// and it is said; nobody else's builds do unless somebody asked for that.
func TestWithoutASandbox(t *testing.T) {
	newBuilder(t, nil) // Nix is there
	cfg := Config{SandboxPaths: []string{"/nowhere/at/all"}}
	for _, want := range []Sandbox{SandboxAuto, SandboxOn, SandboxOff} {
		cfg.Dir, cfg.Sandbox = filepath.Join(t.TempDir(), "builder"), want
		b, err := New(t.Context(), cfg)
		switch {
		case want == SandboxOn || want == SandboxAuto && os.Geteuid() != 0:
			if !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "/nowhere") {
				t.Errorf("%s: %v, want that it is denied, and why", want, err)
			}
		case err != nil:
			t.Errorf("%s: %v", want, err)
		default:
			as := map[bool]string{true: "as users of their own", false: "as this server's own user"}[os.Geteuid() == 0]
			if b.Sandboxed() || !strings.Contains(b.Unboxed(), as) || strings.Contains(b.Unboxed(), "/nowhere") != (want == SandboxAuto) {
				t.Errorf("%s: sandboxed: %v, %q", want, b.Sandboxed(), b.Unboxed())
			}
		}
		if b != nil {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := remove(cfg.Dir); err != nil {
			t.Error(err)
		}
	}
}

// killed in the environment has TestKilledBuilder be the process that is killed, with
// that as the time its build sleeps.
const killed = "BUILDFARM_TEST_KILLED"

// Of the builds of a process that is killed nothing runs, and the next one goes on.
func TestKilledBuilder(t *testing.T) {
	if mark := os.Getenv(killed); mark != "" { // its directories would stay
		buildEndlessly(t, os.Getenv(killed+"_DIR"), mark)
		return
	}
	dir := filepath.Join(t.TempDir(), "builder")
	newBuilder(t, nil) // Nix is there
	mark := "87" + filepath.Base(filepath.Dir(dir)) + time.Now().Format("150405")
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestKilledBuilder$")
	cmd.Env = append(os.Environ(), killed+"="+mark, killed+"_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("begun"))); err != nil {
		t.Fatal(err)
	}
	if len(running(t, mark)) == 0 {
		t.Error("it does not run")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for deadline := time.Now().Add(time.Minute); len(running(t, mark)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("left running: %v", running(t, mark))
		}
	}
	newBuilder(t, func(c *Config) { c.Dir = dir })
	if left, err := os.ReadDir(filepath.Join(dir, "jobs")); err != nil || len(left) > 0 {
		t.Errorf("left of jobs: %v, %v", left, err)
	}
}

// buildEndlessly builds something that leaves its session and ignores signals, says so,
// and goes on until this process is killed.
func buildEndlessly(t *testing.T, dir, mark string) {
	b, err := New(t.Context(), Config{Dir: dir, SandboxPaths: hostPaths, Sandbox: SandboxOff})
	if err != nil {
		t.Fatal(err)
	}
	out := flox.StorePath(strings.Repeat("0", flox.HashPartLen) + "-endless")
	loop := "trap : TERM INT HUP; while :; do sleep 1; done"
	job := &Job{Drv: out + nix.DrvExtension, Plan: &nix.Derivation{
		Name: "endless", Platform: map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH] + "-linux", Builder: "/bin/sh",
		Args:    []string{"-c", "setsid sh -c '" + loop + "' " + mark + " & echo begun; " + loop, mark},
		Outputs: map[string]nix.DrvOutput{"out": {Kind: nix.OutputInputAddressed, Path: out}}, Env: map[string]string{"out": string(out), "PATH": "/usr/bin:/bin"},
	}}
	_, err = b.Build(context.Background(), job, nothing{}, io.Discard, func(e Event) {
		if e.Kind == EventLine {
			_, _ = os.Stdout.WriteString(e.Text)
		}
	})
	t.Fatal(err)
}

// nothing is a Source of builds that need nothing.
type nothing struct{}

func (nothing) Closure(context.Context, []flox.StorePath) ([]*flox.PathInfo, error) { return nil, nil }

func (nothing) Nar(context.Context, io.Writer, *flox.PathInfo) error { return flox.ErrNotFound }
