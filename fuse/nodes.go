package fuse

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"sync"

	"github.com/floxctl/flox"
)

// rootNode is the store directory itself, logsNode the directory flox.LogsName in it.
const (
	rootNode = 1
	logsNode = 2
)

// maxOrdinals bounds how many store paths one mount can ever have looked up.
const maxOrdinals = 1 << 31

// tableMagic begins a node table: name, version, and how to read the rest.
var tableMagic = [8]byte{'f', 'l', 'o', 'x', 'n', 'o', 'd', '1'}

const tableHeader = len(tableMagic) + 8

// nodeTable gives every store path its range of inode numbers: an entry's
// number is ordinal(manifest) << 32 + index. The kernel may ask for a number
// long after the process that gave it is gone, so an ordinal is in the file
// before it is in an answer, and never given twice.
//
// The file is tableMagic, the first ordinal (8 bytes, little endian), and then
// the 32-byte digest of one manifest after another. The first ordinal is
// random: if the file is lost while the mount lives, old numbers lead nowhere
// instead of into another store path.
type nodeTable struct {
	path  string
	first uint32

	mu        sync.RWMutex
	ordinals  map[flox.CID]uint32
	manifests []flox.CID // by ordinal - first
}

// openNodeTable reads the table at path, or makes an empty one.
func openNodeTable(path string) (*nodeTable, error) {
	t := &nodeTable{path: path, ordinals: make(map[flox.CID]uint32)}
	f, err := os.Open(path)
	if errors.Is(err, iofs.ErrNotExist) {
		return t, t.create()
	}
	if err != nil {
		return nil, fmt.Errorf("node table: %w", err)
	}
	defer f.Close()
	size, err := t.read(f)
	if errors.Is(err, flox.ErrBadInput) {
		return nil, fmt.Errorf("node table %s: %w", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("node table %s: %w; unmount, remove it and mount again", path, err)
	}
	// A record cut off by the end of its writer was never answered with.
	if err := os.Truncate(path, size); err != nil {
		return nil, fmt.Errorf("node table: %w", err)
	}
	return t, nil
}

func (t *nodeTable) create() error {
	var b [tableHeader]byte
	copy(b[:], tableMagic[:])
	var r [4]byte
	if _, err := rand.Read(r[:]); err != nil {
		return fmt.Errorf("node table: %w", err)
	}
	t.first = binary.LittleEndian.Uint32(r[:])%(1<<31) + 1
	binary.LittleEndian.PutUint64(b[len(tableMagic):], uint64(t.first))
	// Under another name first: a reader sees the whole header or no file.
	tmp := t.path + ".new"
	if err := os.WriteFile(tmp, b[:], 0o600); err != nil {
		return fmt.Errorf("node table: %w", err)
	}
	if err := os.Rename(tmp, t.path); err != nil {
		return fmt.Errorf("node table: %w", err)
	}
	return nil
}

// read fills t from r and returns how many bytes of it are whole records.
func (t *nodeTable) read(r io.Reader) (int64, error) {
	var b [tableHeader]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, fmt.Errorf("not a node table: %w", flox.ErrCorrupt)
	}
	if err := checkFormat("node table", tableMagic, b[:len(tableMagic)]); err != nil {
		return 0, err
	}
	first := binary.LittleEndian.Uint64(b[len(tableMagic):])
	if first == 0 || first > 1<<31 {
		return 0, fmt.Errorf("first ordinal %d: %w", first, flox.ErrCorrupt)
	}
	t.first = uint32(first)
	for {
		var id flox.CID
		_, err := io.ReadFull(r, id[:])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return t.size(), nil
		}
		if err != nil {
			return 0, err
		}
		if _, dup := t.ordinals[id]; dup || len(t.manifests) == maxOrdinals {
			return 0, fmt.Errorf("record %d: %w", len(t.manifests), flox.ErrCorrupt)
		}
		t.ordinals[id] = t.first + uint32(len(t.manifests))
		t.manifests = append(t.manifests, id)
	}
}

// size is how long the file is when it holds what t holds.
func (t *nodeTable) size() int64 { return int64(tableHeader + flox.CIDSize*len(t.manifests)) }

// give returns the inode number of the entry 0 of manifest, recording it first
// if it is new.
func (t *nodeTable) give(manifest flox.CID) (uint64, error) {
	if node, ok := t.node(manifest, 0); ok {
		return node, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if o, ok := t.ordinals[manifest]; ok {
		return uint64(o) << 32, nil
	}
	if len(t.manifests) == maxOrdinals {
		return 0, fmt.Errorf("node table %s: no ordinals left, remount: %w", t.path, flox.ErrFull)
	}
	if err := t.append(manifest); err != nil {
		return 0, fmt.Errorf("node table: %w", err)
	}
	o := t.first + uint32(len(t.manifests))
	t.ordinals[manifest] = o
	t.manifests = append(t.manifests, manifest)
	return uint64(o) << 32, nil
}

// append adds one record to the file. Opening it each time costs little, since
// it happens once per store path, and leaves nothing to close.
func (t *nodeTable) append(manifest flox.CID) error {
	f, err := os.OpenFile(t.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if want := t.size(); info.Size() != want {
		return fmt.Errorf("%s has %d bytes instead of %d: another server of the mount writes it: %w", t.path, info.Size(), want, flox.ErrBusy)
	}
	if _, err := f.WriteAt(manifest[:], info.Size()); err != nil {
		// Half a record would make every later one unreadable.
		return errors.Join(err, f.Truncate(info.Size()))
	}
	return nil
}

// node gives an entry's number if its manifest has an ordinal.
func (t *nodeTable) node(manifest flox.CID, index uint32) (uint64, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	o, ok := t.ordinals[manifest]
	return uint64(o)<<32 | uint64(index), ok
}

// resolve is the inverse of node.
func (t *nodeTable) resolve(node uint64) (flox.CID, uint32, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	// Ordinals below first wrap around to numbers that are too large.
	i := uint32(node>>32) - t.first
	if node>>32 == 0 || uint64(i) >= uint64(len(t.manifests)) {
		return flox.CID{}, 0, false
	}
	return t.manifests[i], uint32(node), true
}
