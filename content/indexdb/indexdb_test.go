package indexdb

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

func config(dir string) Config {
	return Config{Name: "test", Dir: filepath.Join(dir, "db"), Ballast: filepath.Join(dir, "ballast"), Most: 2 << 20, Log: slog.New(slog.DiscardHandler)}
}

func open(t *testing.T, dir string) *DB {
	t.Helper()
	d, err := Open(config(dir))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("needs root: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes all room there is.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

func apply(d *DB, key string) error {
	b := new(pebble.Batch)
	_ = b.Set([]byte(key), bytes.Repeat([]byte(key), 100), nil)
	return d.Apply(b, true)
}

func reads(t *testing.T, d *DB, keys []string) {
	t.Helper()
	for _, key := range keys {
		v, done, err := d.Get([]byte(key))
		if err != nil || !bytes.HasPrefix(v, []byte(key)) {
			t.Fatalf("%s: %v", key, err)
		}
		_ = done.Close()
	}
	it, err := d.NewIter(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for it.First(); it.Valid(); it.Next() {
		n++
	}
	if err := it.Close(); err != nil || n < len(keys) {
		t.Errorf("%d keys listed, want %d or more: %v", n, len(keys), err)
	}
}

// While many write, others take the whole disk and the ballast: every write ends,
// with ErrFull at last; what was written is read on, also by the next process, and
// once there is room there is nothing lost and writes go on.
func TestTheLastByte(t *testing.T) {
	const env = "FLOXD_TEST_INDEXDB"
	if role := os.Getenv(env); role != "" {
		var dir string
		var enough int
		if _, err := fmt.Sscan(role, &enough, &dir); err != nil {
			t.Fatal(err)
		}
		fillWhileWritten(t, dir, enough)
		return
	}
	// The first has only its log to write, the other tables, too.
	for _, enough := range []int{10, 4000} {
		t.Run(fmt.Sprint(enough), func(t *testing.T) {
			dir := smallDisk(t, "32m")
			cmd := exec.Command(os.Args[0], "-test.run=^TestTheLastByte$", "-test.timeout=40s")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", env, enough, dir))
			theLastByte(t, dir, cmd, enough)
		})
	}
}

func theLastByte(t *testing.T, dir string, cmd *exec.Cmd, enough int) {
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var keys []string
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		if key, ok := strings.CutPrefix(lines.Text(), "wrote "); ok {
			keys = append(keys, key)
		}
	}
	if len(keys) < enough {
		t.Fatalf("%d keys were written: this test shows nothing", len(keys))
	}
	fill(t, dir)
	d := open(t, dir)
	reads(t, d, keys)
	if err := errors.Join(d.Tend(), d.Close()); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if err := apply(d, "more"); err != nil {
		t.Error(err)
	}
	reads(t, d, append(keys, "more"))
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// fillWhileWritten is a process of its own: what Pebble leaves behind cannot be ended.
func fillWhileWritten(t *testing.T, dir string, enough int) {
	d := open(t, dir)
	var mu sync.Mutex
	var keys []string
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			for n := 0; ; n++ {
				key := fmt.Sprintf("%d-%d", w, n)
				if err := apply(d, key); err != nil {
					if !errors.Is(err, flox.ErrFull) {
						t.Errorf("%s: %v", key, err)
					}
					return
				}
				mu.Lock()
				keys = append(keys, key)
				full := len(keys) > enough
				mu.Unlock()
				if full && w == 0 {
					fill(t, dir) // the ballast, too, once it is given up
				}
			}
		})
	}
	group.Wait()
	if err := apply(d, "late"); !errors.Is(err, flox.ErrFull) || !d.Low() || !errors.Is(d.Room(), flox.ErrFull) {
		t.Errorf("%v, low %v, room %v", err, d.Low(), d.Room())
	}
	reads(t, d, keys)
	if err := errors.Join(d.Tend(), d.Close()); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Error(err)
	}
	if err := d.Tend(); !errors.Is(err, flox.ErrFull) {
		t.Errorf("room again: %v, want that the process starts anew", err)
	}
	for _, key := range keys {
		fmt.Println("wrote", key)
	}
	if t.Failed() {
		os.Exit(1)
	}
	os.Exit(0)
}

// A ballast that was given up is set aside again, and nothing is broken if it was enough.
func TestTheBallastIsEnough(t *testing.T) {
	dir := smallDisk(t, "32m")
	d := open(t, dir)
	defer d.Close()
	fill(t, dir)
	n := 0
	for ; !d.Low(); n++ {
		if err := apply(d, fmt.Sprint(n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(d.Room(), d.Broken(), d.Tend()); err != nil || !d.Low() {
		t.Errorf("%v, low %v", err, d.Low())
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	if err := d.Tend(); err != nil || d.Low() {
		t.Errorf("%v, low %v", err, d.Low())
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "ballast"), &st); err != nil || st.Blocks*512 < 1<<19 {
		t.Errorf("the ballast has %d blocks: %v", st.Blocks, err)
	}
}

// There is no room even to make one.
func TestNothingCanBeMade(t *testing.T) {
	dir := smallDisk(t, "1m")
	fill(t, dir)
	if _, err := Open(config(dir)); !errors.Is(err, flox.ErrFull) {
		t.Errorf("%v, want ErrFull", err)
	}
}

// noLogs has no room for a new log.
type noLogs struct {
	vfs.FS
	full atomic.Bool
}

func (n *noLogs) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if n.full.Load() && strings.HasSuffix(name, ".log") {
		return nil, &os.PathError{Op: "create", Path: name, Err: unix.ENOSPC}
	}
	return n.FS.Create(name, c)
}

func (n *noLogs) ReuseForWrite(_, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return n.Create(name, c)
}

// Pebble goes over to a new log half without its lock, and would take the process with it
// when that fails.
func TestNoRoomForANewLog(t *testing.T) {
	cfg, fs := config(t.TempDir()), &noLogs{FS: vfs.Default}
	cfg.FS = fs
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	fs.full.Store(true)
	var keys []string
	for err == nil {
		key := fmt.Sprint(len(keys))
		if err = apply(d, key); err == nil {
			keys = append(keys, key)
		}
	}
	if !errors.Is(err, flox.ErrFull) || !errors.Is(d.Broken(), flox.ErrFull) {
		t.Errorf("%v, broken: %v", err, d.Broken())
	}
	reads(t, d, keys)
}
