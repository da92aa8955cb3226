package staging

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Where nothing was ever staged there is nothing on the disk, so that it does not
// matter whether that is full.
func TestNothingIsKeptOfNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, func(c *Config) { c.openRoom = 1 << 60 })
	if err := s.List(t.Context(), "", func(*Path) bool { return true }); err != nil {
		t.Error(err)
	}
	if _, err := s.Get(t.Context(), flox.CID{1}); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a block: %v", err)
	}
	if n, err := s.Collect(t.Context(), func(*Path) bool { return false }); n != 0 || err != nil {
		t.Errorf("%d collected, %v", n, err)
	}
	if err := errors.Join(s.Sweep(t.Context()), s.Uploaded("00000000000000000000000000000000-x")); err != nil {
		t.Error(err)
	}
	if _, err := s.AddText(t.Context(), "text", []byte("text"), nil); !errors.Is(err, flox.ErrFull) {
		t.Errorf("added without room: %v", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// Where a full disk has no room to open the packs, what lies in the index is read and the
// rest is said to be full; with room it is there again.
func TestStagedIsBackWhenTheDiskHasRoom(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, nil)
	text, err := s.AddText(t.Context(), "text", []byte("text"), nil)
	if err != nil {
		t.Fatal(err)
	}
	large, err := s.AddAddressed(t.Context(), "large", nix.CAFlat, nix.SHA256, nil, bytes.NewReader(random(1, 3<<20)))
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, func(c *Config) { c.openRoom = 1 << 60 })
	whole(t, s, text)
	if _, err := s.Open(t.Context(), large); !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), dir) {
		t.Errorf("without room: %v", err)
	}
	if err := s.Full(); !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), dir) {
		t.Errorf("it has no room, but: %v", err)
	}
	if st := s.Stat(); st.Paths != 2 {
		t.Errorf("%d paths, want 2", st.Paths)
	}
	s.cfg.openRoom = 1
	whole(t, s, large)
	if err := errors.Join(s.Shut(), s.Full()); err != nil {
		t.Errorf("it is open, but: %v", err)
	}
}

// Where not even the index can be opened, that is said, and not that nothing is staged.
func TestShutIsNotNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "content"), 0o700); err != nil { // a crash came before the index
		t.Fatal(err)
	}
	s := open(t, dir, func(c *Config) {
		c.openRoom = 1 << 60
		c.fs = fullFS{vfs.Default}
	})
	p := flox.StorePath("00000000000000000000000000000000-x")
	if _, err := s.Path(p); !errors.Is(err, flox.ErrFull) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("without room: %v", err)
	}
	if err := s.Shut(); !errors.Is(err, flox.ErrFull) {
		t.Errorf("it is shut, but: %v", err)
	}
	s.cfg.openRoom, s.cfg.fs = 1, vfs.Default
	if _, err := s.Path(p); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("with room: %v", err)
	}
}

// fullFS has no room for a file.
type fullFS struct{ vfs.FS }

func (f fullFS) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, &os.PathError{Op: "create", Path: name, Err: unix.ENOSPC}
}
