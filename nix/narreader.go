package nix

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/floxctl/flox"
)

// narBuffer is how many bytes of a NAR are held at once.
const narBuffer = 64 << 10

// NarReader reads a NAR entry by entry, refusing everything Nix's writer would
// not write. It takes not a byte behind the NAR's end from its source, needs
// constant memory, and no stack per level.
//
// It still reads ahead: the grammar tells how many bytes must follow at least
// (every open node has to be closed), and those are fetched at once, so that a
// small file costs two or three reads of the source. Wrap a source whose reads
// are expensive in a bufio.Reader.
type NarReader struct {
	r      io.Reader
	buf    []byte
	rp, wp int    // buf[rp:wp] is read but not consumed
	off    uint64 // bytes consumed
	left   uint64 // content of the current file not yet consumed
	pad    uint64 // zeros behind it
	state  narState
	err    error
	path   []byte // of the current entry
	dirs   []narDir
}

// narDir is a directory whose end was not read yet.
type narDir struct {
	end  int // of its path in NarReader.path
	last int // where the name of its last child ends there; end if it has none
}

// narState says what comes next in the stream.
type narState uint8

const (
	narAtStart    narState = iota // the magic
	narInContent                  // content, padding, the end of the node
	narBehindLeaf                 // the end of a symlink's node
	narInDir                      // an entry, or the end of the innermost directory
	narAtEnd                      // nothing
)

// NewNarReader reads one NAR from r.
func NewNarReader(r io.Reader) *NarReader {
	return &NarReader{r: r, buf: make([]byte, narBuffer)}
}

// Reset makes n read a new NAR from r, keeping its buffers.
func (n *NarReader) Reset(r io.Reader) {
	*n = NarReader{r: r, buf: n.buf, path: n.path[:0], dirs: n.dirs[:0]}
}

// Offset is the number of bytes of the NAR consumed; after io.EOF its size.
func (n *NarReader) Offset() uint64 { return n.off }

// Next moves to the next entry, past what is left of the current file. io.EOF
// comes only after the end of the NAR was read and checked. Malformed and
// truncated input is ErrBadInput (truncated also io.ErrUnexpectedEOF); other
// errors are the source's. Every error is final.
func (n *NarReader) Next() (NarEntry, error) {
	if n.err != nil {
		return NarEntry{}, n.err
	}
	e, err := n.next()
	if err != nil {
		n.err = err
	}
	return e, err
}

func (n *NarReader) next() (NarEntry, error) {
	switch n.state {
	case narAtStart:
		if err := n.expect(narMagic, NarMagicSize+narLeastNode); err != nil {
			return NarEntry{}, err
		}
		return n.node()
	case narInContent:
		if err := n.skip(); err != nil {
			return NarEntry{}, err
		}
		if err := n.zeros(n.pad); err != nil {
			return NarEntry{}, err
		}
		fallthrough
	case narBehindLeaf:
		if err := n.closeNode(); err != nil {
			return NarEntry{}, err
		}
	}
	if n.state == narAtEnd {
		return NarEntry{}, io.EOF
	}
	return n.child()
}

// tail is the least number of bytes behind a node inside all open directories:
// each ends its entry and itself.
func (n *NarReader) tail() int { return 2 * narCloseLen * len(n.dirs) }

// child reads on in the innermost directory: its next entry, or the ends of as
// many directories as end here.
func (n *NarReader) child() (NarEntry, error) {
	for {
		tag, err := n.peek(narCloseLen, n.tail()-narCloseLen)
		if err != nil {
			return NarEntry{}, err
		}
		if string(tag) == narEntry {
			n.consume(narCloseLen)
			if err := n.entryName(); err != nil {
				return NarEntry{}, err
			}
			return n.node()
		}
		if string(tag) != narClose {
			return NarEntry{}, n.bad("want an entry or the end of the directory, got " + tokenWords(string(tag)))
		}
		top := n.dirs[len(n.dirs)-1]
		n.path, n.dirs = n.path[:top.end], n.dirs[:len(n.dirs)-1]
		if err := n.closeNode(); err != nil {
			return NarEntry{}, err
		}
		if n.state == narAtEnd {
			return NarEntry{}, io.EOF
		}
	}
}

// closeNode reads the end of a node, and of the entry around it.
func (n *NarReader) closeNode() error {
	if len(n.dirs) == 0 {
		n.state = narAtEnd
		return n.expect(narClose, narCloseLen)
	}
	n.state = narInDir
	// Behind both comes the directory's next tag.
	return n.expect(narCloseBoth, narCloseLen+n.tail())
}

