package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/scenario"
)

// TestMainJob is the demo, asserted. What the programs print and that bytes are
// right is checked by the scenario itself.
func TestMainJob(t *testing.T) {
	l := open(t)
	dir := t.TempDir()
	s, report, err := scenario.Start(t.Context(), scenario.Config{Programs: l.programs, World: l.world, Dir: dir, Out: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.MainJob(t.Context(), report); err != nil {
		t.Fatal(err)
	}
	for _, r := range report.Runs {
		if r.Round == 1 && r.Traffic.Plain()*2 > r.Closure {
			t.Errorf("%s on %s fetched %d bytes of a closure of %d: that is not lazy", r.Program, r.Host, r.Traffic.Plain(), r.Closure)
		}
	}
	if h := report.HeldByA; h.Storehouse != 0 || h.Peers() == 0 {
		t.Errorf("a path that A holds and never ran: %d bytes from A, %d from the storehouse, want all from A", h.Peers(), h.Storehouse)
	}
	if h := report.Unplugged; h.Storehouse != 0 || h.Peers() == 0 {
		t.Errorf("with the storehouse unplugged: %d bytes from A, %d from the storehouse, want all from A", h.Peers(), h.Storehouse)
	}
	if report.WarmFuse != 0 {
		t.Errorf("%d FUSE requests when everything ran a second time, want none", report.WarmFuse)
	}
	// The reader is told by the deadline, and not before it.
	if w := report.NobodyWaited; w < 5*time.Second || w > 20*time.Second {
		t.Errorf("an error after %s for what nobody holds, want it after the 5 s a look-up may take", w)
	}
}

// TestPathsBecomeVisible: what is not valid is not there, at once; what becomes
// valid is there without a remount, although its absence was seen before.
func TestPathsBecomeVisible(t *testing.T) {
	l := open(t)
	a := l.agent(t, l.host(t, "visible"))
	await(t, a, "follows the storehouse", connected)

	file := filepath.Join(t.TempDir(), "news")
	if err := os.WriteFile(file, []byte("fresh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	layer := l.world.Layered(t.TempDir())
	out, err := layer.Command(t.Context(), "nix-store", "--add", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	path := strings.TrimSpace(string(out))
	for range 3 {
		do(t, a.Host, "cat", path).want(t, 1, "No such file or directory")
	}
	for _, missing := range []string{
		string(l.world.StoreDir) + "/lib",
		l.world.StoreDir.Join(l.world.Ripgrep.Path) + "/bin/missing",
	} {
		do(t, a.Host, "cat", missing).want(t, 1, "No such file or directory")
	}

	p, _, err := l.world.StoreDir.Split(path)
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := l.nixCopy(t.Context(), layer, l.house, p)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nix copy: %v\n%s", err, out)
	}
	eventually(t, path+" is visible", func() bool { return do(t, a.Host, "cat", path) == result{0, "fresh\n"} })
	// Nor was the directory closed to others by it.
	l.runs(t, a.Host)
}

// TestMissingNamesCostNothing: names that cannot be store paths are answered
// once, by the kernel from then on.
func TestMissingNamesCostNothing(t *testing.T) {
	l := open(t)
	a := l.agent(t, l.host(t, "missing"))
	await(t, a, "follows the storehouse", connected)
	l.runs(t, a.Host)
	missing := []string{string(l.world.StoreDir) + "/lib", l.world.StoreDir.Join(l.world.Ripgrep.Path) + "/bin/missing"}
	do(t, a.Host, "ls", missing...)
	var cost uint64
	for range 3 { // the machine may take entries from the kernel's cache in between
		before, _ := status(t, a).Requests()
		do(t, a.Host, "ls", missing...).want(t, 2, "No such file or directory")
		after, _ := status(t, a).Requests()
		if cost = after - before; cost == 0 {
			return
		}
	}
	t.Errorf("%d FUSE requests for names whose absence was known, want none", cost)
}
