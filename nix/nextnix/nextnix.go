// Package nextnix finds, for tests, a Nix that is newer than the one installed on this
// machine. It must not know what is done with it.
package nextnix

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// Bin gives the directory with its programs, to stand first on PATH; scripts/nextnix
// unpacks it once per machine. Where it cannot be had the test is skipped, under CI it
// fails.
func Bin(t testing.TB) string {
	t.Helper()
	_, self, _, _ := runtime.Caller(0)
	cmd := exec.CommandContext(context.Background(), filepath.Join(filepath.Dir(self), "../../scripts/nextnix"))
	var bad bytes.Buffer
	cmd.Stderr = &bad
	out, err := cmd.Output()
	if err != nil && os.Getenv("CI") != "true" {
		t.Skipf("no newer Nix: %v: %s", err, bad.Bytes())
	}
	if err != nil {
		t.Fatalf("no newer Nix: %v: %s", err, bad.Bytes())
	}
	return strings.TrimSpace(string(out))
}
