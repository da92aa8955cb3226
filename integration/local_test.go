package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox/integration/hosts"
)

// localNix are the options with which a Nix of the host's own runs in tests.
const localNix = "NIX_CONF_DIR=/nowhere NIX_USER_CONF_FILES= HOME=/var/lib/nixhome NIX_CONFIG='sandbox = false\nbuild-users-group =\nexperimental-features = nix-command\nsubstituters ='"

// nixHost is a machine with a Nix store and a daemon of its own.
type nixHost struct {
	*stranger
	daemon *hosts.Daemon
}

// nixHost starts Debian's nix-daemon on a host.
func (l *lab) nixHost(t *testing.T, name string) *nixHost {
	t.Helper()
	h := &nixHost{stranger: l.stranger(t, name)}
	h.env = []string{"NIX_CONF_DIR=/nowhere", "NIX_USER_CONF_FILES="}
	var err error
	h.daemon, err = hosts.Start(h.host, l.dir, h.host.Name+"-nix", "sh", "-c", "export "+localNix+"; exec nix-daemon")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, h.daemon) })
	eventually(t, "the local daemon answers", func() bool {
		return do(t, h.host, "sh", "-c", "export "+localNix+"; NIX_REMOTE=daemon nix store ping").code == 0
	})
	return h
}

// local runs a script of root's with the host's own Nix.
func (h *nixHost) local(t *testing.T, script string) string {
	t.Helper()
	return strings.TrimSpace(h.root(t, "export NIX_REMOTE=daemon "+localNix+"\n"+script))
}

// session runs a script in a session of the user's.
func (h *nixHost) session(t *testing.T, script string, args ...string) result {
	t.Helper()
	return h.do(t, append([]string{h.l.programs.Floxctl, "nix", "--", "sh", "-ec", script, "sh"}, args...)...)
}

// localRead is how much the agent read from the local store.
func localRead(t *testing.T, a *hosts.Agent) uint64 {
	t.Helper()
	out, err := a.Ctl(t.Context(), "status", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		LocalStore struct {
			Dir       string `json:"dir"`
			ReadBytes uint64 `json:"readBytes"`
		} `json:"localStore"`
	}
	if err := json.Unmarshal(out, &s); err != nil || s.LocalStore.Dir != "/nix/store" {
		t.Fatalf("status: %v\n%s", err, out)
	}
	return s.LocalStore.ReadBytes
}

// buildLocal is an expression that takes a name and is built by whatever there is.
const buildLocal = `n: derivation { name = n; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo $name > $out" ]; }`

