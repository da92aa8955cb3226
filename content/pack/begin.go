package pack

import (
	"os"

	"golang.org/x/sys/unix"
)

// beginEvery is how many bytes are appended before the disk is asked to begin to
// write them. Otherwise it idles until a Sync, and all that a Sync is for waits.
const beginEvery = 4 << 20

// span is a part of a pack; file may be nil or closed meanwhile.
type span struct {
	file   *os.File
	off, n int64
}

// begin asks the disk to write a part soon. Nothing is durable by that.
func (p span) begin() {
	if p.file == nil {
		return
	}
	raw, err := p.file.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SyncFileRange(int(fd), p.off, p.n, unix.SYNC_FILE_RANGE_WRITE) // Sync is what says that it failed
	})
}
