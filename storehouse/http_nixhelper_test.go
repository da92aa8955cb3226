package storehouse

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// stockNix is a Nix with a local store of its own.
type stockNix struct {
	t        *testing.T
	storeDir string // what paths begin with
	dir      string // where the store, its state and its configuration really are
	home     string // holds what Nix remembers of caches
}

// needNix skips a test that needs stock Nix, or fails it where everything must run.
func needNix(t *testing.T) {
	t.Helper()
	for _, program := range []string{"nix", "nix-store", "nix-build"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("stock Nix is needed: %v", err)
			}
			t.Skipf("needs stock Nix: %v", err)
		}
	}
}

// newNix makes a Nix whose store lies in a directory of its own and is seen as
// storeDir.
func newNix(t *testing.T, storeDir string) *stockNix {
	t.Helper()
	needNix(t)
	n := &stockNix{t: t, storeDir: storeDir, dir: t.TempDir(), home: t.TempDir()}
	t.Cleanup(func() { unprotect(n.dir) })
	for _, d := range []string{"store", "var", "etc"} {
		if err := os.Mkdir(filepath.Join(n.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.configure("")
	return n
}

// unprotect makes a store's directories removable.
func unprotect(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.Chmod(path, 0o755)
		}
		return nil
	})
}

// configure writes nix.conf with more lines.
func (n *stockNix) configure(more string) {
	n.t.Helper()
	conf := "sandbox = false\nfilter-syscalls = false\nbuild-users-group =\nsubstituters =\nexperimental-features = nix-command\n" +
		"fsync-metadata = false\nconnect-timeout = 5\ndownload-attempts = 1\nnetrc-file = " + filepath.Join(n.dir, "netrc") + "\n" + more
	if err := os.WriteFile(filepath.Join(n.dir, "etc", "nix.conf"), []byte(conf), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// token makes uploads to s carry a token.
func (n *stockNix) token(s *Server, token string) {
	n.t.Helper()
	u, err := url.Parse(cacheURL(s))
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "netrc"), []byte("machine "+u.Hostname()+" password "+token+"\n"), 0o600)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// real is where a store path's files are.
func (n *stockNix) real(path string) string {
	return filepath.Join(n.dir, "store", strings.TrimPrefix(path, n.storeDir))
}

func (n *stockNix) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	local := "local?" + url.Values{"real": {n.dir + "/store"}, "state": {n.dir + "/var"}, "log": {n.dir + "/var/log"}}.Encode()
	local = strings.ReplaceAll(local, "%2F", "/")
	if n.storeDir == n.dir+"/store" {
		local = "local"
	}
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + n.home, "NIX_REMOTE=" + local,
		"NIX_STORE_DIR=" + n.storeDir, "NIX_STATE_DIR=" + n.dir + "/var", "NIX_LOG_DIR=" + n.dir + "/var/log",
		"NIX_CONF_DIR=" + n.dir + "/etc", "NIX_USER_CONF_FILES=/dev/null",
	}
	cmd.Dir = n.dir
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// try runs a command and gives what it wrote.
func (n *stockNix) try(args ...string) (stdout, stderr string, err error) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // xz takes its time on a busy machine
	defer cancel()
	cmd := n.command(ctx, args...)
	var out, bad bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &bad
	err = cmd.Run()
	return out.String(), bad.String(), err
}

// run is try of what must work.
func (n *stockNix) run(args ...string) string {
	n.t.Helper()
	out, bad, err := n.try(args...)
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, bad)
	}
	return out
}

// refused runs what must fail and checks that what it writes says why.
func (n *stockNix) refused(wants []string, args ...string) {
	n.t.Helper()
	_, bad, err := n.try(args...)
	if err == nil {
		n.t.Errorf("%s: it works, want an error saying %q", strings.Join(args, " "), wants)
	}
	for _, want := range wants {
		if !strings.Contains(bad, want) {
			n.t.Errorf("%s says\n%s\nwant %q in it", strings.Join(args, " "), bad, want)
		}
	}
}

// sample is what the tests copy: two paths with everything a store path can have.
const sample = `let
  make = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-e" "-c" script ];
    PATH = "/usr/bin:/bin";
  };
  lib = make "lib-SALT" ''
    mkdir -p $out/share/many
    i=0; while [ $i -lt 400 ]; do echo "file $i" > $out/share/many/$i; i=$((i+1)); done
    : > $out/empty
    head -c SIZE /dev/urandom > $out/random
    mkdir $out/hollow
  '';
in make "app-SALT" ''
  mkdir -p $out/bin
  printf '#!/bin/sh\necho hello from ${lib}\n' > $out/bin/app
  chmod +x $out/bin/app
  ln -s app $out/bin/link
  ln -s ${lib}/share $out/share
  ln -s /nowhere/at/all $out/dangling
  printf 'caf\303\251' > "$out/caf$(printf '\303\251') with space"
''
`

