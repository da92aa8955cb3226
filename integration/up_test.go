package integration

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
)

// up starts `floxd up` for one test.
func (l *lab) up(t *testing.T, name string, flags ...string) *hosts.Agent {
	t.Helper()
	a, err := hosts.StartUp(t.Context(), l.programs, l.host(t, name), l.dir, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	return a
}

// said waits until a daemon has said words, counted from the beginning of its log.
func said(t *testing.T, d *hosts.Daemon, times int, words string) {
	t.Helper()
	eventually(t, d.Name+" says "+words, func() bool {
		b, err := os.ReadFile(d.Log)
		return err == nil && strings.Count(string(b), words) >= times
	})
}

// parts are the processes that `floxd up` has started with some arguments.
func parts(t *testing.T, a *hosts.Agent, arguments string) []string {
	t.Helper()
	return strings.Fields(do(t, a.Host, "pgrep", "-P", strconv.Itoa(a.PID()), "-f", "--", arguments).out)
}

func part(t *testing.T, a *hosts.Agent, arguments string) string {
	t.Helper()
	found := parts(t, a, arguments)
	if len(found) != 1 {
		t.Fatalf("processes %v of floxd up are %q, want one", found, arguments)
	}
	return found[0]
}

// interrupt is Ctrl-C.
func interrupt(t *testing.T, d *hosts.Daemon) int {
	t.Helper()
	d.Signal(syscall.SIGINT)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	code, err := d.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// TestUpOnABareMachine: one command gives a working store and a binary cache;
// Ctrl-C takes everything away again but the state, and so does kill -9.
func TestUpOnABareMachine(t *testing.T) {
	l := open(t)
	a := l.up(t, "bare")
	said(t, a.Daemon, 1, "Ready.")
	log, err := os.ReadFile(a.Log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"binary cache at http://127.0.0.1:7780", "mounted at /nix/store", "floxctl status", "Ctrl-C"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("want %q in what it says first:\n%s", want, log)
		}
	}
	await(t, a, "follows the storehouse", connected)
	do(t, a.Host, l.programs.Floxctl, "status").want(t, 0, "mounted at /nix/store, read-only", "connected to", "http://127.0.0.1:7780", "No problems.")
	do(t, a.Host, l.programs.Floxctl, "doctor").want(t, 0)

	if err := l.copyTo(t.Context(), hosts.Inside(a), l.world.Ripgrep.Path); err != nil {
		t.Fatal(err)
	}
	l.runs(t, a.Host)

	// Its parts are started again when they die.
	house := part(t, a, "storehouse --ready-fd")
	child := status(t, a).PID
	for _, pid := range []string{house, strconv.Itoa(child)} {
		do(t, a.Host, "kill", "-9", pid).want(t, 0)
	}
	eventually(t, "another storehouse", func() bool { p := parts(t, a, "storehouse --ready-fd"); return len(p) == 1 && p[0] != house })
	await(t, a, "follows the storehouse again", func(s *hosts.Status) bool { return s.PID != child && connected(s) })
	l.runs(t, a.Host)

	l.upCollects(t, a)

	if code := interrupt(t, a.Daemon); code != 0 {
		t.Errorf("exit code %d after Ctrl-C, want 0", code)
	}
	said(t, a.Daemon, 1, "nothing is mounted at /nix/store any more")
	l.nothingLeft(t, a.Host)

	if err := a.Start(t.Context()); err != nil {
		t.Fatalf("again with the same state: %v", err)
	}
	l.runs(t, a.Host)

	for range 2 {
		a.Kill()
		if err := a.Start(t.Context()); err != nil {
			t.Fatalf("after kill -9: %v", err)
		}
		l.same(t, a.Host, l.files(t, l.world.Ripgrep.Path)...)
	}
}

// upCollects: of the storehouse of one machine stock Nix collects and deletes as of a
// store of its own, also what was built, and at once.
func (l *lab) upCollects(t *testing.T, a *hosts.Agent) {
	t.Helper()
	nix := func(args ...string) result { t.Helper(); return stockNix(t, a.Host, args...) }
	const dep = `derivation { name = "dep"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo it is built; echo dep > $out" ]; }`
	const user = `derivation { name = "user"; system = "x86_64-linux"; builder = "/bin/sh"; dep = ` + dep + `; args = [ "-c" "echo $dep > $out" ]; }`
	nix("nix-store", "-r", l.world.StoreDir.Join(l.world.Ripgrep.Path), "--add-root", "/tmp/ripgrep", "--indirect").want(t, 0)
	kept := lastLine(nix("nix-build", "--out-link", "/tmp/kept", "-E", strings.ReplaceAll(user, `"user"`, `"kept"`)))
	built := nix("nix-build", "--no-out-link", "-E", strings.ReplaceAll(user, `"dep"`, `"other"`))
	built.want(t, 0, "it is built", "-user")
	out := lastLine(built)
	other := strings.TrimSpace(do(t, a.Host, "cat", out).out)
	dead := nix("nix-store", "--gc", "--print-dead")
	dead.want(t, 0, out, other)
	if strings.Contains(dead.out, kept) || !strings.Contains(nix("nix-store", "--gc", "--print-live").out, kept) {
		t.Errorf("dead is said to be\n%s", dead.out)
	}
	nix("nix-store", "--delete", other).want(t, 1, "Cannot delete path '"+other+"' since it is still alive")
	nix("nix-store", "--delete", kept).want(t, 1, "Cannot delete path '"+kept+"' since it is still alive")
	nix("nix-store", "--delete", out).want(t, 0, "1 store paths deleted")
	do(t, a.Host, "cat", out).want(t, 1, "No such file") // though it was read
	do(t, a.Host, "cat", other).want(t, 0, "dep")
	nix("nix-store", "--gc", "--max-freed", "1").want(t, 0, "1 store paths deleted")
	nix("sh", "-c", "exec 3<"+other+"; nix-collect-garbage").want(t, 0, "store paths deleted")
	do(t, a.Host, "cat", other).want(t, 0, "dep")
	nix("nix-collect-garbage").want(t, 0, "store paths deleted")
	do(t, a.Host, "cat", other).want(t, 1, "No such file")
	nix("nix-store", "-q", "--hash", other).want(t, 1, "is not valid")
	nix("nix-collect-garbage").want(t, 0, "1 store paths deleted", ".log'") // of the build; outputs and derivation went before
	nix("nix-collect-garbage").want(t, 0, "0 store paths deleted")
	do(t, a.Host, "cat", kept).want(t, 0, "-dep")
	nix("nix-store", "-qR", "--include-outputs", strings.TrimSpace(nix("nix-store", "-q", "--deriver", kept).out)).want(t, 0, kept)
	do(t, a.Host, "rm", "/tmp/kept").want(t, 0)
	nix("nix-collect-garbage").want(t, 0, "store paths deleted")
	do(t, a.Host, "cat", kept).want(t, 1, "No such file")
	// What a build under way has made, and will need, stays.
	const slow = `derivation { name = "slow"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo it is slow; i=0; while [ $i -lt 3000000 ]; do i=$((i+1)); done; echo > $out" ]; }`
	c := beginNix(t, a.Host, "nix-build", "--no-out-link", "-E", strings.Replace(user, "dep = ", "slow = "+slow+"; dep = ", 1))
	eventually(t, "it waits for the slow one", func() bool { return strings.Contains(c.said(), "it is slow") })
	nix("nix-collect-garbage").want(t, 0)
	if err := <-c.done; err != nil || !strings.Contains(c.said(), "it is built") {
		t.Errorf("built while somebody collected: %v\n%s", err, c.said())
	}
	l.runs(t, a.Host)
}

// TestUpSparesANixStore: a machine with a store of its own keeps it, and can
// mount elsewhere.
func TestUpSparesANixStore(t *testing.T) {
	l := open(t)
	h := l.host(t, "spared")
	own := filepath.Join(h.Dir, "nix", "store", "own")
	if err := os.WriteFile(own, []byte("mine\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{"up"}, {"agent", "--invite", l.house.Invite()}} {
		do(t, h, l.programs.Floxd, command...).want(t, 8, "/nix/store holds files already (own", "has changed nothing", "--store-dir")
	}
	do(t, h, "cat", "/nix/store/own").want(t, 0, "mine")
	if left, err := os.ReadDir(filepath.Join(h.Dir, "state")); err != nil || len(left) > 0 {
		t.Errorf("the refused left state behind: %v, %v", left, err)
	}

	a, err := hosts.StartUp(t.Context(), l.programs, h, l.dir, "--store-dir", "/var/lib/other/store")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	await(t, a, "follows the storehouse", connected)
	r := do(t, h, l.programs.Floxctl, "store", "add", "/etc/hostname", "--token-file", "/var/lib/floxd/storehouse/upload-token")
	r.want(t, 0, "/var/lib/other/store/")
	want := do(t, h, "cat", "/etc/hostname")
	if got := do(t, h, "cat", strings.TrimSpace(r.out)); got != want {
		t.Errorf("read %+v from %s, want %+v", got, r.out, want)
	}
	do(t, h, "cat", "/nix/store/own").want(t, 0, "mine")
}
