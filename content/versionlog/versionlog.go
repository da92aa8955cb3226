// Package versionlog notices that the end of a Pebble database's MANIFEST, the log of its
// versions, is gone. Pebble takes the first record that it cannot read for the end, as it is
// after a crash, and opens an older version: without what was flushed since then, and with
// what came after that, so that there is a hole in what a state holds, and no error.
package versionlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	iofs "io/fs"
	"path/filepath"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
)

// Beside MANIFEST-N there is MANIFEST-N.sum with two slots, written by turns and in place,
// so that it takes no room of a full disk and one of them is whole after a power cut: bytes of
// the MANIFEST that were synced (8), their SHA-256 (32), CRC-32 of both (4).
const (
	suffix   = ".sum"
	slotSize = 8 + sha256.Size + 4
	slotAt   = 512 // the second begins here
)

func isManifest(name string) bool {
	name = filepath.Base(name)
	return strings.HasPrefix(name, "MANIFEST-") && !strings.HasSuffix(name, suffix)
}

// FS gives a file system that notes what was synced of each MANIFEST.
func FS(fs vfs.FS) vfs.FS { return noting{fs} }

type noting struct{ vfs.FS }

// Unwrap is for vfs.Root.
func (n noting) Unwrap() vfs.FS { return n.FS }

// Create is vfs.FS.
func (n noting) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := n.FS.Create(name, c)
	if err != nil || !isManifest(name) {
		return f, err
	}
	sum, err := n.FS.Create(name+suffix, c)
	if err == nil {
		_, err = sum.Write(make([]byte, slotAt+slotSize))
	}
	if err != nil {
		if sum != nil {
			err = errors.Join(err, sum.Close())
		}
		return nil, errors.Join(err, f.Close())
	}
	return &manifest{File: f, sum: sum, hash: sha256.New()}, nil
}

// Remove is vfs.FS.
func (n noting) Remove(name string) error {
	err := n.FS.Remove(name)
	if err == nil && isManifest(name) {
		if err := n.FS.Remove(name + suffix); !errors.Is(err, iofs.ErrNotExist) {
			return err
		}
	}
	return err
}

// manifest is one that is being written, from its begin.
type manifest struct {
	vfs.File
	sum   vfs.File
	hash  hash.Hash
	bytes uint64
	turn  int64
}

// Write is vfs.File.
func (m *manifest) Write(b []byte) (int, error) {
	n, err := m.File.Write(b)
	_, _ = m.hash.Write(b[:n]) // never an error
	m.bytes += uint64(n)       //nolint:gosec // not negative
	return n, err
}

// Sync is vfs.File.
func (m *manifest) Sync() error { return m.synced(m.File.Sync()) }

// SyncData is vfs.File.
func (m *manifest) SyncData() error { return m.synced(m.File.SyncData()) }

// synced notes what was written up to now. Before that is on the disk a crash leaves what
// was noted before, and a MANIFEST that is longer.
func (m *manifest) synced(err error) error {
	if err != nil {
		return err
	}
	slot := binary.BigEndian.AppendUint64(nil, m.bytes)
	slot = m.hash.Sum(slot)
	slot = binary.BigEndian.AppendUint32(slot, crc32.ChecksumIEEE(slot))
	if _, err := m.sum.WriteAt(slot, m.turn*slotAt); err != nil {
		return err
	}
	m.turn = 1 - m.turn
	return m.sum.SyncData()
}

// Close is vfs.File.
func (m *manifest) Close() error { return errors.Join(m.File.Close(), m.sum.Close()) }

// Check gives flox.ErrCorrupt if what was synced of the MANIFEST in force in a directory is
// not there as it was. One that nothing was noted of, as by older programs, is taken as it is.
func Check(fs vfs.FS, dir string) error {
	at, err := pebble.Peek(dir, fs)
	if errors.Is(err, iofs.ErrNotExist) || err == nil && !at.Exists {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	name := at.ManifestFilename
	sums, err := read(fs, name+suffix)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	bytesNoted, want := newest(sums)
	if want == nil {
		return fmt.Errorf("%s%s cannot be read, which says how much there has to be of %s: %w", name, suffix, filepath.Base(name), flox.ErrCorrupt)
	}
	f, err := fs.Open(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	h := sha256.New()
	n, err := io.CopyN(h, f, int64(bytesNoted)) //nolint:gosec // of a file
	err = errors.Join(err, f.Close())
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", name, err)
	}
	if !bytes.Equal(h.Sum(nil), want) {
		return fmt.Errorf("%s is not as it was written, in the %d bytes that are known of it (%d are there): %w", name, bytesNoted, n, flox.ErrCorrupt)
	}
	return nil
}

// newest gives what was noted last; nil = there is no slot that is whole.
func newest(sums []byte) (length uint64, sum []byte) {
	for at := 0; at+slotSize <= len(sums); at += slotAt {
		slot := sums[at : at+slotSize]
		body := slot[:slotSize-4]
		if crc32.ChecksumIEEE(body) != binary.BigEndian.Uint32(slot[slotSize-4:]) {
			continue
		}
		if n := binary.BigEndian.Uint64(body); sum == nil || n > length {
			length, sum = n, body[8:]
		}
	}
	return length, sum
}

func read(fs vfs.FS, name string) ([]byte, error) {
	f, err := fs.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, slotAt+slotSize))
	return b, errors.Join(err, f.Close())
}
