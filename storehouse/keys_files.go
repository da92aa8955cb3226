package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// Files below keysDir that the first server begins with. Its log holds what is in
// them, sealed, from its first minute on: they are as secret as its machine key,
// which opens that. When what is in one has retired the file goes.
const (
	nixKeyName   = "nix.key"
	manifestName = "manifest.key"
	swarmName    = "swarm.secret"
)

// keysInLog reports whether the log of a state directory has to have the keys,
// since a file that the first server began with is gone.
func keysInLog(stateDir string) (bool, error) {
	entries, err := os.ReadDir(filepath.Join(stateDir, "raft"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil || len(entries) == 0 {
		return false, err
	}
	for _, name := range []string{nixKeyName, manifestName, swarmName} {
		_, err := os.Stat(filepath.Join(stateDir, keysDir, name))
		if errors.Is(err, os.ErrNotExist) {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("read keys: %w", err)
		}
	}
	return false, nil
}

// dropKeyFiles removes the files of keys that have retired: a trust list named
// them, and they are not in force any more. Keys that never were are left alone.
func (s *Server) dropKeyFiles(ctx context.Context, have *keys) error {
	dir := filepath.Join(s.cfg.StateDir, keysDir)
	var retired []string
	for _, f := range []struct {
		name  string
		force []nix.SecretKey
		ours  func(*content.TrustList) []string
	}{
		{nixKeyName, have.nix, func(l *content.TrustList) []string { return l.NixKeys }},
		{manifestName, have.manifest, func(l *content.TrustList) []string { return l.ManifestKeys }},
	} {
		key, err := readKeyFile(filepath.Join(dir, f.name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if name := key.Public().String(); !slices.Contains(public(f.force), name) {
			known, err := s.everTrusted(ctx, name, f.ours)
			if err != nil {
				return err
			}
			if known {
				retired = append(retired, f.name)
			}
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, swarmName)); err == nil {
		secret := swarmSecret(strings.TrimSpace(string(b)))
		if !slices.ContainsFunc(have.all.GetSwarmSecrets(), func(s []byte) bool { return string(s) == string(secret) }) {
			retired = append(retired, swarmName)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read secret: %w", err)
	}
	if len(retired) == 0 {
		return nil
	}
	for _, name := range retired {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("remove a retired key: %w", err)
		}
	}
	s.cfg.Log.Info("files of retired keys removed: the keys in force are in the log", "dir", dir, "files", strings.Join(retired, " "))
	return syncDir(dir)
}

func readKeyFile(path string) (key nix.SecretKey, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return key, err
	}
	if key, err = nix.ParseSecretKey(strings.TrimSpace(string(b))); err != nil {
		return key, fmt.Errorf("%s: not a key: %w", path, flox.ErrCorrupt) // err may quote it
	}
	return key, nil
}

// everTrusted reports whether any trust list named a key.
func (s *Server) everTrusted(ctx context.Context, key string, of func(*content.TrustList) []string) (found bool, err error) {
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		lists, err := readTrust(r, 0)
		for _, b := range lists {
			list, bad := content.ParseTrustList(b)
			if bad != nil {
				return fmt.Errorf("facts: %w: %w", bad, flox.ErrCorrupt)
			}
			found = found || slices.Contains(of(list), key)
		}
		return err
	})
	return found, err
}
