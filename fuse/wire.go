package fuse

import (
	"encoding/binary"
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/floxctl/flox"
)

// Requests are parsed and answered by go-fuse. This file has the little that
// goes past it: the headers (to know who asks before anybody waits), answers of
// a header only, and the notifications, which go-fuse cannot send on a
// connection whose INIT it did not see. Layouts: Linux include/uapi/linux/fuse.h.

const (
	inHeaderSize  = 40
	outHeaderSize = 16

	// requestSize is enough for any request of a read-only mount: the kernel
	// wants room for 8 KiB and for a write of max_write, which tunedInit makes small.
	requestSize = 8192
	// answerSize is enough for the fixed part of any answer, its header included.
	answerSize = 512
	// maxRead is the largest READ the kernel may send.
	maxRead = 1 << 20
)

// Operations that are looked at here, by their number in the protocol.
const (
	opLookup      = 1
	opForget      = 2
	opRead        = 15
	opGetXAttr    = 22
	opListXAttr   = 23
	opInit        = 26
	opReadDir     = 28
	opInterrupt   = 36
	opDestroy     = 38
	opIoctl       = 39
	opBatchForget = 42
	opReadDirPlus = 44

	// opCount is one more than the largest operation counted by name; what is
	// above is counted together in slot 0.
	opCount = 54
)

var opNames = [opCount]string{
	0: "OTHER", 1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD",
	9: "MKDIR", 10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ", 16: "WRITE",
	17: "STATFS", 18: "RELEASE", 20: "FSYNC", 21: "SETXATTR", 22: "GETXATTR", 23: "LISTXATTR", 24: "REMOVEXATTR",
	25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR", 30: "FSYNCDIR", 31: "GETLK",
	32: "SETLK", 33: "SETLKW", 34: "ACCESS", 35: "CREATE", 36: "INTERRUPT", 37: "BMAP", 38: "DESTROY", 39: "IOCTL",
	40: "POLL", 41: "NOTIFY_REPLY", 42: "BATCH_FORGET", 43: "FALLOCATE", 44: "READDIRPLUS", 45: "RENAME2",
	46: "LSEEK", 47: "COPY_FILE_RANGE", 50: "SYNCFS", 51: "TMPFILE", 52: "STATX",
}

// slot is where an operation is counted.
func slot(op uint32) uint32 {
	if op >= opCount || opNames[op] == "" {
		return 0
	}
	return op
}

// header is the part of a request that says what is asked and by whom.
type header struct {
	op     uint32
	unique uint64
	node   uint64
	uid    uint32
	pid    uint32
}

// parseHeader reads the header of a request that fills all of b.
func parseHeader(b []byte) (header, error) {
	if len(b) < inHeaderSize {
		return header{}, fmt.Errorf("FUSE request of %d bytes, want at least %d: %w", len(b), inHeaderSize, flox.ErrBadInput)
	}
	if n := binary.NativeEndian.Uint32(b); uint64(n) != uint64(len(b)) {
		return header{}, fmt.Errorf("FUSE request of %d bytes says it has %d: %w", len(b), n, flox.ErrBadInput)
	}
	return header{
		op:     binary.NativeEndian.Uint32(b[4:]),
		unique: binary.NativeEndian.Uint64(b[8:]),
		node:   binary.NativeEndian.Uint64(b[16:]),
		uid:    binary.NativeEndian.Uint32(b[24:]),
		pid:    binary.NativeEndian.Uint32(b[32:]),
	}, nil
}

// payloadSize is how many bytes the caller wants behind the fixed part of the
// answer; never more than a READ may ask for.
func payloadSize(op uint32, b []byte) int {
	at := 0
	switch op {
	case opRead, opReadDir, opReadDirPlus:
		at = inHeaderSize + 16
	case opGetXAttr, opListXAttr:
		at = inHeaderSize
	case opIoctl:
		at = inHeaderSize + 28
	default:
		return 0
	}
	if len(b) < at+4 {
		return 0
	}
	return int(min(binary.NativeEndian.Uint32(b[at:]), maxRead))
}

