package cache

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/indexdb"
)

// objects are the files with content: packs of small segments, and own files
// of large ones. They are numbered, and a number is never used again, so
// that whoever still reads an object by number reads that one or nothing. Bytes
// of an object are never taken back while it exists: objects are removed whole.
type objects struct {
	dir      string
	packSize int64

	mu    sync.Mutex
	next  uint64           // number of the next object
	cur   uint64           // pack that is filled; 0 = none
	packs map[uint64]int64 // bytes of each pack
	total atomic.Int64     // bytes of all packs

	fds [16]fdShard
}

// fdShard holds open files. Its lock is held while a file is opened or removed:
// a removed one never stays open here.
type fdShard struct {
	mu    sync.RWMutex
	files map[uint64]*openFile
	limit int
}

type openFile struct {
	*os.File
	warm atomic.Bool
}

func newObjects(dir string, packSize int64, open int) *objects {
	o := &objects{dir: dir, packSize: packSize, next: 1, packs: map[uint64]int64{}}
	for i := range o.fds {
		o.fds[i] = fdShard{files: map[uint64]*openFile{}, limit: max(open/len(o.fds), 1)}
	}
	return o
}

func (o *objects) path(object uint64) string {
	return filepath.Join(o.dir, fmt.Sprintf("%02x", object%256), strconv.FormatUint(object, 16))
}

// found calls yield with the number and size of each object on the disk.
func (o *objects) found(yield func(object uint64, size int64) error) error {
	return filepath.WalkDir(o.dir, func(path string, d iofs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		object, err := strconv.ParseUint(d.Name(), 16, 64)
		if err != nil || path != o.path(object) {
			return nil // not ours
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return yield(object, info.Size())
	})
}

// adopt takes over an object that is there at start; size is not 0 for a pack.
func (o *objects) adopt(object uint64, pack bool, size int64) {
	o.next = max(o.next, object+1)
	if pack {
		o.packs[object] = size
		o.total.Add(size)
	}
}

// create makes a new object file.
func (o *objects) create() (object uint64, err error) {
	o.mu.Lock()
	object = o.next
	o.next++
	o.mu.Unlock()
	return object, o.make(object)
}

func (o *objects) make(object uint64) error {
	path := o.path(object)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, iofs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
			f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		}
	}
	if err != nil {
		return indexdb.Full(err)
	}
	o.fds[object%16].add(object, f)
	return nil
}

// alloc sets size bytes of the current pack aside, or of a new one.
func (o *objects) alloc(size int64) (object uint64, base int64, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cur == 0 || o.packs[o.cur]+size > o.packSize {
		object := o.next
		o.next++
		if err := o.make(object); err != nil {
			return 0, 0, err
		}
		o.cur, o.packs[object] = object, 0
	}
	base = o.packs[o.cur]
	o.packs[o.cur] += size
	o.total.Add(size)
	return o.cur, base, nil
}

// seal makes sure that nothing more is put into a pack, and gives its size.
func (o *objects) seal(object uint64) (size int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cur == object {
		o.cur = 0
	}
	return o.packs[object]
}

// open gives the file of an object; it may be closed at any time, which reads
// report as os.ErrClosed.
func (o *objects) open(object uint64) (*os.File, error) {
	s := &o.fds[object%16]
	s.mu.RLock()
	f := s.files[object]
	closed := s.files == nil
	s.mu.RUnlock()
	if f != nil {
		if !f.warm.Load() {
			f.warm.Store(true)
		}
		return f.File, nil
	}
	if closed {
		return nil, fmt.Errorf("cache: %w", flox.ErrClosed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[object]; f != nil {
		return f.File, nil
	}
	file, err := os.OpenFile(o.path(object), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if !s.put(object, file) {
		return nil, fmt.Errorf("cache: %w", flox.ErrClosed)
	}
	return file, nil
}

func (s *fdShard) add(object uint64, f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(object, f)
}

// put keeps f open, and closes one that was not used lately if there are too many.
func (s *fdShard) put(object uint64, f *os.File) bool {
	if s.files == nil {
		f.Close()
		return false
	}
	for len(s.files) >= s.limit {
		for other, old := range s.files { // the order of a map is random
			if old.warm.Swap(false) {
				continue
			}
			old.Close()
			delete(s.files, other)
			break
		}
	}
	s.files[object] = &openFile{File: f}
	return true
}

// remove deletes an object. Reads under way end well; later ones find nothing.
func (o *objects) remove(object uint64) error {
	o.mu.Lock()
	if o.cur == object {
		o.cur = 0
	}
	size, pack := o.packs[object]
	o.mu.Unlock()

	s := &o.fds[object%16]
	s.mu.Lock()
	err := os.Remove(o.path(object))
	if f := s.files[object]; f != nil {
		f.Close()
		delete(s.files, object)
	}
	s.mu.Unlock()
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return err
	}
	if pack {
		o.mu.Lock()
		delete(o.packs, object)
		o.mu.Unlock()
		o.total.Add(-size)
	}
	return nil
}

// flush makes packs durable: their bytes, and that they exist.
func (o *objects) flush(list []uint64) error {
	for _, object := range slices.Compact(slices.Sorted(slices.Values(list))) {
		f, err := os.OpenFile(o.path(object), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(indexdb.Full(f.Sync()), f.Close()); err != nil {
			return err
		}
		for _, dir := range []string{filepath.Dir(o.path(object)), o.dir} {
			d, err := os.Open(dir)
			if err != nil {
				return err
			}
			if err := errors.Join(d.Sync(), d.Close()); err != nil {
				return err
			}
		}
	}
	return nil
}

func (o *objects) close() {
	for i := range o.fds {
		s := &o.fds[i]
		s.mu.Lock()
		for _, f := range s.files {
			f.Close()
		}
		s.files = nil
		s.mu.Unlock()
	}
}
