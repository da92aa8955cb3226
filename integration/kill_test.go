package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	iofs "io/fs"
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
	"github.com/floxctl/flox/integration/world"
)

// dirSize sums what files in dir hold; what vanishes meanwhile counts nothing.
func dirSize(t *testing.T, dir string) int64 {
	t.Helper()
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d iofs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var info iofs.FileInfo
			if info, err = d.Info(); err == nil {
				sum += info.Size()
			}
		}
		if errors.Is(err, iofs.ErrNotExist) {
			err = nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// running is a command that runs beside the test.
type running struct {
	cmd    *exec.Cmd
	out    bytes.Buffer
	cancel context.CancelFunc
	ended  chan struct{}
	err    error
}

// begin starts a command, for at most a minute.
func begin(t *testing.T, command func(context.Context) *exec.Cmd) *running {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	r := &running{cmd: command(ctx), cancel: cancel, ended: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.out
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.ended)
		r.err = r.cmd.Wait()
	}()
	t.Cleanup(func() { cancel(); <-r.ended })
	return r
}

// wait gives what the command printed, and how it ended.
func (r *running) wait() ([]byte, error) {
	<-r.ended
	return r.out.Bytes(), r.err
}

func (r *running) hasEnded() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// reader begins to read files through the mount, all of them, in one process.
func reader(t *testing.T, h *netns.Host, files ...string) *running {
	t.Helper()
	return begin(t, func(ctx context.Context) *exec.Cmd {
		return h.Command(ctx, "sha256sum", append([]string{"--"}, files...)...)
	})
}

// copying begins a nix copy.
func (l *lab) copying(t *testing.T, n world.Nix, house *hosts.Storehouse, roots ...flox.StorePath) *running {
	t.Helper()
	return begin(t, func(ctx context.Context) *exec.Cmd {
		cmd, err := l.nixCopy(ctx, n, house, roots...)
		if err != nil {
			t.Fatal(err)
		}
		return cmd
	})
}

// random adds a file of random bytes to a layer over the world.
func (l *lab) random(t *testing.T, size int) (n world.Nix, p flox.StorePath, content []byte) {
	t.Helper()
	content = make([]byte, size)
	_, _ = rand.Read(content)
	file := filepath.Join(t.TempDir(), "random")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	n = l.world.Layered(t.TempDir())
	out, err := n.Command(t.Context(), "nix-store", "--add", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	p, _, err = l.world.StoreDir.Split(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return n, p, content
}

// TestKilled: after kill -9 of any process, at any time, starting it again is
// all there is to do, and nobody is ever given a wrong byte.
func TestKilled(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "killed-house"))
	t.Run("storehouse during nix copy", func(t *testing.T) { l.killDuringCopy(t, house) })
	if err := l.copyTo(t.Context(), house, l.world.Ripgrep.Path, l.world.Unused.Path); err != nil {
		t.Fatal(err)
	}
	a := l.agentOf(t, l.host(t, "killed"), house)
	await(t, a, "follows the storehouse", connected)
	files := l.files(t, l.closure(l.world.Ripgrep.Path)...)
	t.Run("child under readers", func(t *testing.T) { l.killChild(t, a, files) })
	t.Run("warden under readers", func(t *testing.T) { l.killWarden(t, a, files) })
	t.Run("storehouse under readers", func(t *testing.T) { l.killHouse(t, a, house) })
	t.Run("everything at once", func(t *testing.T) {
		for range 2 {
			l.killAll(t, a, house, files)
		}
	})
}

