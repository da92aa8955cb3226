package staging

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
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

// A full disk shuts what was staged, and says so; with room it is there again.
func TestStagedIsBackWhenTheDiskHasRoom(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, nil)
	p, err := s.AddText(t.Context(), "text", []byte("text"), nil)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "content")); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, func(c *Config) { c.openRoom = 1 << 60 })
	if _, err := s.Path(p.Info.Path); !errors.Is(err, flox.ErrFull) {
		t.Errorf("without room: %v", err)
	}
	if err := s.Shut(); !errors.Is(err, flox.ErrFull) {
		t.Errorf("it is shut, but: %v", err)
	}
	s.cfg.openRoom = 1
	if _, err := s.Path(p.Info.Path); err != nil {
		t.Error(err)
	}
	if err := s.Shut(); err != nil {
		t.Errorf("it is open, but: %v", err)
	}
	if st := s.Stat(); st.Paths != 1 {
		t.Errorf("%d paths, want 1", st.Paths)
	}
}
