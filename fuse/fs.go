package fuse

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// forever is how many seconds the kernel may believe what never changes.
	forever = math.MaxInt32
	// passingTime is how many seconds it may believe that a store path is there which
	// may go. The kernel keeps what it has read as long as the node is the same.
	passingTime = 10
	// retryPause is how long to wait before asking a store again that could
	// reach nobody.
	retryPause = 500 * time.Millisecond
)

// files is the store as go-fuse wants it. What is not here is answered ENOSYS,
// after which the kernel does not ask again: OPEN, OPENDIR and FLUSH (so that a
// warm open and close costs no request), ACCESS, extended attributes, STATX, LSEEK.
type files struct {
	fuse.RawFileSystem
	s *Server
}

// String names the file system in go-fuse's messages.
func (f *files) String() string { return "floxd" }

// request finds what go-fuse calls by its number.
func (f *files) request(h *fuse.InHeader) *request {
	if r := f.s.requests.get(h.Unique); r != nil {
		return r
	}
	// Only a kernel that reuses numbers could come here.
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errStopping)
	return &request{ctx: ctx, cancel: cancel}
}

// wait calls do with a context that ends after timeout and, if retry, calls it
// again while time is left and it reached nobody. When parent ends, its cause
// is the error.
func (f *files) wait(parent context.Context, timeout time.Duration, retry bool, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(parent, timeout)
	defer cancel()
	for {
		err := do(ctx)
		if err == nil {
			return nil
		}
		if parent.Err() != nil {
			return context.Cause(parent)
		}
		if !retry || !transient(err) {
			return err
		}
		if !pause(ctx, retryPause) {
			if parent.Err() != nil {
				return context.Cause(parent)
			}
			return err
		}
	}
}

// pause reports whether d passed before ctx was done.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// Lookup answers with an entry and its attributes, or that there is none.
func (f *files) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	r := f.request(in)
	switch in.NodeId {
	case rootNode:
		return f.lookupRoot(r, name, out)
	case logsNode:
		return f.lookupLog(r, name, out)
	}
	manifest, dir, ok := f.s.nodes.resolve(in.NodeId)
	if !ok {
		return stale
	}
	var index uint32
	var entry flox.Entry
	missing := false
	err := f.wait(r.ctx, f.s.cfg.ReadTimeout, true, func(ctx context.Context) error {
		tree, err := f.s.cfg.Store.Tree(ctx, manifest, r.reader())
		if err != nil {
			return err
		}
		index, entry, err = tree.Child(ctx, dir, name)
		missing = errors.Is(err, flox.ErrNotFound)
		return err
	})
	switch {
	case missing:
		// The manifest says so and never changes.
		out.NodeId, out.EntryValid = 0, forever
		return fuse.OK
	case err != nil:
		return f.failed(r, err)
	}
	fillEntry(out, in.NodeId&^math.MaxUint32|uint64(index), entry)
	return fuse.OK
}

// lookupRoot looks up a store path. What is not valid now may be valid the next
// moment, and what was added on this machine may be deleted there, so the kernel
// must ask again each time; then nobody ever has to take a name out of its cache,
// which would need the lock a hung look-up holds.
func (f *files) lookupRoot(r *request, name string, out *fuse.EntryOut) fuse.Status {
	if name == flox.LogsName {
		out.NodeId, out.EntryValid, out.AttrValid = logsNode, forever, forever
		fillTop(&out.Attr, logsNode)
		return fuse.OK
	}
	return f.lookupPath(r, name, out, func(ctx context.Context) (flox.CID, bool, error) { return f.s.cfg.Store.Lookup(ctx, name, r.reader()) })
}

// lookupLog looks up a derivation's log: another one after its next build.
func (f *files) lookupLog(r *request, name string, out *fuse.EntryOut) fuse.Status {
	return f.lookupPath(r, flox.LogsName+"/"+name, out, func(ctx context.Context) (flox.CID, bool, error) {
		manifest, err := f.s.cfg.Store.Log(ctx, name)
		return manifest, false, err
	})
}

