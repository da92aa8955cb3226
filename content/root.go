package content

import (
	"encoding/binary"
	"math"
	"strings"

	"github.com/floxctl/flox"
)

// pageRef is a page as the root block names it.
type pageRef struct {
	id     flox.CID
	bytes  uint32
	first  uint32 // index of its first entry
	path   string // of its first entry
	offset uint64 // in the NAR, behind its first entry's header; 0 for the first page
}

// root is a decoded root block.
type root struct {
	params   Params
	entries  uint32
	narSize  uint64
	kind     flox.Kind // of entry 0
	exec     bool
	dirs     uint32    // of entry 0
	pages    []pageRef // at least two, or none:
	embedded []byte    // then the only page is this
}

// encode is the root block.
func (r *root) encode() []byte {
	b := append([]byte(magicRoot), chunkerFastCDC)
	for _, v := range []uint64{
		uint64(r.params.MinChunk), uint64(r.params.AvgChunk), uint64(r.params.MaxChunk), uint64(r.params.InlineLimit),
		uint64(r.entries), r.narSize,
	} {
		b = binary.AppendUvarint(b, v)
	}
	flags := byte(r.kind)
	if r.exec {
		flags |= flagExec
	}
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(r.dirs))
	if r.embedded != nil {
		b = binary.AppendUvarint(b, 1)
		return append(b, r.embedded...)
	}
	b = binary.AppendUvarint(b, uint64(len(r.pages)))
	var before pageRef
	for i, p := range r.pages {
		next := r.entries
		if i+1 < len(r.pages) {
			next = r.pages[i+1].first
		}
		shared := commonPrefix(before.path, p.path)
		b = binary.AppendUvarint(b, uint64(shared))
		b = appendText(b, p.path[shared:])
		b = binary.AppendUvarint(b, uint64(next-p.first))
		b = binary.AppendUvarint(b, uint64(p.bytes))
		b = binary.AppendUvarint(b, p.offset-before.offset)
		b = append(b, p.id[:]...)
		before = p
	}
	return b
}

// maxRootPaths is how many bytes the paths of all pages may have together once
// written out: they share prefixes, so a small block could name very many.
const maxRootPaths = 8 << 20

// pageRefBytes is the least a page takes in the root block.
const pageRefBytes = 6 + flox.CIDSize

// decodeRoot checks a root block. The embedded page, if any, is not looked at.
func decodeRoot(b []byte) (*root, error) {
	d := &decoder{b: b}
	d.magic(magicRoot)
	if id := d.byte(); d.err == nil && id != chunkerFastCDC {
		d.fail("chunker %d, this version knows %d", id, chunkerFastCDC)
	}
	r := &root{}
	r.params = Params{
		MinChunk:    uint32(d.uvarint("least chunk size", MaxBlock)),
		AvgChunk:    uint32(d.uvarint("average chunk size", MaxBlock)),
		MaxChunk:    uint32(d.uvarint("largest chunk size", MaxBlock)),
		InlineLimit: uint32(d.uvarint("inline limit", maxInlineLimit)),
	}
	if d.err == nil {
		if err := r.params.check(); err != nil {
			d.fail("%v", err)
		}
	}
	r.entries = uint32(d.uvarint("number of entries", math.MaxUint32))
	r.narSize = d.uvarint("NAR size", math.MaxInt64)
	flags := d.byte()
	r.kind, r.exec = flox.Kind(flags&flagKind), flags&flagExec != 0
	r.dirs = uint32(d.uvarint("directories", math.MaxUint32-1))
	n := d.uvarint("number of pages", math.MaxUint32)
	switch {
	case d.err != nil:
	case flags&^(flagKind|flagExec) != 0, r.kind == 0, r.kind != flox.Regular && r.exec, r.kind != flox.Directory && (r.dirs != 0 || r.entries != 1):
		d.fail("flags %#x with %d directories in %d entries", flags, r.dirs, r.entries)
	case r.entries == 0 || r.dirs >= r.entries || n == 0 || n > uint64(r.entries):
		d.fail("%d pages of %d entries, %d directories", n, r.entries, r.dirs)
	case n == 1:
		r.embedded = d.bytes(d.rest())
	case n > uint64(d.rest()/pageRefBytes):
		d.fail("%d pages in %d bytes", n, d.rest())
	default:
		d.readPages(r, int(n))
	}
	if d.err == nil && d.rest() != 0 {
		d.fail("%d bytes behind the end", d.rest())
	}
	if d.err != nil {
		return nil, d.err
	}
	return r, nil
}

func (d *decoder) readPages(r *root, n int) {
	r.pages = make([]pageRef, 0, n)
	var before pageRef
	next, paths := uint64(0), 0
	for i := 0; i < n && d.err == nil; i++ {
		shared := int(d.uvarint("length of a shared path", uint64(len(before.path))))
		suffix := string(d.text("a path", maxPath))
		if paths += shared + len(suffix); d.err == nil && paths > maxRootPaths {
			d.fail("paths of more than %d bytes together", maxRootPaths)
			return
		}
		p := pageRef{path: before.path[:shared] + suffix, first: uint32(next)}
		next += d.uvarint("entries of a page", uint64(r.entries))
		p.bytes = uint32(d.uvarint("bytes of a page", MaxBlock))
		delta := d.uvarint("NAR bytes of a page", r.narSize)
		p.id = d.cid()
		var ok bool
		p.offset, ok = addUint64(before.offset, delta)
		switch {
		case d.err != nil:
		case commonPrefix(before.path, p.path) != shared:
			d.fail("path %q shares more than %d bytes with %q", p.path, shared, before.path)
		case (i == 0) != (p.path == ""), i > 0 && comparePaths(before.path, p.path) >= 0, !validPath(p.path):
			d.fail("path %q of page %d behind %q", p.path, i, before.path)
		case next == uint64(p.first) || next > uint64(r.entries) || p.bytes == 0:
			d.fail("page %d of %d bytes ends at entry %d of %d", i, p.bytes, next, r.entries)
		case !ok || p.offset > r.narSize || (i == 0) != (delta == 0):
			d.fail("page %d begins %d bytes behind the one before, in a NAR of %d", i, delta, r.narSize)
		}
		r.pages = append(r.pages, p)
		before = p
	}
	if d.err == nil && next != uint64(r.entries) {
		d.fail("pages of %d entries together, want %d", next, r.entries)
	}
}

// validPath reports whether path can be an entry's.
func validPath(path string) bool {
	if path == "" {
		return true
	}
	if len(path) > maxPath || pathDepth(path) > maxDepth {
		return false
	}
	for comp := range strings.SplitSeq(path, "/") {
		if !validName([]byte(comp)) {
			return false
		}
	}
	return true
}
