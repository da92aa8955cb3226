package buildfarm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// ordinary in the environment says that the tests run as TestAsAnOrdinaryUser has them.
const ordinary = "BUILDFARM_TEST_ORDINARY"

// A server that gave up root builds in Nix's sandbox like any other: other tests, once
// more, as a user that owns nothing but a directory.
func TestAsAnOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the other tests are run by an ordinary user")
	}
	newBuilder(t, nil) // Nix is there
	const nobody = 65534
	dir := filepath.Join(t.TempDir(), "home")
	for d := filepath.Dir(dir); d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil { // #nosec: of this test
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	tests := []string{"TestAttacks", "TestWithoutASandbox", "TestBuildsInASandbox", "TestFixedAndFloatingOutputs", "TestHiddenDirectoriesAndOwnMounts", "TestCancelledBuildLeavesNothing"}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.run=^("+strings.Join(tests, "|")+")$")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), ordinary+"=1", "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	for _, test := range tests {
		if !strings.Contains(string(out), "--- PASS: "+test+" ") {
			t.Errorf("%s did not pass", test)
		}
	}
	if err != nil || t.Failed() {
		t.Errorf("%v\n%s", err, out)
	}
}

// What builds sees its inputs, and nothing else of this machine.
func TestBuildsInASandbox(t *testing.T) {
	b := newBuilder(t, func(c *Config) { c.Sandbox, c.SandboxPaths = SandboxOn, nil })
	if !b.Sandboxed() {
		t.Fatal("not in a sandbox")
	}
	from := newOrigin(t)
	drv, plan := from.instantiate(t, script("alone", `[ ! -e /etc/hostname ] && [ ! -e /root ] && [ ! -e /usr/bin/env ] && echo fine > $out`, ""))
	got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan})
	if err != nil || !got.Status.OK() {
		t.Fatalf("%+v, %v", got, err)
	}
}

// Root gives what it builds nothing of its own: neither in a sandbox nor without one is
// a build root, or in a group of root's.
func TestRootBuildsAsNobody(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("of root")
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret text\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	from := newOrigin(t)
	for sandbox, id := range map[Sandbox]int{SandboxOn: roomID, SandboxOff: firstID} {
		b := newBuilder(t, func(c *Config) { c.Sandbox = sandbox })
		drv, plan := from.instantiate(t, script("who-"+string(sandbox), "cat "+secret+"; cat /proc/self/uid_map; echo > $out", ""))
		got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan})
		if err != nil || !got.Status.OK() || strings.Contains(got.log, "secret text") {
			t.Fatalf("%s: %+v, %v", sandbox, got, err)
		}
		// Its one user is outside: in a sandbox, Nix's; else the builder's.
		lines := strings.Split(strings.TrimSpace(got.log), "\n")
		if words := strings.Fields(lines[len(lines)-1]); len(words) != 3 || words[1] != fmt.Sprint(id) || words[2] != "1" {
			t.Errorf("%s: the build's users are %q, want one, %d", sandbox, words, id)
		}
	}
}
