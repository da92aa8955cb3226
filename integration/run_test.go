package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/netns"
)

// runUser is an ordinary user whom no file of the machine knows.
const runUser = 4242

// stranger is an ordinary user on a host without an agent.
type stranger struct {
	l    *lab
	host *netns.Host
	home string
	with []string // commands each command is started through
	env  []string // more of the environment
}

// stranger makes the user's home and gives everybody the FUSE device.
func (l *lab) stranger(t *testing.T, name string) *stranger {
	t.Helper()
	h := l.host(t, name)
	for _, dir := range l.found[h] { // whoever else tests here is no host of this one's
		do(t, h, "umount", "--lazy", dir).want(t, 0)
	}
	u := &stranger{l: l, host: h, home: filepath.Join(h.Dir, "home", "user")}
	if err := os.MkdirAll(u.home, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(u.home, runUser, runUser); err != nil {
		t.Fatal(err)
	}
	u.root(t, `mknod "$1/fuse" c 10 229 && chmod 666 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse`)
	return u
}

// root runs a script on the host as root; $1 is the host's directory.
func (u *stranger) root(t *testing.T, script string) string {
	t.Helper()
	r := do(t, u.host, "sh", "-ec", script, "sh", u.host.Dir)
	if r.code != 0 {
		t.Fatalf("%s: exit code %d\n%s", script, r.code, r.out)
	}
	return r.out
}

// command prepares a command of the user's, with an environment of few words.
func (u *stranger) command(ctx context.Context, args ...string) *exec.Cmd {
	all := append([]string{}, u.with...)
	all = append(all, "setpriv", fmt.Sprintf("--reuid=%d", runUser), fmt.Sprintf("--regid=%d", runUser), "--clear-groups", "--",
		"env", "-i", "--default-signal=HUP,INT", // whoever runs the tests may have nohup
		"HOME="+u.home, "PATH=/usr/local/bin:/usr/bin:/bin", "TERM=dumb")
	all = append(append(all, u.env...), args...)
	cmd := u.host.Command(ctx, all[0], all[1:]...)
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// do runs a command of the user's to its end.
func (u *stranger) do(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := u.command(ctx, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		t.Fatalf("%s on %s: %v (%v)\n%s", strings.Join(args, " "), u.host.Name, err, ctx.Err(), tail(out))
	}
	return result{cmd.ProcessState.ExitCode(), string(out)}
}

// run runs floxctl run.
func (u *stranger) run(t *testing.T, args ...string) result {
	t.Helper()
	return u.do(t, append([]string{u.l.programs.Floxctl, "run"}, args...)...)
}

// invite gives the user the storehouse's invite where it is looked for.
func (u *stranger) invite(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile(u.l.house.Invite())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(u.home, ".config", "floxd", "invite.json")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, runUser, runUser); err != nil {
		t.Fatal(err)
	}
}

func (l *lab) ripgrep() string { return l.world.StoreDir.Join(l.world.Ripgrep.Path) }

// TestRunWithOwnMount: who is nobody on a machine without an agent runs a program
// all the same, lazily, and as who they are.
func TestRunWithOwnMount(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-fuse")
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 2, "fuse needs the storehouse's invite", "--invite FILE")
	u.invite(t)
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: fuse: there is no agent", "ripgrep ")

	// It was remembered, and everything is here.
	if err := os.RemoveAll(filepath.Join(u.home, ".config")); err != nil {
		t.Fatal(err)
	}
	if r := u.run(t, "--quiet", l.ripgrep(), "--", "rg", "--version"); r.code != 0 || !strings.HasPrefix(r.out, "ripgrep ") {
		t.Errorf("exit code %d, and it said %q", r.code, r.out)
	}
	u.run(t, l.ripgrep(), "--", "sh", "-c", `echo "$(id -u):$(id -g) $PATH $(pwd)"; grep CapEff /proc/self/status
		findmnt -n -o FSTYPE,OPTIONS /nix/store; touch /nix/store/x`).want(t, 1,
		fmt.Sprintf("%d:%d %s/bin:/usr/local/bin:/usr/bin:/bin /\n", runUser, runUser, l.ripgrep()), "CapEff:\t0000000000000000\n",
		"fuse.floxd", "ro,nosuid,nodev", "Read-only file system")
	u.run(t, l.ripgrep(), "--", l.programs.Floxctl, "status").want(t, 0, "mounted")
	u.run(t, l.ripgrep(), "--", l.programs.Floxctl, "run", l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: agent: ", "ripgrep ")
	u.run(t, filepath.Base(l.ripgrep()), "--", "sh", "-c", "exit 23").want(t, 23)
	u.run(t, l.ripgrep(), "--", "no-such-program").want(t, 3, "no-such-program")
	u.run(t, "/nix/store/00000000000000000000000000000000-nobody", "--", "true").want(t, 3, "not valid in this storehouse")
}

// TestRunJoinsWithAnInvite: a file with what floxctl invite printed makes a member of
// whoever runs something, once, and nobody is asked again.
func TestRunJoinsWithAnInvite(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-joins")
	made := do(t, l.house.Host, l.programs.Floxctl, "invite", "--role", "agent", "--ephemeral")
	made.want(t, 0, "machine may join as agent")
	file := filepath.Join(u.home, "invite")
	if err := os.WriteFile(file, []byte(made.out), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, runUser, runUser); err != nil {
		t.Fatal(err)
	}
	members := func() int {
		list := do(t, l.house.Host, l.programs.Floxctl, "machine", "list")
		list.want(t, 0)
		return strings.Count(list.out, "-run-")
	}
	before := members()
	u.run(t, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: fuse: there is no agent", "ripgrep ")
	u.run(t, "--invite", file, l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ") // it was remembered
	if n := members() - before; n != 1 {
		t.Errorf("%d machines joined, want 1", n)
	}
	// What is used up lets nobody else in.
	other := l.stranger(t, "run-joins-late")
	file = filepath.Join(other.home, "invite")
	if err := os.WriteFile(file, []byte(made.out), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := other.run(t, "--invite", file, l.ripgrep(), "--", "rg", "--version"); r.code == 0 || !strings.Contains(r.out, "invite") {
		t.Errorf("a second machine with a used invite: exit code %d\n%s", r.code, r.out)
	}
}

// TestRunWithoutAStoreDirectory: where there is no /nix, and nobody may make one,
// there is one in the namespace, and everything else is as it was.
func TestRunWithoutAStoreDirectory(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-root")
	u.invite(t)
	u.with = []string{"unshare", "--mount", "--", "sh", "-ec", `umount /nix; mkdir -p /run/empty; mount --bind /run/empty /nix; exec "$@"`, "sh"}
	before := u.do(t, "sh", "-c", `cd "$HOME"; ls -la / | grep -v -e " \.*$" -e nix; findmnt -n /nix/store; pwd`)
	before.want(t, 0)
	after := u.run(t, "--quiet", l.ripgrep(), "--", "sh", "-c", `cd "$HOME"; ls / >/dev/null; rg --version >&2; pwd; touch /x`)
	after.want(t, 1, "ripgrep ", u.home, "/x")
	u.with[5] = `mkdir /nix/store/mine; exec "$@"`
	u.run(t, l.ripgrep(), "--", "sh", "-c", "ls /nix/store; rg --version").want(t, 0, "hides from the command", "ripgrep ")
	u.with[5] = `umount /nix; exec "$@"`
	u.run(t, "--quiet", l.ripgrep(), "--", "sh", "-c", `for d in /*; do test -e "$d" || echo lost "$d"; done; ls -d /etc/passwd /proc/self /dev/null`).want(t, 0, "/etc/passwd")
}
