package storehouse

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/nextnix"
)

// sshScript is a program ssh for which every host is this one: it runs what it is to
// run there. $1 in its directory is how it fails.
const sshScript = `#!/bin/sh
echo "$*" >>%[1]s/said
[ ! -e %[1]s/deny ] || { echo 'Permission denied (publickey).' >&2; exit 255; }
echo $$ >>%[1]s/pids
[ ! -e %[1]s/hang ] || exec sleep 600
for last; do :; done
exec env -i %[2]s sh -c "exec $last"
`

// fakeSSH makes a program dir/ssh that leads to the Nix of n; bin has the programs of its
// daemon, "" = those installed.
func fakeSSH(t *testing.T, n *stockNix, bin string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	env := ""
	for _, e := range n.command(t.Context(), "nix").Env {
		if path, ok := strings.CutPrefix(e, "PATH="); ok && bin != "" {
			e = "PATH=" + bin + ":" + path
		}
		env += " '" + e + "'"
	}
	if err := os.WriteFile(filepath.Join(dir, "ssh"), fmt.Appendf(nil, sshScript, dir, env), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	return dir
}

// sshLines gives the lines of a file that the fake ssh writes.
func sshLines(t *testing.T, dir, name string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// sshEnds waits until no process of the fake ssh is left.
func sshEnds(t *testing.T, dir string) {
	t.Helper()
	eventually(t, "every ssh has ended", func() bool {
		for _, line := range sshLines(t, dir, "pids") {
			if pid, err := strconv.Atoi(line); err == nil && syscall.Kill(pid, 0) == nil {
				return false
			}
		}
		return true
	})
}

// signing has what n builds from now on signed by a new key.
func signing(t *testing.T, n *stockNix) nix.SecretKey {
	t.Helper()
	key, err := nix.GenerateKey("office-1")
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "key"), []byte(key.String()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	n.configure("experimental-features = nix-command ca-derivations\nsecret-key-files = " + filepath.Join(n.dir, "key") + "\n")
	return key
}

// generations are the directories of the programs of the Nixes to try, by version.
func generations(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, bin := range []string{"", nextnix.Bin(t)} {
		out, err := exec.CommandContext(t.Context(), filepath.Join(bin, "nix"), "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		words := strings.Fields(string(out))
		all[words[len(words)-1]] = bin
	}
	return all
}

// From a store of Nix behind ssh a path comes once for everybody, if an accepted key
// signed it, and no process is left when the upstream goes.
func TestSubstituteOverSSH(t *testing.T) {
	t.Parallel()
	needNix(t)
	for version, bin := range generations(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			n := newNix(t, "")
			n.storeDir = n.dir + "/store"
			plain := n.build("unsigned", small)
			key := signing(t, n)
			app := n.build("signed", small)
			ssh := fakeSSH(t, n, bin)
			s, operator := closedHouse(t, func(c *Config) {
				c.StoreDir, c.upstreams.ssh = flox.StoreDir(n.storeDir), filepath.Join(ssh, "ssh")
			})
			added := addUpstream(t, operator, upstreamAs("ssh-ng://cache@builder:2222?ssh-key=/etc/key&compress=true", key, 0))
			if want := "ssh-ng://cache@builder:2222?compress=true&ssh-key=%2Fetc%2Fkey"; added.GetUrl() != want {
				t.Errorf("it is kept as %s, want %s", added.GetUrl(), want)
			}
			opts := SubstituteOptions{Paths: []string{filepath.Base(app)}}
			closure := n.closure(app)
			var both sync.WaitGroup
			for range 2 {
				both.Go(func() {
					if err := s.Substitute(within(t), opts, nil); err != nil {
						t.Error(err)
					}
				})
			}
			both.Wait()
			for _, p := range closure {
				info, err := s.Info(within(t), flox.StorePath(filepath.Base(p)).HashPart())
				if err != nil {
					t.Fatal(err)
				}
				checkWhole(t, s, testPath{info, n.dump(p)})
				if !slices.ContainsFunc(info.Signatures, func(sig string) bool { return strings.HasPrefix(sig, "office-1:") }) {
					t.Errorf("%s has the signatures %q", p, info.Signatures)
				}
			}
			listed, err := s.upstreams.list(within(t))
			if err != nil || listed.GetUpstreams()[0].GetFetchedPaths() != uint64(len(closure)) {
				t.Errorf("%d paths of %d were fetched, %v", listed.GetUpstreams()[0].GetFetchedPaths(), len(closure), err)
			}
			said := sshLines(t, ssh, "said")
			if n := len(said); n > 1+sshQuestions+sshNars { // one is the test's
				t.Errorf("%d sessions were opened", n)
			}
			if line := said[0]; !strings.HasSuffix(line, "-p 2222 -- cache@builder nix-daemon --stdio") || !strings.Contains(line, "-i /etc/key") || !strings.Contains(line, "-C") {
				t.Errorf("ssh is called with %s", line)
			}
			absent := strings.Repeat("0", flox.HashPartLen) + "-none"
			got := substitute(t, s, SubstituteOptions{Paths: []string{filepath.Base(plain), absent}})
			if f := got.failed[filepath.Base(plain)]; !strings.Contains(f.GetReason(), "none of its 0 signatures is by an accepted key") {
				t.Errorf("what nobody signed: %v", f)
			}
			if f := got.failed[absent]; !f.GetUnknown() || strings.Contains(f.GetReason(), "ssh") {
				t.Errorf("what is not there: %v", f)
			}
			if _, err := operator.RemoveUpstream(within(t), connect.NewRequest(&floxv1.RemoveUpstreamRequest{Url: added.GetUrl()})); err != nil {
				t.Fatal(err)
			}
			if _, err := s.upstreams.list(within(t)); err != nil {
				t.Fatal(err)
			}
			sshEnds(t, ssh)
		})
	}
}

// A host that refuses says why; one that says nothing costs one wait.
func TestDeadSSH(t *testing.T) {
	t.Parallel()
	n := newNix(t, "")
	n.storeDir = n.dir + "/store"
	key := signing(t, n)
	app := n.build("signed", small)
	ssh := fakeSSH(t, n, "")
	s, operator := closedHouse(t, func(c *Config) {
		c.StoreDir = flox.StoreDir(n.storeDir)
		c.upstreams = upstreamLimits{ask: 5 * time.Second, pause: time.Hour, ssh: filepath.Join(ssh, "ssh")}
	})
	fails := func(how string, on bool) {
		t.Helper()
		err := os.Remove(filepath.Join(ssh, how))
		if on {
			err = os.WriteFile(filepath.Join(ssh, how), nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	q := upstreamAs("ssh-ng://builder", key, 0)
	fails("deny", true)
	if _, err := operator.AddUpstream(within(t), connect.NewRequest(q)); err == nil || !strings.Contains(err.Error(), "Permission denied (publickey)") {
		t.Errorf("it is added though ssh is refused: %v", err)
	}
	q.Untested = true
	addUpstream(t, operator, q)
	fails("deny", false)
	fails("hang", true)
	if got := substitute(t, s, SubstituteOptions{Paths: []string{filepath.Base(app)}}); len(got.failed) != 1 {
		t.Errorf("%v", got.failed)
	}
	listed, err := s.upstreams.list(within(t))
	if err != nil || listed.GetUpstreams()[0].GetRetryUnixMs() == 0 || !strings.Contains(listed.GetUpstreams()[0].GetProblem(), "no answer within") {
		t.Errorf("%v, %v", listed, err)
	}
	before := len(sshLines(t, ssh, "said"))
	if got := substitute(t, s, SubstituteOptions{Paths: []string{filepath.Base(app)}}); len(got.failed) != 1 || len(sshLines(t, ssh, "said")) != before {
		t.Errorf("it is asked all the same: %v", got.failed)
	}
	sshEnds(t, ssh)
}

// What an upstream says an output became is substituted: over HTTP and over ssh, by a
// signature of its key alone.
func TestSubstituteRealisations(t *testing.T) {
	t.Parallel()
	const ca = `__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";`
	high := func(name string) string {
		return `let low = ` + mk("low-"+name, "echo low "+name+" > $out", ca) + `; in ` + mk("high-"+name, "read x < $low; echo $x $low > $out", "inherit low; "+ca)
	}
	needNix(t)
	newest := nextnix.Bin(t)
	for name, tt := range map[string]struct {
		bin string
		ssh bool
	}{"http": {}, "ssh": {ssh: true}, "ssh-next": {bin: newest, ssh: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := evaluator(t)
			ssh := fakeSSH(t, n, tt.bin)
			f := newFarmOf(t, n, "", 1, func(c *Config) { c.upstreams.ssh = filepath.Join(ssh, "ssh") })
			key := signing(t, n)
			where, dir := "ssh-ng://builder", t.TempDir()
			expr, lie := high(name), high("lie-"+name)
			out := filepath.Base(strings.TrimSpace(n.run("nix-build", "--no-out-link", "-E", expr)))
			if !tt.ssh {
				web := httptest.NewServer(http.FileServer(http.Dir(dir)))
				defer web.Close()
				where = web.URL
				n.run("nix-build", "--no-out-link", "-E", lie)
				n.run("nix", "copy", "--impure", "--to", "file://"+dir+"?secret-key="+filepath.Join(n.dir, "key"), "--expr", "[ ("+expr+") ("+lie+") ]")
			}
			addUpstream(t, operatorOf(t, f.Server), upstreamAs(where, key, 0))
			drv := f.upload(expr)
			if names, m := f.missing(&floxv1.MissingRequest{Paths: outs(drv).GetPaths()}); len(names) != 0 || !slices.Contains(m.GetWillSubstitute(), out) {
				t.Errorf("would build %v and substitute %v, want %s", names, m.GetWillSubstitute(), out)
			}
			h, outputs := f.must(drv, buildfarm.Substituted)
			r := outputs["out"].GetRealisation()
			if len(h.started) != 0 || r.GetPath() != out || len(r.GetInputs()) != 1 {
				t.Fatalf("%v were built, the realisation is %v", h.started, r)
			}
			signers := ""
			for _, sig := range r.GetSignatures() {
				signer, _, _ := strings.Cut(sig, ":")
				signers += signer + " "
			}
			if ours, _, _ := strings.Cut(f.PublicKey(), ":"); !strings.Contains(signers, "office-1 ") || !strings.Contains(signers, ours+" ") {
				t.Errorf("the realisation is signed by %s", signers)
			}
			// What it was made with is known as well.
			if known, err := f.m.builds.Realisations(within(t), connect.NewRequest(&floxv1.RealisationsRequest{Ids: []string{r.GetInputs()[0].GetId()}})); err != nil || len(known.Msg.GetRealisations()) != 1 {
				t.Errorf("realisations of inputs: %v, %v", known, err)
			}
			f.must(drv, buildfarm.AlreadyValid)
			if tt.ssh {
				return
			}
			forge(t, dir)
			drv = f.upload(lie)
			if h, _ := f.must(drv, buildfarm.Built); len(h.started) == 0 {
				t.Error("a realisation that nobody signed was believed")
			}
		})
	}
}

// forge replaces the signatures of all realisations of a cache by those of a stranger.
func forge(t *testing.T, dir string) {
	t.Helper()
	stranger, err := nix.GenerateKey("office-1")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "realisations", "*.doi"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%d realisations in %s: %v", len(files), dir, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r, err := nix.ParseRealisation(b)
		if err != nil {
			t.Fatal(err)
		}
		r.Signatures = []string{stranger.Sign([]byte(r.Fingerprint()))}
		if err := os.WriteFile(file, r.Marshal(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
