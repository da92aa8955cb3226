package integration

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// neighbours adds two hosts that share a subnet, for one test.
func (l *lab) neighbours(t *testing.T, name string) (a, b *netns.Host) {
	t.Helper()
	l.hosts++
	subnet, err := l.net.Subnet(t.Context(), fmt.Sprintf("%s-%d", name, l.hosts), netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	add := func(letter string) *netns.Host {
		h, err := l.net.Host(t.Context(), fmt.Sprintf("%s-%s-%d", name, letter, l.hosts), subnet)
		if err != nil {
			t.Fatal(err)
		}
		l.found[h] = ourMounts(t, h)
		t.Cleanup(func() {
			if !t.Failed() {
				l.nothingLeft(t, h)
			}
		})
		return h
	}
	return add("a"), add("b")
}

// storeNames are the names ls shows of the store directory.
func (l *lab) storeNames(t *testing.T, h *netns.Host) []string {
	t.Helper()
	r := do(t, h, "ls", "-U", string(l.world.StoreDir))
	r.want(t, 0)
	names := strings.Fields(r.out)
	slices.Sort(names)
	return names
}

func baseNames(paths ...flox.StorePath) (names []string) {
	for _, p := range paths {
		names = append(names, string(p))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// mountedAsNix compares what the kernel tells of every entry of paths in the mount
// with what Nix itself put on a disk: type, mode, links, time, size and target. A
// directory's size is its file system's own.
func (l *lab) mountedAsNix(t *testing.T, h *netns.Host, paths ...flox.StorePath) {
	t.Helper()
	const list = `cd "$1" && find . -type d -printf '%P %y %m %n %T@\n' -o -printf '%P %y %m %n %T@ %s %l\n' | sort`
	entries := 0
	for _, p := range paths {
		dir := l.world.StoreDir.Join(p)
		if info, err := os.Stat(l.original(dir)); err != nil || !info.IsDir() {
			continue // find has no name for it
		}
		want, err := exec.CommandContext(t.Context(), "sh", "-c", list, "sh", l.original(dir)).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, want)
		}
		got := do(t, h, "sh", "-c", list, "sh", dir)
		entries += strings.Count(string(want), "\n")
		if got.code != 0 || got.out != string(want) {
			t.Errorf("%s in the mount is not what Nix has:\n%s\nwant\n%s", p, tail([]byte(got.out)), tail(want))
		}
	}
	if entries < 10 {
		t.Errorf("only %d entries were compared", entries)
	}
}

// TestListings: ls of the store shows what is here, or everything valid on
// request; floxctl store list gives both; and without the storehouse what is here
// is shown at once.
func TestListings(t *testing.T) {
	l := open(t)
	lh, vh := l.neighbours(t, "list")
	here, valid := l.agent(t, lh), l.agent(t, vh, "--list", "valid")
	await(t, here, "follows the storehouse", connected)
	await(t, valid, "follows the storehouse", connected)
	used := baseNames(l.closure(l.world.Ripgrep.Path)...)
	for _, h := range []*netns.Host{lh, vh} {
		l.runs(t, h)
	}
	l.mountedAsNix(t, lh, l.closure(l.world.Ripgrep.Path)...)
	if got := l.storeNames(t, lh); !slices.Equal(got, used) {
		t.Errorf("ls shows %d names, want the %d used", len(got), len(used))
	}
	all := baseNames(slices.Concat(l.closure(l.world.Ripgrep.Path), l.closure(l.world.Unused.Path))...)
	if got := l.storeNames(t, vh); !contains(got, all) {
		t.Errorf("ls shows %d names, want at least the %d valid: %v", len(got), len(all), got)
	}
	listed := func(a *hosts.Agent, args ...string) []string {
		r := l.ctl(t, a, append([]string{"store", "list"}, args...)...)
		r.want(t, 0)
		return strings.Fields(strings.ReplaceAll(r.out, string(l.world.StoreDir)+"/", ""))
	}
	if got := listed(here); !slices.Equal(got, used) {
		t.Errorf("store list: %v, want %v", got, used)
	}
	if got := listed(here, "--valid"); !slices.IsSorted(got) || !contains(got, all) {
		t.Errorf("store list --valid: %v, want at least %v", got, all)
	}
	// Everything listed can be used: of some of it nothing was known here.
	do(t, vh, "ls", "-R", l.world.StoreDir.Join(l.world.Unused.Path)).want(t, 0)

	if err := vh.BlackHole(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := newToucher(t, vh, false)
	o := p.do("readdir", string(l.world.StoreDir), time.Minute)
	if o.Errno != "" || o.Count < len(used) || o.Took > 5*time.Second {
		t.Errorf("listing in a black hole: %q, %d names after %s", o.Errno, o.Count, o.Took)
	}
	await(t, valid, "the storehouse is found to be away", func(s *hosts.Status) bool { return !s.Storehouse.Connected })
	if got := l.storeNames(t, vh); !contains(got, used) {
		t.Errorf("without the storehouse: %v, want at least %v", got, used)
	}
	l.ctl(t, valid, "store", "list", "--valid").want(t, 4, "not connected", "without --valid")
	if err := vh.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, valid, "follows the storehouse again", connected)
	eventually(t, "everything valid is listed again", func() bool { return contains(l.storeNames(t, vh), all) })
}

// contains reports whether all of some are among names.
func contains(names, some []string) bool {
	for _, s := range some {
		if !slices.Contains(names, s) {
			return false
		}
	}
	return true
}

// TestHungLookup: names nobody can answer hold up neither other names that were
// never looked up here, nor a listing, nor what is cached: all of that is over
// while they hang on, and they end when they are killed.
func TestHungLookup(t *testing.T) {
	const timeout = time.Hour // whatever waits for it to pass does not end in this test
	l := open(t)
	ha, hb := l.neighbours(t, "hung")
	a, b := l.agent(t, ha, "--lookup-timeout", timeout.String()), l.agent(t, hb)
	await(t, a, "follows the storehouse", connected)
	await(t, b, "follows the storehouse", connected)
	l.runs(t, ha)
	l.same(t, ha, l.world.Ripgrep.Exe)
	known := l.closure(l.world.Ripgrep.Path)
	var fresh []flox.StorePath // what only the neighbour knows
	for _, p := range l.closure(l.world.Unused.Path) {
		if !slices.Contains(known, p) {
			fresh = append(fresh, p)
			do(t, hb, "ls", "-R", l.world.StoreDir.Join(p)).want(t, 0)
		}
	}
	if len(fresh) < 2 {
		t.Fatalf("only %d paths to look up", len(fresh))
	}
	await(t, a, "the neighbours know each other", func(s *hosts.Status) bool { return s.Peers >= 2 })
	// The storehouse is away for this host, without anything being refused.
	if err := l.net.Partition(t.Context(), ha, l.house.Host); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.net.Heal(context.WithoutCancel(t.Context()), ha, l.house.Host); err != nil {
			t.Error(err)
		}
	})
	store := string(l.world.StoreDir)
	stuck := []*toucher{newToucher(t, ha, true), newToucher(t, ha, false)}
	for i, p := range stuck {
		p.begin("stat", fmt.Sprintf("%s/%032d-nobody", store, 900+i))
	}
	await(t, a, "both look-ups wait", func(s *hosts.Status) bool { return s.Waiting >= len(stuck) })
	p := newToucher(t, ha, true)
	for i, path := range fresh {
		if o := p.do("stat", store+"/"+string(path), time.Minute); o.Errno != "" {
			t.Errorf("look-up %d of %s: %s after %s", i, path, o.Errno, o.Took)
		}
		if o := p.do("readdir", store+"/"+string(path), time.Minute); o.Errno != "" && o.Errno != "ENOTDIR" {
			t.Errorf("listing of %s: %s after %s", path, o.Errno, o.Took)
		}
	}
	if o := p.do("readdir", store, time.Minute); o.Errno != "" || o.Count < len(known)+len(fresh) {
		t.Errorf("listing of the store: %q, %d names", o.Errno, o.Count)
	}
	if o := p.do("read", l.world.Ripgrep.Exe, time.Minute); o.Errno != "" {
		t.Errorf("a cached file: %s", o.Errno)
	}
	if n := status(t, a).Waiting; n < len(stuck) {
		t.Errorf("%d wait, want the %d look-ups nobody can answer", n, len(stuck))
	}
	for i, s := range stuck { // kill complains of one that does not hang any more
		t.Logf("look-up %d nobody can answer: gone %s after it was killed", i, s.kill(time.Minute))
	}
}
