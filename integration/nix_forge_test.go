package integration

import (
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
)

// checkForgery: root on one machine offers another content for the well-known output of a
// derivation, by every door there is; no other machine ever reads it.
func (l *lab) checkForgery(t *testing.T, a, b *hosts.Agent, house string) {
	t.Helper()
	const expr = `derivation { name = "victim"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo true > $out" ]; }`
	dir := openDir(t)
	local := `export DIR=` + dir + ` NIX_REMOTE= NIX_CONF_DIR=/nowhere NIX_USER_CONF_FILES= HOME=/tmp; `
	const command = `nix --extra-experimental-features nix-command `
	agent := "unix:///run/floxd/nix.socket"
	made := do(t, a.Host, "sh", "-ec", local+`
		drv=$(nix-instantiate --store $DIR/forge -E '`+expr+`' 2>/dev/null)
		out=$(nix-store --store $DIR/forge -q --outputs "$drv" 2>/dev/null)
		echo forged > $DIR/forge"$out"
		# Where Nix knows it as its own.
		unshare -m sh -ec 'mount --bind '$DIR'/forge/nix /nix; printf "%s\n\n0\n" '$out' | NIX_REMOTE=local NIX_STATE_DIR=/nix/var/nix nix-store --register-validity'
		echo "$out"`)
	made.want(t, 0, "-victim")
	out := lastLine(made)
	do(t, b.Host, "cat", out).want(t, 1, "No such file")

	for _, door := range []struct {
		name, script string
		refused      string // what must be said; "" = a machine may keep it to itself
	}{
		{"AddMultipleToStore: nix copy", command + `copy --no-check-sigs --from $DIR/forge --to ` + agent + ` ` + out, ""},
		{"AddToStoreNar: --import", `nix-store --store $DIR/forge --export ` + out + ` > $DIR/forged.export && nix-store --store ` + agent + ` --import < $DIR/forged.export`, ""},
		{"HTTP PUT: nix copy", command + `copy --no-check-sigs --from $DIR/forge --to ` + house + ` ` + out, "401"},
		{"HTTP PUT: curl", `printf x | curl -sS -T - -w '%{http_code}' ` + house + `/` + strings.TrimPrefix(out, "/nix/store/")[:32] + `.narinfo; exit 1`, "401"},
		{"floxctl store add", l.programs.Floxctl + ` store add $DIR/forge` + out, "token"},
	} {
		r := do(t, a.Host, "sh", "-c", local+door.script)
		if door.refused != "" && (r.code == 0 || !strings.Contains(r.out, door.refused)) {
			t.Errorf("%s: exit code %d, it said %s; want it refused with %q", door.name, r.code, r.out, door.refused)
		}
		if got := do(t, b.Host, "cat", out); got.code == 0 {
			t.Errorf("%s: another machine reads %q", door.name, got.out)
		}
	}
	// What A has taken for itself is not what others get when it asks for more of it.
	stockNix(t, a.Host, "nix-build", "--no-out-link", "-E", strings.ReplaceAll(expr, "victim", "user")+` // { input = "`+out+`"; }`)
	if got := do(t, b.Host, "cat", out); got.code == 0 {
		t.Errorf("after a build on the forger: another machine reads %q", got.out)
	}
	built := stockNix(t, b.Host, "nix-build", "--no-out-link", "-E", expr)
	built.want(t, 0, out)
	if got := do(t, b.Host, "cat", out); got.out != "true\n" {
		t.Errorf("it is %q where it was built, want the truth", got.out)
	}
	// Offered where it is valid, the other content is passed over, as by Nix, and told.
	do(t, b.Host, l.programs.Floxctl, "store", "differences", out).want(t, 0, "Nobody offered")
	do(t, b.Host, "sh", "-ec", local+`nix-store --store `+agent+` --import < $DIR/forged.export`).want(t, 0, out)
	do(t, b.Host, l.programs.Floxctl, "store", "differences", out).want(t, 0, out[len("/nix/store/"):])
	do(t, b.Host, "cat", out).want(t, 0, "true")
}
