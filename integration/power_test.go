package integration

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/fault"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// sums are what sha256sum must say of files.
type sums map[string]string

// add puts files of random bytes, of so many bytes each, into the lab's
// storehouse as one store path.
func (l *lab) add(t *testing.T, name string, sizes ...int) (files []string, want sums) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	want = sums{}
	for i, size := range sizes {
		content := make([]byte, size)
		_, _ = rand.Read(content)
		file := fmt.Sprintf("%03d", i)
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		files = append(files, file)
		want[file] = hex.EncodeToString(sum[:])
	}
	n := l.world.Layered(t.TempDir())
	out, err := n.Command(t.Context(), "nix-store", "--add", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	top := strings.TrimSpace(string(out))
	p, _, err := l.world.StoreDir.Split(top)
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := l.nixCopy(t.Context(), n, l.house, p)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nix copy: %v\n%s", err, out)
	}
	all := sums{}
	for i, file := range files {
		files[i] = top + "/" + file
		all[files[i]] = want[file]
	}
	return files, all
}

// worlds are the sums of files of the world.
func (l *lab) worlds(t *testing.T, files ...string) sums {
	t.Helper()
	want := sums{}
	for _, file := range files {
		content, err := os.ReadFile(l.original(file))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		want[file] = hex.EncodeToString(sum[:])
	}
	return want
}

// check reads every file through the mount, many at once. One that can be read
// must be right; those that give EIO are returned.
func (want sums) check(t *testing.T, h *netns.Host) (unread []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const one = `out=$(sha256sum -- "$1" 2>&1); echo "$out"` // a line in one piece
	cmd := h.Command(ctx, "xargs", "-0", "-P", "32", "-n", "1", "sh", "-c", one, "one")
	cmd.Stdin = strings.NewReader(strings.Join(slices.Sorted(maps.Keys(want)), "\x00"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(out))
	}
	seen := map[string]bool{}
	for line := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n") {
		file, failed := strings.CutSuffix(strings.TrimPrefix(line, "sha256sum: "), ": Input/output error")
		if failed {
			unread = append(unread, file)
		} else {
			var sum string
			sum, file, _ = strings.Cut(line, "  ")
			if sum != want[file] {
				t.Errorf("wrong bytes: %q, want %q", line, want[file])
			}
		}
		seen[file] = true
	}
	for file := range want {
		if !seen[file] {
			t.Errorf("%s was not read", file)
		}
	}
	if t.Failed() {
		t.Fatalf("sha256sum said:\n%s", tail(out))
	}
	return unread
}

// readable reads every file until all can be read: with a busy machine and a
// short deadline some may take two attempts.
func (want sums) readable(t *testing.T, h *netns.Host) {
	t.Helper()
	eventually(t, "every file can be read", func() bool { return len(want.check(t, h)) == 0 })
}

// disk is a disk of a host that can lose power, seen on that host only.
func disk(t *testing.T, l *lab, h *netns.Host, size int64) *fault.Disk {
	t.Helper()
	var d *fault.Disk
	err := h.DoMounted(func() (err error) {
		d, err = fault.NewDisk(t.Context(), l.dir, size)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(d.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", d.Dir, err)
		}
	})
	return d
}

// powerCut takes the power from an agent and its disk, and boots the host.
func powerCut(t *testing.T, a *hosts.Agent, d *fault.Disk) {
	t.Helper()
	child := status(t, a).PID
	if err := a.Host.DoMounted(func() error { return d.PowerCut(t.Context(), a.PID(), child) }); err != nil {
		t.Fatal(err)
	}
	a.Kill() // it is dead: this waits for it
	do(t, a.Host, "sh", "-c", "umount -l /nix/store && rm -rf /run/floxd/*").want(t, 0)
}

// TestAgentPowerCut: what a disk has forgotten, or has only half, is never given
// to a reader, and what was safe on it still is.
func TestAgentPowerCut(t *testing.T) {
	l := open(t)
	h := l.host(t, "power")
	d := disk(t, l, h, 256<<20)
	const kept = 16 // random files of each round that are read to the end before the power goes
	a := l.agent(t, h, "--state-dir", d.Dir, "--cache-budget", "200MiB", "--cache-reserve", "8MiB", "--lookup-timeout", "1s", "--read-timeout", "1s")
	await(t, a, "follows the storehouse", connected)
	synced := l.worlds(t, l.files(t, l.closure(l.world.Ripgrep.Path)...)...)
	synced.readable(t, h)
	rest := l.worlds(t, l.files(t, l.world.Unused.Path)...)

	// The kernel may write in any order what it was not asked to sync.
	for _, round := range []struct{ name, written string }{
		{"nothing written", "-false"},
		{"names before bytes", "-not -path */data/*"},
		{"everything written", "-true"},
	} {
		t.Run(round.name, func(t *testing.T) {
			files, fresh := l.add(t, "fresh", sizes(kept)...)
			part, slow := files[kept:kept+2], files[kept+2:]
			eventually(t, "the new path is there", func() bool { return do(t, h, "ls", "-lR", filepath.Dir(files[0])).code == 0 })
			if err := errors.Join(a.Stop(), a.Start(t.Context())); err != nil { // what is here is safe from now on
				t.Fatal(err)
			}
			await(t, a, "follows the storehouse", connected)
			t.Cleanup(func() { _ = h.Plug(context.WithoutCancel(t.Context())) })
			read := maps.Clone(fresh)
			maps.DeleteFunc(read, func(file, _ string) bool { return !slices.Contains(files[:kept], file) })
			read.readable(t, h)
			for _, file := range part {
				for _, at := range []string{"skip=7", "skip=41"} {
					do(t, h, "dd", "if="+file, "of=/dev/null", "bs=64k", "count=3", at).want(t, 0)
				}
			}
			do(t, h, "ls", "-R", l.world.StoreDir.Join(l.world.Unused.Path)).want(t, 0)
			l.slowly(t, h)
			before := status(t, a).Traffic.Plain()
			r := reader(t, h, slow...)
			await(t, a, "something was fetched", func(s *hosts.Status) bool { return s.Traffic.Plain() > before+256<<10 || r.hasEnded() })
			do(t, h, "find", slices.Concat([]string{d.Dir, "-type", "f"}, strings.Fields(round.written), []string{"-exec", "sync", "{}", "+"})...).want(t, 0)
			if r.hasEnded() {
				t.Error("nothing was under way when the power went")
			}
			powerCut(t, a, d)
			if out, err := r.wait(); err == nil {
				t.Errorf("the reader outlived its agent:\n%s", tail(out))
			}
			l.fast(t, h)

			if err := errors.Join(h.Unplug(t.Context()), a.Start(t.Context())); err != nil {
				t.Fatal(err)
			}
			if unread := synced.check(t, h); len(unread) > 0 {
				t.Errorf("was here and safe, and is lost: %v", unread)
			}
			unread := fresh.check(t, h)
			t.Logf("%d of %d files that were not safe are lost", len(unread), len(fresh))
			if err := h.Plug(t.Context()); err != nil {
				t.Fatal(err)
			}
			await(t, a, "follows the storehouse again", connected)
			maps.Copy(synced, fresh)
			synced.readable(t, h)
			rest.readable(t, h)
		})
	}
}

// sizes are those of small files, and of four large ones after them.
func sizes(small int) []int {
	var all []int
	for range small {
		all = append(all, 1+mrand.IntN(200<<10))
	}
	return append(all, 4<<20, 4<<20, 4<<20, 4<<20)
}
