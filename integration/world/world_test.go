package world

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/need"
	"github.com/floxctl/flox/integration/netns"
)

func built(t *testing.T) *World {
	need.Nix(t)
	need.Root(t)
	w, err := Ensure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// TestProgramsNeedNothingButTheStore runs every program of the world in a
// root directory that holds only the store.
func TestProgramsNeedNothingButTheStore(t *testing.T) {
	w := built(t)
	const numpy = `import numpy, sqlite3, ssl, ctypes
a = numpy.arange(12.).reshape(3, 4)
print(int((a @ a.T).trace()), round(float(numpy.linalg.norm(numpy.linalg.inv(numpy.eye(3) * 2))), 3))
files = {line.split()[5] for line in open("/proc/self/maps") if len(line.split()) > 5 and line.split()[5][0] == "/"}
print("outside:", sorted(f for f in files if "/nix/store/" not in f))`
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"git", []string{w.Git.Exe, "--version"}, "git version 2."},
		{"git with templates", []string{w.Git.Exe, "init", "/tmp/r"}, "Initialized empty"},
		// Both fail, and say so through Perl's modules and through ssh.
		{"git with perl", []string{w.Git.Exe, "add--interactive"}, "not a git repository"},
		{"git with ssh", []string{w.Git.Exe, "ls-remote", "ssh://localhost/r"}, "No user exists for uid 0"},
		{"rg", []string{w.Ripgrep.Exe, "--version"}, "ripgrep "},
		{"rg reads the store", []string{w.Ripgrep.Exe, "-l", "PYTHONHOME=", w.StoreDir.Join(w.Python.Path) + "/bin"}, "bin/python3"},
		{"python", []string{w.Python.Exe, "-c", numpy}, "506 0.866\noutside: []"},
		{"file", []string{w.Unused.Exe, w.Python.Exe}, "script"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"--mount", "--propagation", "private", "--", "sh", "-c", alone, "alone", w.Nix().Dir, t.TempDir(), ""}, tt.args...)
			out, err := exec.CommandContext(t.Context(), "unshare", args...).CombinedOutput()
			if !strings.Contains(string(out), tt.want) {
				t.Errorf("%v, printed %q, want %q in it", err, out, tt.want)
			}
		})
	}
}

func TestWorldIsWhatTheDemoNeeds(t *testing.T) {
	w := built(t)
	demo := map[flox.StorePath]bool{}
	for _, p := range []Program{w.Git, w.Ripgrep, w.Python, w.Unused} {
		for _, c := range w.Closure(p.Path) {
			demo[c.Path] = true
		}
	}
	if len(demo) < 70 {
		t.Errorf("the programs' closures are %d store paths, want 70 or more", len(demo))
	}
	for _, v := range w.Versions {
		if v.Old == "" || v.New == "" || v.Old == v.New {
			t.Errorf("version %+v is no pair", v)
		}
	}
	// Nothing in the store may know where this machine keeps it.
	out, err := exec.CommandContext(t.Context(), "grep", "-rlF", "--", w.Dir, filepath.Join(w.Nix().Dir, "store")).CombinedOutput()
	if err == nil {
		t.Errorf("store paths mention %s:\n%s", w.Dir, out)
	}
	if _, err := w.Command(t.Context(), "nix-store", "--verify", "--check-contents").CombinedOutput(); err != nil {
		t.Errorf("nix-store --verify: %v", err)
	}
}

