package integration

import (
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/fault"
	"github.com/floxctl/flox/integration/hosts"
)

// forget makes a stopped storehouse another one under the same name, address
// and machine key: it keeps what its members know it by on the network, and
// nothing that it signs with.
func forget(t *testing.T, house *hosts.Storehouse) {
	t.Helper()
	entries, err := os.ReadDir(house.State())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "keys" {
			if err := os.RemoveAll(filepath.Join(house.State(), e.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, key := range []string{"nix.key", "manifest.key"} {
		if err := os.Remove(filepath.Join(house.State(), "keys", key)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestImpostor: who has taken over a storehouse's address and machine key, but
// not its signing keys, gets nothing believed.
func TestImpostor(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "impostor"), l.world.Ripgrep.Path)
	a := l.agentOf(t, l.host(t, "victim"), house, "--lookup-timeout", "2s")
	l.runs(t, a.Host)
	invite, err := os.ReadFile(house.Invite())
	if err != nil {
		t.Fatal(err)
	}

	if err := house.Stop(); err != nil {
		t.Fatal(err)
	}
	forget(t, house)
	if err := house.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(house.Invite()); err != nil || string(again) == string(invite) {
		t.Fatalf("the impostor has the invite of the real one, so this shows nothing: %v", err)
	}
	if err := l.copyTo(t.Context(), house, l.world.Unused.Path); err != nil {
		t.Fatal(err)
	}

	refused := func(s *hosts.Status) bool {
		return !s.Storehouse.Connected && strings.Contains(strings.Join(s.Problems, "\n"), "another storehouse, or somebody in between")
	}
	await(t, a, "the agent refuses the trust list", refused)
	do(t, a.Host, "cat", l.world.Unused.Exe).want(t, 1, "Input/output error")
	do(t, a.Host, l.programs.Floxctl, "store", "info", l.world.StoreDir.Join(l.world.Unused.Path)).want(t, 5, "none of its", "manifest signatures")
	l.runs(t, a.Host) // what was trusted stays

	// Nor after a new start.
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, a, "the agent refuses the trust list again", refused)
	do(t, a.Host, "cat", l.world.Unused.Exe).want(t, 1, "Input/output error")
}

// TestRottenStorehouse: where the storehouse's own disk has gone bad, readers
// get the right bytes or an error, never wrong ones.
func TestRottenStorehouse(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "rotten"), l.world.Unused.Path)
	flipped := 0
	err := filepath.WalkDir(house.State(), func(path string, d iofs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".pack") {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		for at := int64(100_000); at < info.Size(); at += 2_000_000 {
			if err := fault.FlipBit(path, at*8+3); err != nil {
				return err
			}
			flipped++
		}
		return nil
	})
	if err != nil || flipped == 0 {
		t.Fatalf("%d bits flipped: %v", flipped, err)
	}
	a := l.agentOf(t, l.host(t, "reader"), house, "--read-timeout", "1s")
	r := do(t, a.Host, "sha256sum", append([]string{"--"}, l.files(t, l.closure(l.world.Unused.Path)...)...)...)
	r.want(t, 1, "Input/output error") // else this shows nothing
	l.known(t, []byte(r.out))
	for line := range strings.Lines(r.out) {
		if strings.HasPrefix(line, "sha256sum: ") && !strings.HasSuffix(line, ": Input/output error\n") {
			t.Errorf("want right bytes or an input/output error, got %s", line)
		}
	}
}
