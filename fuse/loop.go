package fuse

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// idleReaders is how many goroutines wait for the next request while others
// work. Each works on what it read, so a request that does not wait costs no
// hand-over; one that waits keeps its goroutine, and another takes its place.
const idleReaders = 2

// pool is the goroutines of one Run.
type pool struct {
	s   *Server
	dev *device
	ctx context.Context // ends with the Run the pool belongs to
	wg  sync.WaitGroup

	mu    sync.Mutex
	idle  int   // waiting for a request
	total int   // idle and working
	err   error // why the first reader stopped
}

// start adds a reader if there is room for one.
func (p *pool) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.startLocked()
	if p.idle == 0 {
		p.s.requests.setFull(true)
	}
}

func (p *pool) startLocked() {
	if p.idle >= idleReaders || p.total >= p.s.cfg.MaxInFlight+1 || p.err != nil {
		return
	}
	p.idle++
	p.total++
	p.wg.Go(p.work)
}

// took is called when a reader has a request in hand. It leaves another at the
// device, and says so when the limit forbids that.
func (p *pool) took() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle--
	if p.idle == 0 {
		p.startLocked()
		if p.idle == 0 {
			p.s.requests.setFull(true)
		}
	}
}

// back is called when a request is answered; false: enough others wait.
func (p *pool) back() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.idle >= idleReaders || p.err != nil {
		p.total--
		return false
	}
	if p.idle == 0 {
		p.s.requests.setFull(false)
	}
	p.idle++
	return true
}

// stop ends the pool: nobody goes back to the device.
func (p *pool) stop(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle--
	p.total--
	if p.err == nil {
		p.err = err
	}
}

// leave ends a goroutine whose request is left to the next server.
func (p *pool) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total--
}

// work reads and serves requests until there are none.
func (p *pool) work() { p.workAt(p.s.journal.take()) }

func (p *pool) workAt(at place) {
	for {
		n, err := p.dev.read(at.b)
		if err != nil {
			at.give()
			p.stop(err)
			if errors.Is(err, syscall.ENODEV) {
				p.s.unmounted()
			}
			return
		}
		p.took()
		if !p.finish(at, at.b[:n], false) {
			return
		}
	}
}

// finish serves a request and reports whether to read another one.
func (p *pool) finish(at place, in []byte, again bool) bool {
	if !p.s.serve(p.ctx, p.dev, in, again) {
		p.leave() // and nobody else gets its place
		return false
	}
	at.clear()
	if !p.back() {
		at.give()
		return false
	}
	return true
}

// resume serves what the journal has of the last server. It is called before
// start, and does not wait.
func (p *pool) resume(left []place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range left {
		p.total++
		p.wg.Go(func() {
			if p.finish(at, at.request(), true) {
				p.workAt(at)
			}
		})
	}
}

// serve works on one request and answers it. false: it is left, unanswered, to
// the next server of the mount. again says that an earlier one was sent it.
func (s *Server) serve(ctx context.Context, dev *device, in []byte, again bool) bool {
	h, err := parseHeader(in)
	if err != nil {
		s.log.Error("request from the kernel", "error", err)
		return true
	}
	s.counts.requests[slot(h.op)].Add(1)
	switch h.op {
	case opForget, opBatchForget:
		return true // nothing is kept per inode
	case opInterrupt:
		s.requests.interrupt(interrupted(in)) // wants no answer
		return true
	case opIoctl:
		// There are none. The kernel asks for each, so do not wait behind anything.
		s.answer(dev, headerOnly(-int32(unix.ENOTTY), h.unique))
		return true
	}
	name := ""
	if h.op == opLookup {
		name = lookupName(in)
		if name == pollProbe {
			in[inHeaderSize] = '_' // as impossible a name, but one go-fuse leaves to us
		}
	}
	r := s.requests.add(ctx, h, name, again)
	defer s.requests.done(r)
	out := takeBuffer(answerSize + payloadSize(h.op, in))
	defer out.free()
	n, status := s.proto.HandleRequest([][]byte{in}, [][]byte{out.b})
	if errors.Is(context.Cause(ctx), errStopping) && r.ctx.Err() != nil && answerFailed(out.b[:n]) {
		return false // the next server of the mount gets it again
	}
	switch {
	case status != fuse.OK:
		s.answer(dev, headerOnly(-int32(status), h.unique))
	case n == 0: // wants no answer
	case h.node == rootNode && (h.op == opReadDir || h.op == opReadDirPlus) && n == outHeaderSize && !answerFailed(out.b[:n]):
		s.answer(dev, endOfRoot(out.b, h.unique))
	default:
		s.answer(dev, out.b[:n])
	}
	return true
}

