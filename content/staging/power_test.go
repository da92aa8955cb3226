package staging

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// A power cut takes nothing that was acknowledged but texts of the last moment, and no
// text that something acknowledged later refers to.
func TestPowerCut(t *testing.T) {
	disk := vfs.NewCrashableMem()
	dir := t.TempDir()
	// Its lock is on the machine's disk.
	if err := errors.Join(disk.MkdirAll(filepath.Join(dir, "paths"), 0o700), os.Mkdir(filepath.Join(dir, "paths"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for d := dir; ; d = filepath.Dir(d) { // so that the directory is there after a cut
		f, err := disk.OpenDir(d)
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		if d == filepath.Dir(d) {
			break
		}
	}
	s := open(t, dir, func(c *Config) { c.fs = disk })
	ctx := t.Context()
	var texts []flox.StorePath
	text := func() {
		t.Helper()
		p, err := s.AddText(ctx, fmt.Sprint("t", len(texts)), []byte("text"), texts[max(0, len(texts)-1):])
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, p.Info.Path)
	}
	for range 50 {
		text()
	}
	source, err := s.AddAddressed(ctx, "source", nix.CAFlat, nix.SHA256, nil, bytes.NewReader([]byte("data")))
	if err != nil {
		t.Fatal(err)
	}
	after := func() map[flox.StorePath]bool { return leftBy(t, disk, dir) }
	have := after()
	for _, p := range append(texts, source.Info.Path) {
		if !have[p] {
			t.Errorf("%s is gone, and the source was acknowledged after it", p)
		}
	}

	// So has what is said of outputs, and that it is forgotten.
	id := nix.RealisationID{DrvHash: [32]byte{1}, Output: "out"}
	if err := s.Realise(Everybody, &nix.Realisation{ID: id, Path: source.Info.Path}); err != nil {
		t.Fatal(err)
	}
	if !realisedAfter(t, disk, dir, id) {
		t.Error("a realisation that was acknowledged is gone")
	}
	if n, err := s.Unrealise(func(*Realised) bool { return false }); n != 1 || err != nil {
		t.Fatalf("forgot %d realisations, %v", n, err)
	}
	if realisedAfter(t, disk, dir, id) {
		t.Error("a realisation that was forgotten is back")
	}

	running, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(running) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	text()
	for until := time.Now().Add(time.Minute); !after()[texts[50]]; time.Sleep(SyncAfter) {
		if time.Now().After(until) {
			t.Fatal("a text is not on the disk after a minute")
		}
	}
}

// cutNow opens what is left of the index in dir when the power is cut now.
func cutNow(t *testing.T, disk *vfs.MemFS, dir string) *Store {
	t.Helper()
	now := disk.CrashClone(vfs.CrashCloneCfg{})
	after := t.TempDir()
	err := errors.Join(os.Mkdir(filepath.Join(after, "content"), 0o700), os.Mkdir(filepath.Join(after, "paths"), 0o700), now.MkdirAll(after, 0o700),
		now.Rename(filepath.Join(dir, "paths"), filepath.Join(after, "paths")))
	if err != nil {
		t.Fatal(err)
	}
	return open(t, after, func(c *Config) { c.fs = now })
}

// leftBy says what is staged then.
func leftBy(t *testing.T, disk *vfs.MemFS, dir string) map[flox.StorePath]bool {
	t.Helper()
	s := cutNow(t, disk, dir)
	have := map[flox.StorePath]bool{}
	err := s.List(t.Context(), "", func(p *Path) bool { have[p.Info.Path] = true; return true })
	if err = errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	return have
}

// realisedAfter says whether an output is realised then.
func realisedAfter(t *testing.T, disk *vfs.MemFS, dir string, id nix.RealisationID) bool {
	t.Helper()
	s := cutNow(t, disk, dir)
	_, err := s.Realised(Everybody, id)
	if errClose := s.Close(); errClose != nil || err != nil && !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err, errClose)
	}
	return err == nil
}
