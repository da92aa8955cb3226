package fuse

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/floxctl/flox"
)

// memStore is a flox.Store in memory that can be made to wait and to fail. A
// gate is named after what it holds up: "lookup NAME" or "read NAME INDEX".
type memStore struct {
	mu     sync.Mutex
	names  map[string]flox.CID
	trees  map[flox.CID]*memTree
	staged map[string]bool // names that may be deleted
	gates  map[string]chan struct{}
	fails  map[string]error
	many   int                    // how many made-up names a listing has beside names
	made   map[flox.CID]flox.Tree // trees that are computed
}

func newMemStore() *memStore {
	return &memStore{
		names: map[string]flox.CID{}, trees: map[flox.CID]*memTree{}, staged: map[string]bool{},
		gates: map[string]chan struct{}{}, fails: map[string]error{}, made: map[flox.CID]flox.Tree{},
	}
}

// node is a file tree as a test writes it down.
type node struct {
	name string
	kind flox.Kind
	exec bool
	data []byte // content, or target of a symlink
	sub  []node
}

func dir(name string, sub ...node) node { return node{name: name, kind: flox.Directory, sub: sub} }
func file(name string, data []byte) node {
	return node{name: name, kind: flox.Regular, data: data}
}

func link(name, target string) node {
	return node{name: name, kind: flox.Symlink, data: []byte(target)}
}

// memTree is the file tree of one path.
type memTree struct {
	s       *memStore
	name    string
	entries []flox.Entry
	data    [][]byte
}

func (m *memStore) add(name string, n node) flox.CID {
	t := &memTree{s: m, name: name}
	t.build(n)
	id := flox.CID(sha256.Sum256([]byte(name)))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[name], m.trees[id] = id, t
	return id
}

func (t *memTree) build(n node) {
	at := len(t.entries)
	e := flox.Entry{Name: n.name, Kind: n.kind, Executable: n.exec}
	switch n.kind {
	case flox.Regular:
		e.Size = uint64(len(n.data))
		e.File = sha256.Sum256(n.data)
	case flox.Symlink:
		e.Target = string(n.data)
	}
	if at == 0 {
		e.Name = ""
	}
	t.entries = append(t.entries, e)
	t.data = append(t.data, n.data)
	slices.SortFunc(n.sub, func(a, b node) int { return cmp.Compare(a.name, b.name) })
	for _, c := range n.sub {
		if c.kind == flox.Directory {
			t.entries[at].Dirs++
		}
		t.build(c)
	}
	t.entries[at].Span = uint32(len(t.entries) - at - 1)
}

// index finds an entry by its path inside the tree.
func (t *memTree) index(path string) uint32 {
	at := uint32(0)
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if part == "" {
			continue
		}
		i, _, err := t.Child(context.Background(), at, part)
		if err != nil {
			panic(err)
		}
		at = i
	}
	return at
}

func (m *memStore) hold(gate string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gates[gate] = make(chan struct{})
}

func (m *memStore) release(gate string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.gates[gate]; c != nil {
		close(c)
		delete(m.gates, gate)
	}
}

func (m *memStore) fail(gate string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fails[gate] = err
}

func (m *memStore) pass(ctx context.Context, gate string) error {
	m.mu.Lock()
	c, err := m.gates[gate], m.fails[gate]
	m.mu.Unlock()
	if err != nil || c == nil {
		return err
	}
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", gate, context.Cause(ctx))
	}
}