// lookupName is the name a LOOKUP asks for.
func lookupName(b []byte) string {
	b = b[inHeaderSize:]
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// interrupted is which request an INTERRUPT is about.
func interrupted(b []byte) uint64 {
	if len(b) < inHeaderSize+8 {
		return 0
	}
	return binary.NativeEndian.Uint64(b[inHeaderSize:])
}

// putOutHeader writes the header of an answer or notification of len(b) bytes.
func putOutHeader(b []byte, status int32, unique uint64) {
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], uint32(status))
	binary.NativeEndian.PutUint64(b[8:], unique)
}

// headerOnly is an answer without content: a negative errno, or 0.
func headerOnly(status int32, unique uint64) []byte {
	b := make([]byte, outHeaderSize)
	putOutHeader(b, status, unique)
	return b
}

// resend is the notification that makes the kernel send again what it sent to
// a server before and was not answered.
func resend() []byte { return headerOnly(-fuse.NOTIFY_RESEND, 0) }

// The kernel's flags in its INIT: where they are in the request, that there are
// more than 32, and, among the upper ones, that it can send requests again.
const (
	initFlags      = inHeaderSize + 12
	initFlags2     = initFlags + 4
	initHasFlags2  = fuse.CAP_INIT_EXT
	initHasResend2 = fuse.CAP_HAS_RESEND >> 32
)

// resends reports whether the kernel that sent an INIT can send requests again
// that an earlier server did not answer.
func resends(init []byte) bool {
	return len(init) >= initFlags2+4 && binary.NativeEndian.Uint32(init[initFlags:])&initHasFlags2 != 0 &&
		binary.NativeEndian.Uint32(init[initFlags2:])&initHasResend2 != 0
}

// maskResend makes an INIT look like that of a kernel that cannot.
func maskResend(init []byte) {
	if resends(init) {
		flags := binary.NativeEndian.Uint32(init[initFlags2:])
		binary.NativeEndian.PutUint32(init[initFlags2:], flags&^initHasResend2)
	}
}

// invalInode is the notification that drops the cached pages of a whole file.
func invalInode(node uint64) []byte {
	b := make([]byte, outHeaderSize+24) // ino, off = 0, len = 0: to the end
	putOutHeader(b, -fuse.NOTIFY_INVAL_INODE, 0)
	binary.NativeEndian.PutUint64(b[outHeaderSize:], node)
	return b
}

// tunedInit changes go-fuse's answer to INIT. go-fuse has one number for the
// largest READ and the largest WRITE, but nothing writes here, and max_write
// decides how large a buffer every reader of the device must have.
func tunedInit(answer []byte) {
	const maxWrite = outHeaderSize + 20
	if len(answer) >= maxWrite+4 {
		binary.NativeEndian.PutUint32(answer[maxWrite:], 4096)
	}
}

// limitReadAhead makes an answer to INIT allow no more read-ahead than kib; 0
// leaves what was offered. go-fuse has no number for it.
func limitReadAhead(answer []byte, kib int) {
	const at = outHeaderSize + 8
	if kib > 0 && len(answer) >= at+4 {
		offered := binary.NativeEndian.Uint32(answer[at:])
		binary.NativeEndian.PutUint32(answer[at:], min(offered, uint32(kib)<<10)) //nolint:gosec // checked by the caller
	}
}

// splitInit takes Device.Init apart into the request and the answer.
func splitInit(b []byte) (request, answer []byte, err error) {
	bad := func(why string) ([]byte, []byte, error) {
		return nil, nil, fmt.Errorf("FUSE INIT of %d bytes: %s; pass on Device.Init as Mount gave it: %w", len(b), why, flox.ErrBadInput)
	}
	if len(b) < inHeaderSize {
		return bad("too short")
	}
	n := binary.NativeEndian.Uint32(b)
	if n < inHeaderSize+16 || uint64(n) > uint64(len(b)) {
		return bad("wrong request length")
	}
	request, answer = b[:n], b[n:]
	if binary.NativeEndian.Uint32(request[4:]) != opInit {
		return bad("not an INIT request")
	}
	if len(answer) < outHeaderSize || uint64(binary.NativeEndian.Uint32(answer)) != uint64(len(answer)) {
		return bad("wrong answer length")
	}
	return request, answer, nil
}
