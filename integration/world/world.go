// Package world is the demo world: a few hundred megabytes of real programs
// (git, ripgrep, Python with numpy, and all they need) as Nix store paths, made
// by stock Nix from Debian packages, built once per machine and reused.
//
// It must not know what is done with the paths. The store it makes lives in a
// cache directory and is seen at /nix only inside mount namespaces of its own:
// the machine's /nix stays untouched.
package world

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/floxctl/flox"
)

// sources are the Nix expressions and their builders. Together with what the Go
// code of this package asks for they decide which world a directory holds.
//
//go:embed nix
var sources embed.FS

// format changes when this package would build another world from the same
// sources.
const format = "1"

// marker is written last: a directory without it holds an unfinished world.
const marker = "world.json"

// World is what Ensure built or found.
type World struct {
	// Dir is the cache directory; Dir/nix is what is seen at /nix.
	Dir string `json:"-"`
	// StoreDir is the directory the paths were built for.
	StoreDir flox.StoreDir `json:"storeDir"`
	// System is Nix's name of the machine, for example "x86_64-linux".
	System string `json:"system"`
	// Paths are all valid paths, sorted by store path.
	Paths []Path `json:"paths"`
	// Git, Ripgrep and Python (with numpy) are what the demo runs.
	Git     Program `json:"git"`
	Ripgrep Program `json:"ripgrep"`
	Python  Program `json:"python"`
	// Unused is a program of some megabytes that nothing else refers to: for a
	// path that one machine holds and never ran.
	Unused Program `json:"unused"`
	// Tools are the programs of Tools, sorted by name; no other world has them.
	Tools []Tool `json:"tools,omitempty"`
	// Versions are pairs of paths that differ little, to measure deduplication.
	Versions []Version `json:"versions"`
	// BuildSeconds is how long building took, downloads included.
	BuildSeconds float64 `json:"buildSeconds"`

	held *os.File // the lock, while building
}

// Path is one store path of the world.
type Path struct {
	Path       flox.StorePath   `json:"path"`
	NarSize    uint64           `json:"narSize"`    // bytes
	References []flox.StorePath `json:"references"` // may hold Path itself
}

// Program is a store path with a program in it.
type Program struct {
	Path flox.StorePath `json:"path"`
	Exe  string         `json:"exe"` // absolute, below the store directory
	// ClosurePaths and ClosureBytes are how many paths the program's closure has
	// and the sum of their NAR sizes.
	ClosurePaths int    `json:"closurePaths"`
	ClosureBytes uint64 `json:"closureBytes"`
}

// Version is a pair of store paths of one package.
type Version struct {
	Name string         `json:"name"`
	Old  flox.StorePath `json:"old"`
	New  flox.StorePath `json:"new"`
	// Kind is "release" for two versions that Debian published, "rebuild" for
	// the same version built again because a dependency changed.
	Kind string `json:"kind"`
}

// DefaultDir is where worlds are kept: $FLOX_WORLD, else /var/cache/flox-world
// for root, else flox/world in the user's cache directory.
func DefaultDir() (string, error) {
	if dir := os.Getenv("FLOX_WORLD"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Geteuid() == 0 {
		return "/var/cache/flox-world", nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("directory for the demo world: %w: set FLOX_WORLD", err)
	}
	return filepath.Join(cache, "flox", "world"), nil
}

// Ensure gives the demo world of this version of the package, building it if
// nobody has yet: about a minute and 600 MB of disk, as root, with the network
// for Debian packages. It waits for another process that is building the same
// one. An interrupted build is started over by the next call.
func Ensure(ctx context.Context) (*World, error) { return demo.ensure(ctx) }

// Expression lays the expression of the demo world into dir, which is created, and
// gives its file: as Ensure builds it, from the packages of this machine's worlds.
func Expression(ctx context.Context, dir string) (file string, err error) {
	base, err := DefaultDir()
	if err != nil {
		return "", err
	}
	debs := filepath.Join(base, "debs")
	packages, err := demo.debian(ctx, debs)
	if err == nil {
		err = demo.lay(dir, debs, packages)
	}
	return filepath.Join(dir, demo.expression), err
}

// Closure gives root and all it refers to, at any distance, sorted.
func (w *World) Closure(root flox.StorePath) []Path {
	byPath := make(map[flox.StorePath]Path, len(w.Paths))
	for _, p := range w.Paths {
		byPath[p.Path] = p
	}
	reached := map[flox.StorePath]bool{root: true}
	for queue := []flox.StorePath{root}; len(queue) > 0; queue = queue[1:] {
		for _, ref := range byPath[queue[0]].References {
			if !reached[ref] {
				reached[ref] = true
				queue = append(queue, ref)
			}
		}
	}
	var closure []Path
	for _, p := range w.Paths {
		if reached[p.Path] {
			closure = append(closure, p)
		}
	}
	return closure
}

// Abs gives the absolute paths of all of the world's store paths.
func (w *World) Abs() []string {
	var all []string
	for _, p := range w.Paths {
		all = append(all, w.StoreDir.Join(p.Path))
	}
	return all
}

// Nix is the world's store for stock commands. What they add to it stays for
// everybody who uses this machine's world; Layered keeps it apart.
func (w *World) Nix() Nix { return Nix{Dir: filepath.Join(w.Dir, "nix")} }

// Layered is the world's store with all changes written to dir, which is
// created; one command at a time.
func (w *World) Layered(dir string) Nix { return Nix{Dir: dir, Lower: w.Nix().Dir} }

// Command is Nix().Command: a stock Nix command that sees the world at /nix.
func (w *World) Command(ctx context.Context, args ...string) *exec.Cmd {
	return w.Nix().Command(ctx, args...)
}

func load(dir string) (*World, error) {
	b, err := os.ReadFile(filepath.Join(dir, marker))
	if err != nil {
		return nil, err
	}
	w := &World{Dir: dir}
	if err := json.Unmarshal(b, w); err != nil {
		return nil, fmt.Errorf("%s: %w: remove %s to have the demo world built again", filepath.Join(dir, marker), err, dir)
	}
	return w, nil
}

func (w *World) save() error {
	b, err := json.MarshalIndent(w, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(w.Dir, marker+".tmp")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(w.Dir, marker))
}
