package nix

import (
	"bufio"
	"fmt"
	"io"

	"github.com/floxctl/flox"
)

// NarWriter writes a NAR entry by entry: Entry, then for a regular file exactly
// Size bytes through Write, and Close after the last. It closes directories by
// itself. After an error it stays in that error.
type NarWriter struct {
	w      *bufio.Writer
	framer NarFramer
	left   uint64 // content of the current file not yet written
	err    error
}

// NewNarWriter writes to w, which gets nothing complete before Close.
func NewNarWriter(w io.Writer) *NarWriter {
	return &NarWriter{w: bufio.NewWriterSize(w, narBuffer)}
}

// Entry begins the next entry, in NAR order; e.Offset is ignored. The error is
// ErrBadInput if e cannot stand here, else the writer's.
func (n *NarWriter) Entry(e NarEntry) error {
	if n.err != nil {
		return n.err
	}
	if n.left > 0 {
		return n.fail(fmt.Errorf("NAR entry %s: %d bytes of the file before it are missing: %w", quote(e.Path), n.left, flox.ErrBadInput))
	}
	frame, err := n.framer.Next(e)
	if err != nil {
		return n.fail(err)
	}
	n.left = e.Size
	_, err = n.w.Write(frame)
	return n.fail(err)
}

// Write writes content of the current regular file; more than its Size is
// ErrBadInput.
func (n *NarWriter) Write(p []byte) (int, error) {
	if n.err != nil {
		return 0, n.err
	}
	if uint64(len(p)) > n.left {
		return 0, n.fail(fmt.Errorf("NAR content: %d bytes where %d were announced: %w", len(p), n.left, flox.ErrBadInput))
	}
	written, err := n.w.Write(p)
	n.left -= uint64(written)
	return written, n.fail(err)
}

// Offset is the position behind what was written: after Entry of a regular
// file where its content begins, after Close the NAR's size.
func (n *NarWriter) Offset() uint64 {
	return n.framer.off + n.framer.content - n.left
}

// Close ends the NAR and flushes it; it does not close the writer below.
func (n *NarWriter) Close() error {
	if n.err != nil {
		return n.err
	}
	if n.left > 0 {
		return n.fail(fmt.Errorf("NAR: %d bytes of the last file are missing: %w", n.left, flox.ErrBadInput))
	}
	frame, err := n.framer.End()
	if err != nil {
		return n.fail(err)
	}
	if _, err := n.w.Write(frame); err != nil {
		return n.fail(err)
	}
	return n.fail(n.w.Flush())
}

func (n *NarWriter) fail(err error) error {
	if err != nil {
		n.err = err
	}
	return err
}
