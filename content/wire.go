package content

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/floxctl/flox"
)

// Every kind of manifest block begins with four bytes that name it, the last
// being the format's version.
const (
	magicRoot = "FXM1"
	magicPage = "FXP1"
	magicList = "FXL1"
)

// chunkerFastCDC is the only chunker of format version 1.
const chunkerFastCDC = 1

// listChunks is how many chunks a file's list may have in its entry, and how
// many each chunk-list block holds, the last one excepted.
const listChunks = 1024

// maxLists is how many chunk-list blocks a file may have.
const maxLists = 16384

// Bits of an entry's flags.
const (
	flagKind      = 0x03
	flagExec      = 0x04
	flagFormShift = 3
	flagMask      = 0x1f
)

// form says where a regular file's content is named.
type form uint8

const (
	formInline form = iota // in the entry
	formSingle             // one chunk: the file's name is the chunk's
	formList               // 2..listChunks chunks, listed in the entry
	formBlocks             // more, listed in chunk-list blocks
)

// decoder reads a block of a manifest. The first failure sticks: later reads
// give zero values, and err says what was wrong.
type decoder struct {
	b   []byte
	off int
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("manifest block at byte %d: %s: %w", d.off, fmt.Sprintf(format, args...), flox.ErrCorrupt)
	}
}

func (d *decoder) rest() int { return len(d.b) - d.off }

// magic expects the four bytes that begin a block.
func (d *decoder) magic(want string) {
	got := string(d.bytes(len(want)))
	if d.err != nil || got == want {
		return
	}
	d.off = 0
	if last := len(want) - 1; got[:last] == want[:last] && got[last] > want[last] && got[last] <= '9' {
		d.fail("format version %c, this program knows up to version %c: a newer floxd made it, update this one", got[last], want[last])
		return
	}
	d.fail("begins with %q, want %q", got, want)
}

// bytes gives the next n bytes, aliasing the block.
func (d *decoder) bytes(n int) []byte {
	if d.err != nil || n > d.rest() {
		d.fail("ends %d bytes early", n-d.rest())
		return nil
	}
	b := d.b[d.off : d.off+n : d.off+n]
	d.off += n
	return b
}

func (d *decoder) byte() byte {
	if b := d.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) cid() (id flox.CID) {
	copy(id[:], d.bytes(flox.CIDSize))
	return id
}

// uvarint reads a number of at most max, in its shortest form.
func (d *decoder) uvarint(what string, most uint64) uint64 {
	if d.err != nil {
		return 0
	}
	// One byte is by far the commonest.
	if d.off < len(d.b) && d.b[d.off] < 0x80 {
		v := uint64(d.b[d.off])
		if v > most {
			d.fail("%s is %d, want at most %d", what, v, most)
			return 0
		}
		d.off++
		return v
	}
	v, n := binary.Uvarint(d.b[d.off:])
	switch {
	case n <= 0:
		d.fail("%s is no number", what)
	case n > 1 && d.b[d.off+n-1] == 0:
		d.fail("%s is not in its shortest form", what)
	case v > most:
		d.fail("%s is %d, want at most %d", what, v, most)
	default:
		d.off += n
		return v
	}
	return 0
}

// text reads a length of at most max and that many bytes.
func (d *decoder) text(what string, most uint64) []byte {
	n := d.uvarint("length of "+what, most)
	return d.bytes(int(n))
}

func appendText(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// addUint64 adds without running over.
func addUint64(a, b uint64) (uint64, bool) {
	if a > math.MaxUint64-b {
		return 0, false
	}
	return a + b, true
}
