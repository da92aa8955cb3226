package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dirWatch tells when a link may lead elsewhere, as the kernel says it (inotify(7)).
type dirWatch struct {
	tell  chan struct{} // is poked
	file  *os.File      // nil: the kernel does not say it
	ended chan struct{}

	mu    sync.Mutex
	dirs  map[string]int32 // directories, and their watches
	links []string
}

// open has it begin; it ends with close.
func (w *dirWatch) open() {
	w.ended = make(chan struct{})
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		close(w.ended)
		return
	}
	w.file = os.NewFile(uintptr(fd), "inotify")
	go w.read()
}

// only has it tell of these links and of no others; false: not of all of them.
func (w *dirWatch) only(links []string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.links = links; w.file == nil {
		return len(links) == 0
	}
	want := make(map[string]bool)
	for _, link := range links {
		want[filepath.Dir(link)] = true
	}
	all := true
	for dir := range want {
		if _, has := w.dirs[dir]; has {
			continue
		}
		err := w.control(func(fd int) error {
			n, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO|unix.IN_CREATE|unix.IN_DELETE|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ONLYDIR)
			w.dirs[dir] = int32(n) //nolint:gosec // a descriptor
			return err
		})
		if err != nil { // not to be read by this user, or not there
			delete(w.dirs, dir)
			all = false
		}
	}
	for dir, wd := range w.dirs {
		if !want[dir] {
			_ = w.control(func(fd int) error { _, err := unix.InotifyRmWatch(fd, uint32(wd)); return err }) //nolint:gosec // a descriptor
			delete(w.dirs, dir)
		}
	}
	return all
}

func (w *dirWatch) control(f func(fd int) error) error {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}

// read takes what the kernel says until close.
func (w *dirWatch) read() {
	defer close(w.ended)
	b := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(b)
		if err != nil {
			return
		}
		if w.concerns(b[:n]) {
			poke(w.tell)
		}
	}
}

// concerns reports whether some of what the kernel says is about a link.
func (w *dirWatch) concerns(b []byte) (yes bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(b) >= unix.SizeofInotifyEvent {
		e := (*unix.InotifyEvent)(unsafe.Pointer(&b[0])) //nolint:gosec // as the kernel writes it
		end := unix.SizeofInotifyEvent + int(e.Len)
		if end > len(b) {
			return true
		}
		name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:end]), "\x00")
		b = b[end:]
		if e.Mask&(unix.IN_Q_OVERFLOW|unix.IN_IGNORED|unix.IN_MOVE_SELF) != 0 {
			for dir, wd := range w.dirs {
				if wd == e.Wd {
					delete(w.dirs, dir) // it is another one now, if there is one
				}
			}
			yes = true
		}
		yes = yes || slices.ContainsFunc(w.links, func(link string) bool { return filepath.Base(link) == name })
	}
	return yes
}

func (w *dirWatch) close() {
	if w.file != nil {
		_ = w.file.Close()
	}
	<-w.ended
}
