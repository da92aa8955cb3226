package world

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/floxctl/flox"
)

// set is what a world is made of.
type set struct {
	name string
	// tops are the Debian packages the world is made for.
	tops []string
	// added are dependencies that Debian only recommends.
	added map[string][]string
	// excluded are packages that only a Debian system being installed needs, and
	// what is reached by name at run time and never by the programs we run.
	excluded []string
	// previous is a package of which another version is wanted too; "" = none.
	previous string
	// expression is the Nix file below nix/ whose attributes are built.
	expression string
	// finish fills in what is particular to the set.
	finish func(ctx context.Context, w *World, built map[string]flox.StorePath) error
}

// demo is what most tests and the demo use.
var demo = &set{
	name: "demo world", expression: "world.nix", previous: "git",
	tops: []string{"git", "ripgrep", "python3", "python3-numpy", "file", "dash"},
	// git's pager and its way to other machines.
	added:    map[string][]string{"git": {"less", "openssh-client"}},
	excluded: append([]string{"tar"}, installing...),
	finish: func(_ context.Context, w *World, built map[string]flox.StorePath) error {
		w.Git = w.program(built["git"], "git")
		w.Ripgrep = w.program(built["ripgrep"], "rg")
		w.Python = w.program(built["python"], "python3")
		w.Unused = w.program(built["file"], "file")
		w.Versions = []Version{{Name: "python3-numpy", Old: built["numpy"], New: built["numpy-rebuilt"], Kind: "rebuild"}}
		if old := built["git-previous"]; old != "" {
			w.Versions = append(w.Versions, Version{Name: "git", Old: old, New: built["git"], Kind: "release"})
		}
		return nil
	},
}

// installing are packages that only a Debian system being installed needs.
var installing = []string{
	"adduser", "debconf", "debconf-2.0", "debianutils", "dpkg", "install-info", "mailcap", "mime-support", "passwd",
}

// severed are dependencies that would make a cycle: the C library comes first.
var severed = map[string][]string{"libc6": nil, "libgcc-s1": {"libc6"}}

// ensure gives the world of the set, building it if nobody has yet.
func (s *set) ensure(ctx context.Context) (*World, error) {
	base, err := DefaultDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(base, s.key())
	if w, err := load(dir); err == nil || !errors.Is(err, iofs.ErrNotExist) {
		return w, err
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("no %s in %s, and building it needs root: run `make world`: %w", s.name, dir, flox.ErrDenied)
	}
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, fmt.Errorf("directory for the %s: %w", s.name, err)
	}
	held, err := lock(ctx, filepath.Join(base, s.key()+".lock"))
	if err != nil {
		return nil, fmt.Errorf("wait for whoever builds the %s in %s: %w", s.name, dir, err)
	}
	defer held.Close()
	if w, err := load(dir); err == nil || !errors.Is(err, iofs.ErrNotExist) {
		return w, err
	}
	if err := s.build(ctx, base, dir, held); err != nil {
		return nil, fmt.Errorf("build the %s in %s: %w", s.name, dir, err)
	}
	return load(dir)
}

// key names the world that this package builds of the set.
func (s *set) key() string {
	h := sha256.New()
	fmt.Fprintln(h, format, runtime.GOARCH, s.tops, s.added, s.excluded, severed, s.expression)
	err := iofs.WalkDir(sources, ".", func(path string, d iofs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := sources.ReadFile(path)
		fmt.Fprintf(h, "%s %d\n%s", path, len(content), content)
		return err
	})
	if err != nil {
		panic("world: embedded files cannot be read: " + err.Error())
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
