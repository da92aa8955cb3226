package environment

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

const testDir flox.StoreDir = "/flox/store"

// store is Trees in memory: of each store path the files by path, where
// "-> x" is a symlink to x and "" of a path that ends in a slash a directory.
type store map[flox.StorePath]map[string]string

func (s store) Open(_ context.Context, p flox.StorePath) (flox.Tree, error) {
	files, ok := s[p]
	if !ok {
		return nil, fmt.Errorf("%s: %w", p, flox.ErrNotFound)
	}
	return newMemory(files), nil
}

// name gives a store path of that name.
func name(n string) flox.StorePath {
	sum := sha256.Sum256([]byte(n))
	return flox.StorePath(nix.EncodeBase32(sum[:20]) + "-" + n)
}

// memory is a flox.Tree; index 0 is the root.
type memory struct {
	entries  []flox.Entry
	content  []string
	children [][]uint32
}

func newMemory(files map[string]string) *memory {
	m := &memory{}
	m.add("", flox.Directory, "")
	dirs := map[string]uint32{"": 0}
	var mkdir func(p string) uint32
	mkdir = func(p string) uint32 {
		if i, ok := dirs[p]; ok {
			return i
		}
		at := strings.LastIndexByte(p, '/')
		up := mkdir(p[:max(at, 0)])
		i := m.add(p[at+1:], flox.Directory, "")
		m.children[up] = append(m.children[up], i)
		dirs[p] = i
		return i
	}
	for _, p := range slices.Sorted(maps.Keys(files)) {
		text := files[p]
		if d, ok := strings.CutSuffix(p, "/"); ok {
			mkdir(d)
			continue
		}
		if p == "" {
			m.entries[0].Kind, m.content[0] = flox.Regular, text
			continue
		}
		at := strings.LastIndexByte(p, '/')
		up := mkdir(p[:max(at, 0)])
		kind := flox.Regular
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			kind, text = flox.Symlink, target
		}
		i := m.add(p[at+1:], kind, text)
		m.children[up] = append(m.children[up], i)
	}
	return m
}

func (m *memory) add(name string, kind flox.Kind, text string) uint32 {
	e := flox.Entry{Name: name, Kind: kind}
	switch kind {
	case flox.Symlink:
		e.Target = text
	case flox.Regular:
		e.Size = uint64(len(text))
	}
	m.entries, m.content, m.children = append(m.entries, e), append(m.content, text), append(m.children, nil)
	return uint32(len(m.entries) - 1)
}

func (m *memory) Entry(_ context.Context, i uint32) (flox.Entry, error) {
	if int(i) >= len(m.entries) {
		return flox.Entry{}, flox.ErrNotFound
	}
	return m.entries[i], nil
}

func (m *memory) Child(_ context.Context, dir uint32, name string) (uint32, flox.Entry, error) {
	for _, i := range m.children[dir] {
		if m.entries[i].Name == name {
			return i, m.entries[i], nil
		}
	}
	return 0, flox.Entry{}, flox.ErrNotFound
}

func (m *memory) Children(_ context.Context, dir, from uint32, yield func(uint32, flox.Entry) bool) error {
	for _, i := range m.children[dir] {
		if i >= from && !yield(i, m.entries[i]) {
			break
		}
	}
	return nil
}

func (m *memory) ReadAt(_ context.Context, i uint32, p []byte, off int64, _ flox.Reader) (int, error) {
	return copy(p, m.content[i][off:]), nil
}

// forest gives links by path, directories with a slash behind them.
func forest(e *Environment) map[string]string {
	out := map[string]string{}
	for entry := range e.Entries() {
		switch {
		case entry.Kind == flox.Symlink:
			out[entry.Path] = entry.Target
		case entry.Kind == flox.Directory && entry.Path != "":
			out[entry.Path+"/"] = ""
		}
	}
	return out
}

func build(t testing.TB, s store, packages ...Package) *Environment {
	t.Helper()
	e, err := Build(t.Context(), testDir, s, packages)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func encode(t testing.TB, e *Environment) string {
	t.Helper()
	var out bytes.Buffer
	if err := e.WriteNAR(&out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func pkg(n string, priority int) Package {
	return Package{Name: n, Priority: priority, Paths: []flox.StorePath{name(n)}, Active: true}
}
