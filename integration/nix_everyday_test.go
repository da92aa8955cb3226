package integration

import (
	"fmt"
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
	l.bindsBoth(t, a, flakes, profile, profile+"2")
	flakes("shell", ripgrep, "-c", "rg", "--version").want(t, 0, "ripgrep ")
	nix("env", "NIX_BUILD_SHELL=/bin/bash", "nix-shell", filepath.Join(dir, "shell.nix"), "--run", "greet; $tool/bin/rg --version").want(t, 0, "hello from shell", "ripgrep ")
}

// bindsBoth has what nix-env made, and nix profile, become profiles of the storehouse, which
// nix profile reads and changes from then on. nix-env does neither with one that nix profile
// can read.
func (l *lab) bindsBoth(t *testing.T, a *hosts.Agent, flakes func(args ...string) result, profiles ...string) {
	t.Helper()
	ctl := func(want []string, args ...string) {
		t.Helper()
		do(t, a.Host, l.programs.Floxctl, args...).want(t, 0, want...)
	}
	extra := filepath.Join(openDir(t), "extra-1.0")
	must(t, os.MkdirAll(filepath.Join(extra, "bin"), 0o755)) //nolint:gosec // another user reads it
	must(t, os.WriteFile(filepath.Join(extra, "bin/extra"), []byte("#!/bin/sh\necho more\n"), 0o755))
	added := lastLine(stockNix(t, a.Host, "nix-store", "--add", extra))
	for i, made := range profiles {
		shared := fmt.Sprint("root/bound", i)
		shows := func(what, program string, want bool) {
			t.Helper()
			eventually(t, what, func() bool {
				return (do(t, a.Host, "ls", "/flox/"+shared+"/bin/"+program).code == 0) == want
			})
		}
		ctl(nil, "profile", "create", shared)
		ctl(nil, "profile", "grant", shared, "*=reader") // this machine speaks for nobody
		ctl([]string{made}, "profile", "bind", made, shared)
		shows(made+" is one with "+shared, "rg", true)
		ctl([]string{"nix-env", "+ripgrep 13.0.0"}, "history", "-p", shared)
		do(t, a.Host, made+"/bin/rg", "--version").want(t, 0, "ripgrep ")
		eventually(t, made+" leads to what the storehouse made", func() bool {
			return strings.HasSuffix(strings.TrimSpace(do(t, a.Host, "realpath", made).out), "-environment")
		})
		flakes("profile", "list", "--profile", made).want(t, 0, l.world.StoreDir.Join(l.world.Ripgrep.Path))
		stockNix(t, a.Host, "nix-env", "-p", made, "-q").want(t, 1, "use 'nix profile' instead")
		flakes("profile", "install", "--profile", made, added).want(t, 0)
		shows("what nix profile installs is in "+shared, "extra", true)
		do(t, a.Host, made+"/bin/extra").want(t, 0, "more")
		ctl([]string{"extra", "ripgrep"}, "list", "-p", shared)
		flakes("profile", "remove", "--profile", made, added).want(t, 0)
		shows("what nix profile removes is not in "+shared, "extra", false)
		ctl([]string{"ripgrep"}, "list", "-p", shared)
	}
}
