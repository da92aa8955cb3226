package buildfarm

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"

	"github.com/floxctl/flox"
)

// shell is what Nix promises builds in a sandbox beside their inputs: many programs,
// the C library's system() among them, run it.
const shell = "/bin/sh"

// libraryDirs are where a dynamic loader looks.
var libraryDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// maxLibraries bounds what a shell takes with it.
const maxLibraries = 32

// shellPaths are this machine's shell and the libraries it needs, for a sandbox.
func shellPaths() ([]string, error) {
	paths := []string{shell}
	seen := map[string]bool{}
	for todo := []string{shell}; len(todo) > 0; todo = todo[1:] {
		interpreter, libraries, err := linked(todo[0])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", todo[0], err)
		}
		for _, name := range append(libraries, interpreter) {
			if name == "" || seen[name] || len(seen) == maxLibraries {
				continue
			}
			seen[name] = true
			file, err := library(name)
			if err != nil {
				return nil, err
			}
			paths, todo = append(paths, file), append(todo, file)
		}
	}
	// As what symlinks lead to: Nix 2.26 would show the symlink, which leads nowhere there.
	for i, file := range paths {
		real, err := filepath.EvalSymlinks(file)
		if err != nil {
			return nil, err
		}
		paths[i] = file + "=" + real
	}
	return paths, nil
}

// linked gives the dynamic loader of a program and the libraries it names.
func linked(file string) (interpreter string, libraries []string, err error) {
	f, err := elf.Open(file)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 1<<12 {
			name := make([]byte, p.Filesz)
			if _, err := p.ReadAt(name, 0); err != nil {
				return "", nil, err
			}
			interpreter = string(name[:max(len(name)-1, 0)]) // ends with a zero byte
		}
	}
	libraries, err = f.ImportedLibraries()
	return interpreter, libraries, err
}

// library finds a library by its name.
func library(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	for _, dir := range libraryDirs {
		file := filepath.Join(dir, name)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("library %s is in none of %q: %w", name, libraryDirs, flox.ErrNotFound)
}
