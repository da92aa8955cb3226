package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox/integration/fault"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// ctl runs floxctl on an agent's host.
func (l *lab) ctl(t *testing.T, a *hosts.Agent, args ...string) result {
	t.Helper()
	return do(t, a.Host, l.programs.Floxctl, args...)
}

// lines decodes JSON values, one after the other.
func lines[T any](t *testing.T, out string) []T {
	t.Helper()
	var all []T
	for d := json.NewDecoder(strings.NewReader(out)); d.More(); {
		var v T
		if err := d.Decode(&v); err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		all = append(all, v)
	}
	return all
}

// TestLookAround: what floxctl says of a store path is what Nix says of it.
func TestLookAround(t *testing.T) {
	l := open(t)
	a := l.agent(t, l.host(t, "look"), "--metrics", "127.0.0.1:9464")
	await(t, a, "follows the storehouse", connected)
	rg := l.world.StoreDir.Join(l.world.Ripgrep.Path)

	peers := l.ctl(t, a, "peers", "--json")
	peers.want(t, 0, `"storehouse"`)

	type entry struct {
		Path, Kind string
		Size       uint64
		Executable bool
	}
	var names []string
	for _, e := range lines[entry](t, l.ctl(t, a, "store", "ls", "--json", "--recursive", rg).out) {
		if e.Kind == "regular" {
			names = append(names, rg+"/"+e.Path)
		}
	}
	if d := cmp.Diff(l.files(t, l.world.Ripgrep.Path), names); d != "" {
		t.Errorf("store ls against the world (-want +got):\n%s", d)
	}

	want, err := os.ReadFile(l.original(l.world.Ripgrep.Exe))
	if err != nil {
		t.Fatal(err)
	}
	if r := l.ctl(t, a, "store", "cat", l.world.Ripgrep.Exe); r.code != 0 || r.out != string(want) {
		t.Errorf("store cat: exit code %d, %d bytes, want %d", r.code, len(r.out), len(want))
	}

	x := l.explained(t, a, l.world.Ripgrep.Exe)
	steps := x.kinds()
	for _, step := range []string{"look-up", "facts-asked", "facts", "known", "fetch", "asked", "gave", "fetched"} {
		if steps[step] == 0 {
			t.Errorf("explain tells no step %q: %+v", step, x)
		}
	}
	if x.Path != rg || len(x.Sources) != 1 || x.Sources[0].Tier != "storehouse" || x.Sources[0].Bytes == 0 || x.LocalBytes < uint64(len(want)) || x.WaitedMs <= 0 {
		t.Errorf("explain: %+v", x)
	}
	if x := l.explained(t, a, l.world.StoreDir.Join(l.world.Unused.Path)); len(x.Steps) != 0 || x.Known {
		t.Errorf("explain of what nobody read: %+v", x)
	}
	l.ctl(t, a, "explain", rg).want(t, 0, "(storehouse) gave ")
	scraped := scrape(t, a.Host, "127.0.0.1:9464")
	for _, words := range []string{"flox_agent_storehouse_connected 1\n", "flox_agent_mounted 1\n", "flox_agent_wait_seconds_count{for=\"read\"} "} {
		if !strings.Contains(scraped, words) {
			t.Errorf("want %q in the metrics:\n%s", words, scraped)
		}
	}
	if strings.Contains(scraped, "flox_agent_received_bytes_total{tier=\"storehouse\"} 0\n") {
		t.Errorf("no bytes came, say the metrics:\n%s", scraped)
	}

	type info struct {
		Path, NarHash string
		NarSize       uint64
	}
	got := lines[[]info](t, l.ctl(t, a, "store", "info", "--json", rg).out)
	out, err := l.world.Command(t.Context(), "nix", "path-info", "--json", rg).Output()
	if err != nil {
		t.Fatal(err)
	}
	nix := lines[[]info](t, string(out))
	if len(got) != 1 || len(got[0]) != 1 || len(nix) != 1 || len(nix[0]) != 1 {
		t.Fatalf("store info: %+v, nix: %s", got, out)
	}
	if g, n := got[0][0], nix[0][0]; g.Path != n.Path || g.NarHash != n.NarHash || g.NarSize != n.NarSize {
		t.Errorf("store info says %+v, nix says %+v", g, n)
	}
	l.ctl(t, a, "store", "ls", rg+"/nothing").want(t, 3, rg+"/nothing")
	l.ctl(t, a, "store", "info", "/etc/passwd").want(t, 2, "/etc/passwd")
	l.ctl(t, a, "doctor").want(t, 0)
}

