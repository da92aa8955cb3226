package storehouse

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
)

// importAll imports and gives the last progress, with all that failed.
func importAll(t *testing.T, s *Server, opts ImportOptions) *floxv1.ImportProgress {
	t.Helper()
	var last *floxv1.ImportProgress
	var failed []string
	err := s.Import(within(t), opts, func(p *floxv1.ImportProgress) {
		last = p
		failed = append(failed, p.GetFailed()...)
	})
	if err != nil {
		t.Fatal(err)
	}
	if !last.GetFinished() || uint64(len(failed)) != last.GetFailedPaths() || last.GetTotalPaths() != last.GetDonePaths()+last.GetFailedPaths() {
		t.Errorf("the last progress is %v, of %d failures", last, len(failed))
	}
	last.Failed = failed
	return last
}

// fakeCache is a binary cache in a directory.
type fakeCache struct {
	t   *testing.T
	dir string
	key nix.SecretKey
}

func newFakeCache(t *testing.T) *fakeCache {
	t.Helper()
	key, err := nix.GenerateKey("cache-1")
	if err != nil {
		t.Fatal(err)
	}
	return &fakeCache{t, t.TempDir(), key}
}

// add puts a path with a NAR into the cache; signed by its key unless unsigned.
func (f *fakeCache) add(p testPath, nar []byte, signed bool) {
	f.t.Helper()
	info := *p.info
	if signed {
		info.Signatures = []string{f.key.Sign([]byte(nix.Fingerprint(flox.DefaultStoreDir, &info)))}
	}
	file := &nix.NarInfo{Info: info, URL: "nar/" + info.Path.HashPart() + ".nar", Compression: "none"}
	err := errors.Join(
		os.MkdirAll(filepath.Join(f.dir, "nar"), 0o755),
		os.WriteFile(filepath.Join(f.dir, file.URL), nar, 0o644),
		os.WriteFile(filepath.Join(f.dir, info.Path.HashPart()+".narinfo"), file.Marshal(flox.DefaultStoreDir), 0o644))
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeCache) options() ImportOptions {
	return ImportOptions{From: f.dir, Keys: []string{f.key.Public().String()}, Jobs: 4}
}

// What can be had is imported, references first; what is damaged, missing or not
// signed is told of with what refers to it, and a later import brings the rest.
func TestImportGoesOnWithoutWhatFails(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	f := newFakeCache(t)
	base := makePath(t, "base", 50_000)
	top := makePath(t, "top", 50_000, base.info.Path)
	unsigned := makePath(t, "unsigned", 5000, base.info.Path)
	above := makePath(t, "above", 5000, unsigned.info.Path, base.info.Path)
	broken := makePath(t, "broken", 5000)
	missing := makePath(t, "missing", 5000)
	lost := makePath(t, "lost", 5000, missing.info.Path, broken.info.Path)
	for _, p := range []testPath{top, base, above, lost} {
		f.add(p, p.nar, true)
	}
	f.add(unsigned, unsigned.nar, false)
	wrong := bytes.Clone(broken.nar)
	wrong[len(wrong)/2] ^= 1
	f.add(broken, wrong, true)
	got := importAll(t, s, f.options())
	slices.Sort(got.Failed)
	if got.GetDonePaths() != 2 || got.GetFailedPaths() != 5 {
		t.Errorf("%v, want 2 done and 5 failed", got)
	}
	for _, name := range []string{string(unsigned.info.Path), string(above.info.Path), string(broken.info.Path), string(missing.info.Path), string(lost.info.Path)} {
		if !slices.ContainsFunc(got.GetFailed(), func(line string) bool { return strings.HasPrefix(line, name+": ") }) {
			t.Errorf("no word of %s in %q", name, got.GetFailed())
		}
	}
	for _, p := range []testPath{base, top} {
		checkWhole(t, s, p)
		info, err := s.Info(within(t), p.info.Path.HashPart())
		if err != nil || !slices.Contains(info.Signatures, f.key.Sign([]byte(nix.Fingerprint(flox.DefaultStoreDir, info)))) {
			t.Errorf("%s has lost the cache's signature: %v, %v", p.info.Path, info, err)
		}
	}
	f.add(unsigned, unsigned.nar, true)
	f.add(broken, broken.nar, true)
	f.add(missing, missing.nar, true)
	if got := importAll(t, s, f.options()); got.GetDonePaths() != 7 || got.GetFailedPaths() != 0 {
		t.Errorf("when all is right: %v", got)
	}
	checkWhole(t, s, lost)
}