func (m *memStore) Lookup(ctx context.Context, name string, _ flox.Reader) (flox.CID, bool, error) {
	if _, err := flox.ParseStorePath(name); err != nil {
		return flox.CID{}, true, fmt.Errorf("%s: %w", name, flox.ErrNotFound)
	}
	if err := m.pass(ctx, "lookup "+name); err != nil {
		return flox.CID{}, false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	id, ok := m.names[name]
	if !ok {
		return id, false, fmt.Errorf("%s: %w", name, flox.ErrNotFound)
	}
	return id, !m.staged[name], nil
}

// Log finds the path that is called as the derivation, with .log behind.
func (m *memStore) Log(ctx context.Context, name string) (flox.CID, error) {
	id, _, err := m.Lookup(ctx, name+".log", flox.Reader{})
	return id, err
}

func (m *memStore) Names(ctx context.Context, after string, limit int) ([]flox.Named, error) {
	if err := m.pass(ctx, "names"); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []flox.Named
	for name, id := range m.names {
		if m.trees[id] != nil && name > after {
			list = append(list, flox.Named{Name: name, Manifest: id, Kind: m.trees[id].entries[0].Kind})
		}
	}
	for i := firstBehind(m.many, after); i < m.many && i >= 0; i++ {
		list = append(list, flox.Named{Name: manyName(i), Kind: flox.Directory})
		if len(list) >= limit+len(m.names) {
			break
		}
	}
	slices.SortFunc(list, func(a, b flox.Named) int { return cmp.Compare(a.Name, b.Name) })
	return list[:min(limit, len(list))], nil
}

// manyName is the i-th of a sorted row of store path names.
func manyName(i int) string {
	var b [32]byte
	for k := range b {
		b[k] = '0'
	}
	for k, v := 7, i; k >= 0; k, v = k-1, v/32 {
		b[k] = base32[v%32]
	}
	return string(b[:]) + fmt.Sprintf("-made-up-%d", i)
}

func firstBehind(n int, after string) int {
	lo, hi := 0, n
	for lo < hi {
		mid := (lo + hi) / 2
		if manyName(mid) > after {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

func (m *memStore) Tree(_ context.Context, manifest flox.CID, _ flox.Reader) (flox.Tree, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if w, ok := m.made[manifest]; ok {
		return w, nil
	}
	t, ok := m.trees[manifest]
	if !ok {
		return nil, flox.ErrNotFound
	}
	return t, nil
}

func (m *memStore) Usage() flox.Usage {
	return flox.Usage{TotalBytes: 1 << 40, FreeBytes: 1 << 39, Files: 12345}
}

func (t *memTree) Entry(_ context.Context, i uint32) (flox.Entry, error) {
	if int(i) >= len(t.entries) {
		return flox.Entry{}, flox.ErrNotFound
	}
	return t.entries[i], nil
}

func (t *memTree) Child(ctx context.Context, dir uint32, name string) (uint32, flox.Entry, error) {
	var at uint32
	var found flox.Entry
	err := t.Children(ctx, dir, 0, func(i uint32, e flox.Entry) bool {
		at, found = i, e
		return e.Name != name
	})
	if err == nil && found.Name != name {
		err = fmt.Errorf("%s: %w", name, flox.ErrNotFound)
	}
	return at, found, err
}

func (t *memTree) Children(_ context.Context, dir, from uint32, yield func(uint32, flox.Entry) bool) error {
	if int(dir) >= len(t.entries) {
		return flox.ErrNotFound
	}
	for i := dir + 1; i <= dir+t.entries[dir].Span; i += 1 + t.entries[i].Span {
		if i >= from && !yield(i, t.entries[i]) {
			return nil
		}
	}
	return nil
}

func (t *memTree) ReadAt(ctx context.Context, i uint32, p []byte, off int64, _ flox.Reader) (int, error) {
	if int(i) >= len(t.entries) {
		return 0, flox.ErrNotFound
	}
	if err := t.s.pass(ctx, fmt.Sprintf("read %s %d", t.name, i)); err != nil {
		return 0, err
	}
	if off >= int64(len(t.data[i])) {
		return 0, nil
	}
	return copy(p, t.data[i][off:]), nil
}

// Names of the test world.
const (
	toolsPath = "0c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-tools-1.0"
	filePath  = "1c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-just-a-file"
	linkPath  = "2c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-just-a-link"
	hungPath  = "3c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-hung"
	newPath   = "4c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-new"
	crowd     = 1500 // files in share/crowd
)

// noise is n bytes that differ from place to place.
func noise(n int) []byte {
	b := make([]byte, n+8)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:n]
}

// world fills a store with what the tests touch. bin/prog is this test binary.
func world(m *memStore) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	prog := file("prog", self)
	prog.exec = true
	many := make([]node, crowd)
	for i := range many {
		many[i] = file(fmt.Sprintf("f%04d", i), bytes.Repeat([]byte{byte(i)}, i%700))
	}
	m.add(toolsPath, dir("", dir("bin", prog, link("link", "prog")),
		dir("etc", file("conf", []byte("hello\n")), file("empty", nil)),
		dir("share", file("big", noise(3<<20+123)), file("hung", noise(256<<10)), dir("crowd", many...))))
	m.add(filePath, file("", []byte("a file\n")))
	m.add(linkPath, link("", toolsPath+"/etc/conf"))
}
