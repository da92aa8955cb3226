package integration

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// stockNix runs a command of stock Nix on a host, with the agent there as its daemon.
func stockNix(t *testing.T, h *netns.Host, args ...string) result {
	t.Helper()
	return do(t, h, "env", slices.Concat(nixEnv, args)...)
}

// lastLine is the store path a command printed last.
func lastLine(r result) string {
	lines := strings.Fields(r.out)
	return lines[len(lines)-1]
}

// TestStockNixOnAnAgent: with the agent as its daemon, stock Nix writes on one
// machine, builds in the storehouse, reads through the mount, and another
// machine has what was built and nothing else.
func TestStockNixOnAnAgent(t *testing.T) {
	l := open(t)
	house, err := hosts.StartStorehouse(t.Context(), l.programs, l.host(t, "nixhouse"), l.dir, "--builds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, house.Daemon) })
	a := l.agentOf(t, l.host(t, "writer"), house)
	b := l.agentOf(t, l.host(t, "reader"), house, "--lookup-timeout", "2s")
	for _, agent := range []*hosts.Agent{a, b} {
		await(t, agent, "follows the storehouse", connected)
	}
	nix := func(args ...string) result { t.Helper(); return stockNix(t, a.Host, args...) }
	generationsDone := l.generations(t, a, b)

	added := nix("nix-store", "--add", "/etc/hostname")
	added.want(t, 0, "/nix/store/")
	source := lastLine(added)
	if got, want := do(t, a.Host, "cat", source), do(t, a.Host, "cat", "/etc/hostname"); got != want {
		t.Errorf("read %+v, want %+v", got, want)
	}
	nix("nix-store", "-q", "--hash", source).want(t, 0, "sha256:")
	nix("nix-store", "--dump", source).want(t, 0, "nix-archive-1")
	do(t, b.Host, "cat", source).want(t, 1, "No such file")

	expr := `derivation { name = "made"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo a line of the builder; echo made > $out" ]; }`
	built := nix("nix-build", "--no-out-link", "-E", expr)
	built.want(t, 0, "a line of the builder", "-made")
	out := lastLine(built)
	nix("nix-store", "--read-log", out).want(t, 0, "a line of the builder")
	nix("nix", "--extra-experimental-features", "nix-command", "log", out).want(t, 0, "a line of the builder")
	for _, h := range []*netns.Host{a.Host, b.Host} {
		do(t, h, "cat", out).want(t, 0, "made")
	}
	// The log of what somebody else asked for, too.
	stockNix(t, b.Host, "nix-store", "--read-log", out).want(t, 0, "a line of the builder")
	stockNix(t, b.Host, "nix", "--extra-experimental-features", "nix-command", "log", out).want(t, 0, "a line of the builder")
	do(t, b.Host, "env", "NIX_LOG_DIR=/run/floxd/nix-log", "NIX_REMOTE=unix:///run/floxd/nix.socket", "nix-store", "-l", out).want(t, 0, "a line of the builder")
	stockNix(t, b.Host, "nix-store", "--read-log", source).want(t, 1, "is not available")
	if again := nix("nix-build", "--no-out-link", "-E", expr); again.code != 0 || lastLine(again) != out || strings.Contains(again.out, "a line of the builder") {
		t.Errorf("built again: %+v", again)
	}
	nix("nix-build", "--no-out-link", "-E", strings.ReplaceAll(expr, "echo made > $out", "exit 3")).want(t, 1, "exit code 3")
	endless := `derivation { name = "endless"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "while :; do :; done" ]; }`
	nix("nix-build", "--no-out-link", "--timeout", "1", "--keep-failed", "-E", endless).want(t, 1, "timed out after 1 seconds", "is not kept (--keep-failed)")
	nix("nix-build", "--no-out-link", "--max-silent-time", "1", "-E", endless).want(t, 1, "timed out after 1 seconds of silence")
	nix("nix", "--extra-experimental-features", "nix-command", "path-info", "-rS", out).want(t, 0, filepath.Base(out))
	nix("nix", "--extra-experimental-features", "nix-command", "store", "cat", out).want(t, 0, "made")

	nix("nix-store", "-r", out, "--add-root", "/tmp/result", "--indirect").want(t, 0, "/tmp/result")
	nix("nix-store", "--gc", "--print-roots").want(t, 0, "/tmp/result -> "+out)

	// Links below gcroots, profiles and running processes are roots, too.
	do(t, a.Host, "sh", "-c", "mkdir -p /nix/var/nix/gcroots /nix/var/nix/profiles && ln -s "+source+" /nix/var/nix/gcroots/mine && ln -s "+out+" /nix/var/nix/profiles/p-1-link").want(t, 0)
	nix("nix-store", "--gc", "--print-roots").want(t, 0, "/nix/var/nix/gcroots/mine -> "+source, "/nix/var/nix/profiles/p-1-link -> "+out)
	nix("nix-store", "--delete", source).want(t, 1, "still alive")
	do(t, a.Host, "rm", "/nix/var/nix/gcroots/mine").want(t, 0)
	nix("sh", "-c", "exec 3<"+source+"; nix-store --delete "+source).want(t, 1, "still alive")

	// What only this machine has goes out by an export, comes in again, and goes.
	nix("sh", "-c", "nix-store --export "+source+" > /tmp/export && nix-store --delete "+source).want(t, 0)
	nix("nix", "--extra-experimental-features", "nix-command", "path-info", source).want(t, 1, "is not valid")
	do(t, a.Host, "cat", source).want(t, 1, "No such file") // though it was read a moment ago
	nix("sh", "-c", "nix-store --import < /tmp/export").want(t, 0, source)
	do(t, a.Host, "cat", source).want(t, 0)
	// A copy says by which content it goes: others have it, who knew that it was not there.
	copied := nix("sh", "-ec", "cd "+openDir(t)+" && echo copied > text && p=$(nix-store --add text) && n='nix --extra-experimental-features nix-command' && "+
		"$n copy --to file://$PWD/cache $p && nix-store --delete $p && $n copy --from file://$PWD/cache $p && echo $p")
	copied.want(t, 0, "-text")
	eventually(t, "the other machine has what was copied in", func() bool { return do(t, b.Host, "cat", lastLine(copied)).code == 0 })

	do(t, house.Host, l.programs.Floxctl, "storehouse", "status").want(t, 0, ": sandboxed, 1 at a time, Nix 2.8.0")
	l.checkDryRun(t, a.Host, house)
	l.checkForgery(t, a, b, house.URL())

	// From another machine it is the daemon behind ssh-ng.
	remote := "ssh-ng://localhost?remote-program=" + l.programs.Floxd + "%20nix-daemon"
	nix("nix", "--extra-experimental-features", "nix-command", "store", "cat", "--store", remote, out).want(t, 0, "made")

	l.everyday(t, house, a)
	l.installs(t, a)
	l.names(t, house, a)
	generationsDone()
	badDays(t, house, a)
}
