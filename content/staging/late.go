package staging

import (
	"errors"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// lateFS is a file system on which a sync of Pebble's log does nothing yet: what was
// written has then left this process, and settle brings it to the disk. (A write
// that Pebble is not asked to sync stays in the process and goes with it.)
type lateFS struct {
	vfs.FS
	syncing sync.Mutex // who settles after another has what that one has

	mu    sync.Mutex
	dirty map[*lateFile]struct{} // one, two while Pebble goes over to the next
}

func newLateFS(fs vfs.FS) *lateFS {
	return &lateFS{FS: fs, dirty: make(map[*lateFile]struct{})}
}

// settle makes all that was written to logs durable.
func (l *lateFS) settle() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.mu.Lock()
	files := l.dirty
	l.dirty = make(map[*lateFile]struct{})
	l.mu.Unlock()
	var errs []error
	for f := range files {
		if err := f.File.SyncData(); err != nil {
			errs = append(errs, err, f.later())
		}
	}
	return errors.Join(errs...)
}

// late wraps the files that are logs.
func (l *lateFS) late(name string, f vfs.File, err error) (vfs.File, error) {
	if err != nil || !strings.HasSuffix(name, ".log") {
		return f, err
	}
	return &lateFile{File: f, fs: l}, nil
}

// Create is vfs.FS.
func (l *lateFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := l.FS.Create(name, c)
	return l.late(name, f, err)
}

// ReuseForWrite is vfs.FS.
func (l *lateFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := l.FS.ReuseForWrite(old, name, c)
	return l.late(name, f, err)
}

// lateFile is a log.
type lateFile struct {
	vfs.File
	fs *lateFS
}

func (f *lateFile) later() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.fs.dirty[f] = struct{}{}
	return nil
}

// Sync is vfs.File.
func (f *lateFile) Sync() error { return f.later() }

// SyncData is vfs.File.
func (f *lateFile) SyncData() error { return f.later() }

// SyncTo is vfs.File.
func (f *lateFile) SyncTo(int64) (full bool, err error) { return false, f.later() }

// Close is vfs.File. Nobody settles a file that is closed.
func (f *lateFile) Close() error {
	err := f.fs.settle()
	f.fs.mu.Lock()
	delete(f.fs.dirty, f)
	f.fs.mu.Unlock()
	return errors.Join(err, f.File.Close())
}