// scrape gives the metrics that a program on a host tells Prometheus.
func scrape(t *testing.T, h *netns.Host, addr string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: h.Dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("metrics: %s, %v\n%s", resp.Status, err, body)
	}
	return string(body)
}

// explained is what floxctl explain says.
type explained struct {
	Path  string
	Known bool
	Steps []struct {
		Kind, Name, Tier, Why string
	}
	Sources []struct {
		Tier  string
		Bytes uint64
	}
	LocalBytes uint64
	WaitedMs   float64
}

func (l *lab) explained(t *testing.T, a *hosts.Agent, path string) explained {
	t.Helper()
	r := l.ctl(t, a, "explain", "--json", path)
	r.want(t, 0)
	return lines[explained](t, r.out)[0]
}

// kinds counts the steps of each kind.
func (x explained) kinds() map[string]int {
	n := make(map[string]int)
	for _, s := range x.Steps {
		n[s.Kind]++
	}
	return n
}

// TestWatchASlowRead: who waits, for what, how far it is and from where.
func TestWatchASlowRead(t *testing.T) {
	l := open(t)
	a := l.agent(t, l.host(t, "slow"))
	await(t, a, "follows the storehouse", connected)
	_, file := l.large(t)
	l.slowly(t, a.Host)
	watch := begin(t, func(ctx context.Context) *exec.Cmd {
		return a.Host.Command(ctx, l.programs.Floxctl, "watch", "--json", "--interval", "50ms")
	})
	r := reader(t, a.Host, file, l.world.Ripgrep.Exe)
	out, err := r.wait()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l.sums(t, out, file, l.world.Ripgrep.Exe)
	watch.cancel()
	said, _ := watch.wait()
	type state struct {
		Reads []struct {
			PID                      int
			Command, Path, Source    string
			DoneBytes, TotalBytes    uint64
			Operation, Since, Reason string
		}
	}
	seen := false
	for _, s := range lines[state](t, string(said[:bytes.LastIndexByte(said, '\n')+1])) {
		for _, read := range s.Reads {
			if read.PID == r.cmd.Process.Pid && read.Command == "sha256sum" && read.Operation == "READ" && read.TotalBytes > 0 &&
				(read.Path == file || read.Path == l.world.Ripgrep.Exe) {
				seen = true
			}
		}
	}
	if !seen {
		t.Errorf("the slow read was never shown:\n%s", tail(said))
	}
}

// TestAddFromAnywhere: what one machine adds, with the token, another reads.
func TestAddFromAnywhere(t *testing.T) {
	l := open(t)
	a, b := l.agent(t, l.host(t, "adds")), l.agent(t, l.host(t, "reads"))
	await(t, a, "follows the storehouse", connected)
	await(t, b, "follows the storehouse", connected)
	dir := filepath.Join(t.TempDir(), "site")
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("all work and no play "), 100_000)
	for name, content := range map[string][]byte{"small": []byte("hello\n"), "sub/big": big} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l.ctl(t, a, "store", "add", dir).want(t, 2, "token")
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.ctl(t, a, "store", "add", dir, "--token-file", wrong).want(t, 5, "token")
	added := l.ctl(t, a, "store", "add", dir, "--token-file", filepath.Join(l.house.State(), "upload-token"))
	added.want(t, 0, "-site")
	path := strings.TrimSpace(added.out)
	layer := l.world.Layered(t.TempDir())
	if out, err := layer.Command(t.Context(), "nix-store", "--add", dir).Output(); err != nil || strings.TrimSpace(string(out)) != path {
		t.Errorf("nix-store --add gives %q (%v), floxctl %q", out, err, path)
	}
	eventually(t, "the other machine reads it", func() bool { return do(t, b.Host, "cat", path+"/sub/big") == result{0, string(big)} })
	do(t, b.Host, "cat", path+"/small").want(t, 0, "hello")
}

// cacheFile finds, in an agent's cache, the object that holds content, and where
// in it that lies.
func cacheFile(t *testing.T, a *hosts.Agent, content []byte) (file string, at int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(a.State(), "cache", "data"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || file != "" {
			return err
		}
		b, err := os.ReadFile(path)
		if i := bytes.Index(b, content); i >= 0 {
			file, at = path, int64(i)
		}
		return err
	})
	if err != nil || file == "" {
		t.Fatalf("the content lies nowhere in the cache: %v", err)
	}
	return file, at
}

