package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// alone runs floxd in a mount namespace of its own on the host, prepared by a
// script.
func alone(t *testing.T, h *netns.Host, script string, argv ...string) result {
	t.Helper()
	return do(t, h, "unshare", append([]string{"--mount", "--propagation", "private", "--", "sh", "-c", script + "\nexec \"$@\"", "alone"}, argv...)...)
}

// noFUSE hides /dev/fuse and leaves what any program needs.
const noFUSE = `mount -t tmpfs tmpfs /dev
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/urandom c 1 9`

// TestBadStarts: what is in the way is named, with what was expected and what to
// do, by the right exit code, and nothing is left behind.
func TestBadStarts(t *testing.T) {
	l := open(t)
	h := l.host(t, "bad")
	write := func(name, text string) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	floxd, invite := l.programs.Floxd, l.house.Invite()
	agent := func(flags ...string) []string { return append([]string{floxd, "agent", "--invite", invite}, flags...) }
	tests := []struct {
		name string
		argv []string
		code int
		want []string
	}{
		{"agent not root", append([]string{"setpriv", "--reuid=65534", "--clear-groups", "--"}, agent()...), 5, []string{"floxd agent mounts", "sudo"}},
		{"up not root", []string{"setpriv", "--reuid=65534", "--clear-groups", "--", floxd, "up"}, 5, []string{"floxd up mounts", "sudo"}},
		{"unknown key", []string{floxd, "agent", "--config", write("config.toml", "[agent]\ncache-bugdet = \"1GiB\"\n")}, 2, []string{"config.toml:2", "agent.cache-bugdet", "cache-budget"}},
		{"no such configuration", []string{floxd, "agent", "--config", "/nonexistent.toml"}, 2, []string{"/nonexistent.toml does not exist", "--help"}},
		{"bad size", agent("--cache-budget", "lots"), 2, []string{"lots", "cache-budget"}},
		{"no invite", []string{floxd, "agent"}, 2, []string{"in no storehouse yet", "floxd join INVITE", "sudo floxd up"}},
		{"invite that is not there", []string{floxd, "agent", "--invite", "/nonexistent.json"}, 3, []string{"/nonexistent.json does not exist", "copy invite.json"}},
		{"invite that is none", []string{floxd, "agent", "--invite", write("invite.json", "hello\n")}, 2, []string{"invite.json", "not the JSON a storehouse writes"}},
		{"invite with a new key", []string{floxd, "agent", "--invite", write("invite.json", `{"version": 1, "role": "root"}`)}, 2, []string{"unknown field", "role"}},
		{"another store directory", agent("--store-dir", "/run/other"), 2, []string{"/run/other", "/nix/store", "part of every path's hash"}},
		{"mount point that is a file", agent("--store-dir", "/etc/hostname"), 2, []string{"/etc/hostname is a file", "--store-dir"}},
		{"user that is not there", agent("--user", "nosuchuser"), 2, []string{"nosuchuser", "useradd"}},
		{"user that is root", agent("--user", "root"), 2, []string{"is root", "useradd"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { do(t, h, tt.argv[0], tt.argv[1:]...).want(t, tt.code, tt.want...) })
	}
	t.Run("no FUSE device", func(t *testing.T) {
		alone(t, h, noFUSE, agent()...).want(t, 3, "/dev/fuse", "modprobe fuse")
	})
	t.Run("mount point in use", func(t *testing.T) {
		alone(t, h, "mount -t tmpfs tmpfs /nix/store", agent()...).want(t, 8, "/nix/store", "mount point already", "tmpfs")
	})
	t.Run("port in use", func(t *testing.T) {
		listener, err := h.Listen(t.Context(), "tcp", fmt.Sprintf("0.0.0.0:%d", hosts.AgentPort))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		do(t, h, floxd, agent()[1:]...).want(t, 8, "port 7782 (agent.listen) is in use by", "(pid ", "with --listen")
	})
}

// TestSecondOnes: a state directory, a mount point and a port have one user, and
// who came first goes on as if nothing happened.
func TestSecondOnes(t *testing.T) {
	l := open(t)
	h := l.host(t, "second")
	a := l.agent(t, h)
	await(t, a, "follows the storehouse", connected)
	floxd := l.programs.Floxd
	pid := fmt.Sprint(a.PID())
	t.Run("agent", func(t *testing.T) {
		do(t, h, floxd, "agent").want(t, 8, "/var/lib/floxd", "another agent", pid, "--state-dir")
	})
	t.Run("agent elsewhere with the same state", func(t *testing.T) {
		alone(t, h, "umount -l /nix/store", floxd, "agent", "--run-dir", "/run/other", "--listen", "0.0.0.0:7999").
			want(t, 8, "/var/lib/floxd", "another agent", pid, "--state-dir")
	})
	t.Run("up beside an agent", func(t *testing.T) {
		do(t, h, floxd, "up").want(t, 8, "another agent", pid)
	})
	t.Run("same mount point", func(t *testing.T) {
		do(t, h, floxd, "agent", "--invite", l.house.Invite(), "--state-dir", "/var/lib/other", "--run-dir", "/run/other", "--listen", "0.0.0.0:7999").
			want(t, 8, "/nix/store", "mount point already")
	})
	t.Run("same run directory", func(t *testing.T) {
		do(t, h, floxd, "agent", "--invite", l.house.Invite(), "--state-dir", "/var/lib/other", "--listen", "0.0.0.0:7999").
			want(t, 8, "/run/floxd", "another agent uses it")
	})
	t.Run("storehouse", func(t *testing.T) {
		do(t, l.house.Host, floxd, "storehouse", "--http", "none", "--listen", "127.0.0.1:7999").
			want(t, 8, "/var/lib/floxd/storehouse", "another")
	})
	t.Run("storehouse of another store directory", func(t *testing.T) {
		stopped := l.host(t, "renamed")
		house, err := hosts.StartStorehouse(t.Context(), l.programs, stopped, l.dir)
		if err != nil {
			t.Fatal(err)
		}
		stop(t, house.Daemon)
		do(t, stopped, floxd, "storehouse", "--store-dir", "/other/store").want(t, 2, "/other/store", "/nix/store")
	})
	t.Run("ports of up", func(t *testing.T) {
		do(t, l.house.Host, floxd, "up", "--state-dir", "/var/lib/other").want(t, 8, "is in use by floxd", "with --storehouse-")
	})
	t.Run("port of the storehouse", func(t *testing.T) {
		do(t, l.house.Host, floxd, "storehouse", "--state-dir", "/var/lib/other").want(t, 8, "storehouse.http", "is in use by floxd", "with --http")
	})
	l.runs(t, h)
	if s := status(t, a); !s.Storehouse.Connected || !s.Mounted {
		t.Errorf("the first agent suffers: %+v", s)
	}
}

// TestInviteOfAnotherStorehouse: who answers at the address but is not whom the
// invite means is not believed, and the agent says so.
func TestInviteOfAnotherStorehouse(t *testing.T) {
	l := open(t)
	invite, err := api.LoadInvite(l.house.Invite())
	if err != nil {
		t.Fatal(err)
	}
	invite.TrustList = flox.CID{1, 2, 3}
	file := filepath.Join(t.TempDir(), "invite.json")
	if err := invite.Save(file); err != nil {
		t.Fatal(err)
	}
	a, err := hosts.StartAgent(t.Context(), l.programs, l.host(t, "misled"), l.dir, file, "--lookup-timeout", "1s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	await(t, a, "the agent refuses the trust list", func(s *hosts.Status) bool {
		return !s.Storehouse.Connected && strings.Contains(strings.Join(s.Problems, "\n"), "another storehouse, or somebody in between")
	})
	do(t, a.Host, l.programs.Floxctl, "status").want(t, 0, "not connected", "another storehouse, or somebody in between")
	do(t, a.Host, "cat", l.world.Ripgrep.Exe).want(t, 1, "Input/output error")
	do(t, a.Host, l.programs.Floxctl, "doctor").want(t, 1, "no trust list")
}

// TestStranger: who does not know the members' secret gets no answer from
// anybody, and is told where to look.
func TestStranger(t *testing.T) {
	l := open(t)
	invite, err := api.LoadInvite(l.house.Invite())
	if err != nil {
		t.Fatal(err)
	}
	invite.Secret[0] ^= 1
	file := filepath.Join(t.TempDir(), "invite.json")
	if err := invite.Save(file); err != nil {
		t.Fatal(err)
	}
	a, err := hosts.StartAgent(t.Context(), l.programs, l.host(t, "stranger"), l.dir, file, "--lookup-timeout", "1s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	await(t, a, "the agent says that it is not let in", func(s *hosts.Status) bool {
		return !s.Storehouse.Connected && s.Storehouse.Error != "" && len(s.Problems) > 0
	})
	do(t, a.Host, "cat", l.world.Ripgrep.Exe).want(t, 1, "Input/output error")
	do(t, a.Host, l.programs.Floxctl, "status").want(t, 0, "the storehouse is not connected", "does not know this swarm's secret", "another invite?")
}
