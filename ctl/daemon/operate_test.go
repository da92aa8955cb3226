package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/storehouse"
)

// TestOperate runs floxctl as operators do: against a storehouse that runs, on its
// own socket ($HOUSE), and from a machine that joined ($AGENT).
func TestOperate(t *testing.T) {
	dir, err := os.MkdirTemp("", "operate") // a socket's name must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	house, endpoint := filepath.Join(dir, "h"), filepath.Join(dir, "a")
	server := runHouse(t, filepath.Join(dir, "house"), house)
	runEndpoint(t, server, filepath.Join(dir, "agent"), endpoint)
	kept, held := publishTree(t, server, "kept"), publishTree(t, server, "held")
	cache, key, offered := makeCache(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/operate", RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			for name, value := range map[string]string{
				"HOUSE": house, "AGENT": endpoint, "FLOXD_SOCKET": house, "TZ": "UTC",
				"KEPT": server.Config().StoreDir.Join(kept), "HELD": string(held), "CACHE": cache, "KEY": key, "OFFERED": string(offered),
			} {
				env.Setenv(name, value)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": runExits, "until": runUntil},
	})
}

// runUntil is the script command `until REGEXP program args...`: it runs a program
// again and again until it prints what is waited for.
func runUntil(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until REGEXP program args...")
	}
	want := regexp.MustCompile("(?m)" + args[0])
	for end := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		err := ts.Exec(args[1], args[2:]...)
		out := ts.ReadFile("stdout")
		if err == nil && want.MatchString(out) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("not within a minute: %s; last: %q, %v", args[0], out, err)
		}
	}
}

// runFor runs something until the test ends.
func runFor(t *testing.T, what string, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
}

func runHouse(t *testing.T, dir, socket string) *storehouse.Server {
	t.Helper()
	server, err := storehouse.New(storehouse.Config{
		StateDir: dir, Name: "house", HTTPListen: "127.0.0.1:0", Listen: []string{"127.0.0.1:0"}, NoMDNS: true, OpenMembership: true,
		ReserveBytes: 1 << 20, Watermarks: storehouse.Watermarks{Slow: 100, Essential: 100, ReadOnly: 100}, Socket: socket,
		CollectGrace: time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	runFor(t, "storehouse", server.Run)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := server.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	return server
}

// runEndpoint runs an agent that mounts nothing.
func runEndpoint(t *testing.T, server *storehouse.Server, dir, socket string) {
	t.Helper()
	endpoint, err := agent.New(agent.Config{
		StateDir: dir, Socket: socket, Invite: server.Invite(), Listen: []string{"127.0.0.1:0"}, NoMDNS: true,
		CacheReserve: 1, CacheBudget: 64 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	runFor(t, "agent", endpoint.Run)
}

// makeCache makes a binary cache in a directory, with one path.
func makeCache(t *testing.T) (dir, key string, p flox.StorePath) {
	t.Helper()
	dir = t.TempDir()
	secret, err := nix.GenerateKey("cache-1")
	if err != nil {
		t.Fatal(err)
	}
	nar := makeTree(t, "offered")
	info := flox.PathInfo{NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar))}
	if info.Path, err = flox.ParseStorePath("0123456789abcdfghijklmnpqrsvwxyz-offered"); err != nil {
		t.Fatal(err)
	}
	info.Signatures = []string{secret.Sign([]byte(nix.Fingerprint(flox.DefaultStoreDir, &info)))}
	file := nix.NarInfo{Info: info, URL: "offered.nar", Compression: "none"}
	for name, b := range map[string][]byte{file.URL: nar, info.Path.HashPart() + ".narinfo": file.Marshal(flox.DefaultStoreDir)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, secret.Public().String(), info.Path
}

func publishTree(t *testing.T, server *storehouse.Server, name string) flox.StorePath {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	info, _, err := server.PublishSource(ctx, name, bytes.NewReader(makeTree(t, name)), "test")
	if err != nil {
		t.Fatal(err)
	}
	return info.Path
}

// makeTree is the NAR of a directory with a file.
func makeTree(t *testing.T, name string) []byte {
	t.Helper()
	var nar bytes.Buffer
	w := nix.NewNarWriter(&nar)
	content := []byte("a file of " + name)
	for _, step := range []func() error{
		func() error { return w.Entry(nix.NarEntry{Kind: flox.Directory}) },
		func() error {
			return w.Entry(nix.NarEntry{Path: "file", Kind: flox.Regular, Size: uint64(len(content))})
		},
		func() error { _, err := w.Write(content); return err },
		w.Close,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	return nar.Bytes()
}
