package fleet

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/entry"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/storehouse"
)

// derivations adds a graph of n derivations to a machine, each of which needs the
// one of half its number, and gives their paths and how many bytes they have.
func derivations(t *testing.T, m *machine, n int, source flox.StorePath) (paths []flox.StorePath, size uint64) {
	t.Helper()
	const dir = flox.DefaultStoreDir
	staged := m.agent.Staged()
	resolve := staged.Hasher().Resolver(within(t))
	for i := range n {
		d := &nix.Derivation{
			Name: fmt.Sprint("d", i), Outputs: map[string]nix.DrvOutput{"out": {Kind: nix.OutputDeferred}}, Sources: []flox.StorePath{source},
			Platform: "x86_64-linux", Builder: "/bin/sh", Env: map[string]string{"out": "", "name": fmt.Sprint("d", i), "pad": strings.Repeat("some words ", 120)},
		}
		if i > 0 {
			d.Inputs = map[flox.StorePath][]string{paths[i/2]: {"out"}}
		}
		if err := d.FillOutputs(dir, resolve); err != nil {
			t.Fatal(err)
		}
		text, err := d.Marshal(dir)
		if err != nil {
			t.Fatal(err)
		}
		p, err := staged.AddText(within(t), d.Name+nix.DrvExtension, text, d.References())
		if err != nil {
			t.Fatal(err)
		}
		paths, size = append(paths, p.Info.Path), size+uint64(len(text))
	}
	return paths, size
}

// cat reads a store path that is a file on another machine.
func (m *machine) cat(path flox.StorePath) ([]byte, error) {
	stream, err := m.control.Cat(within(m.t), connect.NewRequest(&floxv1.CatRequest{Path: string(path)}))
	if err != nil {
		return nil, err
	}
	var out []byte
	for stream.Receive() {
		out = append(out, stream.Msg().GetData()...)
	}
	return out, errors.Join(stream.Err(), stream.Close())
}

// What is added on one machine is read on another once it was published, and not
// before; a graph of derivations costs no more on the line than its own bytes.
func TestStagedHereReadThere(t *testing.T) {
	s := startServer(t, storehouse.Config{StateDir: t.TempDir(), ServerName: "s1"})
	inv := s.invite(t, &floxv1.MakeInviteRequest{Role: entry.RoleAgent, Uses: 2})
	here, there := startAgent(t, join(t, inv, "here", "")), startAgent(t, join(t, inv, "there", ""))
	for _, m := range []*machine{here, there} {
		eventually(t, "it is connected", func() bool { return m.house().GetConnected() })
	}
	secret := bytes.Repeat([]byte("a private source\n"), 300)
	source := make([]byte, 2<<20)
	rand.NewChaCha8([32]byte{1}).Read(source) //nolint:errcheck // never fails
	private, err := here.agent.Staged().AddText(within(t), "private", secret, nil)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := here.agent.Staged().AddAddressed(within(t), "source", nix.CAFlat, nix.SHA512, nil, bytes.NewReader(source))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	drvs, size := derivations(t, here, 2000, tree.Info.Path)
	t.Logf("added %d derivations in %v", len(drvs), time.Since(began))
	last := drvs[len(drvs)-1]
	if _, err := there.cat(last); err == nil {
		t.Error("another machine reads what was not published")
	}
	began = time.Now()
	done, err := here.agent.PublishStaged(within(t), drvs...)
	t.Logf("published in %v: %+v, the derivations have %d bytes", time.Since(began), done, size)
	if err != nil || done.Paths != len(drvs)+1 {
		t.Fatalf("%+v, %v", done, err)
	}
	if most := (size + uint64(len(source))) * 11 / 10; done.Bytes > most {
		t.Errorf("%d bytes were sent, want at most %d", done.Bytes, most)
	}
	for _, p := range []flox.StorePath{last, drvs[0], tree.Info.Path} {
		want, err := here.cat(p)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := there.cat(p); err != nil || !bytes.Equal(got, want) || len(want) == 0 {
			t.Errorf("%s: there it is %d bytes, here %d, %v", p, len(got), len(want), err)
		}
	}
	if got, err := there.cat(private.Info.Path); err == nil {
		t.Errorf("another machine reads what was never published: %d bytes", len(got))
	}
}
