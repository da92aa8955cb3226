package integration

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
)

// installs: what stock Nix evaluates on a machine is built in the storehouse and is in
// the profile; so is what was added on this machine only. What fails changes nothing.
func (l *lab) installs(t *testing.T, a *hosts.Agent) {
	t.Helper()
	dir, ripgrep := openDir(t), l.world.StoreDir.Join(l.world.Ripgrep.Path)
	file := filepath.Join(dir, "tools.nix")
	must(t, os.WriteFile(file, []byte(`{ system ? builtins.currentSystem }: {
		pkgs.tool = derivation { # a directory with a link to ripgrep's programs
			name = "tool-1.5"; inherit system; builder = "builtin:buildenv"; manifest = "none";
			derivations = [ "true" 5 1 (builtins.storePath "`+ripgrep+`") ];
		};
		broken = derivation { name = "broken-1"; inherit system; builder = "/bin/sh"; args = [ "-c" "echo it breaks; exit 3" ]; };
	}`), 0o644)) //nolint:gosec // another user reads it
	must(t, os.MkdirAll(filepath.Join(dir, "site", "share", "doc"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "site", "share", "doc", "site.txt"), []byte("of this machine"), 0o644)) //nolint:gosec // another user reads it
	floxctl := func(args ...string) result { t.Helper(); return l.ctl(t, a, args...) }

	floxctl("install", file+"#pkgs.tol").want(t, 2, "has no attribute pkgs.tol: where tol should be it has tool")
	floxctl("install", file+"#pkgs").want(t, 2, "is no derivation, but has: tool")
	floxctl("install", file+"#broken").want(t, 2, "it breaks", "nothing was installed")
	floxctl("list").want(t, 3)

	floxctl("install", ripgrep, "--dry-run").want(t, 0, "+ ripgrep", "Nothing was changed")
	floxctl("install", ripgrep, "--reason", "to search").want(t, 0, "+ ripgrep", "generation 1 lives now")
	site := lastLine(stockNix(t, a.Host, "nix-store", "--add", filepath.Join(dir, "site")))
	floxctl("install", file+"#pkgs.tool", "--dry-run").want(t, 0, "+ tool 1.5", "To be built or brought first: ", "Nothing was changed")
	floxctl("install", file+"#pkgs.tool").want(t, 2, "bin/rg of", "both have priority 5")
	floxctl("install", file+"#pkgs.tool", site, "--priority", "6").want(t, 0, "+ site", "+ tool 1.5", "generation 2 lives now")
	floxctl("why", "ripgrep").want(t, 0, "generation 1 (to search)", ripgrep)
	env := environmentOf(t, floxctl("list", "--json"))
	do(t, a.Host, env+"/bin/rg", "--version").want(t, 0, "ripgrep ")
	do(t, a.Host, "cat", env+"/share/doc/site.txt").want(t, 0, "of this machine")
	floxctl("rollback").want(t, 0, "generation 1 lives again")
	floxctl("diff", "2").want(t, 0, "- site", "- tool 1.5")
}

// names: what an admin publishes in a channel is found, built and installed by name, and
// upgraded with the channel.
func (l *lab) names(t *testing.T, house *hosts.Storehouse, a *hosts.Agent) {
	t.Helper()
	dir := filepath.Join(openDir(t), "nixexprs")
	publish := func(version string, code int, said ...string) {
		t.Helper()
		for name, text := range map[string]string{
			"default.nix": `{ system ? builtins.currentSystem }: {
				hi = derivation { name = "hi-` + version + `"; inherit system; builder = "builtin:buildenv"; manifest = "none"; derivations = [ "true" 5 1 ./hi ]; }
					// { meta.description = "Says hi"; };
				nosy = builtins.readFile /etc/hostname;
			}`,
			"hi/bin/hi": "#!/bin/sh\necho hi " + version + "\n",
		} {
			file := filepath.Join(dir, name)
			must(t, os.MkdirAll(filepath.Dir(file), 0o755))
			must(t, os.WriteFile(file, []byte(text), 0o755)) //nolint:gosec // another user runs it
		}
		// Who is no admin is refused; what was to be published is in the storehouse then.
		l.ctl(t, a, "channel", "publish", "nixexprs", dir).want(t, 5, "admin")
		source := lastLine(stockNix(t, a.Host, "nix-store", "--add", dir))
		do(t, house.Host, l.programs.Floxctl, "channel", "publish", "nixexprs", source).want(t, code, said...)
	}
	floxctl := func(args ...string) result { t.Helper(); return l.ctl(t, a, args...) }
	floxctl("install", "hi").want(t, 3, "there is no channel", "floxctl channel track nixpkgs https://channels.nixos.org/")
	floxctl("search", "hi").want(t, 3, "floxctl channel publish")
	publish("1.0", 0, "Left out: nosy for x86_64-linux", "forbidden in restricted mode", "version 1, 1 packages")
	floxctl("search", "says").want(t, 0, "nixexprs.hi", "1.0", "Says hi")
	floxctl("install", "hii").want(t, 3, "there is hi")
	floxctl("install", "hi", "--dry-run").want(t, 0, "+ hi 1.0", "Nothing was changed")
	floxctl("install", "hi").want(t, 0, "+ hi 1.0")
	do(t, a.Host, environmentOf(t, floxctl("list", "--json"))+"/bin/hi").want(t, 0, "hi 1.0")
	floxctl("upgrade").want(t, 0, "is so already")
	publish("2.0", 0, "version 2, 1 packages")
	floxctl("upgrade", "--dry-run").want(t, 0, "~ hi: 1.0 -> 2.0", "Nothing was changed")
	floxctl("hold", "hi").want(t, 0, "hi 1.0: held")
	floxctl("upgrade").want(t, 0, "is so already")
	floxctl("upgrade", "hi").want(t, 2, "floxctl unhold hi")
	floxctl("unhold", "hi").want(t, 0)
	floxctl("upgrade").want(t, 0, "~ hi: 1.0 -> 2.0")
	do(t, a.Host, environmentOf(t, floxctl("list", "--json"))+"/bin/hi").want(t, 0, "hi 2.0")
	floxctl("install", "nixexprs.hi@1.0").want(t, 0, "~ hi: 2.0 -> 1.0")
	floxctl("upgrade").want(t, 0, "is so already")
	floxctl("channel", "show", "nixexprs").want(t, 0, "root on")
	l.tracks(t, house, a)
}

