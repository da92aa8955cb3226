package nix

import (
	"bytes"
	"fmt"
	"io"

	"github.com/floxctl/flox"
)

// FileNar is the NAR of a plain file of size bytes, whose content is read from
// content when it is needed; io.ErrUnexpectedEOF if that ends before.
func FileNar(size uint64, content io.Reader) (io.Reader, error) {
	var f NarFramer
	head, err := f.Next(NarEntry{Kind: flox.Regular, Size: size})
	if err != nil {
		return nil, err
	}
	head = bytes.Clone(head)
	tail, err := f.End()
	if err != nil {
		return nil, err
	}
	return io.MultiReader(bytes.NewReader(head), &exactly{content, size}, bytes.NewReader(tail)), nil
}

// exactly reads left bytes and no more, nor fewer.
type exactly struct {
	r    io.Reader
	left uint64
}

// Read is io.Reader.
func (e *exactly) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(p[:min(uint64(len(p)), e.left)])
	e.left -= uint64(n)
	if err == io.EOF && e.left > 0 { //nolint:errorlint // readers give it as it is
		err = fmt.Errorf("a file ends %d bytes too early: %w", e.left, io.ErrUnexpectedEOF)
	}
	return n, err
}
