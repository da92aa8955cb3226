package nix

import (
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// The files in testdata/nix come from a real Nix (2.8.0):
//
//	go test ./nix -run TestVectorsAreNixs -update
//
// key.sec is an input and of no worth; all others are made from it and from
// vectorTree. Nix has the default store directory in them, under another root.
var update = flag.Bool("update", false, "write testdata/nix anew with the installed Nix")

const vectorDir = "testdata/nix"

// vectorTree is the tree of which the vectors are made.
func vectorTree() []node {
	return sorted([]node{
		dir(""), dir("bin"), executable(file("bin/hello", "#!/bin/sh\necho hello\n")), dir("empty"), file("zero", ""), file("seven", "1234567"), file("eight", "12345678"),
		link("link", "bin/hello"), dir("a"), file("a/b", "below a"), file("a.b", "beside a"), file("ä \"q\\\n\t\x01", "x"),
	})
}

// needNix skips where there is no Nix, except where that must not go unseen.
func needNix(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("nix-store"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("Nix is not installed: install nix-bin")
		}
		t.Skip("Nix is not installed")
	}
}

// nixHost runs Nix in a directory of its own.
type nixHost struct {
	t   *testing.T
	env []string
}

// newNixHost gives Nix an empty world; env may override where its store is.
func newNixHost(t *testing.T, env ...string) nixHost {
	tmp := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tmp, "conf"), 0o755); err != nil {
		t.Fatal(err)
	}
	conf := "experimental-features = nix-command ca-derivations\nsandbox = false\nbuild-users-group =\nsubstituters =\n"
	if err := os.WriteFile(filepath.Join(tmp, "conf", "nix.conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	base := []string{"HOME=" + tmp, "NIX_CONF_DIR=" + tmp + "/conf", "NIX_USER_CONF_FILES=", "NIX_REMOTE=", "PATH=" + os.Getenv("PATH")}
	unseal(t, tmp)
	return nixHost{t: t, env: append(base, env...)}
}

// unseal lets a temporary directory go away though Nix sealed its store there.
func unseal(t *testing.T, tmp string) {
	t.Cleanup(func() {
		err := filepath.WalkDir(tmp, func(p string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				err = os.Chmod(p, 0o755)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// run gives what a command prints, without its line end.
func (h nixHost) run(name string, args ...string) string {
	h.t.Helper()
	cmd := exec.CommandContext(h.t.Context(), name, args...)
	cmd.Env = h.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		h.t.Fatalf("%s %q: %v\n%s", name, args, err, stderr.String())
	}
	return strings.TrimSuffix(string(out), "\n")
}

// makeVectors asks Nix for every vector; keys are file names.
func makeVectors(t *testing.T) map[string]string {
	t.Helper()
	tmp := t.TempDir()
	tree, seven := filepath.Join(tmp, "tree"), filepath.Join(tmp, "tree", "seven")
	writeTree(t, tree, vectorTree())
	h := newNixHost(t)
	store := "local?root=" + filepath.Join(tmp, "root")
	unseal(t, tmp)

	out := map[string]string{"tree.nar": h.run("nix-store", "--dump", tree)}

	var paths []string
	add := func(what string, args ...string) {
		paths = append(paths, what+" "+h.run("nix-store", append([]string{"--store", store}, args...)...))
	}
	add("source tree", "--add", tree)
	for _, algo := range []string{"md5", "sha1", "sha256", "sha512"} {
		add("flat "+algo+" seven", "--add-fixed", algo, seven)
		add("recursive "+algo+" tree", "--add-fixed", "--recursive", algo, tree)
	}
	text := `let a = builtins.toFile "a" "text a"; in [ a (builtins.toFile "b" "see ${a}") ]`
	for i, p := range strings.Fields(strings.Trim(h.run("nix-instantiate", "--read-write-mode", "--store", store, "--eval", "--strict", "-E", text), "[] ")) {
		paths = append(paths, fmt.Sprintf("text %c %s", 'a'+i, strings.Trim(p, `"`)))
	}
	out["paths.txt"] = strings.Join(paths, "\n") + "\n"

	var hashes []string
	for _, algo := range []string{"md5", "sha1", "sha256", "sha512"} {
		for _, form := range []string{"--base16", "--base32", "--base64", "--sri"} {
			hashes = append(hashes, algo+" "+form+" "+h.run("nix", "hash", "file", "--type", algo, form, seven))
		}
	}
	out["hashes.txt"] = strings.Join(hashes, "\n") + "\n"

	secret, err := os.ReadFile(filepath.Join(vectorDir, "key.sec"))
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(tmp, "key")
	if err := os.WriteFile(key, secret, 0o600); err != nil {
		t.Fatal(err)
	}
	out["key.pub"] = h.run("sh", "-c", "nix key convert-secret-to-public < "+key)
	h.run("nix", "store", "sign", "--store", store, "--key-file", key, "--all")
	cache := filepath.Join(tmp, "cache")
	h.run("nix", "copy", "--from", store, "--to", "file://"+cache+"?compression=none&write-nar-listing=1", "--all")
	for _, line := range paths {
		what, path, _ := strings.Cut(line, " /nix/store/")
		name := strings.ReplaceAll(what, " ", "-")
		for _, ext := range []string{".narinfo", ".ls"} {
			b, err := os.ReadFile(filepath.Join(cache, path[:flox.HashPartLen]+ext))
			if err != nil {
				t.Fatal(err)
			}
			out[name+ext] = string(b)
		}
	}
	return out
}

// The vectors committed are what the installed Nix says.
func TestVectorsAreNixs(t *testing.T) {
	needNix(t)
	made := makeVectors(t)
	if *update {
		for name, text := range made {
			if err := os.WriteFile(filepath.Join(vectorDir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	entries, err := os.ReadDir(vectorDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, ok := made[e.Name()]; !ok && e.Name() != "key.sec" {
			t.Errorf("%s is not made by Nix", e.Name())
		}
	}
	for name, want := range made {
		if d := cmp.Diff(want, vector(t, name)); d != "" {
			t.Errorf("%s (-Nix +committed): %s", name, d)
		}
	}
}

func vector(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(vectorDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// vectorPaths is paths.txt: what a path is of, and the path.
func vectorPaths(t *testing.T) map[string]flox.StorePath {
	t.Helper()
	paths := make(map[string]flox.StorePath)
	for line := range strings.Lines(vector(t, "paths.txt")) {
		what, abs, _ := strings.Cut(strings.TrimSpace(line), " /nix/store/")
		p, err := flox.ParseStorePath(abs)
		if err != nil {
			t.Fatal(err)
		}
		paths[what] = p
	}
	return paths
}

func TestVectorNar(t *testing.T) {
	nar := vector(t, "tree.nar")
	if got := string(encode(t, vectorTree())); got != nar {
		t.Error("we write another NAR than Nix")
	}
	nodes, size, err := decode(strings.NewReader(nar))
	if err != nil || size != uint64(len(nar)) {
		t.Fatal(size, err)
	}
	listing, err := MarshalListing(build(t, nodes))
	if d := cmp.Diff(vector(t, "source-tree.ls"), string(listing)); d != "" || err != nil {
		t.Errorf("listing: %v %s", err, d)
	}
	tmp := t.TempDir()
	writeTree(t, filepath.Join(tmp, "tree"), vectorTree())
	if got := string(dump(t, filepath.Join(tmp, "tree"))); got != nar {
		t.Error("we dump another NAR than Nix")
	}
}

func TestVectorPaths(t *testing.T) {
	const dir = flox.DefaultStoreDir
	paths := vectorPaths(t)
	nar, seven := []byte(vector(t, "tree.nar")), []byte("1234567")
	sums := func(algo HashAlgo, b []byte) Hash {
		h := algo.New()
		h.Write(b)
		return Hash{Algo: algo, Sum: h.Sum(nil)}
	}
	got := make(map[string]flox.StorePath)
	var err error
	put := func(what string, p flox.StorePath, e error) { got[what], err = p, errors.Join(err, e) }
	source, e := SourcePath(dir, "tree", sha256.Sum256(nar), nil, false)
	put("source tree", source, e)
	for _, algo := range []HashAlgo{MD5, SHA1, SHA256, SHA512} {
		flat, e := FixedOutputPath(dir, "seven", false, sums(algo, seven), nil, false)
		put("flat "+string(algo)+" seven", flat, e)
		rec, e := FixedOutputPath(dir, "tree", true, sums(algo, nar), nil, false)
		put("recursive "+string(algo)+" tree", rec, e)
	}
	a, e := TextPath(dir, "a", sha256.Sum256([]byte("text a")), nil)
	put("text a", a, e)
	b, e := TextPath(dir, "b", sha256.Sum256([]byte("see "+dir.Join(a))), []flox.StorePath{a})
	put("text b", b, e)
	if d := cmp.Diff(paths, got); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
}

func TestVectorNarInfos(t *testing.T) {
	const dir = flox.DefaultStoreDir
	secret, err := ParseSecretKey(vector(t, "key.sec"))
	if err != nil || secret.Public().String() != vector(t, "key.pub") {
		t.Fatalf("public key of Nix's secret key: %v", err)
	}
	public, err := ParsePublicKey(vector(t, "key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	paths := vectorPaths(t)
	for what, path := range paths {
		text := vector(t, strings.ReplaceAll(what, " ", "-")+".narinfo")
		n, err := ParseNarInfo(dir, []byte(text))
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if d := cmp.Diff(text, string(n.Marshal(dir))); d != "" || n.Info.Path != path {
			t.Errorf("%s: %s", what, d)
		}
		msg := []byte(Fingerprint(dir, &n.Info))
		if name, ok := NewKeyRing(public).Verify(msg, n.Info.Signatures); !ok || name != public.Name() {
			t.Errorf("%s: Nix's signature does not verify over %s", what, msg)
		}
		if sig := secret.Sign(msg); !slices.Equal(n.Info.Signatures, []string{sig}) {
			t.Errorf("%s: we sign %s, Nix %s", what, sig, n.Info.Signatures)
		}
		got, err := ContentAddressPath(dir, path.Name(), n.Info.CA, n.Info.References, false)
		if got != path || err != nil {
			t.Errorf("%s: its address leads to %s, %v", what, got, err)
		}
		listing, err := ParseListing([]byte(vector(t, strings.ReplaceAll(what, " ", "-")+".ls")))
		if err != nil || (listing.Kind == flox.Directory) != strings.Contains(what, "tree") {
			t.Errorf("%s: listing: %v", what, err)
		}
	}
}

func TestVectorHashes(t *testing.T) {
	m, s1, s256, s512 := md5.Sum([]byte("1234567")), sha1.Sum([]byte("1234567")), sha256.Sum256([]byte("1234567")), sha512.Sum512([]byte("1234567"))
	sums := map[HashAlgo][]byte{MD5: m[:], SHA1: s1[:], SHA256: s256[:], SHA512: s512[:]}
	for line := range strings.Lines(vector(t, "hashes.txt")) {
		f := strings.Fields(line)
		algo := HashAlgo(f[0])
		h, err := ParseHash(f[2], algo)
		if err != nil || !h.Equal(Hash{Algo: algo, Sum: sums[algo]}) {
			t.Errorf("%s: %v, %v", line, h, err)
			continue
		}
		ours := map[string]string{"--base16": h.Hex(), "--base32": EncodeBase32(h.Sum), "--base64": strings.TrimPrefix(h.SRI(), f[0]+"-"), "--sri": h.SRI()}
		if ours[f[1]] != f[2] {
			t.Errorf("we write %s as %s", f[2], ours[f[1]])
		}
	}
}

// What a build makes, in a store directory of its own: references, a reference
// to itself, a deriver, signatures, every compression Nix writes.
func TestAgreesWithNixOnBuilds(t *testing.T) {
	needNix(t)
	tmp := t.TempDir()
	dir := flox.StoreDir(filepath.Join(tmp, "my", "store"))
	h := newNixHost(t, "NIX_STORE_DIR="+string(dir), "NIX_STATE_DIR="+tmp+"/var", "NIX_LOG_DIR="+tmp+"/log", "NIX_DATA_DIR="+tmp+"/share")
	unseal(t, tmp)
	expr := `let dep = builtins.toFile "dep" "dep"; in derivation {
		name = "self"; system = builtins.currentSystem; builder = "/bin/sh";
		args = [ "-c" "echo ${dep} $out > $out" ]; }`
	built := h.run("nix-build", "--no-out-link", "-E", expr)
	h.run("nix", "store", "make-content-addressed", built)

	secret, err := ParseSecretKey(h.run("nix", "key", "generate-secret", "--key-name", "test-1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tmp, "key"), []byte(secret.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run("nix", "store", "sign", "--key-file", filepath.Join(tmp, "key"), "--all")

	self := 0
	for _, compression := range []string{"none", "xz", "zstd", "bzip2", "gzip", "br", "lz4"} {
		cache := filepath.Join(tmp, "cache-"+compression)
		h.run("nix", "copy", "--to", "file://"+cache+"?compression="+compression, "--all")
		infos, err := filepath.Glob(filepath.Join(cache, "*.narinfo"))
		if err != nil || len(infos) < 4 {
			t.Fatalf("%d narinfos, %v", len(infos), err)
		}
		for _, name := range infos {
			n := checkNarInfo(t, dir, secret.Public(), cache, name)
			if n.Info.CA != "" && slices.Contains(n.Info.References, n.Info.Path) {
				self++
			}
		}
	}
	if self == 0 {
		t.Error("no content-addressed path that refers to itself")
	}
}

// checkNarInfo checks a file a real Nix wrote, and the NAR it names.
func checkNarInfo(t *testing.T, dir flox.StoreDir, key PublicKey, cache, name string) *NarInfo {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	n, err := ParseNarInfo(dir, text)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if d := cmp.Diff(string(text), string(n.Marshal(dir))); d != "" {
		t.Error(d)
	}
	if _, ok := NewKeyRing(key).Verify([]byte(Fingerprint(dir, &n.Info)), n.Info.Signatures); !ok {
		t.Errorf("Nix's signature does not verify in\n%s", text)
	}
	if n.Info.CA != "" {
		refs := slices.Clone(n.Info.References)
		others := slices.DeleteFunc(refs, func(r flox.StorePath) bool { return r == n.Info.Path })
		got, err := ContentAddressPath(dir, n.Info.Path.Name(), n.Info.CA, others, len(others) < len(n.Info.References))
		if got != n.Info.Path || err != nil {
			t.Errorf("the address leads to %s, %v in\n%s", got, err, text)
		}
	}
	packed, err := os.ReadFile(filepath.Join(cache, n.URL))
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(packed); !n.FileHash.Equal(SHA256Hash(sum)) || n.FileSize != uint64(len(packed)) {
		t.Errorf("file hash or size differ in\n%s", text)
	}
	nar, err := decompress(n.Compression, bytes.NewReader(packed), n.Info.NarSize)
	if err != nil || sha256.Sum256(nar) != n.Info.NarHash {
		t.Errorf("%s: the NAR differs, %v", n.Compression, err)
	}
	return n
}

// A tree we unpack is one Nix takes for its own, and the other way round.
func TestAgreesWithNixOnRandomTrees(t *testing.T) {
	needNix(t)
	h := newNixHost(t)
	tmp := t.TempDir()
	nodes := sorted(sampleTree())
	nar := encode(t, nodes)
	if err := RestorePath(t.Context(), bytes.NewReader(nar), filepath.Join(tmp, "ours")); err != nil {
		t.Fatal(err)
	}
	if got := h.run("nix", "hash", "path", "--type", "sha256", "--base32", filepath.Join(tmp, "ours")); "sha256:"+got != SHA256Hash(sha256.Sum256(nar)).String() {
		t.Errorf("Nix hashes what we unpacked to %s", got)
	}
	if err := os.WriteFile(filepath.Join(tmp, "nar"), nar, 0o644); err != nil {
		t.Fatal(err)
	}
	h.run("sh", "-c", "nix-store --restore "+filepath.Join(tmp, "theirs")+" < "+filepath.Join(tmp, "nar"))
	if !bytes.Equal(dump(t, filepath.Join(tmp, "theirs")), nar) {
		t.Error("what Nix unpacked we dump to other bytes")
	}
}

// Real encoders cut xz files into blocks; the guard must let those through.
func TestXZGuardPassesRealFiles(t *testing.T) {
	if _, err := exec.LookPath("xz"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("xz is not installed: install xz-utils")
		}
		t.Skip("xz is not installed")
	}
	plain := bytes.Repeat(mixed(20_000), 150)
	for _, args := range []string{"-0 -T2", "-0 -T2 --block-size=512KiB", "-9", "-1 -C none", "-1 -C crc32", "-1 -C sha256"} {
		cmd := exec.CommandContext(t.Context(), "xz", append(strings.Fields(args), "-c")...)
		cmd.Stdin = bytes.NewReader(plain)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decompress("xz", bytes.NewReader(packed), math.MaxUint64); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("xz %s: %d bytes, %v", args, len(got), err)
		}
	}
}
