package nix

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"github.com/floxctl/flox"
)

// Listing is one node of a .ls file: the tree of a store path with the place of
// every file in its NAR (Nix 2.8 src/libstore/nar-accessor.cc).
type Listing struct {
	Kind       flox.Kind
	Executable bool                // regular files only
	Size       uint64              // bytes of content of a regular file
	Target     string              // of a symlink
	NarOffset  uint64              // of a regular file's first content byte in the NAR; 0 = unknown
	Entries    map[string]*Listing // of a directory, never nil
}

// MarshalListing gives the bytes of a .ls file as Nix 2.8 writes them. A tree
// no NAR could hold is ErrBadInput.
func MarshalListing(l *Listing) ([]byte, error) {
	var out sliceWriter
	w := NewListingWriter(&out)
	if err := writeListing(w, l, ""); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out, nil
}

// writeListing recurses; the ListingWriter refuses what is too deep.
func writeListing(w *ListingWriter, l *Listing, path string) error {
	err := w.Entry(NarEntry{Path: path, Kind: l.Kind, Executable: l.Executable, Size: l.Size, Target: l.Target, Offset: l.NarOffset})
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(l.Entries)) {
		child := name
		if path != "" {
			child = path + "/" + name
		}
		if err := writeListing(w, l.Entries[name], child); err != nil {
			return err
		}
	}
	return nil
}

// ListingBuilder collects a Listing from entries in NAR order. Its memory grows
// with the tree; ListingWriter's does not. The zero ListingBuilder is empty.
type ListingBuilder struct {
	order narOrder
	open  []*Listing // nodes of the directories still open
	root  *Listing
}

// Add takes the next entry with its Offset. The error is ErrBadInput.
func (b *ListingBuilder) Add(e NarEntry) error {
	if why := e.check(); why != "" {
		return fmt.Errorf("listing entry %s: %s: %w", quote(e.Path), why, flox.ErrBadInput)
	}
	closed, name, err := b.order.next(e.Path, e.Kind)
	if err != nil {
		return err
	}
	node := &Listing{Kind: e.Kind, Executable: e.Executable, Size: e.Size, Target: e.Target}
	if e.Kind == flox.Regular {
		node.NarOffset = e.Offset
	}
	b.open = b.open[:len(b.open)-closed]
	if b.root == nil {
		b.root = node
	} else {
		b.open[len(b.open)-1].Entries[name] = node
	}
	if e.Kind == flox.Directory {
		node.Entries = make(map[string]*Listing)
		b.open = append(b.open, node)
	}
	return nil
}

// Listing is the tree of what was added; ErrBadInput if that is nothing.
func (b *ListingBuilder) Listing() (*Listing, error) {
	if b.root == nil {
		return nil, fmt.Errorf("listing without a root: %w", flox.ErrBadInput)
	}
	return b.root, nil
}

// ListingWriter writes a .ls file from entries in NAR order with constant
// memory. After an error it stays in that error.
type ListingWriter struct {
	w     *bufio.Writer
	order narOrder
	buf   []byte
	// first says that the innermost open directory has no entry yet.
	first bool
	err   error
}

// NewListingWriter writes to w.
func NewListingWriter(w io.Writer) *ListingWriter {
	return &ListingWriter{w: bufio.NewWriter(w)}
}

// Entry writes the next entry with its Offset. The error is ErrBadInput if it
// cannot stand here, else the writer's.
func (l *ListingWriter) Entry(e NarEntry) error {
	if l.err != nil {
		return l.err
	}
	if why := e.check(); why != "" {
		l.err = fmt.Errorf("listing entry %s: %s: %w", quote(e.Path), why, flox.ErrBadInput)
		return l.err
	}
	closed, name, err := l.order.next(e.Path, e.Kind)
	if err != nil {
		l.err = err
		return err
	}
	b := l.buf[:0]
	for range closed {
		b = append(b, "}}"...)
	}
	switch {
	case e.Path == "":
		b = append(b, `{"version":1,"root":`...)
	case l.first && closed == 0:
		b = append(appendJSONString(b, name), ':')
	default:
		b = append(appendJSONString(append(b, ','), name), ':')
	}
	l.buf = appendListingNode(b, &e)
	l.first = e.Kind == flox.Directory
	_, l.err = l.w.Write(l.buf)
	return l.err
}

// appendListingNode leaves a directory open.
func appendListingNode(b []byte, e *NarEntry) []byte {
	switch e.Kind {
	case flox.Directory:
		return append(b, `{"type":"directory","entries":{`...)
	case flox.Symlink:
		b = append(b, `{"type":"symlink","target":`...)
		return append(appendJSONString(b, e.Target), '}')
	}
	b = append(b, `{"type":"regular","size":`...)
	b = strconv.AppendUint(b, e.Size, 10)
	if e.Executable {
		b = append(b, `,"executable":true`...)
	}
	if e.Offset != 0 {
		b = append(b, `,"narOffset":`...)
		b = strconv.AppendUint(b, e.Offset, 10)
	}
	return append(b, '}')
}

// Close ends the file and flushes it; it does not close the writer below.
func (l *ListingWriter) Close() error {
	if l.err != nil {
		return l.err
	}
	if !l.order.begun {
		l.err = fmt.Errorf("listing without a root: %w", flox.ErrBadInput)
		return l.err
	}
	for range l.order.dirs {
		if _, l.err = l.w.WriteString("}}"); l.err != nil {
			return l.err
		}
	}
	if _, l.err = l.w.WriteString("}"); l.err != nil {
		return l.err
	}
	l.err = l.w.Flush()
	return l.err
}

// appendJSONString quotes s as Nix 2.8 does (src/libutil/json.cc): bytes that
// are no UTF-8 stay as they are, since a name must not change.
func appendJSONString(b []byte, s string) []byte {
	const hexDigits = "0123456789abcdef"
	b = append(b, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c == '\n':
			b = append(b, '\\', 'n')
		case c == '\r':
			b = append(b, '\\', 'r')
		case c == '\t':
			b = append(b, '\\', 't')
		case c < ' ':
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		default:
			b = append(b, c)
		}
	}
	return append(b, '"')
}

type sliceWriter []byte

func (s *sliceWriter) Write(p []byte) (int, error) {
	*s = append(*s, p...)
	return len(p), nil
}
