package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRunUsesTheAgent: where there is an agent, run is nothing but the program.
func TestRunUsesTheAgent(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-agent")
	u.run(t, "--mode", "agent", l.ripgrep(), "--", "rg", "--version").want(t, 4, "agent cannot be: there is no agent", "sudo floxd agent")
	await(t, l.agent(t, u.host), "follows the storehouse", connected)
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: agent: the agent at /run/floxd/agent.sock has /nix/store mounted", "ripgrep ")
	u.run(t, l.ripgrep(), "--", "sh", "-c", `echo "$PPID $PATH"; exit 23`).want(t, 23, l.ripgrep()+"/bin:/usr/local/bin")

	link := filepath.Join(u.home, ".nix-profile")
	if err := os.Symlink("generation", link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(l.ripgrep(), filepath.Join(u.home, "generation")); err != nil {
		t.Fatal(err)
	}
	u.run(t, "--quiet", "-p", link, "--", "rg", "--version").want(t, 0, "ripgrep ")
	u.run(t, "-p", "anna/tools", "--", "rg", "--version").want(t, 3, "there is no /flox/anna/tools")
	u.run(t, "/nix/store/00000000000000000000000000000000-nobody", "--", "true").want(t, 3, "not valid in this storehouse")
	if dir := filepath.Join(u.home, ".local"); exists(dir) {
		t.Errorf("%s was made for nothing", dir)
	}
}

// TestRunWithTheHostsMount: a container that was given the host's mount uses it,
// wherever it was put, with or without the agent's socket.
func TestRunWithTheHostsMount(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-bind")
	await(t, l.agent(t, u.host), "follows the storehouse", connected)
	container := func(script string) {
		u.with = []string{"unshare", "--mount", "--", "sh", "-ec", script + `; exec "$@"`, "sh"}
	}
	elsewhere := `mkdir -p /run/host && mount --bind /nix/store /run/host && umount /nix/store`
	noSocket := `mount -t tmpfs tmpfs /run/floxd`

	container(noSocket)
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: bind: there is no agent", "but /nix/store is mounted", "ripgrep ")
	container(elsewhere + ";" + noSocket)
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: bind: the store is mounted at /run/host, shown at /nix/store in a namespace", "ripgrep ")
	u.run(t, "-q", l.ripgrep(), "--", "sh", "-c", "id -u; findmnt -n -o FSTYPE /nix/store; exit 23").want(t, 23, fmt.Sprintf("%d\nfuse.floxd\n", runUser))
	container(elsewhere)
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: bind: ", "ripgrep ")
	u.run(t, "--mode", "agent", l.ripgrep(), "--", "rg", "--version").want(t, 3, "is not mounted at /nix/store here")
	u.with = nil
	u.root(t, "mkdir -p /run/other && mount -t tmpfs tmpfs /run/other")
	container("umount /nix/store;" + noSocket)
	u.run(t, "--mode", "bind", l.ripgrep(), "--", "true").want(t, 3, "no store of ours is mounted here", "--mount type=bind")
}

// TestRunWithoutFUSE: where there is no FUSE the closure is fetched whole, once,
// and is right to the last bit.
func TestRunWithoutFUSE(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-copy")
	u.invite(t)
	u.root(t, `chmod 000 "$1/fuse"`)
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: copy: there is no agent", "/dev/fuse cannot be opened: permission denied", "ripgrep ")
	u.run(t, "--mode", "fuse", l.ripgrep(), "--", "true").want(t, 5, "fuse cannot be: /dev/fuse cannot be opened", "chmod 666 /dev/fuse")
	l.asNix(t, u, filepath.Join(u.home, ".local/state/floxd/store"))
	// Nor where there is no device at all, nor any other.
	u.with = []string{"unshare", "--mount", "--", "sh", "-ec", `mount -t tmpfs tmpfs /dev; exec "$@"`, "sh"}
	u.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "floxctl: copy: there is no agent", "/dev/fuse cannot be opened: no such file", "ripgrep ")
	u.run(t, "--mode", "fuse", l.ripgrep(), "--", "true").want(t, 5, "fuse cannot be: /dev/fuse cannot be opened", "--device /dev/fuse")
	u.with = nil

	// Nobody is needed any more.
	if err := u.host.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	u.run(t, "-q", l.ripgrep(), "--", "sh", "-c", "rg --version; id -u; touch /nix/store/x; exit 23").want(t, 23, "ripgrep ", fmt.Sprintf("%d\n", runUser), "Read-only")
	u.run(t, "-q", l.world.StoreDir.Join(l.world.Unused.Path), "--", "true").want(t, 4)
}