// lookupPath answers with the store path that find finds within the look-up
// timeout, or as it says.
func (f *files) lookupPath(r *request, name string, out *fuse.EntryOut, find func(context.Context) (flox.CID, bool, error)) fuse.Status {
	var manifest flox.CID
	var entry flox.Entry
	missing, always := false, false
	timeout, dead := f.s.cfg.LookupTimeout, f.s.noAnswer.has(name)
	if dead {
		timeout = min(timeout, deadNameWait)
	}
	err := f.wait(r.ctx, timeout, false, func(ctx context.Context) (err error) {
		manifest, always, err = find(ctx)
		if err != nil {
			missing = errors.Is(err, flox.ErrNotFound)
			return err
		}
		tree, err := f.s.cfg.Store.Tree(ctx, manifest, r.reader())
		if err != nil {
			return err
		}
		entry, err = tree.Entry(ctx, 0)
		return err
	})
	switch {
	case missing && always:
		out.NodeId, out.EntryValid = 0, forever
		return fuse.OK
	case missing:
		return fuse.ENOENT
	case err != nil:
		if !dead && transient(err) {
			f.s.noAnswer.note(name)
		}
		return f.failed(r, err)
	}
	node, err := f.s.nodes.give(manifest)
	if err != nil {
		return f.failed(r, err)
	}
	fillEntry(out, node, entry)
	if !always {
		out.EntryValid = 0
	}
	if f.s.cfg.Passing != nil && f.s.cfg.Passing(manifest) {
		out.EntryValid = passingTime
	}
	return fuse.OK
}

// GetAttr answers with attributes.
func (f *files) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = forever
	if in.NodeId == rootNode || in.NodeId == logsNode {
		fillTop(&out.Attr, in.NodeId)
		return fuse.OK
	}
	entry, _, status := f.entry(&in.InHeader)
	if status == fuse.OK {
		fillAttr(&out.Attr, in.NodeId, entry)
	}
	return status
}

// Readlink answers with a symlink's target.
func (f *files) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	entry, _, status := f.entry(in)
	switch {
	case status != fuse.OK:
		return nil, status
	case entry.Kind != flox.Symlink:
		return nil, fuse.EINVAL
	}
	return []byte(entry.Target), fuse.OK
}

// stale answers for a node id that was never given out in this mount.
const stale = fuse.Status(unix.ESTALE)

// entry finds the entry and the tree of the node a request is about.
func (f *files) entry(in *fuse.InHeader) (entry flox.Entry, tree flox.Tree, status fuse.Status) {
	manifest, index, ok := f.s.nodes.resolve(in.NodeId)
	if !ok {
		return entry, nil, stale
	}
	r := f.request(in)
	err := f.wait(r.ctx, f.s.cfg.ReadTimeout, true, func(ctx context.Context) (err error) {
		if tree, err = f.s.cfg.Store.Tree(ctx, manifest, r.reader()); err != nil {
			return err
		}
		entry, err = tree.Entry(ctx, index)
		return err
	})
	if err != nil {
		return entry, nil, f.failed(r, err)
	}
	return entry, tree, fuse.OK
}

// Open is not implemented: the kernel opens without asking from then on.
func (f *files) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

// OpenDir is not implemented either.
func (f *files) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

// Flush is not implemented, so that closing costs nothing.
func (f *files) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// StatFs answers from memory: df(1) must never hang.
func (f *files) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	const block = 4096
	use := f.s.cfg.Store.Usage()
	*out = fuse.StatfsOut{
		Blocks: use.TotalBytes / block, Bfree: use.FreeBytes / block, Bavail: use.FreeBytes / block,
		Files: use.Files, Bsize: block, Frsize: block, NameLen: 255,
	}
	return fuse.OK
}

