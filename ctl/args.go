package ctl

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	flox "github.com/floxctl/flox"
)

// maxLinks bounds the symlinks followed from an argument to the store, as the
// kernel does.
const maxLinks = 40

// storeArg turns what a user names into what the agent is asked for: the base
// name of a store path, or an absolute path inside a store. Symlinks outside
// the store (./result, a profile) are followed; nothing inside a store is ever
// touched, because that could wait for the network.
func storeArg(arg string) (string, error) {
	if arg == "" {
		return "", fmt.Errorf("empty path: %w", flox.ErrBadInput)
	}
	if _, err := flox.ParseStorePath(arg); err == nil {
		return arg, nil
	}
	abs, err := filepath.Abs(arg)
	if err != nil {
		return "", fmt.Errorf("%s: %w", arg, err)
	}
	for range maxLinks {
		if inStore(abs) {
			return abs, nil
		}
		target, ok := followOne(abs)
		if !ok {
			return "", fmt.Errorf("%s is not in a store and no link leads from it to one: want a store path, its base name, or a link such as ./result: %w", arg, flox.ErrBadInput)
		}
		abs = target
	}
	return "", fmt.Errorf("%s: more than %d symlinks: %w", arg, maxLinks, flox.ErrBadInput)
}

// profileArg is the absolute name of what a user names outside every store, ""
// inside one. The file system is not asked: the agent asks it, and waits for none
// that hangs.
func profileArg(arg string) (string, error) {
	if _, err := flox.ParseStorePath(arg); err == nil || arg == "" {
		return "", nil
	}
	abs, err := filepath.Abs(arg)
	if err != nil {
		return "", fmt.Errorf("%s: %w", arg, err)
	}
	if inStore(abs) {
		return "", nil
	}
	return abs, nil
}

// storeArgs is storeArg for a whole command line; the first mistake ends it, so
// that nothing is asked for half of the arguments.
func storeArgs(args []string) ([]string, error) {
	out := make([]string, 0, len(args))
	for _, a := range args {
		p, err := storeArg(a)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// inStore reports whether some component of an absolute path is a store path name.
func inStore(abs string) bool {
	for part := range strings.SplitSeq(abs, "/") {
		if _, err := flox.ParseStorePath(part); err == nil {
			return true
		}
	}
	return false
}

// followOne replaces the first symlink on the way to abs by its target.
func followOne(abs string) (string, bool) {
	parts := strings.Split(abs, "/")[1:]
	at := "/"
	for i, part := range parts {
		at = filepath.Join(at, part)
		target, err := os.Readlink(at)
		if err != nil {
			continue
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(at), target)
		}
		return filepath.Join(append([]string{target}, parts[i+1:]...)...), true
	}
	return "", false
}
