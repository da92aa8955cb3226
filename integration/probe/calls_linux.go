package probe

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls take names that end in a zero byte as they are: making them anew
// would cost as much as the call.

const cwd = unix.AT_FDCWD

func lstat(name []byte, st *unix.Stat_t) unix.Errno {
	at := cwd
	_, _, errno := unix.Syscall6(unix.SYS_NEWFSTATAT, uintptr(at), uintptr(unsafe.Pointer(&name[0])), //nolint:gosec // see above
		uintptr(unsafe.Pointer(st)), unix.AT_SYMLINK_NOFOLLOW, 0, 0) //nolint:gosec // see above
	return errno
}

func open(name []byte, flags int) (int, unix.Errno) {
	at := cwd
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(at), uintptr(unsafe.Pointer(&name[0])), uintptr(flags), 0, 0, 0) //nolint:gosec // see above
	return int(fd), errno
}

func readlink(name, buf []byte) unix.Errno {
	at := cwd
	_, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(at), uintptr(unsafe.Pointer(&name[0])), //nolint:gosec // see above
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0) //nolint:gosec // see above
	return errno
}
