package indexdb

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// vitalFS watches what Pebble writes. Without its log, manifest and markers it does not go on when a write
// fails: it panics, with locks half held. So it does not hear of that once it is open. Writes of all else,
// tables, may fail, they are tried again.
type vitalFS struct {
	vfs.FS
	of *attempt
}

func vital(name string) bool {
	name = filepath.Base(name)
	return strings.HasSuffix(name, ".log") || strings.HasPrefix(name, "MANIFEST-") || strings.HasPrefix(name, "marker.")
}

func (v *vitalFS) check(name string, err error) error {
	switch {
	case err == nil:
		return nil
	case vital(name):
		return v.of.failed(fmt.Errorf("write %s: %w", name, err))
	}
	v.of.slow(err)
	return err
}

func (v *vitalFS) made(name string, f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return f, v.check(name, err)
	}
	return &vitalFile{File: f, fs: v, name: name}, nil
}

// Unwrap is for vfs.Root.
func (v *vitalFS) Unwrap() vfs.FS { return v.FS }

// Create is vfs.FS.
func (v *vitalFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if !vital(name) {
		v.of.begin()
	}
	f, err := v.FS.Create(name, c)
	return v.made(name, f, err)
}

// ReuseForWrite is vfs.FS.
func (v *vitalFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := v.FS.ReuseForWrite(old, name, c)
	return v.made(name, f, err)
}

// Lock is vfs.FS.
func (v *vitalFS) Lock(name string) (io.Closer, error) { return unlocked{}, v.of.lockFile(name) }

// unlocked is all that Pebble has of the lock.
type unlocked struct{}

// Close is io.Closer.
func (unlocked) Close() error { return nil }

// Remove is vfs.FS. What is read early stays until that is over.
func (v *vitalFS) Remove(name string) error {
	if e := v.of.early; e != nil && e.tables[filepath.Base(name)] {
		<-e.over // a goroutine for this alone
	}
	return v.FS.Remove(name)
}

// Rename is vfs.FS.
func (v *vitalFS) Rename(old, name string) error { return v.check(name, v.FS.Rename(old, name)) }

// vitalFile is a file that is written.
type vitalFile struct {
	vfs.File
	fs   *vitalFS
	name string
}

// Write is vfs.File.
func (f *vitalFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	return n, f.fs.check(f.name, err)
}

// Sync is vfs.File.
func (f *vitalFile) Sync() error { return f.fs.check(f.name, f.File.Sync()) }

// SyncData is vfs.File.
func (f *vitalFile) SyncData() error { return f.fs.check(f.name, f.File.SyncData()) }

// SyncTo is vfs.File.
func (f *vitalFile) SyncTo(length int64) (bool, error) {
	full, err := f.File.SyncTo(length)
	return full, f.fs.check(f.name, err)
}
