package integration

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
)

// TestOffline: a machine that starts while everybody else is away runs what it
// has, says by the deadline what it lacks, and catches up by itself.
func TestOffline(t *testing.T) {
	l := open(t)
	h := l.host(t, "offline")
	a := l.agent(t, h, "--lookup-timeout", "1s", "--read-timeout", "2s")
	await(t, a, "follows the storehouse", connected)
	l.runs(t, h)
	// Its name and its manifest are here, its bytes are not.
	lacking, file := l.large(t)
	do(t, h, "ls", "-R", lacking).want(t, 0, filepath.Base(file))

	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := h.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.runs(t, h)
	began := time.Now()
	do(t, h, "cat", file).want(t, 1, "Input/output error")
	if w := time.Since(began); w < 2*time.Second {
		t.Errorf("an error after %s for bytes that may come within 2 s", w)
	}
	do(t, h, "cat", "/nix/store/00000000000000000000000000000000-nobody").want(t, 1, "Input/output error")
	if s := status(t, a); s.Storehouse.Connected || s.Storehouse.Error == "" || len(s.Problems) == 0 {
		t.Errorf("status says nothing of it: %+v", s)
	}
	do(t, h, l.programs.Floxctl, "status").want(t, 0, "not connected", "the storehouse is not connected", "what is here and what peers hold can be read")
	do(t, h, l.programs.Floxctl, "doctor").want(t, 1, "storehouse", "firewall")

	if err := h.Plug(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, a, "follows the storehouse again", func(s *hosts.Status) bool { return s.Storehouse.Connected && len(s.Problems) == 0 })
	l.same(t, h, file)
}
