package integration

import (
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// smallDisk mounts a file system of so many bytes on the host's dir, which is
// given to the unprivileged processes.
func smallDisk(t *testing.T, h *netns.Host, dir, size string) {
	t.Helper()
	for _, argv := range [][]string{{"mkdir", "-p", dir}, {"mount", "-t", "tmpfs", "-o", "mode=755,size=" + size, "tmpfs", dir}} {
		do(t, h, argv[0], argv[1:]...).want(t, 0)
	}
}

// fill takes all room of the disk of dir, until the result is called.
func fill(t *testing.T, h *netns.Host, dir string) (release func()) {
	t.Helper()
	do(t, h, "dd", "if=/dev/zero", "of="+dir+"/fill", "bs=64k").want(t, 1, "No space left")
	return func() { do(t, h, "rm", dir+"/fill").want(t, 0) }
}

// TestAgentsDiskIsFull: reads go on, and stay right, with a disk that is too
// small and with one that others have filled; the agent says so, also to who
// starts it anew, and gets well by itself.
func TestAgentsDiskIsFull(t *testing.T) {
	l := open(t)
	h := l.host(t, "full")
	const dir = "/var/lib/floxd"
	smallDisk(t, h, dir, "40m")
	a := l.agent(t, h, "--cache-reserve", "20MiB")
	files := l.files(t, append(l.closure(l.world.Ripgrep.Path), l.world.Unused.Path)...)

	l.same(t, h, files...)
	if s := status(t, a); s.Cache.Bytes > 20<<20 {
		t.Errorf("the cache holds %d bytes, more than the disk without the reserve", s.Cache.Bytes)
	}

	release := fill(t, h, dir)
	await(t, a, "the agent notices", func(s *hosts.Status) bool {
		return s.Cache.Streaming && strings.Contains(strings.Join(s.Problems, "\n"), "nearly full")
	})
	l.same(t, h, files...)
	l.same(t, h, l.files(t, l.closure(l.world.Unused.Path)...)...) // some were never read
	do(t, h, l.programs.Floxctl, "status").want(t, 0, "nearly full", "free some space")
	do(t, h, l.programs.Floxctl, "doctor").want(t, 1, "streamed and not kept", "free some disk space")

	l.ctl(t, a, "download", l.world.StoreDir.Join(l.world.Unused.Path)).want(t, 7, "could not be kept", "free some space")

	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(t.Context()); err != nil {
		t.Fatalf("start with a full disk: %v", err)
	}
	l.same(t, h, files...)

	release()
	await(t, a, "the cache is used again", func(s *hosts.Status) bool { return !s.Cache.Streaming && len(s.Problems) == 0 })
	l.same(t, h, files...)
	l.runs(t, h)
}

// TestAgentsDiskIsFullToTheLastByte: an agent that finds no byte free, not even what it
// had set aside, serves what is here, says of what it cannot write down why and what to do, and
// gets well by itself.
func TestAgentsDiskIsFullToTheLastByte(t *testing.T) {
	l := open(t)
	h := l.host(t, "last-byte")
	const dir = "/var/lib/floxd"
	smallDisk(t, h, dir, "60m")
	a := l.agent(t, h, "--cache-reserve", "1MiB")
	here := l.files(t, l.closure(l.world.Ripgrep.Path)...)
	l.same(t, h, here...)
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	do(t, h, "find", dir, "-name", "ballast", "-delete").want(t, 0)
	release := fill(t, h, dir)
	if err := a.Start(t.Context()); err != nil {
		t.Fatalf("start with a full disk: %v", err)
	}
	l.same(t, h, here...)
	await(t, a, "it says so", func(s *hosts.Status) bool {
		return strings.Contains(strings.Join(s.Problems, "\n"), "cannot be written down")
	})
	unknown := l.world.StoreDir.Join(l.world.Unused.Path)
	do(t, h, "ls", unknown).want(t, 2, "Input/output error")
	do(t, h, l.programs.Floxctl, "doctor").want(t, 1, "cannot be written down", "free some space")
	l.ctl(t, a, "download", unknown).want(t, 7, "cannot be written down", "free some space")
	l.same(t, h, here...)

	release()
	await(t, a, "facts are written again", func(s *hosts.Status) bool { return len(s.Problems) == 0 })
	l.same(t, h, append(here, l.files(t, l.world.Unused.Path)...)...)
}

// TestStorehousesDiskIsFull: uploads are refused with the reason, what is there
// is served on, and uploads work again once there is room.
func TestStorehousesDiskIsFull(t *testing.T) {
	l := open(t)
	h := l.host(t, "full-house")
	const dir = "/var/lib/floxd"
	smallDisk(t, h, dir, "200m")
	house, err := hosts.StartStorehouse(t.Context(), l.programs, h, l.dir, "--reserve", "64MiB")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, house.Daemon) })
	if err := l.copyTo(t.Context(), house, l.world.Ripgrep.Path); err != nil {
		t.Fatal(err)
	}
	a := l.agentOf(t, l.host(t, "reader"), house)
	await(t, a, "follows the storehouse", connected)

	release := fill(t, h, dir)
	n, p, content := l.random(t, 4<<20)
	cmd, err := l.nixCopy(t.Context(), n, house, p)
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "507") || !strings.Contains(string(out), "full") {
		t.Errorf("nix copy to a full storehouse: %v, want HTTP 507 with the reason\n%s", err, out)
	}
	do(t, a.Host, "cat", l.world.StoreDir.Join(p)).want(t, 1, "No such file or directory")
	l.same(t, a.Host, l.files(t, l.closure(l.world.Ripgrep.Path)...)...)

	release()
	if cmd, err = l.nixCopy(t.Context(), n, house, p); err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nix copy with room again: %v\n%s", err, out)
	}
	eventually(t, "the path is there", func() bool {
		r := do(t, a.Host, "cat", l.world.StoreDir.Join(p))
		return r.code == 0 && r.out == string(content)
	})
}