// tracks: what is published as a tarball is fetched by the storehouse, and installed by
// name; each new one is a version of the channel.
func (l *lab) tracks(t *testing.T, house *hosts.Storehouse, a *hosts.Agent) {
	t.Helper()
	web := openDir(t)
	publish := func(version string) {
		t.Helper()
		dir := filepath.Join(openDir(t), "nixos-1")
		must(t, os.MkdirAll(filepath.Join(dir, "bin"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "bin", "hello"), []byte("#!/bin/sh\necho hello "+version+"\n"), 0o755)) //nolint:gosec // another user runs it
		must(t, os.WriteFile(filepath.Join(dir, "default.nix"), []byte(`{ system ? builtins.currentSystem }: {
			hello = derivation { name = "hello-`+version+`"; inherit system; builder = "builtin:buildenv"; manifest = "none"; derivations = [ "true" 5 1 ./. ]; };
		}`), 0o644)) //nolint:gosec // another user reads it
		must(t, exec.CommandContext(t.Context(), "tar", "-C", filepath.Dir(dir), "-cJf", filepath.Join(web, "nixexprs.tar.xz"), "nixos-1").Run())
	}
	serveWeb(t, a.Host, web, ":8083")
	url := "http://" + netip.AddrPortFrom(a.Host.Addr(), 8083).String() + "/nixexprs.tar.xz"
	track := func() result {
		t.Helper()
		return do(t, house.Host, l.programs.Floxctl, "channel", "track", "followed", url)
	}
	floxctl := func(args ...string) result { t.Helper(); return l.ctl(t, a, args...) }
	floxctl("channel", "track", "followed", url).want(t, 5, "channel.track")
	track().want(t, 4, "404 Not Found", "It is tracked all the same")
	floxctl("channel", "show", "followed").want(t, 0, "failed 1 time in a row", "404 Not Found")
	publish("1.0")
	track().want(t, 0, "Channel followed: version 1, 1 packages", "every 1 d")
	floxctl("install", "followed.hello").want(t, 0, "+ hello 1.0")
	do(t, a.Host, environmentOf(t, floxctl("list", "--json"))+"/bin/hello").want(t, 0, "hello 1.0")
	track().want(t, 0, "is so already, in version 1")
	publish("2.0")
	track().want(t, 0, "version 2, 1 packages")
	floxctl("upgrade").want(t, 0, "~ hello: 1.0 -> 2.0")
	floxctl("channel", "list").want(t, 0, "followed tracks "+url+": published")
	do(t, house.Host, l.programs.Floxctl, "channel", "untrack", "followed").want(t, 0, "tracks nothing any more")
}

// environmentOf is the environment that `floxctl list --json` shows, in the store.
func environmentOf(t *testing.T, listed result) string {
	t.Helper()
	for _, g := range lines[struct {
		Environment map[string]string `json:"environment"`
	}](t, listed.out) {
		for _, path := range g.Environment {
			return "/nix/store/" + path
		}
	}
	t.Fatalf("no environment in %s", listed.out)
	return ""
}
