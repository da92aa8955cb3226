package worker

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/nextnix"
)

// needNix skips without Nix, but not where it has to be.
func needNix(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("nix-store"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("Nix is not installed: install nix-bin")
		}
		t.Skip("Nix is not installed")
	}
}

// stock runs the installed Nix against a daemon's socket, in a world of its own.
type stock struct {
	t       *testing.T
	env     []string
	tmp     string
	storeAt string
	bin     string // of its programs; "" = on PATH
}

func newStock(t *testing.T, dir flox.StoreDir, remote string) *stock {
	t.Helper()
	needNix(t)
	tmp := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tmp, "conf"), 0o755); err != nil {
		t.Fatal(err)
	}
	conf := "experimental-features = nix-command ca-derivations\nsandbox = false\nbuild-users-group =\nsubstituters =\n"
	if err := os.WriteFile(filepath.Join(tmp, "conf", "nix.conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	return &stock{t: t, tmp: tmp, storeAt: string(dir), env: []string{
		"HOME=" + tmp, "PATH=" + os.Getenv("PATH"), "NIX_CONF_DIR=" + tmp + "/conf", "NIX_USER_CONF_FILES=", "NIX_REMOTE=" + remote,
		"NIX_STORE_DIR=" + string(dir), "NIX_STATE_DIR=" + tmp + "/state", "NIX_LOG_DIR=" + tmp + "/log", "NIX_DATA_DIR=" + tmp + "/share",
	}}
}

// with has another Nix run, the one in the directory bin; "" = the installed one.
func (n *stock) with(bin string) *stock {
	n.bin = bin
	for i, e := range n.env {
		if path, ok := strings.CutPrefix(e, "PATH="); ok && bin != "" {
			n.env[i] = "PATH=" + bin + ":" + path
		}
	}
	return n
}

func (n *stock) command(args ...string) *exec.Cmd {
	name := args[0]
	if there := filepath.Join(n.bin, name); n.bin != "" && strings.HasPrefix(name, "nix") {
		name = there
	}
	cmd := exec.CommandContext(n.t.Context(), name, args[1:]...)
	cmd.Env, cmd.Dir = n.env, n.tmp
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (n *stock) try(args ...string) (stdout, stderr string, err error) {
	n.t.Helper()
	cmd := n.command(args...)
	var out, bad bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &bad
	err = cmd.Run()
	return strings.TrimSpace(out.String()), bad.String(), err
}

func (n *stock) run(args ...string) string {
	n.t.Helper()
	out, bad, err := n.try(args...)
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, bad)
	}
	return out
}

// listen serves a unix socket until the test ends and gives its path.
func listen(t *testing.T, serve func(ctx context.Context, conn net.Conn)) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { serve(ctx, conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		cancel()
		serving.Wait()
	})
	return socket
}

// TestStockNixIsServed runs everyday commands of a real Nix of each generation against
// a store behind this package.
func TestStockNixIsServed(t *testing.T) {
	needNix(t)
	for _, bin := range []string{"", nextnix.Bin(t)} {
		t.Run(generation(t, bin), func(t *testing.T) { t.Parallel(); testServed(t, bin) })
	}
}