// entryName reads the name of an entry, from behind its tag to its node, and
// makes it the last part of the path.
func (n *NarReader) entryName() error {
	if err := n.expect(narEntryName, narLeastEntry+n.tail()-narCloseLen); err != nil {
		return err
	}
	size, err := n.length(narLeastEntry - len(narEntryName) + n.tail() - narCloseLen)
	if err != nil {
		return err
	}
	if size > MaxNarName {
		return n.bad(fmt.Sprintf("a name of %d bytes, at most %d are allowed", size, MaxNarName))
	}
	padded := size + narPadding(size)
	b, err := n.peek(int(padded), int(padded)+len(narEntryNode)+narLeastNode+n.tail())
	if err != nil {
		return err
	}
	name := b[:size]
	if why := checkNarName(name); why != "" {
		return n.bad(why)
	}
	if string(b[size:]) != string(narZeros[:padded-size]) {
		return n.bad("padding that is not zero")
	}
	dir := &n.dirs[len(n.dirs)-1]
	start := dir.end
	if len(n.dirs) > 1 {
		start++ // the slash
	}
	if dir.last > dir.end && string(name) <= string(n.path[start:dir.last]) {
		return n.bad(fmt.Sprintf("entry %s behind %s: names must be sorted and differ", quote(name), quote(n.path[start:dir.last])))
	}
	n.path = n.path[:dir.end]
	if len(n.dirs) > 1 {
		n.path = append(n.path, '/')
	}
	n.path = append(n.path, name...)
	dir.last = len(n.path)
	n.consume(int(padded))
	return n.expect(narEntryNode, len(narEntryNode)+narLeastNode+n.tail())
}

// node reads the beginning of a node up to its content.
func (n *NarReader) node() (NarEntry, error) {
	if len(n.dirs) >= MaxNarDepth {
		return NarEntry{}, n.bad(fmt.Sprintf("more than %d levels", MaxNarDepth))
	}
	tail := n.tail()
	if err := n.expect(narNode, narLeastNode+tail); err != nil {
		return NarEntry{}, err
	}
	// The shortest node type with its end is a directory's.
	tag, err := n.peek(narCloseLen, narLeastNode-len(narNode)+tail)
	if err != nil {
		return NarEntry{}, err
	}
	e := NarEntry{}
	switch string(tag) {
	case narRegular:
		e.Kind = flox.Regular
		n.consume(len(narRegular))
		err = n.regular(&e)
	case narSymlink[:narCloseLen]:
		e.Kind = flox.Symlink
		err = n.symlink(&e)
	case narDirectory[:narCloseLen]:
		e.Kind = flox.Directory
		err = n.expect(narDirectory, narLeastNode-len(narNode)+tail)
		n.dirs = append(n.dirs, narDir{end: len(n.path), last: len(n.path)})
		n.state = narInDir
	default:
		err = n.bad("want the type regular, directory or symlink, got " + tokenWords(string(tag)))
	}
	if err != nil {
		return NarEntry{}, err
	}
	e.Path, e.Offset = string(n.path), n.off
	return e, nil
}

func (n *NarReader) regular(e *NarEntry) error {
	rest := len(narContents) + 8 + narCloseLen + n.tail()
	tag, err := n.peek(len(narContents), rest)
	if err != nil {
		return err
	}
	if string(tag) == narExecutable[:len(narContents)] {
		if err := n.expect(narExecutable, len(narExecutable)+rest); err != nil {
			return err
		}
		e.Executable = true
	}
	if err := n.expect(narContents, rest); err != nil {
		return err
	}
	if e.Size, err = n.length(rest - len(narContents)); err != nil {
		return err
	}
	if e.Size > MaxNarSize-narSlack || n.off > MaxNarSize-narSlack-e.Size {
		return n.bad(fmt.Sprintf("a file of %d bytes, a NAR is shorter than 2^63", e.Size))
	}
	n.left, n.pad, n.state = e.Size, narPadding(e.Size), narInContent
	return nil
}

func (n *NarReader) symlink(e *NarEntry) error {
	if err := n.expect(narSymlink, len(narSymlink)+16+narCloseLen+n.tail()); err != nil {
		return err
	}
	size, err := n.length(16 + narCloseLen + n.tail())
	if err != nil {
		return err
	}
	if size > MaxNarTarget {
		return n.bad(fmt.Sprintf("a symlink target of %d bytes, at most %d are allowed", size, MaxNarTarget))
	}
	padded := size + narPadding(size)
	b, err := n.peek(int(padded), int(padded)+narCloseLen+n.tail())
	if err != nil {
		return err
	}
	e.Target = string(b[:size])
	if why := checkNarTarget(e.Target); why != "" {
		return n.bad(why)
	}
	if string(b[size:]) != string(narZeros[:padded-size]) {
		return n.bad("padding that is not zero")
	}
	n.consume(int(padded))
	n.state = narBehindLeaf
	return nil
}

// Read reads content of the current regular file; io.EOF at its end and for
// other kinds.
func (n *NarReader) Read(p []byte) (int, error) {
	if n.err != nil && !errors.Is(n.err, io.EOF) {
		return 0, n.err
	}
	if n.left == 0 || len(p) == 0 {
		if n.left == 0 {
			return 0, io.EOF
		}
		return 0, nil
	}
	// Large reads of large files go past the buffer.
	if n.rp == n.wp && len(p) >= narBuffer/2 && n.left >= narBuffer/2 {
		return n.readDirect(p)
	}
	b, err := n.fillContent()
	if err != nil {
		return 0, err
	}
	got := copy(p, b)
	n.consumeContent(got)
	return got, nil
}

