package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

// What clients tell of content-addressed outputs counts on their machine, of an ordinary
// user for that user alone, and nowhere else; what a key of the storehouse vouches for it
// is told.
func TestRealisationsStayOnTheMachine(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.builds.h = h
	a := runNixAgent(t, h)
	ctx := within(t, time.Minute)
	root := nixDialAs(t, a, worker.Peer{Trust: worker.Trusted})
	alice, bob := nixDialAs(t, a, worker.Peer{Trust: worker.NotTrusted, UID: 1001}), nixDialAs(t, a, worker.Peer{Trust: worker.NotTrusted, UID: 1002})
	text := func(s string) flox.StorePath {
		info, err := root.AddContent(ctx, worker.Content{Name: s, Method: nix.CAText, Algo: nix.SHA256}, strings.NewReader(s))
		if err != nil {
			t.Fatal(err)
		}
		return info.Path
	}
	good, other := text("good"), text("other")
	drv := &nix.Derivation{
		Name: "made", Outputs: map[string]nix.DrvOutput{"out": {Kind: nix.OutputFloating, Recursive: true, Algo: nix.SHA256}},
		Platform: "x86_64-linux", Builder: "/bin/sh", Env: map[string]string{"out": nix.Placeholder("out")},
	}
	path, aterm, err := drv.DrvPath(testStore)
	if err == nil {
		_, err = a.staged.AddText(ctx, path.Name(), aterm, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	id, err := a.staged.Hasher().Realise(ctx, drv, "out")
	if err != nil {
		t.Fatal(err)
	}
	says := func(c *worker.Client) (p flox.StorePath) {
		t.Helper()
		r, err := c.Realisation(ctx, id)
		if err != nil {
			if !errors.Is(err, flox.ErrNotFound) {
				t.Fatal(err)
			}
			return ""
		}
		return r.Path
	}
	add := func(c *worker.Client, p flox.StorePath, want string) {
		t.Helper()
		err := c.AddRealisation(ctx, &nix.Realisation{ID: id, Path: p})
		if err == nil != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("it is told of %s: %v, want %q", p, err, want)
		}
	}
	add(bob, flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-none"), "is not valid")
	add(bob, other, "")
	if says(bob) != other || says(alice) != "" || says(root) != "" {
		t.Errorf("told by bob, bob hears %q, alice %q, root %q", says(bob), says(alice), says(root))
	}
	add(bob, good, "we already have another one locally")
	add(root, good, "")
	if says(alice) != good || says(bob) != other {
		t.Errorf("told by root, alice hears %q, bob %q", says(alice), says(bob))
	}
	target := []worker.DerivedPath{{Path: path, All: true}}
	if m, err := alice.Missing(ctx, target); err != nil || len(m.Build)+len(m.Unknown) > 0 {
		t.Errorf("missing %+v, %v", m, err)
	}
	results, err := alice.BuildResults(ctx, target, worker.BuildNormal)
	if err != nil || results[0].Status != worker.AlreadyValid || len(results[0].Outputs) != 1 || results[0].Outputs[0].Path != good {
		t.Errorf("built %+v, %v", results, err)
	}
	if got := says(nixDial(t, runNixAgent(t, h), worker.Trusted)); got != "" || h.builds.told > 0 {
		t.Errorf("another machine hears %q, the storehouse %d times", got, h.builds.told)
	}
	signed := nix.Realisation{ID: nix.RealisationID{Output: "out"}, Path: good}
	signed.Signatures = []string{h.key.Sign([]byte(signed.Fingerprint()))}
	if err := bob.AddRealisation(ctx, &signed); err != nil || h.builds.told != 1 {
		t.Errorf("signed by the storehouse: %v, told %d times", err, h.builds.told)
	}
	// They go with their paths.
	leaves(t, a, alice) // who had it built
	leaves(t, a, root)  // who added it
	n := newNixClient(t, a)
	n.run("nix-store", "--delete", testStore.Join(good))
	if got := says(nixDialAs(t, a, worker.Peer{Trust: worker.NotTrusted, UID: 1001})); got != "" {
		t.Errorf("alice hears %q, which is gone", got)
	}
	if got := says(bob); got != other {
		t.Errorf("bob hears %q, want what he told", got)
	}
	n.run("nix-collect-garbage")
	if a.staged.Realises() {
		t.Error("realisations of nothing are kept")
	}
}
