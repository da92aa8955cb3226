package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/nix"
)

// nixEnv is what stockNix sets.
var nixEnv = []string{
	"NIX_REMOTE=unix:///run/floxd/nix.socket", "NIX_USER_CONF_FILES=", "NIX_CONF_DIR=/nowhere", "HOME=/tmp", "NIX_STATE_DIR=/tmp/nix-state", "NIX_LOG_DIR=/nix/var/log/nix",
}

// client is a command of stock Nix that runs on a host beside the test.
type client struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  string // file of what it prints
	done chan error
}

// beginNix starts one; it has ended when the test has.
func beginNix(t *testing.T, h *netns.Host, args ...string) *client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
	c := &client{t: t, cmd: h.Command(ctx, args[0], args[1:]...), out: filepath.Join(t.TempDir(), "out"), done: make(chan error, 1)}
	c.cmd.Env = append(c.cmd.Env, nixEnv...)
	out, err := os.Create(c.out)
	must(t, err)
	defer out.Close()
	c.cmd.Stdout, c.cmd.Stderr = out, out
	must(t, c.cmd.Start())
	ended := make(chan struct{})
	go func() { c.done <- c.cmd.Wait(); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return c
}

// ended reports whether it has, without a wait; done has its outcome.
func (c *client) ended() bool { return len(c.done) > 0 }

// said is what it has printed.
func (c *client) said() string {
	b, err := os.ReadFile(c.out)
	must(c.t, err)
	return string(b)
}

// fails waits for its end, which must not be a good one.
func (c *client) fails() {
	c.t.Helper()
	select {
	case err := <-c.done:
		if err == nil {
			c.t.Fatalf("it succeeded:\n%s", c.said())
		}
	case <-time.After(time.Minute):
		c.t.Fatalf("it goes on:\n%s", c.said())
	}
}

// source is a large file whose store path is known before it is added.
type source struct {
	file, path string
	sum        string
}

// newSource writes one; seed says which.
func newSource(t *testing.T, dir string, seed byte, size int) source {
	t.Helper()
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data)
	nar, err := nix.FileNar(uint64(size), bytes.NewReader(data))
	must(t, err)
	sum := sha256.New()
	_, err = io.Copy(sum, nar)
	must(t, err)
	name := fmt.Sprint("large", seed)
	p, err := nix.FixedOutputPath(flox.DefaultStoreDir, name, true, nix.Hash{Algo: nix.SHA256, Sum: sum.Sum(nil)}, nil, false)
	must(t, err)
	s := source{file: filepath.Join(dir, name), path: flox.DefaultStoreDir.Join(p), sum: fmt.Sprintf("%x", sha256.Sum256(data))}
	must(t, os.WriteFile(s.file, data, 0o644))
	return s
}

// absent checks that nothing of it is to be seen on a host.
func (s source) absent(t *testing.T, h *netns.Host) {
	t.Helper()
	do(t, h, "cat", s.path).want(t, 1, "No such file")
	stockNix(t, h, "nix", "--extra-experimental-features", "nix-command", "path-info", s.path).want(t, 1, "is not valid")
}

// whole checks every byte on a host.
func (s source) whole(t *testing.T, h *netns.Host) {
	t.Helper()
	do(t, h, "sha256sum", s.path).want(t, 0, s.sum)
}

// sizeBelow is how many bytes the files below a directory have.
func sizeBelow(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d iofs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				n += info.Size()
			}
		}
		return nil
	})
	return n
}

// largeSource and uploadBegun: what is uploaded, and how much of it has arrived
// when somebody is killed.
const (
	largeSource = 48 << 20
	largeLeft   = 32 << 20 // over a network
	uploadBegun = 4 << 20
)

// arriving tells whether an upload has begun, from the size of where it arrives. That
// may become smaller as well: what was deleted before is swept at any time.
func arriving(size func() int64) func() bool {
	least := size()
	return func() bool {
		now := size()
		least = min(least, now)
		return now-least > uploadBegun
	}
}

