package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/need"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/integration/world"
)

// lab is what tests share: the programs, the world, a network, and a storehouse
// that holds two programs of it. Tests add hosts of their own.
type lab struct {
	dir      string // logs
	programs hosts.Programs
	world    *world.World
	net      *netns.Network
	house    *hosts.Storehouse        // holds the closures of ripgrep and unused
	hosts    int                      // added by tests
	found    map[*netns.Host][]string // mounts a host inherited from whoever else tests on this machine
}

// shared is made by the first test that asks.
var shared = &sharedLab{}

type sharedLab struct {
	once sync.Once
	lab  *lab
	err  error
}

func (s *sharedLab) close() error {
	if s.lab == nil {
		return nil
	}
	return s.lab.close()
}

func open(t *testing.T) *lab {
	t.Helper()
	need.FUSE(t)
	need.Namespaces(t)
	need.Nix(t)
	shared.once.Do(func() {
		shared.lab = &lab{found: map[*netns.Host][]string{}}
		shared.err = shared.lab.start()
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.lab
}

// start makes everything; what it has made when it fails is there for close.
func (l *lab) start() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // the world may have to be built
	defer cancel()
	if err := sweep(); err != nil {
		return err
	}
	if l.dir, err = os.MkdirTemp("", fmt.Sprintf("%s%d-", dirPrefix, os.Getpid())); err != nil {
		return err
	}
	if err := os.Chmod(l.dir, 0o755); err != nil {
		return err
	}
	if l.world, err = world.Ensure(ctx); err != nil {
		return err
	}
	if l.programs, err = hosts.Build(ctx, l.dir); err != nil {
		return err
	}
	if l.net, err = netns.New(ctx, netns.Config{Dir: l.dir}); err != nil {
		return err
	}
	host, err := l.addHost(ctx, "house")
	if err != nil {
		return err
	}
	if l.house, err = hosts.StartStorehouse(ctx, l.programs, host, l.dir); err != nil {
		return err
	}
	return l.copyTo(ctx, l.house, l.world.Ripgrep.Path, l.world.Unused.Path)
}

// dirPrefix begins the name of a lab's directory; the process id follows.
const dirPrefix = "flox-integration-"

// sweep removes the directories of labs whose process was killed. Everything
// else of them went with it.
func sweep() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*-*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), dirPrefix), "-")
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, os.ErrNotExist) {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// close stops the storehouse and removes the network, and says what did not
// end as it should.
func (l *lab) close() (err error) {
	if l.house != nil && l.house.Daemon != nil {
		err = l.house.Stop()
	}
	if l.net != nil {
		err = errors.Join(err, l.net.Close())
	}
	return errors.Join(err, os.RemoveAll(l.dir))
}

// addHost adds a host on a subnet of its own.
func (l *lab) addHost(ctx context.Context, name string) (*netns.Host, error) {
	subnet, err := l.net.Subnet(ctx, name+"-lan", netip.Prefix{})
	if err != nil {
		return nil, err
	}
	return l.net.Host(ctx, name, subnet)
}

// host adds a host for one test, and looks when that is over whether anything
// was left on it.
func (l *lab) host(t *testing.T, name string) *netns.Host {
	t.Helper()
	l.hosts++
	h, err := l.addHost(t.Context(), fmt.Sprintf("%s-%d", name, l.hosts))
	if err != nil {
		t.Fatal(err)
	}
	l.found[h] = ourMounts(t, h)
	t.Cleanup(func() {
		if !t.Failed() {
			l.nothingLeft(t, h)
		}
	})
	return h
}

// agent starts an agent for one test.
func (l *lab) agent(t *testing.T, h *netns.Host, flags ...string) *hosts.Agent {
	t.Helper()
	return l.agentOf(t, h, l.house, flags...)
}

// agentOf starts an agent of another storehouse.
func (l *lab) agentOf(t *testing.T, h *netns.Host, house *hosts.Storehouse, flags ...string) *hosts.Agent {
	t.Helper()
	a, err := hosts.StartAgent(t.Context(), l.programs, h, l.dir, house.Invite(), flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, a.Daemon) })
	return a
}

// newHouse starts a storehouse for one test, with the closures of roots in it.
func (l *lab) newHouse(t *testing.T, h *netns.Host, roots ...flox.StorePath) *hosts.Storehouse {
	t.Helper()
	house, err := hosts.StartStorehouse(t.Context(), l.programs, h, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, house.Daemon) })
	if err := l.copyTo(t.Context(), house, roots...); err != nil {
		t.Fatal(err)
	}
	return house
}

// stop ends a daemon, and shows its log if the test failed.
func stop(t *testing.T, d *hosts.Daemon) {
	t.Helper()
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		t.Logf("the end of %s:\n%s", d.Log, d.Tail())
	}
}

// copyTo copies the closures of roots into a storehouse with stock Nix.
func (l *lab) copyTo(ctx context.Context, house *hosts.Storehouse, roots ...flox.StorePath) error {
	if len(roots) == 0 {
		return nil
	}
	cmd, err := l.nixCopy(ctx, l.world.Nix(), house, roots...)
	if err != nil {
		return err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nix copy to %s: %w: %s", house.URL(), err, out)
	}
	return nil
}

// nixCopy is the command of copyTo, with the store of n, run on the
// storehouse's host.
func (l *lab) nixCopy(ctx context.Context, n world.Nix, house *hosts.Storehouse, roots ...flox.StorePath) (*exec.Cmd, error) {
	args, err := house.CopyArgs("--option", "download-attempts", "1") // who is killed is not waited for
	if err != nil {
		return nil, err
	}
	n.NetNS = house.Host.NetNS()
	for _, p := range roots {
		args = append(args, l.world.StoreDir.Join(p))
	}
	return n.Command(ctx, args...), nil
}

