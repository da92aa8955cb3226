package ctl

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/ctl/cli"
)

// What the agent leaves free for others unless told otherwise: max(5 GiB, 5 %).
const (
	reserveBytes   = 5 << 30
	reservePercent = 5
)

// checkDisk looks at the file system the state is or will be on.
func checkDisk(_ context.Context, p patient) []finding {
	dir := nearestDir(filepath.Join(p.root, p.stateDir))
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return []finding{warning("disk", "make "+p.stateDir+" accessible", "cannot ask %s for its free space: %v", dir, err)}
	}
	block := uint64(st.Bsize)
	total, free := st.Blocks*block, st.Bavail*block
	reserve := max(reserveBytes, total/100*reservePercent)
	var list []finding
	switch {
	case free < 64<<20:
		list = append(list, failure("disk", "free some space: with none left, neither state nor cache can be written",
			"%s has %s free of %s", dir, cli.FormatBytes(free), cli.FormatBytes(total)))
	case free < reserve:
		list = append(list, warning("disk", "free some space, or lower the agent's reserve (agent.cache-reserve in "+cli.DefaultConfigFile+")",
			"%s has %s free of %s; the cache leaves %s to others, so it will not grow", dir, cli.FormatBytes(free), cli.FormatBytes(total), cli.FormatBytes(reserve)))
	default:
		list = append(list, ok("disk", "%s has %s free of %s", dir, cli.FormatBytes(free), cli.FormatBytes(total)))
	}
	if st.Files > 0 && st.Ffree < st.Files/100 {
		list = append(list, warning("disk", "remove files you do not need: the file system is out of inodes", "%s has %d inodes left of %d", dir, st.Ffree, st.Files))
	}
	return list
}

// nearestDir is dir, or what of it exists.
func nearestDir(dir string) string {
	for dir != "/" && dir != "." {
		if _, err := os.Stat(dir); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return dir
}

// maxKeyFiles bounds the walk through the state directory.
const maxKeyFiles = 10_000

// checkKeys looks for secrets that others can read.
func checkKeys(ctx context.Context, p patient) []finding {
	root := filepath.Join(p.root, p.stateDir)
	if _, err := os.Stat(root); errors.Is(err, fs.ErrNotExist) {
		return []finding{ok("keys", "no state at %s yet", p.stateDir)}
	}
	var list []finding
	secrets, seen := 0, 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if seen++; err != nil || ctx.Err() != nil || seen > maxKeyFiles {
			return errors.Join(err, ctx.Err(), stopWalk(seen))
		}
		if d.IsDir() && strings.Count(strings.TrimPrefix(path, root), "/") > 2 {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() || !secretName(d.Name()) {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil // it went away while we looked
		}
		secrets++
		if info.Mode().Perm()&0o077 != 0 {
			list = append(list, failure("keys", "chmod 600 "+path+", and replace what it holds if others use this machine",
				"%s can be read by others (mode %04o)", path, info.Mode().Perm()))
		}
		return nil
	})
	switch {
	case errors.Is(err, fs.ErrPermission):
		return append(list, warning("keys", "run: sudo floxctl doctor", "you may not look into %s", p.stateDir))
	case err != nil && !errors.Is(err, fs.SkipAll):
		return append(list, warning("keys", "see the error", "cannot look through %s: %v", p.stateDir, err))
	case len(list) == 0:
		list = append(list, ok("keys", "%s in %s, readable by their owner only", plural(uint64(secrets), "secret", "secrets"), p.stateDir))
	}
	return list
}

// stopWalk ends the walk of a state directory that is larger than any should be.
func stopWalk(seen int) error {
	if seen > maxKeyFiles {
		return fs.SkipAll
	}
	return nil
}

// secretName tells files that hold secrets by their names.
func secretName(name string) bool {
	if strings.HasSuffix(name, ".pub") || strings.HasPrefix(name, "public") {
		return false
	}
	for _, word := range []string{"key", "token", "invite", "secret"} {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}
