package fuse

import (
	"context"
	"errors"
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/floxctl/flox"
)

// Offsets in a directory: 0 begins, firstChild is behind "." and "..".
const firstChild = 2

// ReadDir lists a directory.
func (f *files) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, func(e fuse.DirEntry, _ flox.Entry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus lists a directory with the attributes of what is in it.
func (f *files) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, func(e fuse.DirEntry, entry flox.Entry) bool {
		at := out.AddDirLookupEntry(e)
		if at == nil {
			return false
		}
		// A zero NodeId tells the kernel that the attributes are left out: for
		// the dots, and in the store directory, where they would have to be fetched.
		if entry.Kind != 0 {
			fillEntry(at, e.Ino, entry)
		}
		return true
	})
}

// list adds a directory's entries from the request's offset until add says that
// the answer is full.
func (f *files) list(in *fuse.ReadIn, add func(fuse.DirEntry, flox.Entry) bool) fuse.Status {
	if in.Offset > math.MaxInt64 {
		return fuse.EINVAL
	}
	if in.Offset < 1 && !add(fuse.DirEntry{Name: ".", Mode: modeDir, Ino: in.NodeId, Off: 1}, flox.Entry{}) {
		return fuse.OK
	}
	if in.Offset < firstChild && !add(fuse.DirEntry{Name: "..", Mode: modeDir, Ino: fuse.FUSE_UNKNOWN_INO, Off: firstChild}, flox.Entry{}) {
		return fuse.OK
	}
	switch in.NodeId {
	case rootNode:
		return f.listRoot(in, add)
	case logsNode:
		return fuse.OK // too many to tell
	}
	manifest, dir, ok := f.s.nodes.resolve(in.NodeId)
	if !ok {
		return stale
	}
	// An entry's offset is its index and firstChild + 1, so that the next one to
	// list is the first whose index is not below offset - firstChild.
	from := uint32(max(in.Offset, firstChild) - firstChild)
	base := in.NodeId &^ math.MaxUint32
	r := f.request(&in.InHeader)
	err := f.wait(r.ctx, f.s.cfg.ReadTimeout, true, func(ctx context.Context) error {
		tree, err := f.s.cfg.Store.Tree(ctx, manifest, r.reader())
		if err != nil {
			return err
		}
		return tree.Children(ctx, dir, from, func(i uint32, e flox.Entry) bool {
			ok := add(fuse.DirEntry{Name: e.Name, Mode: mode(e), Ino: base | uint64(i), Off: uint64(i) + firstChild + 1}, e)
			if ok {
				from = i + 1 // where to go on if the rest must be asked for again
			}
			return ok
		})
	})
	if err != nil {
		return f.failed(r, err)
	}
	return fuse.OK
}

// A name of the store directory takes at least smallestName bytes of an answer:
// the fixed part of an entry, and what comes behind a hash part rounded up to 8.
// So no more names are asked for than may fit, and at most namesPage at once.
const (
	smallestName = 24 + 40
	namesPage    = 4096
)

// errFull ends a listing whose answer is full.
var errFull = errors.New("the answer is full")

// listRoot lists the store directory. Nothing is remembered between two
// requests, so an offset says by itself where to go on: see rootCursor.
func (f *files) listRoot(in *fuse.ReadIn, add func(fuse.DirEntry, flox.Entry) bool) fuse.Status {
	r := f.request(&in.InHeader)
	pos := newRootCursor(in.Offset)
	// The names that an earlier request listed already are passed over.
	page := min(int(in.Size)/smallestName+int(min(pos.skip, maxRank))+1, namesPage)
	err := f.wait(r.ctx, f.s.cfg.ReadTimeout, true, func(ctx context.Context) error {
		for {
			names, err := f.s.cfg.Store.Names(ctx, pos.after, page)
			if err != nil {
				return err
			}
			for _, name := range names {
				if !f.addName(&pos, name, add) {
					return errFull
				}
			}
			if len(names) < page {
				return nil
			}
		}
	})
	if err != nil && !errors.Is(err, errFull) {
		return f.failed(r, err)
	}
	return fuse.OK
}

// addName adds one name of the store directory; false: it did not fit. Nodes are
// not given for being listed: most names are never looked up.
func (f *files) addName(pos *rootCursor, name flox.Named, add func(fuse.DirEntry, flox.Entry) bool) bool {
	off, listed := pos.next(name.Name)
	if !listed {
		e := fuse.DirEntry{Name: name.Name, Ino: fuse.FUSE_UNKNOWN_INO, Off: off}
		if name.Kind != 0 { // else type 0, DT_UNKNOWN: a reader asks lstat, and find descends
			e.Mode = mode(flox.Entry{Kind: name.Kind})
		}
		if node, ok := f.s.nodes.node(name.Manifest, 0); ok {
			e.Ino = node
		}
		if !add(e, flox.Entry{}) {
			return false
		}
	}
	pos.pass(name.Name)
	return true
}
