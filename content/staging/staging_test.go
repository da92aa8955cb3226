package staging

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		crashChild(dir)
	}
	goleak.VerifyTestMain(m)
}

const storeDir = flox.StoreDir("/my/store")

func open(t testing.TB, dir string, change func(*Config)) *Store {
	t.Helper()
	cfg := Config{Dir: dir, StoreDir: storeDir, Reserve: 1}
	if change != nil {
		change(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// random gives n bytes that depend on seed only.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// treeNar is a directory with one file of the content and a link to it.
func treeNar(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	_, err := b.Write(nil)
	for _, e := range []nix.NarEntry{
		{Kind: flox.Directory}, {Path: "file", Kind: flox.Regular, Executable: true, Size: uint64(len(data))}, {Path: "link", Kind: flox.Symlink, Target: "file"},
	} {
		err = errors.Join(err, w.Entry(e))
		if e.Kind == flox.Regular {
			_, werr := w.Write(data)
			err = errors.Join(err, werr)
		}
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func fileNar(t testing.TB, data []byte) []byte {
	t.Helper()
	r, err := nix.FileNar(uint64(len(data)), bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// narOf reads a staged path back.
func narOf(t testing.TB, s *Store, p *Path) []byte {
	t.Helper()
	m, err := content.NewPageCache(0).Open(t.Context(), p.Info.Manifest, s)
	if err != nil {
		t.Fatal(p.Info.Path, err)
	}
	var b bytes.Buffer
	if err := m.WriteNar(t.Context(), &b, s, 0, -1); err != nil {
		t.Fatal(p.Info.Path, err)
	}
	return b.Bytes()
}

// whole says whether all of a path is there.
func whole(t testing.TB, s *Store, p *Path) {
	t.Helper()
	if nar := narOf(t, s, p); sha256.Sum256(nar) != p.Info.NarHash || uint64(len(nar)) != p.Info.NarSize {
		t.Errorf("%s: its NAR is another", p.Info.Path)
	}
}

func list(t testing.TB, s *Store, after string) (names []string) {
	t.Helper()
	if err := s.List(t.Context(), after, func(p *Path) bool {
		names = append(names, p.Info.Path.Name())
		return true
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// drvText is a derivation with the right output path.
func drvText(t testing.TB, name string, inputs map[flox.StorePath][]string, resolve func(flox.StorePath) (nix.DrvHash, error)) (*nix.Derivation, []byte) {
	t.Helper()
	d := &nix.Derivation{
		Name: name, Outputs: map[string]nix.DrvOutput{"out": {Kind: nix.OutputDeferred}}, Inputs: inputs,
		Platform: "x", Builder: "/b", Env: map[string]string{"out": "", "pad": strings.Repeat("environment ", 100)},
	}
	if err := d.FillOutputs(storeDir, resolve); err != nil {
		t.Fatal(err)
	}
	text, err := d.Marshal(storeDir)
	if err != nil {
		t.Fatal(err)
	}
	return d, text
}

func TestAddedPathsAreThereAndStay(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, nil)
	text, big := random(1, 3000), random(2, 3<<20)
	tree, bigTree := treeNar(t, text), treeNar(t, big)
	var added []*Path
	want := make(map[flox.StorePath][]byte)
	add := func(p *Path, err error) func(flox.StorePath, error) func([]byte) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return func(path flox.StorePath, err error) func([]byte) {
			t.Helper()
			if p.Info.Path != path || err != nil {
				t.Errorf("it is called %s, want %s, %v", p.Info.Path, path, err)
			}
			return func(nar []byte) { want[p.Info.Path], added = nar, append(added, p) }
		}
	}
	ctx := t.Context()
	sum := func(algo nix.HashAlgo, b []byte) nix.Hash {
		h := algo.New()
		h.Write(b)
		return nix.Hash{Algo: algo, Sum: h.Sum(nil)}
	}
	add(s.AddText(ctx, "text", text, nil))(nix.TextPath(storeDir, "text", sha256.Sum256(text), nil))(fileNar(t, text))
	refs := []flox.StorePath{added[0].Info.Path}
	add(s.AddText(ctx, "text2", big, refs))(nix.TextPath(storeDir, "text2", sha256.Sum256(big), refs))(fileNar(t, big))
	for _, algo := range []nix.HashAlgo{nix.MD5, nix.SHA1, nix.SHA256, nix.SHA512} {
		for i, b := range [][]byte{text, big} {
			name := fmt.Sprint("flat", algo, i)
			add(s.AddAddressed(ctx, name, nix.CAFlat, algo, nil, bytes.NewReader(b)))(nix.FixedOutputPath(storeDir, name, false, sum(algo, b), nil, false))(fileNar(t, b))
		}
		for i, b := range [][]byte{tree, bigTree} {
			name := fmt.Sprint("tree", algo, i)
			add(s.AddAddressed(ctx, name, nix.CANar, algo, nil, bytes.NewReader(b)))(nix.FixedOutputPath(storeDir, name, true, sum(algo, b), nil, false))(b)
		}
	}
	add(s.AddAddressed(ctx, "text3", nix.CAText, nix.SHA256, refs, bytes.NewReader(text)))(nix.TextPath(storeDir, "text3", sha256.Sum256(text), refs))(fileNar(t, text))
	plain := &flox.PathInfo{Path: "11111111111111111111111111111111-plain", References: refs, NarHash: sha256.Sum256(bigTree), NarSize: uint64(len(bigTree)), Deriver: "22222222222222222222222222222222-plain.drv", Signatures: []string{"k:x"}}
	// Inside a longer stream.
	stream := bytes.NewReader(append(bytes.Clone(bigTree), "behind"...))
	add(s.Add(ctx, plain, stream, AddOptions{Embedded: true}))(plain.Path, nil)(bigTree)
	if rest, _ := io.ReadAll(stream); string(rest) != "behind" {
		t.Errorf("left of the stream is %q", rest)
	}
	check := func(s *Store) {
		t.Helper()
		for _, p := range added {
			got, err := s.Path(p.Info.Path)
			if d := cmp.Diff(p, got, cmp.AllowUnexported(Path{})); d != "" || err != nil {
				t.Errorf("%v %s", err, d)
				continue
			}
			if !bytes.Equal(narOf(t, s, got), want[p.Info.Path]) {
				t.Errorf("%s: its NAR is another", p.Info.Path)
			}
			if by, err := s.ByManifest(p.Info.Manifest); err != nil || by.Info.Manifest != p.Info.Manifest {
				t.Errorf("%s by its manifest: %v", p.Info.Path, err)
			}
		}
		if st := s.Stat(); st.Paths != uint64(len(added)) || len(list(t, s, "")) != len(added) || st.Bytes == 0 {
			t.Errorf("%d were added, %+v", len(added), st)
		}
	}
	check(s)
	before := s.Stat()
	// What is there is not added again, whatever comes.
	again, err := s.Add(ctx, plain, bytes.NewReader(tree), AddOptions{})
	if err != nil || again.Info.NarHash != plain.NarHash || s.Stat() != before {
		t.Errorf("added again: %+v, %v", again, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, nil)
	check(s)
	if d := cmp.Diff(before, s.Stat()); d != "" {
		t.Error(d)
	}
}

func TestAddRefuses(t *testing.T) {
	ctx, text := t.Context(), []byte("text")
	const elsewhere, dep = flox.StorePath("00000000000000000000000000000000-elsewhere"), flox.StorePath("00000000000000000000000000000001-dep.drv")
	away := errors.New("away")
	s := open(t, t.TempDir(), func(c *Config) {
		c.Known = func(_ context.Context, p flox.StorePath) (*flox.PathInfo, error) {
			switch p.HashPart() {
			case elsewhere.HashPart():
				return &flox.PathInfo{Path: elsewhere}, nil
			case "33333333333333333333333333333333":
				return nil, away
			}
			return nil, flox.ErrNotFound
		}
	})
	nar, other := fileNar(t, text), fileNar(t, []byte("other"))
	good, err := s.addressed("x", nix.ContentAddress{Method: nix.CAText, Hash: nix.SHA256Hash(sha256.Sum256(text))}, []flox.StorePath{elsewhere})
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(what string, want error, nar []byte, change func(*flox.PathInfo)) {
		t.Helper()
		info := *good
		change(&info)
		if p, err := s.Add(ctx, &info, bytes.NewReader(nar), AddOptions{}); !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", what, p, err)
		}
	}
	same := func(*flox.PathInfo) {}
	bad := flox.ErrBadInput
	refuse("another text", bad, other, same)
	refuse("bytes behind the NAR", bad, append(bytes.Clone(nar), 0), same)
	refuse("half a NAR", bad, nar[:len(nar)/2], same)
	refuse("another path", bad, nar, func(i *flox.PathInfo) { i.Path = "11111111111111111111111111111111-x" })
	refuse("another name", bad, nar, func(i *flox.PathInfo) { i.Path += "y" })
	refuse("fewer references", bad, nar, func(i *flox.PathInfo) { i.References = nil })
	refuse("a size that is another", bad, nar, func(i *flox.PathInfo) { i.NarHash, i.NarSize = sha256.Sum256(nar), 1 })
	refuse("a hash that is another", bad, nar, func(i *flox.PathInfo) { i.NarHash, i.NarSize = sha256.Sum256(other), uint64(len(nar)) })
	refuse("an address that is none", bad, nar, func(i *flox.PathInfo) { i.CA = "text:sha256:x" })
	refuse("a name that is none", bad, nar, func(i *flox.PathInfo) { i.CA, i.Path = "", "x" })
	refuse("a reference nobody has", bad, nar, func(i *flox.PathInfo) { i.CA, i.References = "", []flox.StorePath{dep} })
	refuse("a reference under another name", bad, nar, func(i *flox.PathInfo) { i.CA, i.References = "", []flox.StorePath{elsewhere + "2"} })
	refuse("references out of order", bad, nar, func(i *flox.PathInfo) { i.CA, i.References = "", []flox.StorePath{elsewhere, dep, elsewhere} })
	refuse("a reference nobody can say", away, nar, func(i *flox.PathInfo) {
		i.CA, i.References = "", []flox.StorePath{"33333333333333333333333333333333-x"}
	})
	if names := list(t, s, ""); len(names) != 0 || s.Stat().Paths != 0 {
		t.Fatal("they are there: ", names)
	}
	if _, err := s.Add(ctx, good, bytes.NewReader(nar), AddOptions{}); err != nil {
		t.Error("the good one: ", err)
	}
	refuse("the same hash part", bad, nar, func(i *flox.PathInfo) { i.CA, i.Path = "", i.Path+"y" })
	for _, name := range []string{"", ".", "a/b", strings.Repeat("n", 212)} {
		if _, err := s.AddAddressed(ctx, name, nix.CANar, nix.SHA256, nil, eager{t}); !errors.Is(err, bad) {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

// eager fails the test when it is read.
type eager struct{ t *testing.T }

func (e eager) Read([]byte) (int, error) {
	e.t.Error("it was read")
	return 0, io.EOF
}

// A derivation that could put its output where another's belongs is not taken.
func TestAddChecksDerivations(t *testing.T) {
	const remote = "remote"
	d, remoteText := drvText(t, remote, nil, nil)
	remotePath, _, err := d.DrvPath(storeDir)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir(), func(c *Config) {
		c.Known = func(_ context.Context, p flox.StorePath) (*flox.PathInfo, error) { return &flox.PathInfo{Path: p}, nil }
		c.Derivation = func(_ context.Context, p flox.StorePath) ([]byte, error) {
			if p != remotePath {
				return nil, flox.ErrNotFound
			}
			return remoteText, nil
		}
	})
	resolve := s.Hasher().Resolver(t.Context())
	a, aText := drvText(t, "a", map[flox.StorePath][]string{remotePath: {"out"}}, resolve)
	pa, err := s.AddText(t.Context(), "a.drv", aText, a.References())
	if err != nil {
		t.Fatal(err)
	}
	b, bText := drvText(t, "b", map[flox.StorePath][]string{pa.Info.Path: {"out"}}, resolve)
	pb, err := s.AddText(t.Context(), "b.drv", bText, b.References())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Derivation(t.Context(), pb.Info.Path); err != nil || got.Outputs["out"].Path != b.Outputs["out"].Path {
		t.Errorf("read again it is %+v, %v", got, err)
	}
	forged := bytes.Replace(bText, []byte("environment"), []byte("Environment"), 1)
	for what, text := range map[string][]byte{"forged": forged, "no derivation": []byte("Derive(x)"), "another name": aText} {
		if p, err := s.AddText(t.Context(), "b.drv", text, b.References()); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, %v", what, p, err)
		}
	}
}

func TestOneAddOfManyAtOnce(t *testing.T) {
	s := open(t, t.TempDir(), nil)
	text := random(3, 2000)
	var work sync.WaitGroup
	for i := range 32 {
		work.Go(func() {
			if _, err := s.AddText(t.Context(), "same", text, nil); err != nil {
				t.Error(err)
			}
			if _, err := s.AddText(t.Context(), fmt.Sprint("other", i), text, nil); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	if st := s.Stat(); st.Paths != 33 || len(list(t, s, "")) != 33 {
		t.Errorf("%+v", st)
	}
}

func TestListGoesOnBehind(t *testing.T) {
	s := open(t, t.TempDir(), nil)
	for i := range 20 {
		if _, err := s.AddText(t.Context(), fmt.Sprint("n", i), []byte("x"), nil); err != nil {
			t.Fatal(err)
		}
	}
	var all, parts []string
	collect := func(to *[]string, most int) func(*Path) bool {
		n := 0
		return func(p *Path) bool {
			*to = append(*to, string(p.Info.Path))
			n++
			return n < most
		}
	}
	err := s.List(t.Context(), "", collect(&all, 100))
	for after := ""; err == nil && len(parts) < len(all); after = parts[len(parts)-1] {
		err = s.List(t.Context(), after, collect(&parts, 3))
	}
	if err != nil || !slices.IsSorted(all) || len(all) != 20 || !slices.Equal(all, parts) {
		t.Errorf("%v, %d and %d", err, len(all), len(parts))
	}
}

func TestCollectKeepsWhatIsReferredTo(t *testing.T) {
	s := open(t, t.TempDir(), nil)
	text := func(name string, data []byte, refs ...flox.StorePath) flox.StorePath {
		t.Helper()
		p, err := s.AddText(t.Context(), name, data, refs)
		if err != nil {
			t.Fatal(err)
		}
		return p.Info.Path
	}
	big := random(5, 2<<20)
	a := text("a", []byte("a"))
	b := text("b", big, a)
	c := text("c", []byte("c"), b)
	text("twin", []byte("c")) // the same manifest as c
	text("empty", nil)        // nothing of its own
	text("lost", random(6, 2<<20))
	up := text("up", []byte("up"))
	text("upuser", []byte("upuser"), up)
	if err := s.Uploaded(up, "44444444444444444444444444444444-nobody"); err != nil {
		t.Fatal(err)
	}
	if st := s.Stat(); st.Uploaded != 1 {
		t.Errorf("%+v", st)
	}
	if err := s.Remove(t.Context(), b); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("b, which c refers to, was removed: %v", err)
	}
	disk := s.packs.Stat().Blocks
	n, err := s.Collect(t.Context(), func(p *Path) bool { return p.Info.Path == c || p.Info.Path.Name() == "upuser" })
	if d := cmp.Diff([]string{"a", "b", "c", "upuser"}, list(t, s, "")); d != "" || n != 4 || err != nil {
		t.Errorf("%d went, %v %s", n, err, d)
	}
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := s.packs.Stat().Blocks; now >= disk || now == 0 {
		t.Errorf("%d blocks are in packs, %d were before", now, disk)
	}
	for _, p := range []flox.StorePath{a, b, c} {
		got, err := s.Path(p)
		if err != nil {
			t.Fatal(err)
		}
		whole(t, s, got)
	}
	if err := s.Remove(t.Context(), c); err != nil {
		t.Error(err)
	}
	n, err = s.Collect(t.Context(), func(*Path) bool { return false })
	if err := errors.Join(err, s.Sweep(t.Context())); n != 3 || err != nil {
		t.Errorf("%d went, %v", n, err)
	}
	if st := s.Stat(); st.Paths != 0 || st.Uploaded != 0 || st.NarBytes != 0 || s.packs.Stat().Blocks != 0 {
		t.Errorf("%+v", st)
	}
	it, err := s.db.NewIter(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for it.First(); it.Valid(); it.Next() {
		t.Errorf("left in the index: %q", it.Key())
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBudgetHolds(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, func(c *Config) { c.Budget = 4 << 20 })
	if _, err := s.AddText(t.Context(), "fits", random(1, 1<<20), nil); err != nil {
		t.Fatal(err)
	}
	before := s.Stat()
	if _, err := s.AddAddressed(t.Context(), "large", nix.CANar, nix.SHA256, nil, bytes.NewReader(treeNar(t, random(2, 8<<20)))); !errors.Is(err, flox.ErrFull) {
		t.Errorf("more than the budget: %v", err)
	}
	if _, err := s.AddAddressed(t.Context(), "large", nix.CAFlat, nix.SHA256, nil, bytes.NewReader(random(2, 8<<20))); !errors.Is(err, flox.ErrFull) {
		t.Errorf("more than the budget, spooled: %v", err)
	}
	// Run gives the room back.
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if st := s.Stat(); st.Paths != 1 || s.packs.Stat().PlainBytes > before.Bytes+1<<20 {
		t.Errorf("%+v, before %+v", st, before)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "spool-*")); len(left) > 0 {
		t.Error(left)
	}
	if s.Stat().Paths != 1 {
		t.Error(list(t, s, ""))
	}
}

func BenchmarkAddDerivations(b *testing.B) {
	s := open(b, b.TempDir(), nil)
	var last *Path
	for i := 0; b.Loop(); i++ {
		inputs := map[flox.StorePath][]string{}
		if last != nil {
			inputs[last.Info.Path] = []string{"out"}
		}
		name := fmt.Sprint("d", i)
		d, text := drvText(b, name, inputs, s.Hasher().Resolver(b.Context()))
		p, err := s.AddText(b.Context(), name+".drv", text, d.References())
		if err != nil {
			b.Fatal(err)
		}
		last = p
	}
}
