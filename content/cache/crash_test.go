package cache

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needRoot skips a test that mounts, but fails it under CI.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test mounts a file system and needs root")
		}
		t.Skip("mounting a file system needs root")
	}
}

// private runs the calling test again in a mount namespace of its own, and says
// whether it did. Elsewhere on the machine somebody may copy the namespace we
// are in, and with it a mount of ours that must end when we unmount it.
func private(t *testing.T) bool {
	t.Helper()
	needRoot(t)
	const env = "FLOXD_TEST_CACHE_PRIVATE"
	if os.Getenv(env) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return false
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	// Our temporary directory outlives a child that does not clean up.
	cmd.Env = append(os.Environ(), env+"=1", "TMPDIR="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	t.Logf("in a namespace of its own:\n%s", out)
	if err != nil {
		t.Errorf("in a namespace of its own: %v", err)
	}
	return true
}

// loopDisk is an ext4 of its own, whose power can be cut.
type loopDisk struct {
	image, dir string
	mounted    bool
}

func newLoopDisk(t *testing.T, size int64) *loopDisk {
	t.Helper()
	tmp := t.TempDir()
	d := &loopDisk{image: filepath.Join(tmp, "memory", "image"), dir: filepath.Join(tmp, "mnt")}
	for _, dir := range []string{d.dir, filepath.Dir(d.image)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// In memory: what others do to the machine's disk shall not slow us down.
	run(t, "mount", "-t", "tmpfs", "floxd-test", filepath.Dir(d.image))
	t.Cleanup(func() { run(t, "umount", filepath.Dir(d.image)) })
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.image, size); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0", d.image)
	d.mount(t)
	t.Cleanup(func() { d.unmount(t) })
	return d
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

func (d *loopDisk) mount(t *testing.T) {
	t.Helper()
	run(t, "mount", "-o", "loop", d.image, d.dir)
	d.mounted = true
}

func (d *loopDisk) unmount(t *testing.T) {
	t.Helper()
	if d.mounted {
		run(t, "umount", d.dir)
		d.mounted = false
	}
}

// cut takes the power: what was not made durable is gone.
func (d *loopDisk) cut(t *testing.T) {
	t.Helper()
	f, err := os.Open(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const shutdown, noLogFlush = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, fs/ext4/ext4.h
	flags := uint32(noLogFlush)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		t.Fatalf("EXT4_IOC_SHUTDOWN: %v", errno)
	}
}

// startWriter runs the writer until it works on its files.
func startWriter(t *testing.T, dir, session string, seed int) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("FLOXD_TEST_CACHE_WRITER=%s|%s|%d", dir, session, seed))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		kill(cmd)
		t.Fatalf("writer says %q, %v", line, err)
	}
	return cmd
}

func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // reports the kill
}