// uploadWay prepares a source in a directory and gives the command that adds it.
type uploadWay func(dir string, s source) []string

// uploadWays are those of stock Nix, by the operation they come to.
func uploadWays(t *testing.T, h *netns.Host) map[string]uploadWay {
	t.Helper()
	elsewhere := func(dir string, s source) string {
		t.Helper()
		store := filepath.Join(dir, "elsewhere")
		stockNix(t, h, "nix-store", "--store", store, "--add", s.file).want(t, 0, s.path)
		return store
	}
	return map[string]uploadWay{
		"AddToStore": func(_ string, s source) []string { return []string{"nix-store", "--add", s.file} },
		"AddToStoreNar": func(dir string, s source) []string {
			stockNix(t, h, "sh", "-ec", "nix-store --store "+elsewhere(dir, s)+" --export "+s.path+" > "+s.file+".export").want(t, 0)
			return []string{"sh", "-c", "exec nix-store --import < " + s.file + ".export"}
		},
		"AddMultipleToStore": func(dir string, s source) []string {
			return []string{"nix", "--extra-experimental-features", "nix-command", "copy", "--no-check-sigs", "--from", elsewhere(dir, s), s.path}
		},
	}
}

// cutUpload adds a source with stock Nix and calls kill while it is on its way. On
// a machine where it was through before, the next one is tried. again is the command.
func cutUpload(t *testing.T, a *hosts.Agent, dir string, seed byte, way uploadWay, kill func(*client)) (s source, again []string) {
	t.Helper()
	for range 5 {
		s := newSource(t, dir, seed, largeSource)
		seed++
		command := way(dir, s)
		staged := filepath.Join(a.State(), "staged", "content")
		begun := arriving(func() int64 { return sizeBelow(staged) })
		c := beginNix(t, a.Host, command...)
		eventually(t, "the upload has begun", func() bool { return begun() || c.ended() })
		kill(c)
		if err := <-c.done; err != nil {
			return s, command
		}
	}
	t.Fatal("no upload was cut off: all were through before")
	return source{}, nil
}

// answers waits until an agent that was killed serves stock Nix again.
func answers(t *testing.T, a *hosts.Agent) {
	t.Helper()
	await(t, a, "it serves again", connected)
	eventually(t, "its socket for Nix answers", func() bool {
		return stockNix(t, a.Host, "nix-store", "--gc", "--print-roots").code == 0
	})
}

// stuck is a derivation whose builder ends never; mark is in its command line.
func stuck(name, mark string) string {
	return fmt.Sprintf(`derivation { name = %q; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo it has begun; /bin/sh -c 'kill -STOP $$' %s & wait; echo > $out" ]; }`, name, mark)
}

// runs reports whether a process with mark in its command line does.
func runs(t *testing.T, mark string) bool {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil && bytes.Contains(b, []byte(mark)) && bytes.HasPrefix(b, []byte("/bin/sh\x00")) {
			return true
		}
	}
	return false
}

