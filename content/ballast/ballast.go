// Package ballast sets room of a disk aside for a database on it: Pebble goes on and on
// without getting anywhere, also when it is opened, while its disk has none at all.
package ballast

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// Ballast is a file that is there so that it can go. Its methods may be called at the same
// time, but for Set and Tend.
type Ballast struct {
	file, of string
	size     int64 // bytes; 0 = there is to be none
	log      *slog.Logger
	low      atomic.Bool
}

// New prepares a ballast of size bytes in a file, for the database that is called of. What
// was there before is left as it is until Set.
func New(file, of string, size int64, log *slog.Logger) *Ballast {
	return &Ballast{file: file, of: of, size: size, log: log}
}

// pause is between two tries on a disk that is full though the ballast is gone: Pebble
// tries again at once, for as long as it is full.
const pause = 500 * time.Millisecond

// FS gives a file system that drops the ballast when the disk of fs is full, and tries
// again once then, after half a second if the ballast had gone before.
func (b *Ballast) FS(fs vfs.FS) vfs.FS {
	return vfs.OnDiskFull(fs, func() {
		if b.Low() {
			time.Sleep(pause) // no context: what Pebble asks of a file has none
		}
		b.Drop()
	})
}

// Low says that the ballast is gone: the disk was full.
func (b *Ballast) Low() bool { return b.low.Load() }

// Set sets the room aside.
func (b *Ballast) Set() {
	if b.size <= 0 {
		return
	}
	f, err := os.OpenFile(b.file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, b.size), f.Close()) //nolint:gosec // a descriptor
	}
	if err != nil {
		b.log.Warn("no ballast", "of", b.of, "size", b.size, "err", err)
	}
	b.low.Store(err != nil)
}

// Drop gives the room to whoever writes next.
func (b *Ballast) Drop() {
	b.low.Store(true)
	if err := os.Truncate(b.file, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		b.log.Warn("drop the ballast", "of", b.of, "err", err)
	}
}

// Tend sets the room aside again once the disk has more than two times as much.
func (b *Ballast) Tend() {
	if !b.Low() {
		return
	}
	if _, free, err := Disk(filepath.Dir(b.file)); err == nil && free > 2*b.size {
		b.Set()
	}
}

// Disk gives the size of the disk that a directory is on, and what is free of it for us, in bytes.
func Disk(dir string) (total, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil //nolint:gosec // of one disk
}