// asNix compares a directory with the closure of ripgrep in the world.
func (l *lab) asNix(t *testing.T, u *stranger, dir string) {
	t.Helper()
	for _, p := range l.closure(l.world.Ripgrep.Path) {
		const list = `cd "$1" && find . -printf '%P %y %m %T@ %s %l\n' | sed 's/^\([^ ]* d [^ ]* [^ ]*\) [0-9]*/\1/' | sort; find . -type f -print0 | sort -z | xargs -0 sha256sum`
		got := u.do(t, "sh", "-c", list, "sh", filepath.Join(dir, string(p)))
		want, err := exec.CommandContext(t.Context(), "sh", "-c", list, "sh", l.original(l.world.StoreDir.Join(p))).CombinedOutput()
		if err != nil {
			t.Fatal(err)
		}
		if got.out != string(want) {
			t.Errorf("%s in %s is not what Nix has:\n%s\nwant\n%s", p, dir, tail([]byte(got.out)), tail(want))
		}
	}
}

// withoutNamespaces runs a command on the host in a user namespace in which no
// other can be made, as root there or as the user.
func (u *stranger) withoutNamespaces(t *testing.T, uid int, args ...string) result {
	t.Helper()
	network, err := os.Open(u.host.NetNS())
	if err != nil {
		t.Fatal(err)
	}
	defer network.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var r result
	err = u.host.DoMounted(func() error {
		if err := unix.Setns(int(network.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		// The limit is the new namespace's own; the machine's stays as it is.
		script := fmt.Sprintf(`echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --reuid=%d --regid=%[1]d --clear-groups -- "$@"`, uid)
		cmd := exec.CommandContext(ctx, "sh", append([]string{"-ec", script, "sh"}, args...)...)
		cmd.Dir, cmd.Env = "/", []string{"HOME=" + u.home, "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		all := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: all, GidMappings: all, GidMappingsEnableSetgroups: true}
		out, err := cmd.CombinedOutput()
		runtime.KeepAlive(network)
		if cmd.ProcessState == nil {
			return err
		}
		r = result{cmd.ProcessState.ExitCode(), string(out)}
		return ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestRunWithoutNamespaces: where not even namespaces are allowed, the files can
// be written where they are wanted.
func TestRunWithoutNamespaces(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-bare")
	u.invite(t)
	floxctl := l.programs.Floxctl
	u.withoutNamespaces(t, runUser, floxctl, "run", l.ripgrep(), "--", "rg", "--version").want(t, 4,
		"nothing here can show", "agent  there is no agent", "no store of ours is mounted", "user namespaces are used up or switched off", "--to DIR")
	for _, mode := range []string{"fuse", "copy"} {
		u.withoutNamespaces(t, runUser, floxctl, "run", "--mode", mode, l.ripgrep(), "--", "true").want(t, 5, mode+" cannot be: ", "user.max_user_namespaces")
	}
	dir := filepath.Join(u.home, "store")
	u.withoutNamespaces(t, runUser, floxctl, "run", "--to", dir, l.ripgrep()).want(t, 0, "programs in them run only where that is /nix/store", "complete in "+dir)
	l.asNix(t, u, dir)
	u.withoutNamespaces(t, runUser, floxctl, "run", "--to", dir, l.ripgrep(), "--", "rg", "--version").want(t, 5, dir, "user.max_user_namespaces")

	// What is there and differs is left alone.
	file := filepath.Join(dir, filepath.Base(l.ripgrep()), "bin", "rg")
	if err := os.WriteFile(file, []byte("mine"), 0o555); err != nil {
		t.Fatal(err)
	}
	u.withoutNamespaces(t, runUser, floxctl, "run", "--to", dir, l.ripgrep()).want(t, 6, "differs", "move it away")
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("it was overwritten: %q, %v", b, err)
	}

	// Root of a container writes the store itself.
	u.withoutNamespaces(t, 0, floxctl, "run", "--to", "/nix/store", l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
	u.withoutNamespaces(t, runUser, l.world.Ripgrep.Exe, "--version").want(t, 0, "ripgrep ")
}

// TestRunAsRoot: what talks to the network is not root for somebody who only runs
// a program.
func TestRunAsRoot(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-as-root")
	dir := filepath.Join(u.host.Dir, "root")
	run := func(program string, args ...string) result {
		return do(t, u.host, "env", append([]string{"-i", "HOME=" + dir, "PATH=/usr/bin:/bin", program, "run"}, args...)...)
	}
	floxctl, invite := l.programs.Floxctl, l.house.Invite()
	run(floxctl, "--invite", invite, l.ripgrep(), "--", "true").want(t, 4, "fuse   an agent of one's own would be root", "sudo floxd agent", "run it as an ordinary user")
	for _, mode := range private {
		run(floxctl, "--invite", invite, "--mode", mode, l.ripgrep(), "--", "true").want(t, 5, mode+" cannot be: ", "must not be")
		run(l.programs.Floxd, "--mode", mode, "--state-dir", dir, "--invite", invite, string(l.world.Ripgrep.Path), "--", "true").want(t, 5, "must not do so as root")
	}
	if exists(dir) {
		t.Errorf("%s was made for nothing", dir)
	}
	run(floxctl, "--invite", invite, "--to", filepath.Join(dir, "store"), l.ripgrep()).want(t, 0, "complete in ")
}

func exists(file string) bool {
	_, err := os.Lstat(file)
	return err == nil
}