// TestVerifyFindsAFlippedBit: what rots in the cache is found, dropped and
// fetched again.
func TestVerifyFindsAFlippedBit(t *testing.T) {
	l := open(t)
	a := l.agent(t, l.host(t, "rots"))
	await(t, a, "follows the storehouse", connected)
	rg := l.world.StoreDir.Join(l.world.Ripgrep.Path)
	l.ctl(t, a, "download", "--closure=false", rg).want(t, 0, "complete on this machine")
	l.ctl(t, a, "store", "verify", rg).want(t, 0, "nothing wrong")

	content, err := os.ReadFile(l.original(l.world.Ripgrep.Exe))
	if err != nil {
		t.Fatal(err)
	}
	file, at := cacheFile(t, a, content[1<<20:1<<20+4096])
	if err := fault.FlipBit(file, at*8+5); err != nil {
		t.Fatal(err)
	}
	r := l.ctl(t, a, "store", "verify", rg)
	r.want(t, 6, "bin/rg", "are dropped")
	l.ctl(t, a, "store", "verify", rg).want(t, 0, "nothing wrong")
	l.same(t, a.Host, l.files(t, l.world.Ripgrep.Path)...)
	l.ctl(t, a, "doctor").want(t, 0, "found wrong and dropped")
}

// whole fails the test if `store ls --long` shows a file that is not all here.
func (r result) whole(t *testing.T) {
	t.Helper()
	for line := range strings.Lines(r.out) {
		if strings.HasPrefix(line, "-r") && !strings.Contains(line, " 100 %") {
			t.Errorf("not whole: %s", line)
		}
	}
}

// TestKeepAndCollect: what is downloaded works without a network, what is kept
// survives a collection, and what is not, does not.
func TestKeepAndCollect(t *testing.T) {
	l := open(t)
	a := l.agent(t, l.host(t, "keeps"), "--read-timeout", "2s")
	await(t, a, "follows the storehouse", connected)
	rg, large, file := l.world.StoreDir.Join(l.world.Ripgrep.Path), "", ""
	large, file = l.large(t)
	progress := lines[struct {
		Finished              bool
		DonePaths, TotalPaths int
	}](t, l.ctl(t, a, "download", "--keep", "--json", rg).out)
	if last := progress[len(progress)-1]; !last.Finished || last.DonePaths != 4 || last.TotalPaths != 4 {
		t.Errorf("download ended with %+v, want 4 of 4 paths", last)
	}
	l.ctl(t, a, "download", "--closure=false", large).want(t, 0, "complete on this machine")
	kept := status(t, a).Cache
	if kept.Kept == 0 || kept.Kept >= kept.Bytes {
		t.Errorf("%d of %d bytes are kept", kept.Kept, kept.Bytes)
	}
	l.ctl(t, a, "cache", "usage").want(t, 0, "never goes by itself")
	do(t, a.Host, "setpriv", "--reuid=65533", "--clear-groups", "--", l.programs.Floxctl, "cache", "gc").want(t, 5, "sudo")

	l.ctl(t, a, "cache", "gc").want(t, 0, "Freed")
	if c := status(t, a).Cache; c.Bytes < kept.Kept || c.Bytes > kept.Bytes-1<<20 {
		t.Errorf("the cache holds %d bytes after a collection, it held %d, of which %d were kept", c.Bytes, kept.Bytes, kept.Kept)
	}
	if err := a.Host.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.runs(t, a.Host)
	for _, p := range l.closure(l.world.Ripgrep.Path) {
		l.ctl(t, a, "store", "ls", "--long", "--recursive", l.world.StoreDir.Join(p)).whole(t)
	}
	l.same(t, a.Host, l.files(t, l.closure(l.world.Ripgrep.Path)...)...)
	do(t, a.Host, "cat", file).want(t, 1, "Input/output error")

	l.ctl(t, a, "unkeep", rg).want(t, 0, "no longer kept")
	l.ctl(t, a, "unkeep", rg).want(t, 3)
	l.ctl(t, a, "keep", rg).want(t, 0, "kept")
	l.ctl(t, a, "unkeep", rg).want(t, 0, "no longer kept")
	l.ctl(t, a, "cache", "gc").want(t, 0, "Freed")
	if c := status(t, a).Cache; c.Kept != 0 || c.Bytes > 1<<20 {
		t.Errorf("the cache holds %d bytes, %d of them kept, when nothing is", c.Bytes, c.Kept)
	}
	if err := a.Host.Plug(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, a, "follows the storehouse again", connected)
	l.same(t, a.Host, file)
	l.keepsProfile(t, a, large)
	l.capsPrefetch(t, a, large, file)
}

