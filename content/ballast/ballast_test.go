package ballast

import (
	"errors"
	"log/slog"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// fullFS is a disk without room for any file.
type fullFS struct {
	vfs.FS
	asked int
}

func (f *fullFS) Create(string, vfs.DiskWriteCategory) (vfs.File, error) {
	f.asked++
	return nil, syscall.ENOSPC
}

// Pebble, which tries again at once for as long as a disk is full, is slowed down once
// there is nothing left to give up.
func TestFullDiskIsNotTriedAllTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &fullFS{FS: vfs.NewMem()}
		b := New(filepath.Join(t.TempDir(), "ballast"), "a test", 4096, slog.New(slog.DiscardHandler))
		b.Set()
		fs, begun := b.FS(disk), time.Now()
		for time.Since(begun) < 10*time.Second && disk.asked < 1000 {
			if _, err := fs.Create("table", vfs.WriteCategoryUnspecified); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("%v, want no space", err)
			}
			if disk.asked == 2 && !time.Now().Equal(begun) {
				t.Error("waits though there was a ballast to give up")
			}
		}
		if disk.asked > 50 {
			t.Errorf("a disk that stays full was asked %d times in %v", disk.asked, time.Since(begun))
		}
	})
}
