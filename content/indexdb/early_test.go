package indexdb

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
)

// stuckDisk makes nothing durable until it may.
type stuckDisk struct {
	vfs.FS
	may chan struct{}
}

type stuckFile struct {
	vfs.File
	may chan struct{}
}

func (s *stuckDisk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, c)
	return &stuckFile{f, s.may}, err
}

func (s *stuckDisk) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.ReuseForWrite(old, name, c)
	return &stuckFile{f, s.may}, err
}

func (f *stuckFile) Sync() error {
	<-f.may
	return f.File.Sync()
}

func (f *stuckFile) SyncData() error {
	<-f.may
	return f.File.SyncData()
}

// twoRuns fills a database, of which a table and a log are left, and gives its keys.
func twoRuns(t *testing.T, cfg Config) []string {
	t.Helper()
	var keys []string
	for range 2 { // the first open leaves a log, the second makes a table of it
		d, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for range 500 {
			keys = append(keys, fmt.Sprint(len(keys)))
			if err := apply(d, keys[len(keys)-1]); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return keys
}

// What is there is read before the disk has written anything, tables and log; who
// writes waits, and what was written then is read by all who come later.
func TestReadBeforeTheDiskWrites(t *testing.T) {
	cfg := config(t.TempDir())
	keys := twoRuns(t, cfg)
	disk := &stuckDisk{vfs.Default, make(chan struct{})}
	cfg.FS = disk
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	reads(t, d, keys)
	before, err := d.NewIter(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- apply(d, "late") }()
	if _, _, err := d.Get([]byte("late")); err == nil || d.writable() {
		t.Error("the disk wrote: this test shows nothing")
	}
	close(disk.may)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	reads(t, d, append(keys, "late"))
	n := 0
	for before.First(); before.Valid(); before.Next() {
		n++
	}
	if err := before.Close(); err != nil || n != len(keys) {
		t.Errorf("%d keys listed by who began before, want %d: %v", n, len(keys), err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// Tables that are read early may still have to be opened: they stay so long, also when
// nothing of them is left in the database that is written.
func TestTablesReadEarlyStay(t *testing.T) {
	cfg := config(t.TempDir())
	keys := twoRuns(t, cfg)
	disk := &stuckDisk{vfs.Default, make(chan struct{})}
	cfg.FS = disk
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	before, err := d.NewIter(context.Background(), nil) // has opened no table
	if err != nil {
		t.Fatal(err)
	}
	old := 0
	for _, is := range d.early.tables {
		if is {
			old++
		}
	}
	if old == 0 {
		t.Fatal("no table was there: this test shows nothing")
	}
	close(disk.may)
	if err := apply(d, "late"); err != nil {
		t.Fatal(err)
	}
	if err := d.db.DeleteRange([]byte("0"), []byte("z"), pebble.Sync); err != nil {
		t.Fatal(err)
	}
	if err := d.db.Compact(context.Background(), []byte("0"), []byte("z"), false); err != nil {
		t.Fatal(err)
	}
	for range 1000 { // tables go in the background
		runtime.Gosched()
	}
	n := 0
	for before.First(); before.Valid(); before.Next() {
		n++
	}
	if err := before.Close(); err != nil || n != len(keys) {
		t.Errorf("%d keys listed by who began before, want %d: %v", n, len(keys), err)
	}
	if err := d.Close(); err != nil { // waits for the background
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(cfg.Dir, "*.sst"))
	if err != nil || len(left) > 0 {
		t.Errorf("%v stay for ever: %v", left, err)
	}
}

// rotten says that the database is damaged to who opens it for writing.
type rotten struct{ vfs.FS }

func (r *rotten) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if strings.HasSuffix(name, ".dbtmp") {
		return nil, fmt.Errorf("read %s: %w", name, pebble.ErrCorruption)
	}
	return r.FS.Create(name, c)
}

// Damage that only who writes meets does not hold up who reads. The next process hears
// of it from Open, as of any other.
func TestDamagedWhereItIsWritten(t *testing.T) {
	cfg := config(t.TempDir())
	keys := twoRuns(t, cfg)
	bad := cfg
	bad.Options.DisableAutomaticCompactions = true // Pebble panics if one runs when it fails to open
	bad.FS = &rotten{vfs.Default}
	d, err := Open(bad)
	if err != nil {
		t.Fatal(err)
	}
	if err := apply(d, "late"); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
	reads(t, d, keys)
	if err := d.Tend(); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("%v, want that the process starts anew", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Open(cfg); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("the next process: %v, want ErrCorrupt", err)
	}
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if d, err = Open(cfg); err != nil {
		t.Fatalf("made anew: %v", err)
	}
	if err := errors.Join(apply(d, "new"), d.Close()); err != nil {
		t.Error(err)
	}
}

// The next process waits for the lock's end, not only for who writes.
func TestOneProcessAtATime(t *testing.T) {
	cfg := config(t.TempDir())
	twoRuns(t, cfg)
	const env = "FLOXD_TEST_INDEXDB_SECOND"
	if dir := os.Getenv(env); dir != "" {
		if _, err := Open(config(dir)); err == nil {
			t.Error("two processes have it")
		}
		return
	}
	disk := &stuckDisk{vfs.Default, make(chan struct{})}
	cfg.FS = disk
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	second := func() {
		t.Helper()
		cmd := exec.Command(os.Args[0], "-test.run=^TestOneProcessAtATime$")
		cmd.Env = append(os.Environ(), env+"="+filepath.Dir(cfg.Dir))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	second() // while it is only read
	close(disk.may)
	if err := apply(d, "late"); err != nil {
		t.Fatal(err)
	}
	second() // once who read it early has gone
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