// Sizes of the random file in the sample: small is quick to compress, large is
// many chunks and more than an HTTP client sends unasked.
const (
	small = 100_000
	large = 3 << 20
)

// build builds the sample; another salt makes another app of another lib.
func (n *stockNix) build(salt string, size int) (app string) {
	n.t.Helper()
	expr := strings.NewReplacer("SALT", salt, "SIZE", strconv.Itoa(size)).Replace(sample)
	return strings.TrimSpace(n.run("nix-build", "--no-out-link", "-E", expr))
}

// closure lists what a path needs, itself included.
func (n *stockNix) closure(path string) []string {
	n.t.Helper()
	all := strings.Fields(n.run("nix-store", "-qR", path))
	slices.Sort(all)
	return all
}

func (n *stockNix) dump(path string) []byte {
	n.t.Helper()
	return []byte(n.run("nix-store", "--dump", n.real(path)))
}

// upload is one file of a binary cache.
type upload struct {
	name string // "nar/….nar.xz" or "….narinfo"
	data []byte
}

// files gives what stock Nix would upload for one path.
func (n *stockNix) files(path, compression string) (nar, info upload) {
	n.t.Helper()
	dir := n.t.TempDir()
	n.run("nix", "copy", "--to", "file://"+dir+"?compression="+compression, path)
	read := func(name string) upload {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			n.t.Fatal(err)
		}
		return upload{name, b}
	}
	info = read(flox.StorePath(filepath.Base(path)).HashPart() + ".narinfo")
	for line := range strings.Lines(string(info.data)) {
		if name, ok := strings.CutPrefix(line, "URL: "); ok {
			nar = read(strings.TrimSpace(name))
		}
	}
	return nar, info
}

// edit replaces a part of a text file.
func (u upload) edit(t *testing.T, expr, with string) upload {
	t.Helper()
	re := regexp.MustCompile(expr)
	if !re.Match(u.data) {
		t.Fatalf("%s has nothing like %q: %s", u.name, expr, u.data)
	}
	return upload{u.name, re.ReplaceAll(u.data, []byte(with))}
}

func (u upload) put(t *testing.T, s *Server, token string) reply {
	t.Helper()
	return ask(t, "PUT", cacheURL(s)+"/"+u.name, token, nil, bytes.NewReader(u.data))
}

func cacheURL(s *Server) string { return "http://" + s.web.Addr().String() }

func uploadToken(t *testing.T, s *Server) string {
	t.Helper()
	b, err := os.ReadFile(stateFile(s, "upload-token"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// nixAndServer is a Nix with a store of its own and a storehouse for it.
func nixAndServer(t *testing.T) (*stockNix, *Server) {
	t.Helper()
	n := newNix(t, "")
	n.storeDir = n.dir + "/store"
	cfg := testConfig(t.TempDir())
	cfg.StoreDir = flox.StoreDir(n.storeDir)
	s, _ := start(t, cfg)
	n.token(s, uploadToken(t, s))
	return n, s
}

// reply is an answer of the binary cache.
type reply struct {
	status int
	header http.Header
	body   string
}

// ask sends one request; with a token it is an upload's.
func ask(t *testing.T, method, url, token string, header http.Header, body io.Reader) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	if header != nil {
		req.Header = header
	}
	if token != "" {
		req.SetBasicAuth("", token)
	}
	res, err := (&http.Transport{DisableCompression: true, DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return reply{res.StatusCode, res.Header, string(b)}
}

func (r reply) check(t *testing.T, status int, wants ...string) {
	t.Helper()
	if r.status != status {
		t.Errorf("status %d, want %d: %.300s", r.status, status, r.body)
	}
	for _, want := range wants {
		if !strings.Contains(r.body, want) {
			t.Errorf("it says %.500q, want %q in it", r.body, want)
		}
	}
}

// isValid checks whether a path is valid.
func isValid(t *testing.T, s *Server, path string, want bool) {
	t.Helper()
	base := path[strings.LastIndexByte(path, '/')+1:]
	_, err := s.Info(within(t), flox.StorePath(base).HashPart())
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err)
	}
	if got := err == nil; got != want {
		t.Errorf("%s is valid: %v, want %v", base, got, want)
	}
}

func unmarshal(t *testing.T, b string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(b), &v); err != nil {
		t.Fatalf("%v: %.300s", err, b)
	}
	return v
}
