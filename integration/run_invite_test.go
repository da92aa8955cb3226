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

// closedHouse is a storehouse with ripgrep that lets in whom it invited, and nobody
// else.
func (l *lab) closedHouse(t *testing.T, name string) *hosts.Storehouse {
	t.Helper()
	house, err := hosts.StartStorehouse(t.Context(), l.programs, l.host(t, name), l.dir, "--open=false")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, house.Daemon) })
	if err := l.copyTo(t.Context(), house, l.world.Ripgrep.Path); err != nil {
		t.Fatal(err)
	}
	return house
}

// howInvited is what every run is told that is not let in.
const howInvited = "floxctl invite --role agent --ephemeral >FILE"

// TestRunIsNotLetIn: who is no member of a storehouse that is closed is told what
// gets one in, an ordinary user and root.
func TestRunIsNotLetIn(t *testing.T) {
	l := open(t)
	house := l.closedHouse(t, "run-closed")
	u := l.stranger(t, "run-outside")
	dir := filepath.Join(u.home, "copy")
	asRoot := func(args ...string) result {
		return do(t, u.host, "env", append([]string{"HOME=" + u.home, l.programs.Floxctl, "run", "--state-dir", filepath.Join(u.host.Dir, "state")}, args...)...)
	}
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 2, "fuse needs the storehouse's invite", howInvited)
	asRoot("--to", dir, l.ripgrep()).want(t, 2, "copy needs the storehouse's invite", howInvited)

	// An invite.json, as a member has it, makes no member.
	b, err := os.ReadFile(house.Invite())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(u.home, "invite.json")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, mode := range private {
		u.run(t, "--mode", mode, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 4, "not (or no longer) a member", howInvited)
	}
	asRoot("--invite", file, "--to", dir, l.ripgrep()).want(t, 4, "not (or no longer) a member", howInvited)

	file = u.invitation(t, house, "invite")
	asRoot("--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 4, "must not be", "sudo floxd agent --invite "+file, "run --to DIR --invite "+file)
	asRoot("--invite", file, "--to", dir, l.ripgrep()).want(t, 0, "complete in")
	asRoot("--to", filepath.Join(u.home, "again"), l.ripgrep()).want(t, 0, "complete in") // it was remembered
	u.run(t, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 5, "used up", howInvited)
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

// TestRunOnAFullDisk: who has no room for state is told so, and what to do.
func TestRunOnAFullDisk(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-full")
	u.invite(t)
	dir := filepath.Join(u.host.Dir, "small")
	u.root(t, `mkdir "$1/small" && mount -t tmpfs -o size=1m,mode=777 tmpfs "$1/small"`)
	release := fill(t, u.host, dir)
	u.run(t, "--mode", "copy", "--state-dir", dir+"/new", l.ripgrep(), "--", "rg", "--version").want(t, 7, "no space left on device", dir, "free some space", "--state-dir")
	release()
	u.run(t, "--state-dir", filepath.Join(u.home, "new"), l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
}
