package storehouse

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Stock Nix writes a closure in every compression it has and reads back what it
// wrote, bit for bit.
func TestNixCompressions(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	for compression, size := range map[string]int{"": large, "zstd": large, "none": large, "bzip2": small, "gzip": small, "br": small, "lz4": small} {
		t.Run("with "+compression, func(t *testing.T) {
			u := cacheURL(s)
			if compression != "" { // else Nix's own choice, xz
				u += "?compression=" + compression
			}
			app := n.build("c"+compression, size)
			n.run("nix", "copy", "--to", u, app)
			checkStored(t, s, n, app)
		})
	}
	if left, err := os.ReadDir(filepath.Join(s.cfg.StateDir, "staged")); err != nil || len(left) > 0 {
		t.Errorf("%d uploads wait after all became paths, %v", len(left), err)
	}
}

// checkStored compares everything the storehouse says of a closure with what the
// Nix that made it says.
func checkStored(t *testing.T, s *Server, n *stockNix, app string) {
	t.Helper()
	closure := n.closure(app)
	if len(closure) != 2 {
		t.Fatalf("closure %v, want 2 paths", closure)
	}
	files := t.TempDir()
	n.run("nix", "copy", "--to", "file://"+files+"?compression=none&write-nar-listing=1", app)
	for _, path := range closure {
		hash := flox.StorePath(filepath.Base(path)).HashPart()
		want := n.dump(path)
		info, err := nix.ParseNarInfo(s.cfg.StoreDir, []byte(ask(t, "GET", cacheURL(s)+"/"+hash+".narinfo", "", nil, nil).body))
		if err != nil {
			t.Fatal(err)
		}
		wantList, err := os.ReadFile(filepath.Join(files, hash+".ls"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(unmarshal(t, string(wantList)), unmarshal(t, ask(t, "GET", cacheURL(s)+"/"+hash+".ls", "", nil, nil).body)); diff != "" {
			t.Errorf("listing of %s, -Nix +ours:\n%s", path, diff)
		}
		packed := ask(t, "GET", cacheURL(s)+"/"+info.URL, "", nil, nil)
		packed.check(t, 200)
		z, err := zstd.NewReader(strings.NewReader(packed.body))
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if _, err := z.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s as zstd: %v, another NAR than nix-store --dump gives", path, err)
		}
		z.Close()
		plain := ask(t, "GET", cacheURL(s)+"/"+strings.TrimSuffix(info.URL, ".zst"), "", nil, nil)
		if plain.check(t, 200); plain.body != string(want) {
			t.Errorf("%s: another NAR than nix-store --dump gives", path)
		}
	}
	u := cacheURL(s)
	for _, args := range [][]string{{"path-info", "-r"}, {"path-info", "-rsS"}, {"store", "ls", "-lR"}} {
		args = append([]string{"nix"}, args...)
		if got, want := n.run(append(args, "--store", u, app)...), n.run(append(args, app)...); got != want {
			t.Errorf("%v says %q, of the local store %q", args, got, want)
		}
	}
	checkJSON(t, n, u, app)
}

// checkJSON compares the facts Nix reads from the cache with those it has itself.
func checkJSON(t *testing.T, n *stockNix, u, app string) {
	t.Helper()
	of := func(args ...string) any {
		list := unmarshal(t, n.run(append([]string{"nix", "path-info", "-r", "--json"}, args...)...))
		for _, e := range list.([]any) {
			for _, own := range []string{"registrationTime", "ultimate", "signatures", "url", "downloadSize", "downloadHash"} {
				delete(e.(map[string]any), own)
			}
		}
		return list
	}
	if diff := cmp.Diff(of(app), of("--store", u, app)); diff != "" {
		t.Errorf("path-info, -local +ours:\n%s", diff)
	}
}

// Another machine reads from the storehouse with stock Nix if it trusts our key,
// and gets exactly what was written; with any other key it gets nothing.
func TestNixReads(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	app := n.build("r", large)
	n.run("nix", "copy", "--to", cacheURL(s)+"?compression=zstd", app)
	other, err := nix.GenerateKey("test-1") // our key's name, but not our key
	if err != nil {
		t.Fatal(err)
	}
	other2, err := nix.GenerateKey("other-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"nix", "copy", "--from", cacheURL(s), app}, {"nix-store", "-r", app}} {
		for name, c := range map[string]struct {
			key string
			ok  bool
		}{"our key": {s.PublicKey(), true}, "our name, another key": {other.Public().String(), false}, "another key": {other2.Public().String(), false}} {
			t.Run(args[0]+" with "+name, func(t *testing.T) {
				reader := newNix(t, n.storeDir)
				reader.configure("substituters = " + cacheURL(s) + "\ntrusted-public-keys = " + c.key + "\n")
				if !c.ok {
					why := "lacks a valid signature"
					if args[0] == "nix-store" {
						why = "is not signed by any of the keys in 'trusted-public-keys'"
					}
					reader.refused([]string{why}, args...)
					if _, err := os.Lstat(reader.real(app)); err == nil {
						t.Error("it is there all the same")
					}
					return
				}
				reader.run(args...)
				for _, path := range n.closure(app) {
					if !bytes.Equal(reader.dump(path), n.dump(path)) {
						t.Errorf("%s has other content", path)
					}
				}
				reader.run("nix-store", "--verify", "--check-contents")
			})
		}
	}
}

// Uploads without the token are refused, and Nix shows what to do about it: also
// for a large one, which it sends only when told to.
func TestNixToken(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	apps := []string{n.build("ts", small), n.build("tl", large)}
	for name, token := range map[string]string{"none": "", "wrong": "0123456789abcdef0123456789abcdef"} {
		t.Run(name, func(t *testing.T) {
			n.token(s, token)
			if token == "" {
				if err := os.Remove(filepath.Join(n.dir, "netrc")); err != nil {
					t.Fatal(err)
				}
			}
			for _, app := range apps {
				n.refused([]string{"HTTP error 401", "upload-token", "netrc-file"}, "nix", "copy", "--to", cacheURL(s)+"?compression=none", app)
				for _, path := range n.closure(app) {
					isValid(t, s, path, false)
				}
			}
		})
	}
	n.token(s, uploadToken(t, s))
	for _, app := range apps {
		n.run("nix", "copy", "--to", cacheURL(s)+"?compression=zstd", app)
		isValid(t, s, app, true)
	}
}

// What we cannot unpack is refused, and Nix shows what we can.
func TestNixUnknownCompression(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	app := n.build("u", small)
	for _, compression := range []string{"lzip", "lzma"} {
		n.refused([]string{"HTTP error 400", "known: none, xz, zstd, bzip2, gzip, br, lz4"}, "nix", "copy", "--to", cacheURL(s)+"?compression="+compression, app)
	}
	isValid(t, s, app, false)
}

// Copying what is there again sends nothing. A store that built the same path
// with other content gets the first content's facts from stock Nix, and a clear
// answer when it insists.
func TestNixFirstWins(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	// The entries of its own beginning come before the count.
	eventually(t, "the keys are sealed", func() bool { return s.sealed.Load() > 0 })
	app := n.build("f", small)
	u := cacheURL(s) + "?compression=zstd"
	n.run("nix", "copy", "--to", u, app)
	lib := n.closure(app)[0]
	if lib == app {
		lib = n.closure(app)[1]
	}
	first := n.dump(lib)
	entries := s.node.Status().Last
	n.run("nix", "copy", "--to", u, app)
	n.run("nix-store", "--delete", app, lib)
	if again := n.build("f", small); again != app || bytes.Equal(n.dump(lib), first) {
		t.Fatalf("built %s again as %s: want the same name and other content", app, again)
	}
	n.run("nix", "copy", "--to", u, app)
	if got := s.node.Status().Last; got != entries {
		t.Errorf("%d entries in the log, %d before copying what is there", got, entries)
	}
	token := uploadToken(t, s)
	nar, info := n.files(lib, "zstd")
	nar.put(t, s, token).check(t, 201)
	info.put(t, s, token).check(t, 400, "the first one stays", nix.SHA256Hash(sha256.Sum256(first)).String(),
		nix.SHA256Hash(sha256.Sum256(n.dump(lib))).String())
	hash := flox.StorePath(filepath.Base(lib)).HashPart()
	served := ask(t, "GET", cacheURL(s)+"/nar/"+hash+"-"+nix.EncodeBase32(sumOf(first))+".nar", "", nil, nil)
	if served.check(t, 200); served.body != string(first) {
		t.Error("the first content is not what is served")
	}
}

func sumOf(b []byte) []byte { h := sha256.Sum256(b); return h[:] }

// Two machines copying one closure at once both succeed.
func TestNixTwoAtOnce(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	app := n.build("two", large)
	var group sync.WaitGroup
	for _, compression := range []string{"zstd", "zstd", "xz"} {
		m := *n // with a cache of its own, as on a machine of its own
		m.home = t.TempDir()
		group.Go(func() {
			if _, bad, err := m.try("nix", "copy", "--to", cacheURL(s)+"?compression="+compression, app); err != nil {
				t.Errorf("copy with %s: %v\n%s", compression, err, bad)
			}
		})
	}
	group.Wait()
	checkStored(t, s, n, app)
}

// A client that is killed in the middle of an upload leaves nothing valid, and the
// next copy works.
func TestNixKilled(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	app := n.build("k", large)
	started := make(chan *os.Process, 1)
	cache := newHTTP(s, s.cfg, s.packs, s.packs.Stored)
	arrived := make(chan int, 8)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.HasPrefix(r.URL.Path, "/nar/") && r.ContentLength > 2<<20 {
			r.Body = &killer{r.Body, started}
			defer func() { arrived <- 1 }()
		}
		cache.ServeHTTP(w, r)
	}))
	defer web.Close()
	cmd := n.command(within(t), "nix", "copy", "--to", web.URL+"?compression=none", app)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	started <- cmd.Process
	if err := cmd.Wait(); cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("not killed: %v", err)
	}
	<-arrived
	for _, path := range n.closure(app) {
		isValid(t, s, path, false)
	}
	n.run("nix", "copy", "--to", cacheURL(s)+"?compression=none", app)
	checkStored(t, s, n, app)
}

// killer kills a process once a part of a request has come.
type killer struct {
	io.ReadCloser
	started chan *os.Process // gets it once, and keeps it
}

// Read implements io.Reader.
func (k *killer) Read(p []byte) (int, error) {
	n, err := k.ReadCloser.Read(p[:min(len(p), 1<<20)])
	if n > 0 {
		process := <-k.started
		_ = process.Kill()
		k.started <- process
	}
	return n, err
}
