// Package need says what a test needs of the machine: root, FUSE, stock Nix.
//
// Where it is missing the test is skipped with a reason, unless CI=true: then
// it fails, so that nothing is ever green because nothing ran. The package
// must not know what the test does with it.
package need

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Root skips (CI: fails) the test unless it runs as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "not root: run `make test` (it uses sudo) or run the test as root")
	}
}

// FUSE skips (CI: fails) the test unless it runs as root and /dev/fuse opens.
func FUSE(t testing.TB) {
	t.Helper()
	Root(t)
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		missing(t, "cannot open /dev/fuse ("+err.Error()+"): load the module with `modprobe fuse`, or give the container --device /dev/fuse")
		return
	}
	_ = f.Close()
}

// Nix skips (CI: fails) the test unless stock Nix is installed outside of /nix,
// so that it still runs with another directory mounted there.
func Nix(t testing.TB) {
	t.Helper()
	for _, name := range []string{"nix", "nix-store", "nix-build"} {
		Command(t, name)
		file, err := exec.LookPath(name)
		if err != nil {
			return // only when missing did not stop the test
		}
		if real, err := filepath.EvalSymlinks(file); err == nil && strings.HasPrefix(real, "/nix/") {
			missing(t, name+" lies in /nix, which the tests cover: install Debian's nix-bin with scripts/setup")
		}
	}
}

// Namespaces skips (CI: fails) the test unless it runs as root and the machine
// has what integration/netns uses: ip, nsenter, unshare, iptables, tc.
func Namespaces(t testing.TB) {
	t.Helper()
	Root(t)
	for _, name := range []string{"ip", "bridge", "tc", "nsenter", "unshare", "iptables"} {
		Command(t, name)
	}
}

// Command skips (CI: fails) the test unless a program of that name is found.
func Command(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		missing(t, "no "+name+" found: run scripts/setup")
	}
}

func missing(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal("needed under CI: " + reason)
		return
	}
	t.Skip(reason)
}