// WriteTo writes what is left of the current file's content to w.
func (n *NarReader) WriteTo(w io.Writer) (int64, error) {
	if n.err != nil && !errors.Is(n.err, io.EOF) {
		return 0, n.err
	}
	var total int64
	for n.left > 0 {
		written, err := n.writeSome(w)
		total += int64(written)
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// writeSome writes at most a buffer of the current file's content to w.
func (n *NarReader) writeSome(w io.Writer) (int, error) {
	b, err := n.fillContent()
	if err != nil {
		return 0, err
	}
	written, err := w.Write(b)
	n.consumeContent(written)
	if err == nil && written < len(b) {
		err = io.ErrShortWrite
	}
	return written, err
}

func (n *NarReader) skip() error {
	for n.left > 0 {
		b, err := n.fillContent()
		if err != nil {
			return err
		}
		n.consumeContent(len(b))
	}
	return nil
}

func (n *NarReader) readDirect(p []byte) (int, error) {
	if uint64(len(p)) > n.left {
		p = p[:n.left]
	}
	got, err := n.r.Read(p)
	n.off += uint64(got)
	n.left -= uint64(got)
	switch {
	case got > 0 || err == nil:
		// An error that lasts comes again with the next read.
		return got, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // the latter of a compressed one
		n.err = n.truncated()
	default:
		n.err = fmt.Errorf("read NAR at byte %d: %w", n.off, err)
	}
	return 0, n.err
}

// fillContent gives at least one byte of the current file's content.
func (n *NarReader) fillContent() ([]byte, error) {
	sure := narBuffer
	if n.left < narBuffer {
		sure = int(n.left+n.pad) + narCloseLen + n.tail()
	}
	if _, err := n.peek(1, sure); err != nil {
		n.err = err
		return nil, err
	}
	b := n.buf[n.rp:n.wp]
	if uint64(len(b)) > n.left {
		b = b[:n.left]
	}
	return b, nil
}

func (n *NarReader) consumeContent(k int) {
	n.consume(k)
	n.left -= uint64(k)
}

// expect consumes exactly token; sure is as for peek.
func (n *NarReader) expect(token string, sure int) error {
	b, err := n.peek(len(token), sure)
	if err != nil {
		return err
	}
	if string(b) != token {
		want, got := tokenWords(token), tokenWords(string(b))
		if want == got {
			got = "other lengths or padding, " + quote(b)
		}
		return n.bad("want " + want + ", got " + got)
	}
	n.consume(len(token))
	return nil
}

// length consumes the 8 bytes of a length; sure is as for peek.
func (n *NarReader) length(sure int) (uint64, error) {
	b, err := n.peek(8, sure)
	if err != nil {
		return 0, err
	}
	n.consume(8)
	return binary.LittleEndian.Uint64(b), nil
}

// zeros consumes k zeros of padding behind a file.
func (n *NarReader) zeros(k uint64) error {
	b, err := n.peek(int(k), int(k)+narCloseLen+n.tail())
	if err != nil {
		return err
	}
	if string(b) != string(narZeros[:k]) {
		return n.bad("padding that is not zero")
	}
	n.consume(int(k))
	return nil
}

// peek gives the next need bytes, at most narBuffer. sure is how many bytes of
// the NAR must follow at least from here: that much is read if it comes.
func (n *NarReader) peek(need, sure int) ([]byte, error) {
	if n.wp-n.rp >= need {
		return n.buf[n.rp : n.rp+need], nil
	}
	if n.rp > 0 {
		n.wp, n.rp = copy(n.buf, n.buf[n.rp:n.wp]), 0
	}
	sure = min(max(sure, need), len(n.buf))
	got, err := io.ReadAtLeast(n.r, n.buf[n.wp:sure], need-n.wp)
	n.wp += got
	switch {
	case err == nil:
		return n.buf[:need], nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, n.truncated()
	}
	return nil, fmt.Errorf("read NAR at byte %d: %w", n.off+uint64(n.wp), err)
}

func (n *NarReader) consume(k int) {
	n.rp += k
	n.off += uint64(k)
}

func (n *NarReader) bad(why string) error {
	return fmt.Errorf("NAR at byte %d (in %s): %s: %w", n.off, quote(n.path), why, flox.ErrBadInput)
}

func (n *NarReader) truncated() error {
	return fmt.Errorf("NAR ends early, behind byte %d (in %s): %w: %w", n.off+uint64(n.wp-n.rp), quote(n.path), io.ErrUnexpectedEOF, flox.ErrBadInput)
}

// tokenWords shows encoded strings without the zeros among them.
func tokenWords(token string) string {
	words := strings.FieldsFunc(token, func(c rune) bool { return c < ' ' })
	return quote(strings.Join(words, " "))
}