// pollProbe is a name go-fuse finds by itself in the root of every mount.
const pollProbe = ".go-fuse-epoll-hack"

// answerFailed reports whether an answer is an error.
func answerFailed(out []byte) bool {
	return len(out) < outHeaderSize || binary.NativeEndian.Uint32(out[4:]) != 0
}

// endOfRoot ends a listing of the store directory. Without OPENDIR the kernel
// caches every directory it read to the end, for ever; but names come and go in
// this one. It takes an empty answer for the end; eight bytes are too short for
// an entry, so that a reader sees the end and the kernel does not.
func endOfRoot(out []byte, unique uint64) []byte {
	b := out[:outHeaderSize+8]
	clear(b)
	putOutHeader(b, 0, unique)
	return b
}

// answer writes to the device.
func (s *Server) answer(dev *device, b []byte) {
	if status := int32(binary.NativeEndian.Uint32(b[4:])); status != 0 {
		switch syscall.Errno(-status) {
		case unix.EIO:
			s.counts.errors.Add(1)
		case unix.EINTR:
			s.counts.interrupted.Add(1)
		}
	}
	// ENOENT: nobody waits for it any more.
	if err := dev.write(b); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		s.log.Error("answer to the kernel", "error", err, "bytes", len(b))
	}
}

// device is one server's own handle of the FUSE device.
type device struct {
	file *os.File
	raw  syscall.RawConn
}

// openDevice duplicates f, so that reading can be stopped and closing it leaves
// the mount alone.
func openDevice(f *os.File) (*device, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	ctlErr := raw.Control(func(from uintptr) {
		fd, err = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err := errors.Join(ctlErr, err); err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	// Waiting in the runtime's poller costs no thread and can be ended.
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	d := &device{file: os.NewFile(uintptr(fd), "fuse")}
	if d.raw, err = d.file.SyscallConn(); err != nil {
		d.file.Close()
		return nil, err
	}
	return d, nil
}

// read waits for a request. Errors: os.ErrDeadlineExceeded after interrupt,
// ENODEV when there is no mount any more.
func (d *device) read(b []byte) (int, error) {
	n := 0
	var err error
	waitErr := d.raw.Read(func(fd uintptr) bool {
		for {
			touch(b)
			n, err = unix.Read(int(fd), b)
			switch {
			// ENOENT: the request was given up while it was being read.
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			case errors.Is(err, unix.EAGAIN):
				return false
			default:
				return true
			}
		}
	})
	if waitErr == nil {
		return n, err
	}
	if errors.Is(waitErr, os.ErrDeadlineExceeded) || errors.Is(waitErr, os.ErrClosed) {
		return 0, waitErr
	}
	// The poller gives up on a device that signals an error, which one without a
	// mount does: the device itself says what it is.
	if d.raw.Control(func(fd uintptr) { n, err = unix.Read(int(fd), b) }) == nil && !errors.Is(err, unix.EAGAIN) {
		return n, err
	}
	return 0, waitErr
}

// touch has the pages of a place for a request in memory. The kernel takes a
// request from its queue before it copies it; where a page for that is missing
// and SIGKILL is pending, it gets none, and fails the request with EIO.
func touch(b []byte) {
	const page, word = 4096, 4 // the smallest there are
	// Not a byte is changed, also not under who else has the journal.
	for at := b; len(at) >= word; at = at[min(page, len(at)):] {
		atomic.OrUint32((*uint32)(unsafe.Pointer(&at[0])), 0) //nolint:gosec // a place is aligned to its size
	}
}

// write sends one answer or notification; it is never partial.
func (d *device) write(b []byte) error {
	var err error
	ctlErr := d.raw.Control(func(fd uintptr) {
		_, err = unix.Write(int(fd), b)
	})
	return errors.Join(ctlErr, err)
}

// buffer is a reused answer buffer.
type buffer struct {
	b    []byte
	pool *sync.Pool
}

// Answers are small, or READs: the kernel's read-ahead, or all of a large read(2).
var bufferPools = [...]struct {
	size int
	pool sync.Pool
}{{size: answerSize + 4<<10}, {size: answerSize + 128<<10}, {size: answerSize + maxRead}}

func takeBuffer(size int) buffer {
	for i := range bufferPools {
		c := &bufferPools[i]
		if size > c.size {
			continue
		}
		if p, ok := c.pool.Get().(*[]byte); ok {
			return buffer{(*p)[:size], &c.pool}
		}
		return buffer{make([]byte, c.size)[:size], &c.pool}
	}
	return buffer{b: make([]byte, size), pool: nil}
}

func (b buffer) free() {
	if b.pool != nil {
		full := b.b[:cap(b.b)]
		b.pool.Put(&full)
	}
}
