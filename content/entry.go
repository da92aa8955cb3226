package content

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// rec is an entry with everything the manifest says of it.
type rec struct {
	name   string
	data   string   // a symlink's target, or an inline file's content
	file   *fileRec // of a regular file in chunks
	size   uint64   // of a regular file
	offset uint64   // in the NAR, behind the entry's header; known while ingesting
	span   uint32
	dirs   uint32
	depth  uint8
	kind   flox.Kind
	exec   bool
}

// fileRec names the content of a regular file that is not inline.
type fileRec struct {
	id     flox.CID
	chunks []flox.Chunk // none: one chunk of name id
	lists  []listRef    // instead of chunks
}

func (r *rec) form() form {
	switch {
	case r.file == nil:
		return formInline
	case len(r.file.lists) > 0:
		return formBlocks
	case len(r.file.chunks) > 0:
		return formList
	}
	return formSingle
}

// entry is what the root package knows of r.
func (r *rec) entry() flox.Entry {
	e := flox.Entry{Name: r.name, Kind: r.kind, Executable: r.exec}
	switch r.kind {
	case flox.Directory:
		e.Span, e.Dirs = r.span, r.dirs
	case flox.Symlink:
		e.Target = r.data
	case flox.Regular:
		e.Size = r.size
		if r.file != nil {
			e.File = r.file.id
		} else {
			e.File = Hash([]byte(r.data))
		}
	}
	return e
}

// appendEntry encodes r, which lies up levels above where a child or sibling of
// the entry before it would.
func appendEntry(b []byte, r *rec, up int) []byte {
	b = binary.AppendUvarint(b, uint64(up))
	flags := byte(r.kind)
	if r.exec {
		flags |= flagExec
	}
	if r.kind == flox.Regular {
		flags |= byte(r.form()) << flagFormShift
	}
	b = append(b, flags)
	b = appendText(b, r.name)
	switch r.kind {
	case flox.Directory:
		b = binary.AppendUvarint(b, uint64(r.span))
		return binary.AppendUvarint(b, uint64(r.dirs))
	case flox.Symlink:
		return appendText(b, r.data)
	}
	b = binary.AppendUvarint(b, r.size)
	if r.file == nil {
		return append(b, r.data...)
	}
	b = append(b, r.file.id[:]...)
	switch r.form() {
	case formList:
		b = appendChunks(b, r.file.chunks)
	case formBlocks:
		b = binary.AppendUvarint(b, uint64(len(r.file.lists)))
		for _, l := range r.file.lists {
			b = binary.AppendUvarint(b, l.bytes)
			b = append(b, l.id[:]...)
		}
	}
	return b
}

// want says how much of an entry is decoded.
type want uint8

const (
	wantCheck want = iota // everything is checked, only numbers and kind are kept
	wantEntry             // of an entry that was checked: all but its chunks
	wantAll
)

// readEntry decodes what appendEntry wrote behind up, and gives the name within
// the block.
func (d *decoder) readEntry(r *rec, p Params, w want) (name []byte) {
	flags := d.byte()
	r.kind, r.exec = flox.Kind(flags&flagKind), flags&flagExec != 0
	f := form(flags >> flagFormShift)
	if d.err == nil && (flags&^flagMask != 0 || r.kind == 0 || r.kind != flox.Regular && (r.exec || f != 0)) {
		d.fail("flags %#x", flags)
	}
	name = d.text("a name", nix.MaxNarName)
	if w != wantCheck {
		r.name = string(name)
	}
	switch r.kind {
	case flox.Directory:
		r.span = uint32(d.uvarint("span", 1<<32-2))
		r.dirs = uint32(d.uvarint("directories", uint64(r.span)))
	case flox.Symlink:
		target := d.text("a target", nix.MaxNarTarget)
		if d.err == nil && (len(target) == 0 || bytes.IndexByte(target, 0) >= 0) {
			d.fail("symlink target %q", target)
		}
		if w != wantCheck {
			r.data = string(target)
		}
	case flox.Regular:
		d.readContent(r, p, f, w)
	}
	return name
}

func (d *decoder) readContent(r *rec, p Params, f form, w want) {
	r.size = d.uvarint("file size", math.MaxInt64)
	if d.err == nil && (f == formInline) != (r.size <= uint64(p.InlineLimit)) {
		d.fail("a file of %d bytes in form %d, with an inline limit of %d", r.size, f, p.InlineLimit)
	}
	if f == formInline {
		if data := d.bytes(int(r.size)); w != wantCheck {
			r.data = string(data)
		}
		return
	}
	id := d.cid()
	if w != wantCheck {
		r.file = &fileRec{id: id}
	}
	if w == wantEntry {
		return
	}
	got, keep := r.size, w == wantAll
	var chunks []flox.Chunk
	var lists []listRef
	switch f {
	case formSingle:
		if d.err == nil && r.size > uint64(p.MaxChunk) {
			d.fail("one chunk of %d bytes, want at most %d", r.size, p.MaxChunk)
		}
	case formList:
		chunks, got = d.chunks(p, 2, true, keep)
	case formBlocks:
		lists, got = d.lists(p, keep)
	}
	if d.err == nil && got != r.size {
		d.fail("chunks of %d bytes together in a file of %d", got, r.size)
	}
	if keep {
		r.file.chunks, r.file.lists = chunks, lists
	}
}

// Sizes at which a page ends: past minPage bytes behind an entry whose checksum
// says so (one in cutEvery), at maxPage in any case. Cutting by content keeps the
// pages of two versions of a tree equal around what changed.
const (
	minPage  = 32 << 10
	maxPage  = 96 << 10
	cutEvery = 512
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// cutsPage reports whether a page of size bytes that ends with the given entry
// ends there.
func cutsPage(size int, entry []byte) bool {
	return size >= maxPage || size >= minPage && crc32.Checksum(entry, castagnoli)%cutEvery == 0
}

// validName reports whether s may name an entry of a directory.
func validName(s []byte) bool {
	switch {
	case len(s) == 0, len(s) > nix.MaxNarName,
		len(s) == 1 && s[0] == '.', len(s) == 2 && s[0] == '.' && s[1] == '.':
		return false
	}
	return bytes.IndexByte(s, '/') < 0 && bytes.IndexByte(s, 0) < 0
}

// comparePaths orders paths as a NAR does: component by component, so a slash
// sorts before every byte of a name.
func comparePaths(a, b string) int {
	i := commonPrefix(a, b)
	switch {
	case i == len(a) && i == len(b):
		return 0
	case i == len(a):
		return -1
	case i == len(b):
		return 1
	}
	// No name holds a NUL, so it can stand for the slash.
	x, y := a[i], b[i]
	if x == '/' {
		x = 0
	}
	if y == '/' {
		y = 0
	}
	return int(x) - int(y)
}

func commonPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

func joinPath(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// pathDepth is how many levels below the store path an entry lies.
func pathDepth(path string) int {
	if path == "" {
		return 0
	}
	return strings.Count(path, "/") + 1
}
