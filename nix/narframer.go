package nix

import (
	"encoding/binary"
	"fmt"

	"github.com/floxctl/flox"
)

// NarFramer gives the bytes of a NAR around the content of its files, so that
// a NAR can be sent, measured or served from the middle without its content
// passing through here. The zero NarFramer begins a NAR. Memory is bounded by
// the limits of one entry; a NarFramer may be reused after Reset or Resume.
//
//	for each entry: send Next(entry), then its content if it is regular
//	send End()
type NarFramer struct {
	buf     []byte
	order   narOrder
	off     uint64 // behind the last frame
	content uint64 // bytes of content that follow off
	ended   bool
}

// Next gives the bytes that stand between the content of the entry before and
// e's own content (for other kinds: up to what follows). They are valid until
// the next call. The error is ErrBadInput: e cannot stand here; f is then good
// for Reset and Resume only.
func (f *NarFramer) Next(e NarEntry) ([]byte, error) {
	if why := e.check(); why != "" {
		return nil, fmt.Errorf("NAR entry %s: %s: %w", quote(e.Path), why, flox.ErrBadInput)
	}
	if f.ended {
		return nil, fmt.Errorf("NAR entry %s: the NAR has ended: %w", quote(e.Path), flox.ErrBadInput)
	}
	f.buf = f.buf[:0]
	wasLeaf := f.order.begun && f.order.isLeaf
	closed, name, err := f.order.next(e.Path, e.Kind)
	if err != nil {
		return nil, err
	}
	if wasLeaf {
		f.buf = append(f.buf, narZeros[:narPadding(f.content)]...)
		f.buf = append(f.buf, narCloseBoth...)
	}
	for range closed {
		f.buf = append(f.buf, narCloseBoth...)
	}
	if e.Path == "" {
		f.buf = append(f.buf, narMagic...)
	} else {
		f.buf = append(f.buf, narEntry...)
		f.buf = append(f.buf, narEntryName...)
		f.buf = appendNarString(f.buf, name)
		f.buf = append(f.buf, narEntryNode...)
	}
	f.appendNode(&e)
	off := f.off + f.content + uint64(len(f.buf))
	if e.Size > MaxNarSize-narSlack || off > MaxNarSize-narSlack-e.Size {
		return nil, fmt.Errorf("NAR entry %s: with its %d bytes the NAR exceeds 2^63: %w", quote(e.Path), e.Size, flox.ErrBadInput)
	}
	f.off, f.content = off, e.Size
	return f.buf, nil
}

// narSlack is more than can follow the content of a NAR's last file.
const narSlack = (MaxNarDepth + 1) * 2 * narCloseLen

func (f *NarFramer) appendNode(e *NarEntry) {
	f.buf = append(f.buf, narNode...)
	switch e.Kind {
	case flox.Regular:
		f.buf = append(f.buf, narRegular...)
		if e.Executable {
			f.buf = append(f.buf, narExecutable...)
		}
		f.buf = append(f.buf, narContents...)
		f.buf = binary.LittleEndian.AppendUint64(f.buf, e.Size)
	case flox.Directory:
		f.buf = append(f.buf, narDirectory...)
	case flox.Symlink:
		f.buf = append(f.buf, narSymlink...)
		f.buf = appendNarString(f.buf, e.Target)
	}
}

// End gives the bytes behind the last entry's content. The error is
// ErrBadInput: there was no entry.
func (f *NarFramer) End() ([]byte, error) {
	if !f.order.begun || f.ended {
		return nil, fmt.Errorf("NAR: it ends before its root, or twice: %w", flox.ErrBadInput)
	}
	f.buf = append(f.buf[:0], narZeros[:narPadding(f.content)]...)
	open := len(f.order.dirs)
	if f.order.isLeaf {
		open++
	}
	for range open - 1 {
		f.buf = append(f.buf, narCloseBoth...)
	}
	f.buf = append(f.buf, narClose...)
	f.off, f.content, f.ended = f.off+f.content+uint64(len(f.buf)), 0, true
	return f.buf, nil
}

// Offset is the position in the NAR behind the bytes given last: after Next
// where the entry's content begins (NarEntry.Offset), after End the NAR's size.
func (f *NarFramer) Offset() uint64 { return f.off }

// Reset makes f begin a new NAR.
func (f *NarFramer) Reset() {
	f.order = narOrder{path: f.order.path[:0], dirs: f.order.dirs[:0]}
	f.off, f.content, f.ended = 0, 0, false
}

// Resume makes f continue behind last, an entry with its Offset, as if Next had
// given everything up to last.Offset. The error is ErrBadInput.
func (f *NarFramer) Resume(last NarEntry) error {
	f.Reset()
	if why := last.check(); why != "" {
		return fmt.Errorf("NAR entry %s: %s: %w", quote(last.Path), why, flox.ErrBadInput)
	}
	if last.Size > MaxNarSize-narSlack || last.Offset > MaxNarSize-narSlack-last.Size {
		return fmt.Errorf("NAR entry %s: %d bytes at %d exceed 2^63: %w", quote(last.Path), last.Size, last.Offset, flox.ErrBadInput)
	}
	if err := f.order.resume(last.Path, last.Kind); err != nil {
		return err
	}
	f.off, f.content = last.Offset, last.Size
	return nil
}
