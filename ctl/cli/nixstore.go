package cli

import (
	"errors"
	"io"
	"os"

	flox "github.com/floxctl/flox"
)

// mostOther is how many of a Nix store's first names may be no store path's: what
// builds and collections leave for a moment.
const mostOther = 64

// IsNixStore reports whether a Nix store is at dir: store paths, or the directory in
// which Nix links equal files. It must not be asked of a mount of ours, where nobody
// may answer. A directory that cannot be looked into is an error.
func IsNixStore(dir string) (bool, error) {
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.IsDir() {
		return false, err
	}
	names, err := f.Readdirnames(mostOther)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	for _, name := range names {
		if _, err := flox.ParseStorePath(name); err == nil || name == ".links" {
			return true, nil
		}
	}
	return false, nil
}