func testServed(t *testing.T, bin string) {
	root := t.TempDir()
	dir := flox.StoreDir(filepath.Join(root, "store"))
	st := newDirStore(t, dir, root)
	server := &Server{Dir: dir, Version: "2.8.0-test", Open: st.open}
	socket := listen(t, func(ctx context.Context, conn net.Conn) {
		if err := server.Serve(ctx, conn, Peer{Trust: Trusted}); err != nil {
			t.Error(err)
		}
	})
	n := newStock(t, dir, "unix://"+socket).with(bin)

	source := n.run("nix-store", "--add", tree(t, map[string]string{"bin/hello": "#!/bin/sh\n", "empty": ""}))
	if got, err := os.ReadFile(filepath.Join(source, "bin/hello")); err != nil || string(got) != "#!/bin/sh\n" {
		t.Errorf("added %q, %v", got, err)
	}
	if got := n.run("nix-store", "-q", "--hash", source); !strings.HasPrefix(got, "sha256:") {
		t.Errorf("hash %q", got)
	}
	flat := n.run("nix-store", "--add-fixed", "sha1", filepath.Join(source, "bin/hello"))
	text := n.run("nix", "eval", "--raw", "--impure", "--expr", `builtins.toFile "text" "see ${builtins.storePath `+source+`}"`)
	if got := n.run("nix-store", "-qR", text); got != source+"\n"+text {
		t.Errorf("closure %q, want the text and its source", got)
	}
	if got := n.run("nix-store", "-q", "--referrers", source); got != text {
		t.Errorf("referrers %q", got)
	}
	if got := lines(n.run("nix", "path-info", "--all")); len(got) != 3 {
		t.Errorf("all paths %q", got)
	}
	if got := n.run("nix", "path-info", "-rS", text); !strings.Contains(got, source) {
		t.Errorf("path-info %q", got)
	}
	if out, got, err := n.try("nix", "store", "ping"); err != nil || !strings.Contains(out+got, "Version: 2.8.0-test") {
		t.Errorf("ping %v, %q, %q", err, out, got)
	}
	if got := n.run("nix", "store", "cat", source+"/bin/hello"); got != "#!/bin/sh" {
		t.Errorf("cat %q", got)
	}
	drv := n.run("nix-instantiate", "-E", `derivation { name = "d"; system = "x"; builder = "/b"; src = builtins.storePath `+source+`; }`)
	if _, err := os.Stat(strings.TrimSuffix(drv, "!out")); err != nil {
		t.Error(err)
	}

	// Copies out and in again, by every way a daemon is sent NARs.
	cache := "file://" + filepath.Join(n.tmp, "cache")
	n.run("nix", "copy", "--to", cache, text)
	export := n.run("sh", "-c", "nix-store --export $(nix-store -qR "+text+") > export; echo ok")
	if export != "ok" {
		t.Fatal(export)
	}
	for _, way := range [][]string{
		{"nix", "copy", "--no-check-sigs", "--from", cache, text},
		{"sh", "-c", "nix-store --import < export"},
	} {
		n.run("nix-store", "--delete", text, flat)
		if _, err := os.Stat(text); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("deleted, but %v", err)
		}
		n.run(way...)
		if got := n.run("nix-store", "-q", "--references", text); got != source {
			t.Errorf("%v: references %q", way, got)
		}
		flat = n.run("nix-store", "--add-fixed", "sha1", filepath.Join(source, "bin/hello"))
	}
	n.run("nix", "key", "generate-secret", "--key-name", "k")
	n.run("sh", "-c", "nix key generate-secret --key-name k > key && nix store sign -k key "+text)
	if got := n.run("nix", "path-info", "--sigs", text); !strings.Contains(got, "k:") {
		t.Errorf("signatures %q", got)
	}
	testStockRoots(n, st, text, source)
	n.run("nix-store", "--verify", "--check-contents")
	n.run("nix", "store", "verify", "--no-trust", "--all")
	absent := dir.Join(vPath)
	if _, bad, err := n.try("nix-store", "-r", absent); err == nil || !strings.Contains(bad, "does not exist and cannot be created") {
		t.Errorf("realise nothing: %v, %s", err, bad)
	}
	if _, bad, err := n.try("nix", "path-info", absent); err == nil || !strings.Contains(bad, "is not valid") {
		t.Errorf("info of nothing: %v, %s", err, bad)
	}
}

// testStockRoots keeps text by an indirect root and collects the rest.
func testStockRoots(n *stock, st *dirStore, text, source string) {
	n.t.Helper()
	link := filepath.Join(n.tmp, "result")
	n.run("nix-store", "-r", text, "--add-root", link, "--indirect")
	if got := n.run("nix-store", "--gc", "--print-roots"); !strings.Contains(got, link+" -> "+text) {
		n.t.Errorf("roots %q", got)
	}
	if got := n.run("nix-store", "--gc", "--print-live"); got != text+"\n"+source && got != source+"\n"+text {
		n.t.Errorf("live %q", got)
	}
	if _, bad, err := n.try("nix-store", "--delete", source); err == nil || !strings.Contains(bad, "since it is still alive") {
		n.t.Errorf("delete what lives: %v, %s", err, bad)
	}
	n.run("nix-collect-garbage")
	if got := lines(n.run("nix", "path-info", "--all")); len(got) != 2 {
		n.t.Errorf("paths after the collection: %q", got)
	}
}

// TestStockNixInterrupted: Ctrl-C in the client ends what the daemon does.
func TestStockNixInterrupted(t *testing.T) {
	needNix(t)
	root := t.TempDir()
	dir := flox.StoreDir(filepath.Join(root, "store"))
	st := newDirStore(t, dir, root)
	st.block, st.waits = make(chan struct{}), make(chan struct{})
	server := &Server{Dir: dir, Version: "2.8.0", Open: st.open}
	socket := listen(t, func(ctx context.Context, conn net.Conn) {
		if err := server.Serve(ctx, conn, Peer{}); err != nil {
			t.Error(err)
		}
	})
	cmd := newStock(t, dir, "unix://"+socket).command("nix-store", "--realise", dir.Join(vPath))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-st.waits
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-st.ended; !errors.Is(err, errHungUp) {
		t.Errorf("the daemon's part ended because of %v", err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the client says it worked")
	}
}
