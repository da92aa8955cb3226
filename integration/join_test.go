package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// made is what floxd storehouse init, floxd join and floxctl invite print with
// --json, as far as tests look at it.
type made struct {
	ID          string `json:"id"`
	Invite      string `json:"invite"`
	Fingerprint string `json:"fingerprint"`
	Role        string `json:"role"`
	Peer        string `json:"peer"`
	Already     bool   `json:"already"`
	Told        bool   `json:"told"`
	Runs        struct {
		PID int    `json:"pid"`
		Log string `json:"log"`
	} `json:"runs"`
}

// says runs a command that prints JSON and must succeed.
func says(t *testing.T, h *netns.Host, name string, args ...string) (m made) {
	t.Helper()
	r := do(t, h, name, args...)
	r.want(t, 0)
	if err := json.Unmarshal([]byte(r.out), &m); err != nil {
		t.Fatalf("%v in: %s", err, r.out)
	}
	return m
}

// newcomer is a host on which nothing of flox runs; what join starts there is
// killed at the latest when the test ends.
func (l *lab) newcomer(t *testing.T, h *netns.Host) *netns.Host {
	t.Cleanup(func() {
		state := filepath.Join(h.Root(), "var/lib/floxd")
		logs, _ := filepath.Glob(filepath.Join(state, "floxd-*.log"))
		for _, log := range logs {
			if b, err := os.ReadFile(log); err == nil && t.Failed() {
				t.Logf("the end of %s on %s:\n%s", filepath.Base(log), h.Name, tail(b))
			}
		}
		pids, _ := filepath.Glob(filepath.Join(state, "floxd-*.pid"))
		for _, file := range pids {
			b, err := os.ReadFile(file)
			if err != nil {
				continue
			}
			pid := strings.TrimSpace(string(b))
			if name, err := os.ReadFile("/proc/" + pid + "/comm"); err == nil && strings.HasPrefix(string(name), "flox") {
				_ = exec.Command("kill", "-9", pid).Run()
			}
		}
	})
	return h
}