// badDays: who takes part in an upload or a build is killed in the middle of it.
// What was cut off is nowhere, a second try works, and nothing is left behind.
func badDays(t *testing.T, house *hosts.Storehouse, a *hosts.Agent) {
	dir := openDir(t)
	before := status(t, a).Staged
	seed := byte(1)
	for op, way := range uploadWays(t, a.Host) {
		for who, kill := range map[string]func(*client){
			"the client": func(c *client) { must(t, c.cmd.Process.Kill()) },
			"the agent":  func(*client) { must(t, syscall.Kill(status(t, a).PID, syscall.SIGKILL)) },
		} {
			if op == "AddToStoreNar" && who == "the client" {
				continue // for the agent it is as with AddMultipleToStore
			}
			s, again := cutUpload(t, a, dir, seed, way, kill)
			seed += 5
			answers(t, a)
			s.absent(t, a.Host)
			stockNix(t, a.Host, again...).want(t, 0)
			s.whole(t, a.Host)
			stockNix(t, a.Host, "nix-store", "--delete", s.path).want(t, 0)
			if op == "AddToStore" { // of the others the storehouse has it, too
				s.absent(t, a.Host)
			}
			must(t, os.RemoveAll(s.file+".export"))
		}
	}

	// The storehouse is killed in the middle of a build.
	mark := fmt.Sprintf("floxtest%d", os.Getpid())
	expr := stuck("stuck", mark)
	c := beginNix(t, a.Host, "nix-build", "--no-out-link", "-E", expr)
	begun := func(c *client) {
		t.Helper()
		eventually(t, "it is being built", func() bool { return strings.Contains(c.said(), "it has begun") && runs(t, mark) })
	}
	begun(c)
	house.Kill()
	eventually(t, "nothing of the build runs", func() bool { return !runs(t, mark) })
	must(t, house.Start(t.Context()))
	// Who builds may have begun it anew by itself; either way it can be stopped.
	select {
	case <-c.done:
		await(t, a, "follows the storehouse again", connected)
		c = beginNix(t, a.Host, "nix-build", "--no-out-link", "-E", expr)
	case <-time.After(5 * time.Second):
	}
	eventually(t, "it is built again", func() bool { return runs(t, mark) })

	// Ctrl-C ends the build there, and the next one has its place.
	must(t, c.cmd.Process.Signal(os.Interrupt))
	c.fails()
	eventually(t, "nothing of the build runs after Ctrl-C", func() bool { return !runs(t, mark) })
	built := stockNix(t, a.Host, "nix-build", "--no-out-link", "-E", `derivation { name = "after"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo after > $out" ]; }`)
	built.want(t, 0, "-after")
	left, err := os.ReadDir(filepath.Join(house.State(), "builder", "jobs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
		t.Errorf("left of builds: %v, %v", left, err)
	}
	// Of what was cut off and deleted, no more than a pack stays.
	const pack = 64 << 20
	eventually(t, "what was cut off takes no room", func() bool { return status(t, a).Staged.Bytes < before.Bytes+pack+uploadBegun })
}

// uploadCut kills the leader while an agent uploads what a build needs, to
// whichever server: others see all of it or nothing, and a second try works.
func (h *house) uploadCut(r *readers) {
	t, dir := h.t, openDir(h.t)
	stored := func() (n int64) {
		for _, s := range h.servers {
			n += sizeBelow(s.State())
		}
		return n
	}
	for seed := range byte(5) {
		s := newSource(t, dir, 40+seed, largeLeft)
		expr := fmt.Sprintf(`derivation { name = "needs"; system = "x86_64-linux"; builder = "/bin/sh"; src = builtins.path { path = %s; name = %q; }; }`, s.file, filepath.Base(s.file))
		build := []string{"nix-build", "--no-out-link", "-E", expr}
		begun := arriving(stored)
		_, leader := h.leader()
		c := beginNix(t, r.agents[0].Host, build...)
		h.eventually("the upload has begun", func() bool { return begun() || c.ended() })
		leader.Kill()
		there := do(t, r.agents[1].Host, "sha256sum", s.path)
		if there.code == 0 && !strings.Contains(there.out, s.sum) || there.code != 0 && !strings.Contains(there.out, "No such file") {
			t.Errorf("while it is uploaded another machine reads %+v", there)
		}
		c.fails() // nobody builds here
		h.eventually("a second try uploads it", func() bool {
			again := stockNix(t, r.agents[0].Host, build...)
			return again.code != 0 && strings.Contains(again.out, "builds nothing")
		})
		s.whole(t, r.agents[1].Host)
		must(t, leader.Launch())
		h.up()
		h.agree(nil)
		if there.code != 0 {
			return // it was in the middle
		}
	}
	t.Error("no upload was cut off: all were through before")
}
