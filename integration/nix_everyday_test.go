package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
)

// everyday: nix-env, nix profile, nix shell and nix-shell, which direnv runs, are what
// their users know. Profiles keep their generations, and what is in them stays.
func (l *lab) everyday(t *testing.T, house *hosts.Storehouse, a *hosts.Agent) {
	t.Helper()
	must(t, l.copyTo(t.Context(), house, l.world.Ripgrep.Path))
	nix := func(args ...string) result { t.Helper(); return stockNix(t, a.Host, args...) }
	flakes := func(args ...string) result {
		t.Helper()
		return nix(append([]string{"nix", "--extra-experimental-features", "nix-command flakes"}, args...)...)
	}
	dir, ripgrep := openDir(t), l.world.StoreDir.Join(l.world.Ripgrep.Path)
	for name, text := range map[string]string{
		"own.nix": `{ own = derivation { name = "own-1.0"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo own >$out" ]; }; }`,
		"shell.nix": `derivation { name = "shell"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo >$out" ];
			stdenv = ./stdenv; tool = builtins.storePath "` + ripgrep + `"; }`,
		"stdenv/setup": `greet() { echo "hello from $name"; }`,
	} {
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(text), 0o644)) //nolint:gosec // another user reads it
	}

	profile := filepath.Join(dir, "profile")
	env := func(args ...string) result {
		t.Helper()
		return nix(append([]string{"nix-env", "-p", profile}, args...)...)
	}
	env("-i", ripgrep).want(t, 0)
	do(t, a.Host, profile+"/bin/rg", "--version").want(t, 0, "ripgrep ")
	env("-q").want(t, 0, "ripgrep")
	env("-e", "ripgrep").want(t, 0)
	do(t, a.Host, "ls", profile+"/bin/rg").want(t, 2)
	env("--rollback").want(t, 0)
	do(t, a.Host, profile+"/bin/rg", "--version").want(t, 0, "ripgrep ")
	env("--list-generations").want(t, 0, "1 ", "(current)", "2 ")
	nix("nix-store", "--gc", "--print-roots").want(t, 0, profile+"-1-link -> ")
	env("--delete-generations", "2").want(t, 0)
	nix("nix-env", "-f", filepath.Join(dir, "own.nix"), "-qaP").want(t, 0, "own-1.0")

	flakes("profile", "install", "--profile", profile+"2", ripgrep).want(t, 0)
	do(t, a.Host, profile+"2/bin/rg", "--version").want(t, 0, "ripgrep ")
	flakes("profile", "list", "--profile", profile+"2").want(t, 0, ripgrep)
	// What both made becomes a profile of the storehouse.
	for made, shared := range map[string]string{profile: "root/env", profile + "2": "root/profile"} {
		do(t, a.Host, l.programs.Floxctl, "profile", "bind", made, shared).want(t, 0, made)
		eventually(t, made+" is one with "+shared, func() bool {
			return strings.HasPrefix(do(t, a.Host, "/flox/"+shared+"/bin/rg", "--version").out, "ripgrep ")
		})
		do(t, a.Host, l.programs.Floxctl, "history", "-p", shared).want(t, 0, "nix-env", "+ripgrep 13.0.0")
		do(t, a.Host, made+"/bin/rg", "--version").want(t, 0, "ripgrep ")
	}
	flakes("shell", ripgrep, "-c", "rg", "--version").want(t, 0, "ripgrep ")
	nix("env", "NIX_BUILD_SHELL=/bin/bash", "nix-shell", filepath.Join(dir, "shell.nix"), "--run", "greet; $tool/bin/rg --version").want(t, 0, "hello from shell", "ripgrep ")
}