// machines are the names the storehouse lists, asked on a host.
func (l *lab) machines(t *testing.T, h *netns.Host) (names []string) {
	t.Helper()
	r := do(t, h, l.programs.Floxctl, "machine", "list", "--json")
	r.want(t, 0)
	var list []struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal([]byte(r.out), &list); err != nil {
		t.Fatalf("%v in: %s", err, r.out)
	}
	for _, m := range list {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return names
}

func (l *lab) lists(t *testing.T, h *netns.Host, want ...string) {
	t.Helper()
	if got := l.machines(t, h); !slices.Equal(got, want) {
		t.Errorf("on %s the machines are %v, want %v", h.Name, got, want)
	}
}

// TestMachinesJoinAndLeave: a storehouse of three servers and a machine that uses
// it come about by one command each, and the machine goes by one.
func TestMachinesJoinAndLeave(t *testing.T) {
	l := open(t)
	floxd, floxctl := l.programs.Floxd, l.programs.Floxctl
	s1, s2, s3, user := l.newcomer(t, l.host(t, "s1")), l.newcomer(t, l.host(t, "s2")), l.newcomer(t, l.host(t, "s3")), l.newcomer(t, l.host(t, "user"))
	const mine = "# mine\n[storehouse]\nhttp = \"0.0.0.0:7780\" # open\nbuilds = true\n"
	do(t, s1, "sh", "-c", "mkdir -p /etc/floxd && cat >/etc/floxd/config.toml <<'END'\n"+mine+"END").want(t, 0)
	first := says(t, s1, floxd, "storehouse", "init", "--name", "s1", "--storehouse-name", "acme", "--json")
	do(t, s1, "cat", "/etc/floxd/config.toml").want(t, 0, "# mine\n[storehouse]\n", "http = \"0.0.0.0:7780\" # open\n", `consensus = "`+s1.Addr().String()+`:7783"`)
	if again := says(t, s1, floxd, "storehouse", "init", "--name", "s1", "--json"); again.Runs.PID != first.Runs.PID {
		t.Errorf("a second init: process %d, before %d", again.Runs.PID, first.Runs.PID)
	}

	do(t, s2, floxctl, "join", first.Invite, "--name", "s2").want(t, 0, "acme", "s2 (server) joined", "floxd-storehouse.log")
	do(t, s3, floxctl, "join", first.Invite, "--name", "s3").want(t, 5, "used up")
	do(t, s3, floxctl, "join", says(t, s2, floxctl, "invite", "--role", "server", "--json").Invite, "--name", "s3").want(t, 0, "s3 (server) joined")
	l.lists(t, s3, "s1", "s2", "s3")
	do(t, s2, floxctl, "join", first.Invite, "--name", "s2").want(t, 0, "was a member already")

	house := hosts.Joined(s1, l.dir)
	if err := l.copyTo(t.Context(), house, l.world.Ripgrep.Path); err != nil {
		t.Fatal(err)
	}
	invite := says(t, s3, floxctl, "invite", "--role", "agent", "--user", "root", "--label", "site=berlin", "--json").Invite
	const nixConf = "# mine\nmax-jobs = 3"
	do(t, user, "sh", "-c", "mkdir -p /etc/nix && printf '"+nixConf+"' >/etc/nix/nix.conf").want(t, 0)
	joined := says(t, user, floxctl, "join", invite, "--name", "laptop", "--json")
	if joined.Role != "agent" || joined.Already || joined.Runs.PID == 0 {
		t.Errorf("it became %+v", joined)
	}
	l.runs(t, user)
	again := says(t, user, floxctl, "join", invite, "--name", "laptop", "--json")
	if !again.Already || again.Peer != joined.Peer || again.Runs.PID != joined.Runs.PID {
		t.Errorf("joined again it is %+v, before %+v", again, joined)
	}
	l.lists(t, s1, "laptop", "s1", "s2", "s3")
	l.nixNeedsNothing(t, user)
	eventually(t, "new shells find the user's profile", func() bool {
		return strings.Contains(do(t, user, "bash", "-lc", "echo $PATH").out, "/flox/root/default/bin:")
	})
	l.assignedIsFound(t, s2, user, "site=berlin")

	do(t, user, floxctl, "leave").want(t, 2, "--yes")
	do(t, user, floxctl, "leave", "--yes", "--purge").want(t, 0, "has left acme as agent")
	l.lists(t, s2, "s1", "s2", "s3")
	l.nothingLeft(t, user)
	do(t, user, "ls", "/var/lib/floxd/agent").want(t, 2, "No such file")
	if r := do(t, user, "cat", "/etc/nix/nix.conf"); r.out != nixConf {
		t.Errorf("nix.conf is %q after it left, was %q", r.out, nixConf)
	}
	do(t, user, "readlink", "/nix/var/nix/daemon-socket/socket").want(t, 1)
	do(t, user, "ls", "/etc/profile.d/floxd.sh").want(t, 2)
	do(t, user, floxctl, "leave", "--yes").want(t, 3, "joined no storehouse")
	back := says(t, user, floxctl, "join", says(t, s1, floxctl, "invite", "--role", "agent", "--json").Invite, "--no-start", "--json")
	if back.Already || back.Peer == joined.Peer {
		t.Errorf("with a new key it is %+v, before %+v", back, joined)
	}

	var left result
	eventually(t, "the third server is caught up with, and leaves", func() bool {
		left = do(t, s3, floxctl, "leave", "--yes")
		return left.code != 8
	})
	left.want(t, 0, "has left acme as server", "/var/lib/floxd/storehouse-left-")
	l.nothingLeft(t, s3)
	do(t, s2, floxctl, "leave", "--yes", "--purge").want(t, 0, "has left acme as server")
	do(t, s1, floxctl, "leave", "--yes").want(t, 8, "s1 is the only server", "Nothing was changed")
	do(t, s1, floxctl, "invite", "--role", "agent").want(t, 0) // it takes writes alone
	names := l.machines(t, s1)
	if !slices.Contains(names, "s1") || slices.Contains(names, "s2") || slices.Contains(names, "s3") {
		t.Errorf("after two have left, the machines are %v", names)
	}
}

// assignedIsFound has an operator put a profile on machines with a label: new login shells
// of everybody find its programs on such a machine, and run them, until it is taken back.
func (l *lab) assignedIsFound(t *testing.T, operator, user *netns.Host, label string) {
	t.Helper()
	const profile = "acme/base"
	ctl := func(args ...string) { t.Helper(); do(t, operator, l.programs.Floxctl, args...).want(t, 0) }
	ctl("profile", "create", profile)
	ctl("install", "-p", profile, l.world.StoreDir.Join(l.world.Ripgrep.Path))
	shell := func(who ...string) string {
		sh := append(who, "env", "-i", "HOME=/", "PATH=/usr/bin:/bin", "sh", "-lc", "command -v rg; rg --version")
		return do(t, user, sh[0], sh[1:]...).out
	}
	if got := shell(); strings.Contains(got, "ripgrep ") {
		t.Errorf("before it is assigned a shell says %s", got)
	}
	ctl("profile", "assign", profile, "--to", label)
	for _, who := range [][]string{nil, {"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}} {
		eventually(t, fmt.Sprintf("new login shells of %q find what is assigned", who), func() bool {
			return strings.HasPrefix(shell(who...), "/flox/"+profile+"/bin/rg\nripgrep ")
		})
	}
	ctl("profile", "unassign", profile, "--from", label)
	eventually(t, "new login shells find it no more", func() bool { return !strings.Contains(shell(), "ripgrep ") })
}

// TestJoinOnTheLAN: without an invite a machine finds the storehouse of its LAN,
// while its window is open, and joins the one whose fingerprint it was told.
func TestJoinOnTheLAN(t *testing.T) {
	l := open(t)
	floxd, floxctl := l.programs.Floxd, l.programs.Floxctl
	server, user := l.neighbours(t, "window")
	l.newcomer(t, server)
	says(t, server, floxd, "storehouse", "init", "--name", "s1", "--storehouse-name", "acme", "--json")
	do(t, user, floxctl, "join", "--no-start").want(t, 3, "no storehouse on this LAN", "floxctl invite --lan 10m")
	window := says(t, server, floxctl, "invite", "--role", "agent", "--lan", "10m", "--json")
	do(t, user, floxctl, "join", "--no-start").want(t, 2, "acme", window.Fingerprint, server.Addr().String(), "no terminal", "--yes FINGERPRINT")
	do(t, user, floxctl, "join", "--no-start", "--yes", "bafk").want(t, 5, "no storehouse on this LAN has the fingerprint bafk", window.Fingerprint)
	asked := []string{"acme", window.Fingerprint, server.Addr().String(), "Compare the fingerprint", "Join it? [y/N]"}
	answered(t, user, "n", floxctl, "join", "--no-start", "--name", "laptop").want(t, 130, append(asked, "nothing was changed")...)
	l.lists(t, server, "s1")
	do(t, user, "cat", keptInvite).want(t, 1, "No such file")
	do(t, user, "cat", "/etc/floxd/config.toml").want(t, 1, "No such file")
	answered(t, user, "y", floxctl, "join", "--no-start", "--name", "laptop").want(t, 0, append(asked, "laptop (agent) joined")...)
	l.lists(t, server, "laptop", "s1")
	do(t, user, floxctl, "join", "--no-start", "--name", "laptop", "--yes", window.Fingerprint).want(t, 0, "was a member already")

	// An agent that is run by hand takes an invite as well, once.
	invite := says(t, server, floxctl, "invite", "--role", "agent", "--json").Invite
	a, err := hosts.StartAgent(t.Context(), l.programs, server, l.dir, invite)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	await(t, a, "it is a member", connected)
	if err := errors.Join(a.Stop(), a.Start(t.Context())); err != nil {
		t.Fatal(err)
	}
	await(t, a, "it is one after a restart", connected)
	l.lists(t, server, "laptop", "s1", server.Name)
}

// answered runs a command at a terminal, and answers its question.
func answered(t *testing.T, h *netns.Host, answer, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := h.Command(ctx, "script", "-qec", strings.Join(append([]string{name}, args...), " "), "/dev/null")
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	var said []byte
	asked := false
	for buf := make([]byte, 4096); ; {
		n, err := out.Read(buf)
		if said = append(said, buf[:n]...); !asked && strings.Contains(string(said), "[y/N]") {
			asked = true
			_, err := io.WriteString(in, answer+"\n")
			must(t, err)
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	if cmd.ProcessState == nil || ctx.Err() != nil || !asked {
		t.Fatalf("%s %v on %s: %v, asked: %v\n%s", name, args, h.Name, err, asked, said)
	}
	return result{cmd.ProcessState.ExitCode(), string(said)}
}

// nixNeedsNothing: stock Nix on a machine that joined uses its agent, for root and
// for others, without a variable or an option, and believes the storehouse's keys.
func (l *lab) nixNeedsNothing(t *testing.T, h *netns.Host) {
	t.Helper()
	path := l.world.StoreDir.Join(l.world.Ripgrep.Path)
	for _, who := range [][]string{{}, {"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}} {
		bare := append(slices.Clone(who), "env", "-i", "HOME=/nonexistent", "PATH=/usr/bin:/bin")
		nix := func(args ...string) result { return do(t, h, bare[0], append(slices.Clone(bare[1:]), args...)...) }
		nix("nix-store", "--query", "--requisites", path).want(t, 0, path)
		nix("nix", "--extra-experimental-features", "nix-command", "store", "ping").want(t, 0, "Store URL: daemon")
		// As cron and units would have it.
		built := nix("nix-build", "--no-out-link", "-E", fmt.Sprintf(`derivation { name = "bare-%d"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo built >$out" ]; }`, len(who)))
		built.want(t, 0, "/nix/store/")
		nix("cat", lastLine(built)).want(t, 0, "built")
		added := nix("nix-store", "--add", "/etc/hostname")
		added.want(t, 0, "/nix/store/")
		nix("cat", strings.TrimSpace(added.out)).want(t, 0)
		eventually(t, "stock Nix finds the path signed by a key it trusts", func() bool {
			r := nix("nix", "--extra-experimental-features", "nix-command", "store", "verify", "--no-contents", path)
			return r.code == 0
		})
	}
}
