package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// A kernel without FUSE_NOTIFY_RESEND (before Linux 6.9) does not send a request
// again that a server read and did not live to answer. There, requests are read
// straight into a file that the next server of the mount has as well: the kernel
// itself writes them to where they are found, so there is no moment in which a
// request is in the memory of one process only. The connection is the same, so
// the kernel takes the answer from whoever gives it; an answer to a request that
// was answered already is refused by its number, which is never used twice.
//
// The file is a page with journalMagic, the size and number of the slots, the
// mount it belongs to, and a checksum of that (all little endian), and then the
// slots. A slot holds one request as the kernel writes it; one whose first eight
// bytes are zero is empty. A slot that makes no sense is not served.

// journalMagic begins a journal: name and version.
var journalMagic = [8]byte{'f', 'l', 'o', 'x', 'j', 'r', 'n', '1'}

const (
	journalHeader = 4096
	// maxSlots bounds a journal found on disk.
	maxSlots = 1 << 14
)

// journal is an open journal. A nil one keeps nothing.
type journal struct {
	mem  []byte
	left []place // what the last server did not answer

	mu   sync.Mutex
	free []int
}

// place is where one reader of the device puts a request.
type place struct {
	b []byte
	j *journal
	n int // slot
}

// openJournal opens the journal of a mount, or makes one where there is none or
// one that is not understood, which why then says. Only an error means that
// there is no journal.
func openJournal(path string, mount uint32, slots int) (j *journal, why, err error) {
	if j, why = findJournal(path, mount); j != nil {
		return j, nil, nil
	}
	if errors.Is(why, os.ErrNotExist) {
		why = nil
	}
	if j, err = makeJournal(path, mount, slots); err != nil {
		return nil, why, fmt.Errorf("journal: %w", err)
	}
	return j, why, nil
}

// findJournal opens the journal the last server left.
func findJournal(path string, mount uint32) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	slots, err := readJournal(f, mount)
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	return mapJournal(f, slots)
}

// readJournal checks the header of a journal and gives its number of slots.
func readJournal(f *os.File, mount uint32) (slots int, err error) {
	var b [journalHeader]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return 0, fmt.Errorf("header: %w: %w", err, flox.ErrCorrupt)
	}
	if err := checkFormat("journal", journalMagic, b[:8]); err != nil {
		return 0, err
	}
	if crc32.ChecksumIEEE(b[:20]) != binary.LittleEndian.Uint32(b[20:]) {
		return 0, fmt.Errorf("header checksum: %w", flox.ErrCorrupt)
	}
	size := binary.LittleEndian.Uint32(b[8:])
	slots = int(binary.LittleEndian.Uint32(b[12:]))
	info, err := f.Stat()
	switch {
	case err != nil:
		return 0, err
	case size != requestSize || slots < 1 || slots > maxSlots || info.Size() != journalSize(slots):
		return 0, fmt.Errorf("%d slots of %d bytes in a file of %d: %w", slots, size, info.Size(), flox.ErrCorrupt)
	case binary.LittleEndian.Uint32(b[16:]) != mount:
		return 0, fmt.Errorf("it belongs to another mount: %w", flox.ErrCorrupt)
	}
	return slots, nil
}

func journalSize(slots int) int64 { return journalHeader + int64(slots)*requestSize }

// makeJournal makes an empty journal in the place of whatever is there.
func makeJournal(path string, mount uint32, slots int) (j *journal, err error) {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	slots = min(slots, maxSlots)
	// All of it now: a page that cannot be had later is a SIGBUS.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, journalSize(slots)); err != nil {
		return nil, fmt.Errorf("%d bytes for it: %w", journalSize(slots), err)
	}
	var b [24]byte
	copy(b[:], journalMagic[:])
	binary.LittleEndian.PutUint32(b[8:], requestSize)
	binary.LittleEndian.PutUint32(b[12:], uint32(slots)) //nolint:gosec // at most maxSlots
	binary.LittleEndian.PutUint32(b[16:], mount)
	binary.LittleEndian.PutUint32(b[20:], crc32.ChecksumIEEE(b[:20]))
	if _, err := f.WriteAt(b[:], 0); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, path); err != nil {
		return nil, err
	}
	return mapJournal(f, slots)
}

func mapJournal(f *os.File, slots int) (*journal, error) {
	// With its pages, see touch.
	mem, err := unix.Mmap(int(f.Fd()), 0, int(journalSize(slots)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	j := &journal{mem: mem}
	for n := range slots {
		p := j.place(slots - 1 - n) // the first is taken first: few pages are used
		if unanswered(p.b) {
			j.left = append(j.left, p)
		} else {
			j.free = append(j.free, p.n)
		}
	}
	return j, nil
}

// place is a slot's.
func (j *journal) place(n int) place {
	at := journalHeader + n*requestSize
	return place{b: j.mem[at : at+requestSize : at+requestSize], j: j, n: n}
}

// unanswered reports whether a slot holds a request somebody waits for.
func unanswered(b []byte) bool {
	n := binary.NativeEndian.Uint32(b)
	if n < inHeaderSize || n > requestSize {
		return false
	}
	h, err := parseHeader(b[:n])
	if err != nil || h.unique == 0 || h.op >= opCount || opNames[h.op] == "" {
		return false
	}
	switch h.op {
	case opForget, opBatchForget, opInterrupt, opInit, opDestroy:
		return false
	}
	return true
}

// take gives a place to read a request to; when none is left, or there is no
// journal, one that nobody else can find.
func (j *journal) take() place {
	if j != nil {
		j.mu.Lock()
		defer j.mu.Unlock()
		if last := len(j.free) - 1; last >= 0 {
			p := j.place(j.free[last])
			j.free = j.free[:last]
			return p
		}
	}
	return place{b: make([]byte, requestSize)}
}

// request is what is in a place of the journal.
func (p place) request() []byte { return p.b[:binary.NativeEndian.Uint32(p.b)] }

// clear is called when the request was answered or wants no answer.
func (p place) clear() {
	if p.j != nil {
		// At once, so that no half of a header is ever there.
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&p.b[0])), 0) //nolint:gosec // the slot is 8 KiB, and so aligned
	}
}

// give gives an empty place back.
func (p place) give() {
	if p.j != nil {
		p.j.mu.Lock()
		defer p.j.mu.Unlock()
		p.j.free = append(p.j.free, p.n)
	}
}

// close unmaps the journal; nobody may have a place any more.
func (j *journal) close() {
	if j != nil {
		_ = unix.Munmap(j.mem)
		j.mem, j.free, j.left = nil, nil, nil
	}
}

// checkFormat compares the magic of a file, whose last byte is its version.
func checkFormat(what string, want [8]byte, got []byte) error {
	last := len(want) - 1
	switch {
	case string(got[:last]) != string(want[:last]) || got[last] < '1' || got[last] > '9':
		return fmt.Errorf("not a %s: %w", what, flox.ErrCorrupt)
	case got[last] > want[last]:
		return fmt.Errorf("its format is version %c and this program knows up to version %c: a newer floxd wrote it, start that one: %w", got[last], want[last], flox.ErrBadInput)
	}
	return nil
}
