package buildfarm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// lockFile makes this the only process that uses what the file stands for, until
// it is closed or the process ends.
func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("builder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("builder: %s is locked by another process: %w: %w", name, err, flox.ErrBusy), f.Close())
	}
	return f, nil
}

// remove removes a directory with what is in it, also where that is read-only. It
// changes nothing outside, whatever somebody does inside meanwhile.
func remove(dir string) error {
	if os.RemoveAll(dir) == nil {
		return nil
	}
	parent := filepath.Dir(dir)
	root, err := os.OpenRoot(parent)
	if err != nil {
		return err
	}
	defer root.Close()
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if rel, bad := filepath.Rel(parent, path); err == nil && bad == nil && d.IsDir() {
			_ = root.Chmod(rel, 0o700) // what is left says why
		}
		return nil
	})
	return os.RemoveAll(dir)
}