// TestLayeredLeavesTheWorldAlone adds a path in a layer: it is there, and the
// world below knows nothing of it.
func TestLayeredLeavesTheWorldAlone(t *testing.T) {
	w := built(t)
	file := filepath.Join(t.TempDir(), "only-a")
	if err := os.WriteFile(file, []byte("only here\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	layer := w.Layered(t.TempDir())
	out, err := output(layer.Command(t.Context(), "nix-store", "--add", file))
	if err != nil {
		t.Fatal(err)
	}
	path := strings.TrimSpace(string(out))
	if got, err := output(layer.Command(t.Context(), "cat", path)); err != nil || string(got) != "only here\n" {
		t.Errorf("in the layer: %q, %v", got, err)
	}
	if out, err := output(w.Command(t.Context(), "nix-store", "--check-validity", path)); err == nil {
		t.Errorf("%s is valid in the world below: %s", path, out)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Errorf("%s is in the machine's own store", path)
	}
}

// TestCommandRunsInANetworkNamespace serves the world's store from a host over
// HTTP to stock Nix on another.
func TestCommandRunsInANetworkNamespace(t *testing.T) {
	w := built(t)
	need.Namespaces(t)
	ctx := t.Context()
	network, err := netns.New(ctx, netns.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer network.Close()
	subnet, err := network.Subnet(ctx, "office", netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	server, err := network.Host(ctx, "server", subnet)
	if err != nil {
		t.Fatal(err)
	}
	client, err := network.Host(ctx, "client", subnet)
	if err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	layer := w.Layered(t.TempDir())
	shell := w.StoreDir.Join(w.Closure(w.Ripgrep.Path)[0].Path)
	if _, err := output(layer.Command(ctx, "nix", "copy", "--to", "file://"+cache, shell)); err != nil {
		t.Fatal(err)
	}
	listener, err := server.Listen(ctx, "tcp", "0.0.0.0:80")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() { _ = http.Serve(listener, http.FileServer(http.Dir(cache))) }()

	empty := Nix{Dir: t.TempDir(), NetNS: client.NetNS()}
	if _, err := output(empty.Command(ctx, "nix", "copy", "--no-check-sigs", "--from", "http://"+server.Addr().String(), shell)); err != nil {
		t.Fatal(err)
	}
	if _, err := output(empty.Command(ctx, "nix-store", "--check-validity", shell)); err != nil {
		t.Error(err)
	}
	// Without the namespace the server does not exist.
	elsewhere := Nix{Dir: t.TempDir()}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := output(elsewhere.Command(short, "nix", "path-info", "--store", "http://"+server.Addr().String(), shell)); err == nil {
		t.Error("the server was reached from outside")
	}
}

func TestEnsureWaitsForAnotherBuilder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	held, err := lock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, file); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second builder: got %v, want to wait", err)
	}
	_ = held.Close()
	again, err := lock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}

func TestUnfinishedWorldIsNotLoaded(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "nix", "store"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := load(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no marker: got %v, want not to exist", err)
	}
	if err := os.WriteFile(filepath.Join(dir, marker), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := load(dir); err == nil || !strings.Contains(err.Error(), "remove "+dir) {
		t.Errorf("damaged marker: got %v, want what to do", err)
	}
}

func TestResolve(t *testing.T) {
	known, err := parseControl([]byte(`Package: git
Version: 1:2.0
Depends: libc6 (>= 2.28), perl:any,
 libcontinued
Pre-Depends: virtual | other

Package: libc6
Version: 2
Depends: libgcc-s1

Package: libgcc-s1
Version: 3
Depends: libc6

Package: perl
Version: 5
Depends: perl-modules, dpkg (>= 1)

Package: perl-modules
Version: 5
Depends: perl

Package: real
Version: 1
Provides: virtual (= 1)
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ripgrep", "python3", "python3-numpy", "file", "dash", "less", "openssh-client"} {
		known = append(known, control{Name: name, Version: "1"})
	}
	got, err := demo.resolve(known)
	if err != nil {
		t.Fatal(err)
	}
	deps := map[string][]string{}
	for name, p := range got {
		deps[name] = p.Deps
	}
	want := map[string][]string{
		"git":          {"dash", "less", "libc6", "openssh-client", "perl", "real"},
		"libc6":        {},
		"perl":         {"dash", "perl-modules"},
		"perl-modules": {"dash"}, // its way back to perl is cut
		"real":         {},
		"ripgrep":      {}, "python3": {}, "python3-numpy": {}, "file": {}, "dash": {}, "less": {}, "openssh-client": {},
	}
	if d := cmp.Diff(want, deps); d != "" {
		t.Errorf("dependencies (-want +got):\n%s", d)
	}
	if _, err := demo.resolve(known[1:]); err == nil {
		t.Error("a missing package was not noticed")
	}
}

func FuzzParseControl(f *testing.F) {
	f.Add([]byte("Package: a\nVersion: 1\nDepends: b (>= 1) | c:any, d\n\n"))
	f.Add([]byte(": \n\nDepends: ,|,\nProvides: (\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseControl(b)
		if err != nil {
			return
		}
		for _, c := range all {
			for _, alternatives := range c.Depends {
				if len(alternatives) == 0 || c.Name == "" {
					t.Errorf("%+v: empty name or relation", c)
				}
			}
		}
	})
}

// TestMissingDependenciesAreAskedForAgain: apt follows the dependencies of what
// this machine has, which may be others than those of the archive's package.
func TestMissingDependenciesAreAskedForAgain(t *testing.T) {
	known, err := parseControl([]byte(`Package: node
Version: 20-elsewhere
Depends: python3

Package: node
Version: 18
Filename: pool/node.deb
Depends: libnode | libnode-legacy, virtual, libother

Package: real
Version: 1
Filename: pool/real.deb
Provides: virtual
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := []string{known[0].File, known[1].File}; got[0] != "" || got[1] != "pool/node.deb" {
		t.Errorf("files in the archive: %q", got)
	}
	if d := cmp.Diff([]string{"libnode", "libother"}, missing(known[1:])); d != "" {
		t.Errorf("missing (-want +got):\n%s", d)
	}
}

func TestToolsAreBuiltAndChecked(t *testing.T) {
	wanted := map[string]bool{"python": true, "compiler": true}
	for _, name := range tools.tops {
		wanted[name] = true
	}
	for _, spec := range toolSpecs {
		if !wanted[spec.attr] || spec.want == "" {
			t.Errorf("%+v: its package is not asked for, or nothing is looked for in its output", spec)
		}
	}
	if len(toolSpecs) < 20 || tools.key() == demo.key() {
		t.Errorf("%d tools, key %s", len(toolSpecs), tools.key())
	}
	w := built(t)
	tool := Tool{Name: "git", Program: w.Git, Args: []string{"hash-object", "input.txt"}, Want: "no hash"}
	if err := w.tryTool(t.Context(), tool); err == nil {
		t.Error("a tool that prints something else was accepted")
	}
	tool.Want = "\n"
	if err := w.tryTool(t.Context(), tool); err != nil {
		t.Error(err)
	}
}