// Over HTTP the closures of the paths named are fetched, each NAR once, also from a
// cache that fails now and then; what is valid is not asked for again.
func TestImportOverHTTP(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	f := newFakeCache(t)
	var before []flox.StorePath
	var all []testPath
	for i := range 12 {
		p := makePath(t, "web"+string(rune('a'+i)), 20_000, slices.Clone(before)...)
		f.add(p, p.nar, true)
		all, before = append(all, p), append(before, p.info.Path)
	}
	other := makePath(t, "other", 10)
	f.add(other, other.nar, true)
	var nars, asked atomic.Int32
	files := http.FileServer(http.Dir(f.dir))
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 5 {
			http.Error(w, "busy", http.StatusServiceUnavailable)
			return
		}
		if strings.HasPrefix(r.URL.Path, "/cache/nar/") {
			nars.Add(1)
		}
		http.StripPrefix("/cache", files).ServeHTTP(w, r)
	}))
	defer web.Close()
	opts := f.options()
	opts.From, opts.Paths = web.URL+"/cache", []flox.StorePath{all[len(all)-1].info.Path}
	if got := importAll(t, s, opts); got.GetDonePaths() != uint64(len(all)) || got.GetFailedPaths() != 0 {
		t.Errorf("%v, want %d paths", got, len(all))
	}
	for _, p := range all {
		checkWhole(t, s, p)
	}
	if stillValid(t, s, other) || int(nars.Load()) != len(all) {
		t.Errorf("%d NARs fetched, want %d and not the other path", nars.Load(), len(all))
	}
	asked.Store(100)
	if importAll(t, s, opts); asked.Load() > 101 { // nix-cache-info
		t.Errorf("%d requests for what is here", asked.Load()-100)
	}
}

// What cannot be imported is said before anything is.
func TestImportRefuses(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	f := newFakeCache(t)
	if err := os.WriteFile(filepath.Join(f.dir, "nix-cache-info"), []byte("StoreDir: /other/store\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		opts ImportOptions
		want error
	}{
		"store directory": {f.options(), flox.ErrBadInput},
		"nothing":         {ImportOptions{}, flox.ErrBadInput},
		"relative":        {ImportOptions{From: "x"}, flox.ErrBadInput},
		"scheme":          {ImportOptions{From: "gs://x"}, flox.ErrBadInput},
		"not there":       {ImportOptions{From: "/nowhere/at/all"}, flox.ErrNotFound},
		"unlisted":        {ImportOptions{From: "http://127.0.0.1:1"}, flox.ErrUnreachable},
		"jobs":            {ImportOptions{From: f.dir, Jobs: 1000}, flox.ErrBadInput},
		"path":            {ImportOptions{From: f.dir, Paths: []flox.StorePath{"x"}}, flox.ErrBadInput},
		"key":             {ImportOptions{From: f.dir, Keys: []string{"x"}}, flox.ErrBadInput},
	} {
		if err := s.Import(within(t), c.opts, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// What stock Nix copies into a directory is imported in every compression it has,
// bit for bit.
func TestImportWhatNixWrote(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	dir := t.TempDir()
	key, err := nix.GenerateKey("office-1")
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "key"), []byte(key.String()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	var apps []string
	for _, compression := range []string{"xz", "zstd", "none", "bzip2", "gzip", "br", "lz4"} {
		app := n.build("i"+compression, small)
		n.run("nix", "copy", "--to", "file://"+dir+"?compression="+compression+"&secret-key="+filepath.Join(n.dir, "key"), app)
		apps = append(apps, app)
	}
	if got := importAll(t, s, ImportOptions{From: "file://" + dir}); got.GetDonePaths() != 0 || got.GetFailedPaths() == 0 {
		t.Errorf("without the cache's key: %v", got)
	}
	if got := importAll(t, s, ImportOptions{From: dir, Keys: []string{key.Public().String()}}); got.GetFailedPaths() != 0 {
		t.Errorf("%v", got)
	}
	for _, app := range apps {
		info, err := s.Info(within(t), flox.StorePath(filepath.Base(app)).HashPart())
		if err != nil {
			t.Fatal(err)
		}
		checkWhole(t, s, testPath{info, n.dump(app)})
		if _, ok := nix.NewKeyRing(key.Public()).Verify([]byte(nix.Fingerprint(s.cfg.StoreDir, info)), info.Signatures); !ok {
			t.Errorf("%s has lost the signature it came with", app)
		}
	}
}