// freeze stops a process and waits for all of its threads: an fsync must not
// end well after the power is gone.
func freeze(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := func() bool {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", cmd.Process.Pid))
		if err != nil || len(stats) == 0 {
			t.Fatalf("threads of the writer: %v", err)
		}
		for _, f := range stats {
			raw, err := os.ReadFile(f)
			if err != nil {
				return false
			}
			_, rest, _ := strings.Cut(string(raw), ") ")
			if !strings.HasPrefix(rest, "T") {
				return false
			}
		}
		return true
	}
	for try := 0; !stopped(); try++ {
		if try == 5000 {
			t.Fatal("the writer does not stop")
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// survey is what a look at all of the writer's files found.
type survey struct{ hits, unverified, misses, wrong int }

// look reads every chunk of the writer's files, and them all again.
func look(c *Cache) (v survey) {
	for i := range writerFiles {
		s := writerSample(i)
		for j := range s.chunks {
			n := int64(s.chunks[j].Size)
			if c.State(s.File, s.offs[j], n) == Unverified {
				v.unverified++
			}
			st, err := s.look(c, s.offs[j], n, 1)
			switch {
			case err != nil:
				v.wrong++
			case st == Hit:
				v.hits++
			default:
				v.misses++
			}
			if data, err := c.Get(context.Background(), s.chunks[j].ID); err == nil && string(data) != string(s.chunk(j)) {
				v.wrong++
			}
		}
	}
	return v
}

// After kill -9 the cache opens by itself, every byte in it is right, and
// nothing needs to be verified again: the page cache was not lost.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	hits := 0
	for round := range 6 {
		cmd := startWriter(t, dir, "", round)
		time.Sleep(time.Duration(50+rand.IntN(250)) * time.Millisecond)
		kill(cmd)
		cfg := small(dir)
		cfg.BootID = ""
		c, err := Open(cfg)
		if err != nil {
			t.Fatalf("round %d: open after kill -9: %v", round, err)
		}
		v := look(c)
		if v.wrong > 0 || v.unverified > 0 {
			t.Errorf("round %d: %+v", round, v)
		}
		hits += v.hits
		checkDisk(t, c)
		if round%2 == 0 {
			err = c.Close()
		} else {
			crash(c)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if hits == 0 {
		t.Error("nothing was ever cached: this test shows nothing")
	}
}

// checkDisk says whether the disk holds what the index knows, and nothing else.
func checkDisk(t *testing.T, c *Cache) {
	t.Helper()
	var sum totals
	packs := map[uint64]bool{}
	err := c.index.pages(context.Background(), []byte{'f'}, func(list []entry) error {
		for _, e := range list {
			ct, _, _, err := decode(e.value)
			if err != nil {
				return err
			}
			sum.replace(nil, ct)
			if ct.packed {
				packs[ct.object] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if sum != c.sum.totals {
		t.Errorf("records sum up to %+v, totals say %+v", sum, c.sum.totals)
	}
	err = c.objects.found(func(object uint64, _ int64) error {
		if ok, err := c.index.has(objectKey(object)); err != nil || !ok {
			t.Errorf("object %d is on the disk and not in the index: %v", object, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// cuts runs the writer on a disk whose power is cut, in rounds, and counts wrong reads.
func cuts(t *testing.T, session string, rounds int) (sum survey) {
	d := newLoopDisk(t, 256<<20)
	dir := filepath.Join(d.dir, "cache")
	for round := range rounds {
		cmd := startWriter(t, dir, session, round)
		time.Sleep(time.Duration(100+rand.IntN(300)) * time.Millisecond)
		freeze(t, cmd)
		d.cut(t)
		kill(cmd)
		d.unmount(t)
		d.mount(t)
		cfg := small(dir)
		cfg.BootID = session
		c, err := Open(cfg)
		if err != nil {
			t.Fatalf("round %d: open after a power cut: %v", round, err)
		}
		v := look(c)
		sum.hits += v.hits
		sum.unverified += v.unverified
		sum.wrong += v.wrong
		sum.misses += v.misses
		checkDisk(t, c)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return sum
}

// No reader sees a wrong byte or a hole as zeros after a power cut, though the
// boot id stays the same here and the index may know of bytes that never
// reached the disk.
func TestPowerCut(t *testing.T) {
	if private(t) {
		return
	}
	v := cuts(t, "", 6)
	t.Logf("%+v", v)
	if v.wrong > 0 {
		t.Errorf("%d wrong reads after power cuts", v.wrong)
	}
	if v.hits == 0 || v.unverified == 0 {
		t.Errorf("%+v: nothing was in doubt, so this test shows nothing", v)
	}
}

// The control: a cache that believes the session never ended gives wrong bytes,
// so the test above can fail.
func TestPowerCutBlind(t *testing.T) {
	if private(t) {
		return
	}
	var v survey
	for range 5 { // on a busy machine all may reach the disk in time
		if v = cuts(t, "always the same", 3); v.wrong > 0 {
			return
		}
	}
	t.Errorf("%+v: trusting blindly does no harm, so the power cuts show nothing", v)
}