func (l *lab) killDuringCopy(t *testing.T, house *hosts.Storehouse) {
	killed := 0
	for range 4 {
		before := dirSize(t, house.State())
		cmd := l.copying(t, l.world.Nix(), house, l.world.Ripgrep.Path, l.world.Unused.Path)
		eventually(t, "nix copy brings something", func() bool { return cmd.hasEnded() || dirSize(t, house.State()) > before+1<<20 })
		if !cmd.hasEnded() {
			killed++
		}
		house.Kill()
		_, _ = cmd.wait() // it may have been done
		if err := house.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if killed == 0 {
		t.Error("the storehouse was never killed during a copy: this shows nothing")
	}
}

// killChild: the mount and the reads under way outlive the process that serves.
func (l *lab) killChild(t *testing.T, a *hosts.Agent, files []string) {
	l.slowly(t, a.Host)
	r := reader(t, a.Host, files...)
	for range 4 {
		before := status(t, a)
		await(t, a, "something was fetched", func(s *hosts.Status) bool { return s.Traffic.Plain() > before.Traffic.Plain()+64<<10 || r.hasEnded() })
		if r.hasEnded() {
			t.Fatalf("the reader ended too early: %v\n%s", r.err, tail(r.out.Bytes()))
		}
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		await(t, a, "another child", func(s *hosts.Status) bool { return s.PID != before.PID })
	}
	l.fast(t, a.Host)
	out, err := r.wait()
	if err != nil {
		t.Fatalf("a read that was under way failed: %v\n%s", err, tail(out))
	}
	l.sums(t, out, files...)
}

// killWarden: a mount without its warden is dead; the next warden replaces it.
func (l *lab) killWarden(t *testing.T, a *hosts.Agent, files []string) {
	for range 2 {
		r := reader(t, a.Host, files...)
		a.Kill()
		out, err := r.wait()
		if err == nil {
			l.sums(t, out, files...)
		} else {
			l.known(t, out)
		}
		if err := a.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.same(t, a.Host, files...)
	}
}

// killHouse: reads wait for the storehouse to come back.
func (l *lab) killHouse(t *testing.T, a *hosts.Agent, house *hosts.Storehouse) {
	await(t, a, "follows the storehouse", connected)
	files := l.files(t, l.closure(l.world.Unused.Path)...)
	l.slowly(t, a.Host)
	before := status(t, a).Traffic.Plain()
	r := reader(t, a.Host, files...)
	await(t, a, "something was fetched", func(s *hosts.Status) bool { return s.Traffic.Plain() > before+64<<10 || r.hasEnded() })
	house.Kill()
	l.fast(t, a.Host)
	if err := house.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	out, err := r.wait()
	if err != nil {
		t.Fatalf("a read that was under way failed: %v\n%s", err, tail(out))
	}
	l.sums(t, out, files...)
	await(t, a, "follows the storehouse again", connected)
}

func (l *lab) killAll(t *testing.T, a *hosts.Agent, house *hosts.Storehouse, files []string) {
	n, p, content := l.random(t, 16<<20)
	before := dirSize(t, house.State())
	upload := l.copying(t, n, house, p)
	r := reader(t, a.Host, files...)
	child := status(t, a).PID
	eventually(t, "nix copy brings something", func() bool { return upload.hasEnded() || dirSize(t, house.State()) > before+1<<20 })
	_ = syscall.Kill(child, syscall.SIGKILL)
	house.Kill()
	a.Kill()
	_, _ = upload.wait()
	if out, err := r.wait(); err != nil {
		l.known(t, out)
	}
	if err := errors.Join(house.Start(t.Context()), a.Start(t.Context())); err != nil {
		t.Fatal(err)
	}
	cmd, err := l.nixCopy(t.Context(), n, house, p)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nix copy again: %v\n%s", err, out)
	}
	l.same(t, a.Host, files...)
	eventually(t, "the new path is there", func() bool {
		r := do(t, a.Host, "cat", l.world.StoreDir.Join(p))
		if r.code == 0 && r.out != string(content) {
			t.Fatalf("wrong bytes: %d of %d", len(r.out), len(content))
		}
		return r.code == 0
	})
}

// known checks the sums among the output of a reader that was cut off: what it
// was given before must be right.
func (l *lab) known(t *testing.T, out []byte) {
	t.Helper()
	for line := range strings.Lines(string(out)) {
		if sum, file, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  "); ok && len(sum) == 64 {
			l.sums(t, []byte(line), file)
		}
	}
}

// slowly limits a host's link so that reads take a while, until fast.
func (l *lab) slowly(t *testing.T, h *netns.Host) {
	t.Helper()
	if err := h.Rate(t.Context(), 10e6); err != nil {
		t.Fatal(err)
	}
}

func (l *lab) fast(t *testing.T, h *netns.Host) {
	t.Helper()
	if err := h.Rate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
}
