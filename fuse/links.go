package fuse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// linkTime is how many seconds the kernel may believe that a name of Links is there.
	// Where a link leads is kept until Invalidate says otherwise.
	linkTime = 10
	// maxLinkNodes bounds the names whose nodes are known.
	maxLinkNodes = 1 << 17
	// maxTarget is the longest target of a link, as in the kernel (PATH_MAX).
	maxTarget = 4095
)

// Links is a tree of symbolic links of two levels, OWNER/NAME, that a Server shows
// instead of a Store. Names that differ in case only may mean the same. Methods are
// called by many at once.
//
// Targets that one link has over time should be of one length: Linux before 6.15 can
// cut off a target that became longer while its inode was in use.
type Links interface {
	// Known calls yield with every owner (name "") and every link whose kernel state
	// may be there from before, until it returns false. It must not wait.
	Known(yield func(owner, name string) bool)
	// Listed is Known for what a listing shows: of the top (owner ""), the owners, or
	// an owner's names. It must not wait.
	Listed(owner string) []string
	// Owner gives the spelling of an owner. It may wait until ctx is done, for what is
	// not known here. ErrNotFound: there is none, now.
	Owner(ctx context.Context, owner string) (spelling string, err error)
	// Link is Owner for a link, and gives where it leads.
	Link(ctx context.Context, owner, name string) (spelling, target string, err error)
	// Target gives where a link leads that Link found. It must not wait. ErrNotFound:
	// it is there no more. ErrUnreachable: it would have to be looked up again.
	Target(owner, name string) (string, error)
}

// linkNode is the inode number of a name of Links: a hash, so that every server of the
// mount gives the same without having kept it.
func linkNode(owner, name string) uint64 {
	sum := blake3.Sum256([]byte(strings.ToLower(owner) + "/" + strings.ToLower(name)))
	node := uint64(0)
	for _, b := range sum[:8] {
		node = node<<8 | uint64(b)
	}
	return node>>1 | 1<<32 // offsets of a listing are nodes: never below firstChild, nor negative
}

// linkName is what a node stands for; name "" is an owner.
type linkName struct{ owner, name string }

// linkNames knows nodes' names.
type linkNames struct {
	links Links

	mu sync.Mutex
	by map[uint64]linkName
}

func newLinkNames(l Links) *linkNames {
	n := &linkNames{links: l, by: make(map[uint64]linkName)}
	n.learn()
	return n
}

// learn adds what is known, n.mu being held or n not shared yet.
func (n *linkNames) learn() {
	n.links.Known(func(owner, name string) bool {
		n.by[linkNode(owner, name)] = linkName{owner, name}
		return len(n.by) < maxLinkNodes
	})
}

// give gives the node of a name that is there.
func (n *linkNames) give(owner, name string) uint64 {
	node := linkNode(owner, name)
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, known := n.by[node]; !known && len(n.by) >= maxLinkNodes {
		clear(n.by) // the kernel looks up again what it is told is stale
		n.learn()
	}
	n.by[node] = linkName{owner, name}
	return node
}

func (n *linkNames) resolve(node uint64) (linkName, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l, ok := n.by[node]
	return l, ok
}

// live lists the nodes of links.
func (n *linkNames) live() (nodes []uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for node, l := range n.by {
		if l.name != "" {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// linkFiles is Links as go-fuse wants it.
type linkFiles struct {
	files // for request, wait, failed and what is not implemented
	names *linkNames
}

// at is what a node stands for; the root is no owner's.
func (f *linkFiles) at(node uint64) (linkName, fuse.Status) {
	if node == rootNode {
		return linkName{}, fuse.OK
	}
	at, ok := f.names.resolve(node)
	if !ok {
		return at, stale
	}
	return at, fuse.OK
}

// Lookup answers what is known from memory, and waits for the rest as Links does.
func (f *linkFiles) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	r := f.request(in)
	at, status := f.at(in.NodeId)
	if status != fuse.OK {
		return status
	}
	var target string
	err := f.wait(r.ctx, f.s.cfg.LookupTimeout, false, func(ctx context.Context) (err error) {
		if in.NodeId == rootNode {
			at.owner, err = f.names.links.Owner(ctx, name)
			return err
		}
		at.name, target, err = f.names.links.Link(ctx, at.owner, name)
		return err
	})
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return fuse.ENOENT // asked again each time
	case err != nil:
		return f.failed(r, err)
	}
	node := f.names.give(at.owner, at.name)
	out.NodeId, out.EntryValid, out.AttrValid = node, linkTime, linkTime
	f.fill(&out.Attr, node, at, target)
	return fuse.OK
}

func (f *linkFiles) fill(out *fuse.Attr, node uint64, at linkName, target string) {
	if at.name == "" {
		fillTop(out, node)
		return
	}
	fillAttr(out, node, flox.Entry{Kind: flox.Symlink, Target: target})
}

// GetAttr never waits.
func (f *linkFiles) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	at, status := f.at(in.NodeId)
	if status != fuse.OK {
		return status
	}
	target := ""
	if at.name != "" {
		if target, status = f.target(at); status != fuse.OK {
			return status
		}
	}
	out.AttrValid = linkTime
	f.fill(&out.Attr, in.NodeId, at, target)
	return fuse.OK
}