// failed logs what a program is about to see as an errno.
func (f *files) failed(r *request, err error) fuse.Status {
	status := errno(err)
	if errors.Is(err, errKilled) || errors.Is(err, errStopping) || errors.Is(err, errUnmounted) {
		return status
	}
	if unsaid, ok := f.s.warned.now(); ok {
		f.s.log.Warn("request failed", "op", opNames[slot(r.op)], "node", r.node, "name", r.name, "pid", r.pid,
			"waited", time.Since(r.since).Round(time.Millisecond), "errno", status.String(), "error", err, "unsaid", unsaid)
	}
	return status
}

// seldom keeps a log readable when everything fails at once.
type seldom struct {
	mu     sync.Mutex
	at     time.Time
	unsaid int
}

// now reports whether something may be said again, and how often it was not.
func (s *seldom) now() (unsaid int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) < time.Second {
		s.unsaid++
		return 0, false
	}
	unsaid, s.unsaid, s.at = s.unsaid, 0, time.Now()
	return unsaid, true
}

// Modes of a store: nobody writes, everybody reads (Nix 2.8
// src/libstore/local-store.cc canonicaliseTimestampAndPermissions).
const (
	modeFile    = unix.S_IFREG | 0o444
	modeExec    = unix.S_IFREG | 0o555
	modeDir     = unix.S_IFDIR | 0o555
	modeSymlink = unix.S_IFLNK | 0o777
)

func mode(e flox.Entry) uint32 {
	switch {
	case e.Kind == flox.Directory:
		return modeDir
	case e.Kind == flox.Symlink:
		return modeSymlink
	case e.Executable:
		return modeExec
	}
	return modeFile
}

func fillEntry(out *fuse.EntryOut, node uint64, e flox.Entry) {
	out.NodeId, out.EntryValid, out.AttrValid = node, forever, forever
	fillAttr(&out.Attr, node, e)
}

func fillAttr(out *fuse.Attr, node uint64, e flox.Entry) {
	*out = fuse.Attr{
		Ino: node, Mode: mode(e), Nlink: 1, Blksize: 4096,
		Atime: 1, Mtime: 1, Ctime: 1, // the time of everything in a Nix store
	}
	switch e.Kind {
	case flox.Regular:
		out.Size = e.Size
	case flox.Symlink:
		out.Size = uint64(len(e.Target))
	case flox.Directory:
		out.Nlink = 2 + e.Dirs
	}
	out.Blocks = out.Size/512 + min(out.Size%512, 1)
}

// fillTop gives the attributes of the store directory, or of the one of logs. They
// never change, so that walking through it costs nothing; one link means that nobody
// counted its directories (find(1) trusts two).
func fillTop(out *fuse.Attr, node uint64) {
	*out = fuse.Attr{Ino: node, Mode: modeDir, Nlink: 1, Blksize: 4096, Atime: 1, Mtime: 1, Ctime: 1}
}

// inPlace is a read whose bytes are in the answer already.
type inPlace int

func (n inPlace) Size() int { return int(n) }
func (n inPlace) Done()     {}

// Bytes belongs to fuse.ReadResult; buf is where Read put them.
func (n inPlace) Bytes(buf []byte) ([]byte, fuse.Status) { return buf[:n], fuse.OK }

// Readv is asked for by go-fuse instead of Bytes when it could copy.
func (n inPlace) Readv([][]byte) (int, fuse.Status) { return int(n), fuse.OK }

// checkShort makes sure that fewer bytes than asked for end where the file
// does: the kernel would show zeros for the rest.
func checkShort(ctx context.Context, tree flox.Tree, index uint32, off int64, n, want int) error {
	if n == want {
		return nil
	}
	e, err := tree.Entry(ctx, index)
	if err != nil {
		return err
	}
	if uint64(off)+uint64(n) < e.Size {
		return fmt.Errorf("read of %d bytes at %d of a file of %d gave %d: %w", want, off, e.Size, n, flox.ErrCorrupt)
	}
	return nil
}
