package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// TestPlace: a Nix store of the machine is never covered, and nothing else is taken
// for one.
func TestPlace(t *testing.T) {
	const path = "00000000000000000000000000000000-name"
	for name, tt := range map[string]struct {
		has, mount, want string
		err              error
	}{
		"nothing there":           {"", "", "", nil},
		"a store":                 {path, "", mountSession, nil},
		"a store without a path":  {".links", "", mountSession, nil},
		"a store, system":         {path, mountSystem, "", flox.ErrBusy},
		"nothing there, system":   {"", mountSystem, "", nil},
		"nothing there, session":  {"", mountSession, mountSession, nil},
		"other files":             {"notes", "", "", flox.ErrBusy},
		"other files, for system": {"notes", mountSystem, "", flox.ErrBusy},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &Config{StoreDir: filepath.Join(t.TempDir(), "store"), StateDir: "/state", Mount: tt.mount}
			if tt.has != "" {
				if err := os.MkdirAll(filepath.Join(cfg.StoreDir, tt.has), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			err := cfg.place("floxd agent")
			if !errors.Is(err, tt.err) || err == nil && cfg.Mount != tt.want {
				t.Errorf("mount %q (%v), want %q (%v)", cfg.Mount, err, tt.want, tt.err)
			}
			if at := cfg.mountDir(); err == nil && (at == "/state/mount") != (tt.want == mountSession) {
				t.Errorf("it is mounted at %s", at)
			}
		})
	}
}

// TestNeedsStore: who would stop without the store is named.
func TestNeedsStore(t *testing.T) {
	root := t.TempDir()
	if got := needsStore(root, "/nix/store"); !strings.Contains(got, "write nothing more") {
		t.Errorf("nothing runs: %q", got)
	}
	for link, to := range map[string]string{
		"run/current-system": "/nix/store/x-nixos", "proc/12/exe": "/nix/store/x-bash/bin/bash", "proc/13/exe": "/usr/bin/bash",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, link)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	want := "/run/current-system is /nix/store/x-nixos, process 12 runs /nix/store/x-bash/bin/bash, which would stop without it"
	if got := needsStore(root, "/nix/store"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestLinkSession: the word of a session's mount is there for as long as it is one.
func TestLinkSession(t *testing.T) {
	cfg := &Config{RunDir: t.TempDir(), StateDir: "/state", Mount: mountSession}
	link := filepath.Join(cfg.RunDir, cli.SessionLink)
	for range 2 {
		if err := cfg.linkSession(); err != nil {
			t.Fatal(err)
		}
		if to, err := os.Readlink(link); err != nil || to != "/state/mount" {
			t.Errorf("%s leads to %q (%v)", link, to, err)
		}
	}
	cfg.Mount = ""
	if err := cfg.linkSession(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}