// capsPrefetch: what nobody waits for comes no faster than it may, or not at all.
func (l *lab) capsPrefetch(t *testing.T, a *hosts.Agent, large, file string) {
	restart := func(flag string) {
		t.Helper()
		l.ctl(t, a, "cache", "gc").want(t, 0, "Freed")
		if err := a.Restart(t.Context(), "--read-timeout", "30s", flag); err != nil {
			t.Fatal(err)
		}
		await(t, a, "follows the storehouse", connected)
	}
	restart("--prefetch=false")
	l.ctl(t, a, "keep", "--offline", "closure", large).want(t, 0, "kept")
	l.same(t, a.Host, file)
	if p := status(t, a).Prefetch; p.On || p.Bytes() > 0 {
		t.Errorf("prefetching is switched off, and it fetched %+v", p)
	}
	l.ctl(t, a, "status").want(t, 0, "prefetching is switched off")
	l.ctl(t, a, "unkeep", large).want(t, 0, "no longer kept")

	const rate, burst, enough = 256 << 10, 1 << 20, 3 << 19
	began := time.Now()
	restart("--prefetch-rate=256KiB")
	l.ctl(t, a, "keep", "--offline", "closure", large).want(t, 0, "kept")
	l.ctl(t, a, "status").want(t, 0, "at most 256 KiB/s")
	eventually(t, "something is fetched ahead", func() bool {
		p := status(t, a).Prefetch
		if most := burst + uint64(rate*time.Since(began).Seconds()); p.Bytes() > most || p.RateBytes != rate {
			t.Fatalf("%d bytes were fetched %s after the start, at most %d may be: %+v", p.Bytes(), time.Since(began), most, p)
		}
		return p.Bytes() >= enough
	})
	if err := a.Restart(t.Context(), "--prefetch-rate=0"); err != nil { // no limit
		t.Fatal(err)
	}
	await(t, a, "what is kept is complete", func(s *hosts.Status) bool {
		return s.Prefetch.RateBytes == 0 && s.Offline.Kept > 0 && s.Offline.KeptComplete == s.Offline.Kept
	})
}

// keepsProfile: a profile where only root may look is kept, follows its link, and
// that survives the agent and its parent.
func (l *lab) keepsProfile(t *testing.T, a *hosts.Agent, large string) {
	rg := l.world.StoreDir.Join(l.world.Ripgrep.Path)
	script := func(text string) { t.Helper(); do(t, a.Host, "sh", "-ec", "cd /run; "+text).want(t, 0) }
	script("umask 077; mkdir profiles; cd profiles; ln -s " + rg + " p-1-link; ln -s " + large + " p-2-link; ln -s p-1-link p; ln -s p-0-link old; ln -s /etc/shadow out")
	const link = "/run/profiles/p"
	for _, bad := range []string{"old", "out", "none"} {
		l.ctl(t, a, "keep", "--offline", "closure", "/run/profiles/"+bad).want(t, 3, "no such link, or it does not lead to a path in /nix/store")
	}
	l.ctl(t, a, "keep", "--offline", "closure", link).want(t, 0, link+", now "+rg, "1 profile is kept")
	ready := func(target string) {
		t.Helper()
		eventually(t, link+" is "+target+", and ready", func() bool {
			return strings.Contains(l.ctl(t, a, "keep", "--list").out, "closure  "+link+", now "+target+": ready\n")
		})
	}
	ready(rg)
	for _, p := range l.closure(l.world.Ripgrep.Path) {
		l.ctl(t, a, "store", "ls", "--long", "--recursive", l.world.StoreDir.Join(p)).whole(t)
	}
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	script("ln -sfn p-2-link profiles/p")
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, a, "follows the storehouse", connected)
	ready(large)
	l.ctl(t, a, "status").want(t, 0, "1 of 1 kept profiles", link+", now "+large+": ready (offline: closure)")
	l.ctl(t, a, "cache", "gc").want(t, 0, "Freed")
	l.ctl(t, a, "store", "ls", "--long", "--recursive", large).whole(t)
	l.ctl(t, a, "store", "info", rg).want(t, 0, " (0 %)\n")
	l.ctl(t, a, "unkeep", link).want(t, 0, link+", now "+large, "1 profile is no longer kept")
	l.ctl(t, a, "keep", "--list").want(t, 0, "Nothing is kept.")
}
