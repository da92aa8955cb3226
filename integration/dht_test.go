package integration

import (
	"testing"

	"github.com/floxctl/flox/integration/hosts"
)

// TestSwarmWithoutAStorehouse: the storehouse is gone for good. A machine that is
// restarted then, on a subnet multicast does not cross, finds the others again,
// for it remembers where they were; what they hold and it never had can be read,
// facts included.
func TestSwarmWithoutAStorehouse(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "gone"), l.world.Ripgrep.Path, l.world.Unused.Path)
	a := l.agentOf(t, l.host(t, "holder"), house)
	b := l.agentOf(t, l.host(t, "restarted"), house)
	await(t, a, "follows the storehouse", connected)
	await(t, b, "sees storehouse and A", func(s *hosts.Status) bool { return s.Peers >= 2 })
	path := l.world.StoreDir.Join(l.world.Unused.Path)
	do(t, a.Host, l.programs.Floxctl, "download", path).want(t, 0, "complete")

	house.Kill()
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, b, "found A again", func(s *hosts.Status) bool { return s.Peers >= 1 && !s.Storehouse.Connected })
	before := status(t, b)
	for _, file := range l.files(t, l.world.Unused.Path) {
		l.same(t, b.Host, file)
	}
	got := status(t, b).Traffic.Sub(before.Traffic)
	if got.Storehouse != 0 || got.Peers() == 0 {
		t.Errorf("from the storehouse %d bytes, from peers %d", got.Storehouse, got.Peers())
	}
	x := l.explained(t, b, path)
	if steps := x.kinds(); steps["facts-late"] == 0 || steps["facts"] == 0 || steps["gave"] == 0 {
		t.Errorf("explain does not tell that other machines were asked: %+v", x)
	}
	for _, s := range x.Sources {
		if s.Tier == "storehouse" && s.Bytes > 0 {
			t.Errorf("explain tells of bytes from the storehouse: %+v", s)
		}
	}
}
