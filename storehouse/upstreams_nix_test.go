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
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/pack/bucket/s3test"
	"github.com/floxctl/flox/nix"
)

// What stock Nix copied to a cache is substituted from a directory, over HTTP and from
// S3, whatever it compresses with; what a dry run says is what the cache's files are.
func TestSubstituteWhatNixWrote(t *testing.T) {
	n := newNix(t, "")
	n.storeDir = n.dir + "/store"
	s3 := s3test.Start(t)
	key, err := nix.GenerateKey("office-1")
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "key"), []byte(key.String()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	// The bucket's own keys are not those of the environment.
	q := upstreamAs("s3://store?"+strings.SplitN(s3.URL(), "?", 2)[1], key, 0)
	q.Login, q.Password = os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
	plain := t.TempDir()
	web := httptest.NewServer(http.FileServer(http.Dir(plain)))
	defer web.Close()
	for name, tt := range map[string]struct {
		dir, compression string
		q                *floxv1.AddUpstreamRequest
	}{
		"file": {plain, "xz", upstreamAs("file://"+plain, key, 0)},
		"http": {plain, "zstd", upstreamAs(web.URL+"/", key, 0)},
		"s3":   {s3.Objects(), "none", q},
	} {
		t.Run(name, func(t *testing.T) {
			s, operator := closedHouse(t, func(c *Config) { c.StoreDir = flox.StoreDir(n.storeDir) })
			app := n.build("u"+name, small)
			n.run("nix", "copy", "--to", "file://"+tt.dir+"?compression="+tt.compression+"&secret-key="+filepath.Join(n.dir, "key"), app)
			addUpstream(t, operator, tt.q)
			opts := SubstituteOptions{Paths: []string{filepath.Base(app)}, Dry: true}
			dry := substitute(t, s, opts)
			closure := n.closure(app)
			var names []string
			for _, p := range closure {
				names = append(names, filepath.Base(p))
				checkDry(t, n, tt.dir, dry.found[filepath.Base(p)], p)
			}
			if len(dry.found) != len(closure) || len(dry.failed) != 0 {
				t.Errorf("a dry run finds %d paths of %q, and not %v", len(dry.found), names, dry.failed)
			}
			alone := opts
			alone.Alone = true
			if got := substitute(t, s, alone); len(got.found) != 1 {
				t.Errorf("alone it finds %d paths", len(got.found))
			}
			if _, err := s.Info(within(t), flox.StorePath(filepath.Base(app)).HashPart()); err == nil {
				t.Error("a dry run made it valid")
			}
			opts.Dry = false
			if got := substitute(t, s, opts); len(got.failed) != 0 || got.last.GetDonePaths() != uint64(len(closure)) || got.last.GetDoneBytes() != got.last.GetTotalBytes() {
				t.Errorf("%v, %v", got.last, got.failed)
			}
			for _, p := range closure {
				info, err := s.Info(within(t), flox.StorePath(filepath.Base(p)).HashPart())
				if err != nil {
					t.Fatal(err)
				}
				checkWhole(t, s, testPath{info, n.dump(p)})
				if !slices.ContainsFunc(info.Signatures, func(sig string) bool { return strings.HasPrefix(sig, "office-1:") }) {
					t.Errorf("%s has the signatures %q", p, info.Signatures)
				}
			}
			if got := substitute(t, s, SubstituteOptions{Paths: opts.Paths, Dry: true}); len(got.found)+len(got.failed) != 0 {
				t.Errorf("what is valid would be fetched: %v", got.found)
			}
			resp, err := operator.TestUpstream(within(t), connect.NewRequest(&floxv1.TestUpstreamRequest{Url: tt.q.GetUpstream().GetUrl(), Path: app}))
			if err != nil || resp.Msg.GetStoreDir() != n.storeDir || resp.Msg.GetFound() == nil {
				t.Errorf("test: %v, %v", resp, err)
			}
		})
	}
}

// checkDry compares what a dry run says of a path with the cache's files and Nix.
func checkDry(t *testing.T, n *stockNix, dir string, got *floxv1.SubstitutablePath, path string) {
	t.Helper()
	if got == nil {
		t.Errorf("a dry run does not find %s", path)
		return
	}
	b, err := os.ReadFile(filepath.Join(dir, flox.StorePath(filepath.Base(path)).HashPart()+".narinfo"))
	if err != nil {
		t.Fatal(err)
	}
	info, err := nix.ParseNarInfo(flox.StoreDir(n.storeDir), b)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(dir, info.URL))
	if err != nil {
		t.Fatal(err)
	}
	said, err := api.ToPathInfo(got.GetInfo())
	if err != nil || said.NarHash != info.Info.NarHash || !slices.Equal(said.References, info.Info.References) || said.Deriver != info.Info.Deriver {
		t.Errorf("%s: %v, %v", path, got, err)
	}
	if said.NarSize != uint64(len(n.dump(path))) || got.GetDownloadSize() != uint64(st.Size()) {
		t.Errorf("%s: a NAR of %d bytes, %d to download; want %d and %d", path, said.NarSize, got.GetDownloadSize(), len(n.dump(path)), st.Size())
	}
}

// A bucket is listed, and imported whole.
func TestImportFromS3(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	s3 := s3test.Start(t)
	f := newFakeCache(t)
	base := makePath(t, "base", 50_000)
	top := makePath(t, "top", 5000, base.info.Path)
	for _, p := range []testPath{base, top} {
		f.add(p, p.nar, true)
	}
	if err := os.CopyFS(s3.Objects(), os.DirFS(f.dir)); err != nil {
		t.Fatal(err)
	}
	opts := f.options()
	opts.From = s3.URL()
	if got := importAll(t, s, opts); got.GetDonePaths() != 2 || got.GetFailedPaths() != 0 {
		t.Errorf("%v", got)
	}
	checkWhole(t, s, top)
}
