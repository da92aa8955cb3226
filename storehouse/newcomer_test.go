package storehouse

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox"
)

// A server that holds a storehouse of its own becomes no part of another one: nothing
// of it is changed, and it is said what to do.
func TestStorehouseOfItsOwnDoesNotJoinAnother(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	_, stop := start(t, cfg)
	stop()
	_, err := OpenNewcomer(cfg.StateDir)
	if !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), cfg.StateDir+" holds a storehouse of its own") || !strings.Contains(err.Error(), "floxctl leave") {
		t.Errorf("it joins another one: %v, want ErrBusy with what to do", err)
	}
	if _, err := os.Lstat(filepath.Join(cfg.StateDir, joinedName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was told of another one: %v", err)
	}
}
