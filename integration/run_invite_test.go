package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
)

// invitation writes what floxctl invite prints into a file of the user's.
func (u *stranger) invitation(t *testing.T, house *hosts.Storehouse, name string, args ...string) (file string) {
	t.Helper()
	made := do(t, house.Host, u.l.programs.Floxctl, append([]string{"invite", "--role", "agent", "--ephemeral"}, args...)...)
	made.want(t, 0, "may join as agent")
	file = filepath.Join(u.home, name)
	if err := os.WriteFile(file, []byte(made.out), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, runUser, runUser); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestRunsAtTheSameTimeWithAnInvite: each has an agent of its own, so an invite for
// one machine is enough for one at a time.
func TestRunsAtTheSameTimeWithAnInvite(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-invited")
	for _, mode := range private {
		state := filepath.Join(u.home, "state-"+mode)
		u.env = []string{"XDG_STATE_HOME=" + state}
		file := u.invitation(t, l.house, "invite-"+mode)
		u.run(t, "--mode", mode, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
		first := u.start(t, mode, "echo ready; read x")
		if line := first.says(t); line != "ready" {
			t.Fatalf("%s: it says %q", mode, line)
		}
		u.run(t, "--mode", mode, l.ripgrep(), "--", "rg", "--version").want(t, 5, "at the same time", state, "Wait until one of those has ended", "floxctl invite --role agent --ephemeral --uses 2 >FILE")
		file = u.invitation(t, l.house, "invite-"+mode, "--uses", "1")
		u.run(t, "--mode", mode, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
		fmt.Fprintln(first.stdin)
		if code, _ := first.ends(t); code != 0 {
			t.Errorf("%s: exit code %d", mode, code)
		}
		// Both have joined, with an invite each.
		u.beside(t, mode)

		u.env = []string{"XDG_STATE_HOME=" + state + "-two"}
		file = u.invitation(t, l.house, "invite-"+mode, "--uses", "2")
		u.run(t, "--mode", mode, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
		u.beside(t, mode)
	}
}

// beside runs a program while another one runs.
func (u *stranger) beside(t *testing.T, mode string) {
	t.Helper()
	first := u.start(t, mode, "echo ready; read x")
	if line := first.says(t); line != "ready" {
		t.Fatalf("%s: it says %q", mode, line)
	}
	u.run(t, "--mode", mode, u.l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
	fmt.Fprintln(first.stdin)
	if code, _ := first.ends(t); code != 0 {
		t.Errorf("%s: exit code %d", mode, code)
	}
}
