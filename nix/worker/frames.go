package worker

import (
	"encoding/binary"
	"errors"
	"io"
)

// frameReader reads a framed stream: runs of bytes, each behind its length,
// up to a run of length 0. It takes nothing behind that.
type frameReader struct {
	r    io.Reader
	left uint64 // of the current frame
	err  error  // io.EOF behind the last frame
}

// Read gives io.EOF behind the last frame only; a stream that breaks off is
// io.ErrUnexpectedEOF.
func (f *frameReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for f.err == nil && f.left == 0 {
		var word [8]byte
		if _, err := io.ReadFull(f.r, word[:]); err != nil {
			f.fail(err)
			break
		}
		if f.left = binary.LittleEndian.Uint64(word[:]); f.left == 0 {
			f.err = io.EOF
		}
	}
	if f.err != nil {
		return 0, f.err
	}
	if uint64(len(p)) > f.left {
		p = p[:f.left]
	}
	n, err := f.r.Read(p)
	f.left -= uint64(n)
	if err != nil {
		f.fail(err)
		return n, f.err
	}
	return n, nil
}

func (f *frameReader) fail(err error) {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	f.err = err
}

// drain reads to behind the last frame.
func (f *frameReader) drain() error {
	_, err := io.Copy(io.Discard, f)
	return err
}

// frameWriter writes a framed stream.
type frameWriter struct{ e *encoder }

func (f frameWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, f.e.err
	}
	f.e.u64(uint64(len(p)))
	f.e.raw(p)
	return len(p), f.e.err
}

// end writes the frame of length 0.
func (f frameWriter) end() { f.e.u64(0) }
