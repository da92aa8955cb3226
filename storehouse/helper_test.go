package storehouse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

func TestMain(m *testing.M) {
	buildfarm.Inside()
	if dir := os.Getenv("STOREHOUSE_TEST_DIR"); dir != "" {
		runChild(dir)
	}
	if dir := os.Getenv(figureServerEnv); dir != "" {
		runFigureServer(dir)
	}
	goleak.VerifyTestMain(m,
		// Processes' own, in libraries: started once, never stopped.
		goleak.IgnoreTopFunction("github.com/ipfs/go-log/writer.(*MirrorWriter).logRoutine"),
		goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// testConfig is a storehouse for itself on loopback.
func testConfig(dir string) Config {
	c := Config{
		StateDir: dir, Name: "test", HTTPListen: "127.0.0.1:0", Listen: []string{"127.0.0.1:0"},
		NoMDNS: true, OpenMembership: true, ReserveBytes: 1 << 20,
		// However full the disk of the test machine is.
		Watermarks: Watermarks{Slow: 100, Essential: 100, ReadOnly: 100},
	}
	if os.Getenv("STOREHOUSE_TEST_LOG") != "" {
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return c
}

// start runs a storehouse until the test ends or stop is called.
func start(t *testing.T, cfg Config) (s *Server, stop func()) {
	t.Helper()
	return startChanged(t, cfg, func(*Server) {})
}

// startChanged is start of a server that something is changed of before it runs.
func startChanged(t *testing.T, cfg Config, change func(*Server)) (s *Server, stop func()) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	change(s)
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Run(ctx) }()
	stopped := false
	stop = func() {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-result; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	if err := s.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	return s, stop
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// testPath is a store path, its NAR and its facts.
type testPath struct {
	info *flox.PathInfo
	nar  []byte
}

func (p testPath) reader() *bytes.Reader { return bytes.NewReader(p.nar) }

// makePath makes a path with a file of size random bytes, one symlink, and references.
func makePath(t testing.TB, name string, size int, refs ...flox.StorePath) testPath {
	t.Helper()
	seed := sha256.Sum256([]byte(name))
	data := make([]byte, size)
	rand.NewChaCha8(seed).Read(data) //nolint:errcheck // never fails
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(w.Entry(nix.NarEntry{Kind: flox.Directory}))
	must(w.Entry(nix.NarEntry{Path: "bin", Kind: flox.Directory}))
	must(w.Entry(nix.NarEntry{Path: "bin/" + name, Kind: flox.Regular, Executable: true, Size: uint64(size)}))
	_, err := w.Write(data)
	must(err)
	must(w.Entry(nix.NarEntry{Path: "link", Kind: flox.Symlink, Target: "bin/" + name}))
	must(w.Close())
	return asPath(name, b.Bytes(), refs...)
}

// makeCrowded is a path of so many files that its manifest has several pages.
func makeCrowded(t testing.TB, name string, files int) testPath {
	t.Helper()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	err := w.Entry(nix.NarEntry{Kind: flox.Directory})
	for i := range files {
		err = errors.Join(err, w.Entry(nix.NarEntry{Path: fmt.Sprintf("%06d-with-a-rather-long-name-so-that-pages-fill", i), Kind: flox.Regular}))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return asPath(name, b.Bytes())
}

// asPath makes a store path of a NAR.
func asPath(name string, nar []byte, refs ...flox.StorePath) testPath {
	seed := sha256.Sum256([]byte(name))
	hash := nix.EncodeBase32(nix.CompressHash(seed[:], 20))
	slices.Sort(refs)
	return testPath{&flox.PathInfo{
		Path: flox.StorePath(hash + "-" + name), NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar)), References: refs,
	}, nar}
}

// publish publishes p and checks that it is new.
func publish(t *testing.T, s *Server, p testPath) *flox.PathInfo {
	t.Helper()
	info, was, err := s.Publish(within(t), p.info, p.reader(), "tester")
	if err != nil || was {
		t.Fatalf("publish %s: was valid %v, %v", p.info.Path, was, err)
	}
	return info
}

// checkWhole checks that a path is valid, signed, and gives its NAR bit for bit.
func checkWhole(t *testing.T, s *Server, p testPath) {
	t.Helper()
	info, err := s.Info(within(t), p.info.Path.HashPart())
	if err != nil {
		t.Fatal(err)
	}
	if info.Path != p.info.Path || info.NarHash != p.info.NarHash || !slices.Equal(info.References, p.info.References) {
		t.Errorf("info %+v, want that of %+v", info, p.info)
	}
	m, err := content.OpenManifest(within(t), info.Manifest, s.Blocks())
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := m.WriteNar(within(t), &got, s.Blocks(), 0, int64(m.NarSize())); err != nil {
		t.Fatalf("%s: %v", p.info.Path, err)
	}
	if !bytes.Equal(got.Bytes(), p.nar) {
		t.Errorf("%s: the NAR is another", p.info.Path)
	}
	key, err := nix.ParsePublicKey(s.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := nix.NewKeyRing(key).Verify([]byte(nix.Fingerprint(s.cfg.StoreDir, info)), info.Signatures); !ok {
		t.Errorf("%s: no signature of %s over Nix's fingerprint: %v", p.info.Path, key.Name(), info.Signatures)
	}
	lists, err := s.trustLists(within(t), 0)
	if err != nil || len(lists) == 0 {
		t.Fatalf("trust lists: %d, %v", len(lists), err)
	}
	list, err := content.ParseTrustList(lists[len(lists)-1])
	if err != nil {
		t.Fatal(err)
	}
	if err := list.VerifyInfo(s.cfg.StoreDir, info); err != nil {
		t.Error(err)
	}
}

// isRoot skips a test that needs root, or fails it where everything must run.
func isRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("needs root")
	}
	t.Skip("needs root to mount a small disk")
}

func stateFile(s *Server, name string) string { return filepath.Join(s.cfg.StateDir, name) }