// original is where the world keeps what the hosts see at file.
func (l *lab) original(file string) string {
	return filepath.Join(l.world.Nix().Dir, "store", strings.TrimPrefix(file, string(l.world.StoreDir)))
}

// files are the regular files of store paths, as the hosts see them.
func (l *lab) files(t *testing.T, paths ...flox.StorePath) []string {
	t.Helper()
	var files []string
	for _, p := range paths {
		dir := l.world.StoreDir.Join(p)
		top := l.original(dir)
		err := filepath.WalkDir(top, func(path string, d iofs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				files = append(files, dir+strings.TrimPrefix(path, top))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(files) == 0 {
		t.Fatalf("no files in %v", paths)
	}
	return files
}

// large is the largest file that unused needs and ripgrep does not, and the
// store path it lies in.
func (l *lab) large(t *testing.T) (dir, file string) {
	t.Helper()
	needed := l.closure(l.world.Ripgrep.Path)
	most := int64(-1)
	for _, p := range l.closure(l.world.Unused.Path) {
		if slices.Contains(needed, p) {
			continue
		}
		for _, f := range l.files(t, p) {
			if info, err := os.Stat(l.original(f)); err == nil && info.Size() > most {
				most, dir, file = info.Size(), l.world.StoreDir.Join(p), f
			}
		}
	}
	return dir, file
}

// closure are the store paths a program needs.
func (l *lab) closure(root flox.StorePath) []flox.StorePath {
	var paths []flox.StorePath
	for _, p := range l.world.Closure(root) {
		paths = append(paths, p.Path)
	}
	return paths
}

// same reads files through the mount of a host and compares every byte.
func (l *lab) same(t *testing.T, h *netns.Host, files ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := h.Command(ctx, "sha256sum", append([]string{"--"}, files...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("read on %s: %v\n%s", h.Name, err, tail(out))
	}
	l.sums(t, out, files...)
}

// sums compares what sha256sum printed of files with the world.
func (l *lab) sums(t *testing.T, printed []byte, files ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(string(printed)), "\n")
	if len(lines) != len(files) {
		t.Fatalf("%d sums of %d files:\n%s", len(lines), len(files), tail(printed))
	}
	for i, file := range files {
		f, err := os.Open(l.original(file))
		if err != nil {
			t.Fatal(err)
		}
		hash := sha256.New()
		_, err = io.Copy(hash, f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		if want := hex.EncodeToString(hash.Sum(nil)) + "  " + file; lines[i] != want {
			t.Errorf("wrong bytes: got %s, want %s", lines[i], want)
		}
	}
}

// runs executes ripgrep from the mount with nothing else around.
func (l *lab) runs(t *testing.T, h *netns.Host) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := h.Command(ctx, l.world.Ripgrep.Exe, "--version")
	cmd.Env = []string{"PATH=/nonexistent"}
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.HasPrefix(out, []byte("ripgrep ")) {
		t.Fatalf("rg on %s: %v\n%s", h.Name, err, out)
	}
}

// result is how a command on a host ended.
type result struct {
	code int
	out  string // standard output and error
}

// do runs a command on a host to its end, whatever that is; one that does not
// end within a minute fails the test.
func do(t *testing.T, h *netns.Host, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := h.Command(ctx, name, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		t.Fatalf("%s %s on %s: %v (%v)\n%s", name, strings.Join(args, " "), h.Name, err, ctx.Err(), tail(out))
	}
	return result{cmd.ProcessState.ExitCode(), string(out)}
}

// want checks an exit code and words that must stand in the output.
func (r result) want(t *testing.T, code int, words ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	for _, w := range words {
		if !strings.Contains(r.out, w) {
			t.Errorf("want %q in what is said", w)
		}
	}
	if t.Failed() {
		t.Fatalf("it said:\n%s", r.out)
	}
}

// status asks an agent.
func status(t *testing.T, a *hosts.Agent) *hosts.Status {
	t.Helper()
	s, err := a.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// await waits until the agent's status is ok.
func await(t *testing.T, a *hosts.Agent, what string, ok func(*hosts.Status) bool) {
	t.Helper()
	if err := a.Await(t.Context(), what, ok); err != nil {
		t.Fatal(err)
	}
}

func connected(s *hosts.Status) bool { return s.Storehouse.Connected }

// ourMounts are the mount points of our file systems on a host.
func ourMounts(t *testing.T, h *netns.Host) (at []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // also at the end of a test
	defer cancel()
	mounts, err := h.Run(ctx, "cat", "/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); strings.Contains(line, " - fuse.floxd ") {
			at = append(at, f[4])
		}
	}
	return at
}

// nothingLeft looks for mounts and processes of ours on a host where everything
// was stopped.
func (l *lab) nothingLeft(t *testing.T, h *netns.Host) {
	t.Helper()
	for _, dir := range ourMounts(t, h) {
		if !slices.Contains(l.found[h], dir) {
			t.Errorf("%s is still mounted on %s", dir, h.Name)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// Killed processes go in their own time.
	var left string
	for ctx.Err() == nil {
		out, err := exec.CommandContext(ctx, "ip", "netns", "pids", filepath.Base(h.NetNS())).Output()
		if err != nil {
			t.Error(err)
			return
		}
		left = ""
		for pid := range strings.FieldsSeq(string(out)) {
			if name, err := os.ReadFile("/proc/" + pid + "/comm"); err == nil && strings.HasPrefix(string(name), "flox") {
				left += pid + " " + string(name)
			}
		}
		if left == "" {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("processes left on %s:\n%s", h.Name, left)
}

// eventually waits until ok, for at most a minute.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begun := time.Now(); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatalf("not in a minute: %s", what)
		}
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-4000):] }
