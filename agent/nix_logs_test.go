package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

const (
	aDrv = flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-made.drv")
	bDrv = flox.StorePath("1123456789abcdfghijklmnpqrsvwxyz-other.drv")
)

// BuildLog tells which path is the log of aDrv, and has none of any other derivation.
func (b *builder) BuildLog(_ context.Context, req *connect.Request[floxv1.BuildLogRequest], stream *connect.ServerStream[floxv1.BuildLogPiece]) error {
	if req.Msg.GetDrv() != string(aDrv) || b.log == "" {
		return connect.NewError(connect.CodeNotFound, errors.New("no log"))
	}
	for range 2 { // a log is in pieces, of which the first is enough
		if err := stream.Send(&floxv1.BuildLogPiece{Data: []byte("a line\n"), Record: &floxv1.BuildRecord{Drv: string(aDrv), Log: string(b.log)}}); err != nil {
			return err
		}
	}
	return nil
}

// The log of a build is found by derivation, on every machine; one that a client
// sends on its own. Without a storehouse, those of builds that were seen here are
// found on. A collection takes none.
func TestBuildLogsAreFoundByDerivation(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	log := h.make(t, "made.log", nil, testFile{name: "f", data: []byte("a line\n")})
	h.publish(log)
	h.set(func() { h.builds.log = log.Path })
	here, there := runNixAgent(t, h), runNixAgent(t, h)
	find := func(a *Agent, name string) (flox.CID, error) { return a.store.Log(within(t, time.Minute), name) }
	for _, a := range []*Agent{here, there} {
		if got, err := find(a, string(aDrv)); got != log.Manifest || err != nil {
			t.Errorf("log %s, %v, want %s", got, err, log.Manifest)
		}
		for _, name := range []string{string(bDrv), string(aDrv) + ".bz2", string(aDrv[:2]), "x.drv"} {
			if _, err := find(a, name); !errors.Is(err, flox.ErrNotFound) {
				t.Errorf("log of %q: %v", name, err)
			}
		}
	}
	seen := here.nix.logs.fetches(within(t, time.Minute), here.calls.builds(here.houses.first()))
	for _, drv := range []flox.StorePath{aDrv, bDrv} {
		seen.stopped(&floxv1.BuildStop{Drv: string(drv), Outcome: &floxv1.BuildOutcome{StartUnix: 1}})
	}
	seen.wait()
	s := &nixSession{a: here, logs: here.nix.logs}
	if err := s.AddLog(t.Context(), bDrv, strings.NewReader("sent\n")); err != nil {
		t.Fatal(err)
	}
	newNixClient(t, here).run("nix-store", "--gc")
	if err := here.nix.logs.tidy(); err != nil {
		t.Error(err)
	}
	h.stop()
	sent, err := here.nix.logs.known(bDrv)
	if err != nil {
		t.Fatal(err)
	}
	if got := readWhole(t, here, sent, 0); string(got) != "sent\n" {
		t.Errorf("log that was sent: %q", got)
	}
	if _, err := find(here, string(bDrv)); err != nil {
		t.Errorf("log that was sent: %v", err)
	}
	if got, err := find(here, string(aDrv)); got != log.Manifest || err != nil {
		t.Errorf("without a storehouse: %s, %v", got, err)
	}
}

// Trusted clients add signatures, to paths of the storehouse and to staged ones.
func TestStockNixSigns(t *testing.T) {
	h := newHouse(t)
	there := h.make(t, "there", nil, testFile{name: "a", data: []byte("1")})
	h.publish(there)
	a := runNixAgent(t, h)
	n := newNixClient(t, a)
	if err := os.WriteFile(filepath.Join(n.tmp, "src"), []byte("source"), 0o644); err != nil {
		t.Fatal(err)
	}
	here := n.run("nix-store", "--add", filepath.Join(n.tmp, "src"))
	secret := n.run("nix", "key", "generate-secret", "--key-name", "mine-1")
	if err := os.WriteFile(filepath.Join(n.tmp, "key"), []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	paths := []string{testStore.Join(there.Path), here}
	for range 2 { // the second time there is nothing to add
		n.run(append([]string{"nix", "store", "sign", "-k", filepath.Join(n.tmp, "key")}, paths...)...)
	}
	for _, p := range paths {
		if got := n.run("nix", "path-info", "--sigs", p); strings.Count(got, "mine-1:") != 1 {
			t.Errorf("signatures %q", got)
		}
	}
	user := nixDial(t, a, worker.NotTrusted)
	if err := user.AddSignatures(within(t, time.Minute), there.Path, []string{"other:aaaa"}); err == nil || !strings.Contains(err.Error(), "you are not privileged to add signatures") {
		t.Errorf("a user signs: %v", err)
	}
	var sigs []string
	for i := range 65 {
		sigs = append(sigs, fmt.Sprintf("k%d:aaaa", i))
	}
	if err := nixDial(t, a, worker.Trusted).AddSignatures(within(t, time.Minute), there.Path, sigs); err == nil {
		t.Error("a path has as many signatures as anybody likes")
	}
}

// A derivation without its graph is built if its outputs prove themselves;
// otherwise the client reads what a stock daemon says.
func TestInputAddressedDerivationOfAnotherNix(t *testing.T) {
	h := newHouse(t)
	a := runNixAgent(t, h)
	drv := &nix.Derivation{
		Outputs:  map[string]nix.DrvOutput{"out": {Path: "0123456789abcdfghijklmnpqrsvwxyz-made"}},
		Platform: "x86_64-linux", Builder: "/bin/sh", Env: map[string]string{"name": "made"},
	}
	for _, trust := range []worker.Trust{worker.NotTrusted, worker.Trusted} {
		_, err := nixDial(t, a, trust).BuildDerivation(within(t, time.Minute), aDrv, drv, worker.BuildNormal)
		if err == nil || !strings.Contains(err.Error(), "you are not privileged to build input-addressed derivations") {
			t.Errorf("built for a client trusted %v: %v", trust, err)
		}
	}
}