// TestBesideALocalNix: a machine's own Nix stays as it is and goes on building,
// while sessions see its store merged with the storehouse's.
func TestBesideALocalNix(t *testing.T) {
	l := open(t)
	house, err := hosts.StartStorehouse(t.Context(), l.programs, l.host(t, "localhouse"), l.dir, "--builds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, house.Daemon) })
	if err := l.copyTo(t.Context(), house, l.world.Ripgrep.Path, l.world.Unused.Path); err != nil {
		t.Fatal(err)
	}
	h := l.nixHost(t, "localnix")
	only := h.local(t, `mkdir -p "$1/tree/sub"; echo mine > "$1/tree/sub/file"; ln -s sub/file "$1/tree/link"; nix-store --add "$1/tree"`)
	h.local(t, "nix copy --no-check-sigs --from "+house.URL()+" "+l.ripgrep()+" 2>&1")
	forged := l.world.StoreDir.Join(l.world.Unused.Path)
	h.local(t, "mkdir "+forged+` && echo forged > `+forged+`/forged && printf '%s\n\n0\n' `+forged+` | NIX_REMOTE=local nix-store --register-validity`)
	invalid := "/nix/store/00000000000000000000000000000000-being-built"
	h.local(t, "mkdir "+invalid)
	const sums = `cd /nix/store && find . -mindepth 1 -not -name '*loop*' -not -name '*.drv' -not -path ./.links -not -path './.links/*' -printf '%P %y %m %T@ %s %l\n' | sort; find . -type f -not -name '*loop*' -not -name '*.drv' -not -path './.links/*' -print0 | sort -z | xargs -0 sha256sum`
	before := h.local(t, sums)
	loop, err := hosts.Start(h.host, l.dir, h.host.Name+"-loop", "sh", "-c", "export NIX_REMOTE=daemon "+localNix+`; i=0
while nix-build --no-out-link -E '(`+buildLocal+`) "loop-'$i'"'; do i=$((i+1)); done; exit 1`)
	if err != nil {
		t.Fatal(err)
	}
	defer stop(t, loop)

	a := l.agentOf(t, h.host, house)
	await(t, a, "follows the storehouse", connected)
	do(t, h.host, l.programs.Floxctl, "status").want(t, 0, "mounted at /var/lib/floxd/mount", "its paths say /nix/store")
	h.session(t, `findmnt -n -o FSTYPE /nix/store; id -u; echo "$NIX_REMOTE"; exit 23`).want(t, 23, fmt.Sprintf("fuse.floxd\n%d\nunix:///run/floxd/nix.socket\n", runUser))
	if got := h.root(t, `findmnt -n -o FSTYPE --target /nix/store`); strings.Contains(got, "fuse.floxd") {
		t.Errorf("outside of sessions the store directory is on %s", got)
	}

	// What only the local store has, and what it only has in part.
	h.session(t, `cat "$1/link"; ls -l "$1"; ls /nix/store`, only).want(t, 0, "mine\n", "link -> sub/file", filepath.Base(only))
	was := status(t, a)
	if err := syscall.Kill(was.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, a, "another child", func(s *hosts.Status) bool { return s.PID != was.PID && s.Mounted })
	h.session(t, `cat "$1/link" "$1/sub/file"`, only).want(t, 0, "mine\nmine\n")
	if again := status(t, a).FuseRead; again != 0 {
		t.Errorf("%d bytes that were read before are read again", again)
	}
	h.session(t, `ls -d "$1"`, invalid).want(t, 2, "No such file")
	if r := h.session(t, "ls /nix/store"); strings.Contains(r.out, "being-built") {
		t.Errorf("what is not valid is listed:\n%s", r.out)
	}

	// What both have comes from the local disk; where they differ it is the storehouse's.
	traffic := status(t, a).Traffic
	files := l.files(t, l.world.Ripgrep.Path)
	r := h.session(t, `sha256sum -- "$@"`, files...)
	l.sums(t, []byte(r.out), files...)
	h.run(t, l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
	size := uint64(0)
	for _, f := range files {
		if info, err := os.Stat(l.original(f)); err == nil {
			size += uint64(info.Size())
		}
	}
	if got, fetched := localRead(t, a), status(t, a).Traffic.Sub(traffic).Plain(); got < size/2 || fetched > size/4 {
		t.Errorf("of %d bytes that both have, %d were read from the local disk, %d fetched", size, got, fetched)
	}
	files = l.files(t, l.world.Unused.Path)
	r = h.session(t, `test ! -e "$0/forged"; sha256sum -- "$@"`, files...)
	l.sums(t, []byte(r.out), files...)
	do(t, h.host, "cat", forged+"/forged").want(t, 0, "forged")

	// What the local daemon builds is there at once, in a session that is open, too.
	r = h.session(t, `for i in 1 2 3 4 5; do p=$(NIX_REMOTE=unix:///nix/var/nix/daemon-socket/socket nix-build --no-out-link -E "(`+
		strings.ReplaceAll(strings.ReplaceAll(buildLocal, "$", `\$`), `"`, `\"`)+`) \"now-loop-$i\"") && cat $p; done`)
	r.want(t, 0, "now-loop-1\n", "now-loop-5\n")

	// And the storehouse builds what is built in a session.
	r = h.session(t, `nix-build --no-out-link -E "$1"`, "("+buildLocal+`) "in-session"`)
	r.want(t, 0, "-in-session")
	h.session(t, `cat "$1"`, lastLine(r)).want(t, 0, "in-session\n")
	do(t, h.host, "cat", lastLine(r)).want(t, 1, "No such file")

	if !loop.Running() {
		t.Error("the local daemon stopped building")
	}
	stop(t, loop)
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(h.local(t, sums), "\n")); diff != "" {
		t.Errorf("the local store was changed (-before +after):\n%s", diff)
	}
	h.local(t, "rmdir "+invalid+"; nix-store --verify --check-contents 2>&1")
	for name := range strings.FieldsSeq(h.local(t, "ls /nix/store")) {
		if strings.Contains(name, "in-session") {
			t.Errorf("%s was written to the local store", name)
		}
	}
}