// target says where a link leads, or what to do instead: a name that is not known any
// more is stale, and the kernel looks it up.
func (f *linkFiles) target(at linkName) (string, fuse.Status) {
	target, err := f.names.links.Target(at.owner, at.name)
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return "", fuse.ENOENT
	case err != nil || len(target) == 0 || len(target) > maxTarget:
		return "", stale
	}
	return target, fuse.OK
}

// Readlink never waits.
func (f *linkFiles) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	at, ok := f.names.resolve(in.NodeId)
	if !ok {
		return nil, stale
	}
	if at.name == "" {
		return nil, fuse.EINVAL
	}
	target, status := f.target(at)
	return []byte(target), status
}

// OpenDir is implemented: without it the kernel would keep listings for ever.
func (f *linkFiles) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.OK }

// ReleaseDir belongs to OpenDir.
func (f *linkFiles) ReleaseDir(*fuse.ReleaseIn) {}

// StatFs says that there is nothing to fill.
func (f *linkFiles) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: 255}
	return fuse.OK
}

// Read is of no file.
func (f *linkFiles) Read(<-chan struct{}, *fuse.ReadIn, []byte) (fuse.ReadResult, fuse.Status) {
	return nil, fuse.EINVAL
}

// ReadDir lists the owners, or the names of one.
func (f *linkFiles) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, out.AddDirEntry)
}

// ReadDirPlus is ReadDir: it leaves the attributes out.
func (f *linkFiles) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, func(e fuse.DirEntry) bool { return out.AddDirLookupEntry(e) != nil })
}

// list adds names in the order of their nodes, which are where to go on: nothing is
// remembered between two requests, and what comes meanwhile moves nothing.
func (f *linkFiles) list(in *fuse.ReadIn, add func(fuse.DirEntry) bool) fuse.Status {
	at, status := f.at(in.NodeId)
	if status != fuse.OK {
		return status
	}
	if at.name != "" {
		return fuse.ENOTDIR
	}
	if in.Offset < 1 && !add(fuse.DirEntry{Name: ".", Mode: modeDir, Ino: in.NodeId, Off: 1}) {
		return fuse.OK
	}
	if in.Offset < firstChild && !add(fuse.DirEntry{Name: "..", Mode: modeDir, Ino: fuse.FUSE_UNKNOWN_INO, Off: firstChild}) {
		return fuse.OK
	}
	var entries []fuse.DirEntry
	for _, name := range f.names.links.Listed(at.owner) {
		e := fuse.DirEntry{Name: name, Mode: modeSymlink, Ino: linkNode(at.owner, name)}
		if in.NodeId == rootNode {
			e.Mode, e.Ino = modeDir, linkNode(name, "")
		}
		if e.Off = e.Ino; e.Off > in.Offset {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(x, y fuse.DirEntry) int { return cmp.Compare(x.Off, y.Off) })
	for _, e := range entries {
		if !add(e) {
			break
		}
	}
	return fuse.OK
}

// Invalidate makes the kernel ask again where links lead that may have changed. It returns
// when that is done: who resolves one then sees what Links says now. Of a server
// that begins, all Known links are. Errors as of DropPages.
func (s *Server) Invalidate(ctx context.Context, owner, name string) error {
	return s.drop(ctx, []uint64{linkNode(owner, name)})
}

// dropLinks has the kernel forget where links lead, as an earlier server said. It may
// have ended between a change and its invalidation.
func (s *Server) dropLinks(ctx context.Context, dev *device) {
	for _, node := range s.links.live() {
		if ctx.Err() != nil {
			return
		}
		if err := dev.write(invalInode(node)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			s.log.Error("a link is not invalidated", "error", fmt.Errorf("node %d: %w", node, err))
		}
	}
}
