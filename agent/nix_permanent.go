package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/worker"
)

// AddPermanent implements worker.Roots, as Nix 2.26 src/libstore/indirect-root-store.cc.
// Only trusted clients get here: the agent's own user, with whose rights the link is
// made, and root, with whose rights this process makes nothing.
func (s *sessionRoots) AddPermanent(ctx context.Context, p flox.StorePath, link string) error {
	dir := s.all.a.cfg.StoreDir
	if !s.own {
		return &worker.Error{Message: fmt.Sprintf("cannot create symlink '%s': the agent runs as another user and creates nothing with root's rights; "+
			"a symlink to '%s' that you create there yourself is kept when it is added as an indirect root, as nix-store --add-root does", link, dir.Join(p)), Cause: flox.ErrDenied}
	}
	if _, _, err := dir.Split(link); err == nil || link == string(dir) || strings.HasPrefix(link, string(dir)+"/") {
		return &worker.Error{Message: fmt.Sprintf("creating a garbage collector root (%s) in the Nix store is forbidden (are you running nix-build inside the store?)", link), Cause: flox.ErrDenied}
	}
	if err := s.AddTemp(ctx, p); err != nil {
		return err
	}
	if err := makeRoot(link, dir.Join(p), string(dir)+"/"); err != nil {
		return err
	}
	return s.AddIndirect(ctx, link)
}

// makeRoot makes a link, in place of one that points below store if there is one.
func makeRoot(link, target, store string) error {
	if info, err := os.Lstat(link); err == nil {
		old := ""
		if info.Mode()&os.ModeSymlink != 0 {
			old, _ = os.Readlink(link) // one that cannot be read is not replaced
		}
		if !strings.HasPrefix(old, store) {
			return &worker.Error{Message: fmt.Sprintf("cannot create symlink '%s'; already exists", link), Cause: flox.ErrBusy}
		}
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil { //nolint:gosec // as Nix makes them
		return fmt.Errorf("permanent root: %w", err)
	}
	temp, err := os.MkdirTemp(filepath.Dir(link), filepath.Base(link)+".tmp-")
	if err != nil {
		return fmt.Errorf("permanent root: %w", err)
	}
	defer os.RemoveAll(temp)
	made := filepath.Join(temp, "link")
	if err := os.Symlink(target, made); err != nil {
		return fmt.Errorf("permanent root: %w", err)
	}
	if err := os.Rename(made, link); err != nil {
		return fmt.Errorf("permanent root: %w", err)
	}
	return nil
}
