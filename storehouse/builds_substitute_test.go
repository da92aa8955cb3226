package storehouse

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/nix"
)

// officeCache is a directory that stock Nix copied to, served over HTTP as an upstream
// of a storehouse.
type officeCache struct {
	n   *stockNix
	dir string
}

func newOfficeCache(t *testing.T, n *stockNix, s *Server) *officeCache {
	t.Helper()
	key, err := nix.GenerateKey("office-1")
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "key"), []byte(key.String()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := &officeCache{n, t.TempDir()}
	web := httptest.NewServer(http.FileServer(http.Dir(c.dir)))
	t.Cleanup(web.Close)
	addUpstream(t, operatorOf(t, s), upstreamAs(web.URL, key, 0))
	return c
}

// build has stock Nix build an expression, copies it to the cache and names it.
func (c *officeCache) build(expr string) (base string) {
	c.n.t.Helper()
	out := strings.TrimSpace(c.n.run("nix-build", "--no-out-link", "-E", expr))
	c.n.run("nix", "copy", "--to", "file://"+c.dir+"?compression=none&secret-key="+filepath.Join(c.n.dir, "key"), out)
	return filepath.Base(out)
}

// files gives the sizes of the NARs of paths, and what their files take.
func (c *officeCache) files(paths ...string) (nars, files uint64) {
	c.n.t.Helper()
	for _, p := range paths {
		info := c.info(p)
		st, err := os.Stat(filepath.Join(c.dir, info.URL))
		if err != nil {
			c.n.t.Fatal(err)
		}
		nars += info.Info.NarSize
		files += uint64(st.Size())
	}
	return nars, files
}

func (c *officeCache) info(base string) *nix.NarInfo {
	c.n.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, flox.StorePath(base).HashPart()+".narinfo"))
	if err != nil {
		c.n.t.Fatal(err)
	}
	info, err := nix.ParseNarInfo(flox.StoreDir(c.n.storeDir), b)
	if err != nil {
		c.n.t.Fatal(err)
	}
	return info
}

// missing is what Build would do, by name.
func (f *farm) missing(q *floxv1.MissingRequest) (builds []string, resp *floxv1.MissingResponse) {
	f.t.Helper()
	r, err := f.m.builds.Missing(within(f.t), connect.NewRequest(q))
	if err != nil {
		f.t.Fatal(err)
	}
	for _, d := range r.Msg.GetWillBuild() {
		builds = append(builds, strings.TrimSuffix(flox.StorePath(d).Name(), nix.DrvExtension))
	}
	return builds, r.Msg
}

// What an upstream has is not built, and what is said before is what is done.
func TestBuildsWhatUpstreamsLack(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	c := newOfficeCache(t, f.n, f.Server)
	a := mk("a", "echo a > $out", "")
	b := `let a = ` + a + `; in ` + mk("b", "echo b $a > $out", "inherit a;")
	own := `let b = ` + b + `; in ` + mk("own", "read x < $b; echo own $x > $out", "inherit b; allowSubstitutes = false;")
	top := `let own = ` + own + `; in ` + mk("top", "read x < $own; echo top $x > $out", "inherit own;")
	outB := c.build(b)
	c.build(own) // there, and yet not to be taken
	drv, drvB := f.upload(top), f.upload(b)

	names, m := f.missing(&floxv1.MissingRequest{Paths: outs(drv).GetPaths()})
	want := slices.Sorted(slices.Values(append([]string{outB}, refNames(c.info(outB))...)))
	nars, files := c.files(want...)
	if !slices.Equal(names, []string{"own", "top"}) || !slices.Equal(m.GetWillSubstitute(), want) || m.GetNarBytes() != nars || m.GetDownloadBytes() != files {
		t.Errorf("would build %v and substitute %v; want own and top, and %v of %d bytes in files of %d", names, m, want, nars, files)
	}
	if names, m := f.missing(&floxv1.MissingRequest{Paths: outs(drv).GetPaths(), NoSubstitutes: true}); len(names) != 4 || len(m.GetWillSubstitute()) != 0 {
		t.Errorf("without upstreams: %v, %v", names, m)
	}
	if h, _ := f.must(drvB, buildfarm.Substituted); len(h.started) != 0 {
		t.Errorf("%v were built", h.started)
	}
	h, out := f.must(drv, buildfarm.Built)
	if got := f.read(out["out"].GetPath()); !strings.HasPrefix(got, "top own b ") || len(h.started) != 2 {
		t.Errorf("top is %q, with %v built", got, h.started)
	}

	// A path for itself, and one that nobody has.
	lone := c.build(mk("lone", "echo lone > $out", ""))
	unknown := strings.Repeat("0", 32) + "-x"
	q := &floxv1.BuildRequest{Paths: []*floxv1.DerivedPath{{Path: lone}, {Path: unknown}}}
	if _, m := f.missing(&floxv1.MissingRequest{Paths: q.GetPaths()}); !slices.Equal(m.GetWillSubstitute(), []string{lone}) || !slices.Equal(m.GetUnknown(), []string{unknown}) {
		t.Errorf("of paths: %v", m)
	}
	h, err := f.build(within(t), q, nil)
	if err != nil || len(h.results) != 2 || h.results[0].GetOutcome().GetStatus() != uint32(buildfarm.Substituted) || h.results[1].GetOutcome().GetStatus() != uint32(buildfarm.NoSubstituters) {
		t.Errorf("%v, %v", h, err)
	}

	// The cache says it has it, and then gives something else: it is built.
	expr := mk("broken", "echo broken > $out", "")
	broken := c.build(expr)
	drv = f.upload(expr)
	if err := os.WriteFile(filepath.Join(c.dir, c.info(broken).URL), []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if h, out := f.must(drv, buildfarm.Built); !slices.Equal(h.started, []string{drv}) || out["out"].GetPath() != broken {
		t.Errorf("%v were built for %v", h.started, out)
	}
}

// refNames are the base names of what a path refers to.
func refNames(info *nix.NarInfo) (names []string) {
	for _, ref := range info.Info.References {
		names = append(names, string(ref))
	}
	return names
}
