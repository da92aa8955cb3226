package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// openDir is a directory of the test that everybody may read, and in which Nix may have
// a store.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "flox-nix-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_ = os.Chmod(path, 0o700) // #nosec: of this test
			}
			return nil
		})
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil { // #nosec: to be read by others
		t.Fatal(err)
	}
	return dir
}

// checkDryRun: what stock Nix says would be done, with an upstream that stock Nix wrote,
// is what is done then.
func (l *lab) checkDryRun(t *testing.T, at *netns.Host, house *hosts.Storehouse) {
	t.Helper()
	const base = `derivation { name = "cached"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo from the cache > $out" ]; }`
	const top = `derivation { name = "on-top"; system = "x86_64-linux"; builder = "/bin/sh"; base = ` + base + `; args = [ "-c" "read x < $base; echo $x $base > $out" ]; }`
	dir := openDir(t)
	there := func(script string) result {
		t.Helper()
		return do(t, house.Host, "env", "NIX_REMOTE=", "NIX_CONF_DIR=/nowhere", "NIX_USER_CONF_FILES=", "HOME=/tmp", "DIR="+dir, "sh", "-ec", script)
	}
	made := there(`mkdir -p -m 755 $DIR/office && nix-store --generate-binary-cache-key office-1 $DIR/office.sec $DIR/office.pub
		out=$(nix-build --store $DIR/elsewhere --no-out-link --option build-users-group "" --option sandbox-paths "/bin /usr /lib /lib64" -E '` + base + `')
		nix --extra-experimental-features nix-command copy --store $DIR/elsewhere --to "file://$DIR/office?secret-key=$DIR/office.sec" "$out"
		chmod -R a+rX $DIR/office; echo "$(cat $DIR/office.pub) $out"`)
	made.want(t, 0, "-cached", "office-1:")
	words := strings.Fields(made.out)
	key, out := words[len(words)-2], words[len(words)-1]
	do(t, house.Host, l.programs.Floxctl, "upstream", "add", "file://"+dir+"/office", "--key", key).want(t, 0)
	do(t, house.Host, l.programs.Floxctl, "upstream", "test", "file://"+dir+"/office", out).want(t, 0, "-cached")

	nix := func(args ...string) result { t.Helper(); return stockNix(t, at, args...) }
	dry := nix("nix-build", "--dry-run", "-E", top)
	dry.want(t, 0, "this derivation will be built:", "-on-top.drv", "this path will be fetched (", out)
	if strings.Contains(dry.out, "-cached.drv") {
		t.Errorf("a dry run says %s", dry.out)
	}
	nix("nix-build", "--dry-run", "--no-substitute", "-E", top).want(t, 0, "these 2 derivations will be built:", "-cached.drv")
	nix("nix-build", "--dry-run", "--option", "substituters", "", "-E", top).want(t, 0, "these 2 derivations will be built:", "-cached.drv")
	done := nix("nix-build", "--no-out-link", "-E", top)
	done.want(t, 0, "copying path '"+out+"' from 'file://"+dir+"/office'", "building '")
	if strings.Contains(done.out, "-cached.drv'") {
		t.Errorf("what the upstream has was built: %s", done.out)
	}
	do(t, at, "cat", lastLine(done)).want(t, 0, "from the cache "+out)
	// What the upstream's key signed may be copied in by whoever has it.
	copied := there(`out=$(nix-build --store $DIR/elsewhere --no-out-link --option build-users-group "" --option sandbox-paths "/bin /usr /lib /lib64" -E '` + strings.ReplaceAll(base, "cached", "copied") + `')
		nix --extra-experimental-features nix-command copy --store $DIR/elsewhere --to "file://$DIR/office?secret-key=$DIR/office.sec" "$out"
		chmod -R a+rX $DIR/office; echo "$out"`)
	copied.want(t, 0, "-copied")
	nix("nix", "--extra-experimental-features", "nix-command", "copy", "--from", "file://"+dir+"/office", lastLine(copied)).want(t, 0)
	do(t, at, "cat", lastLine(copied)).want(t, 0, "from the cache")
	if again := nix("nix-build", "--dry-run", "-E", top); again.code != 0 || strings.Contains(again.out, "will be") {
		t.Errorf("a dry run of what was done says %s", again.out)
	}
}
