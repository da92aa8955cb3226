package nix

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/floxctl/flox"
)

// exportMagic stands between a path's NAR and its facts.
const exportMagic = 0x4558494e

// maxExportReferences bounds the references of one path in an export.
const maxExportReferences = 1 << 16

// ExportWriter writes what `nix-store --export` does: paths one behind the
// other, each with its NAR (Nix 2.8 src/libstore/export-import.cc).
type ExportWriter struct {
	dir flox.StoreDir
	w   io.Writer
}

// NewExportWriter writes to w for a store at dir.
func NewExportWriter(w io.Writer, dir flox.StoreDir) *ExportWriter {
	return &ExportWriter{dir: dir, w: w}
}

// Path writes one path; nar writes its NAR.
func (e *ExportWriter) Path(info *flox.PathInfo, nar func(io.Writer) error) error {
	if _, err := e.w.Write(binary.LittleEndian.AppendUint64(nil, 1)); err != nil {
		return fmt.Errorf("export %s: %w", info.Path, err)
	}
	return e.Item(info, nar)
}

// Item writes one path as ExportPath of the worker protocol answers: without
// the mark that a path follows.
func (e *ExportWriter) Item(info *flox.PathInfo, nar func(io.Writer) error) error {
	if err := nar(e.w); err != nil {
		return fmt.Errorf("export %s: %w", info.Path, err)
	}
	b := binary.LittleEndian.AppendUint64(nil, exportMagic)
	b = appendNarString(b, e.dir.Join(info.Path))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(info.References)))
	for _, ref := range info.References {
		b = appendNarString(b, e.dir.Join(ref))
	}
	deriver := ""
	if info.Deriver != "" {
		deriver = e.dir.Join(info.Deriver)
	}
	b = appendNarString(b, deriver)
	b = binary.LittleEndian.AppendUint64(b, 0) // no legacy signature
	if _, err := e.w.Write(b); err != nil {
		return fmt.Errorf("export %s: %w", info.Path, err)
	}
	return nil
}

// Close says that no path follows. It does not close the writer below.
func (e *ExportWriter) Close() error {
	_, err := e.w.Write(make([]byte, 8))
	return err
}

// ExportReader reads what ExportWriter writes. For each path: Next, then the
// NAR from the reader below, to its end and no further, then Facts.
type ExportReader struct {
	dir flox.StoreDir
	r   io.Reader
	buf [8]byte
}

// NewExportReader reads from r. It reads only what belongs to the export.
func NewExportReader(r io.Reader, dir flox.StoreDir) *ExportReader {
	return &ExportReader{dir: dir, r: r}
}

// Next reports whether a path follows.
func (e *ExportReader) Next() (bool, error) {
	n, err := e.number()
	if err == nil && n > 1 {
		err = fmt.Errorf("input doesn't look like something created by 'nix-store --export': %w", flox.ErrBadInput)
	}
	if err != nil {
		return false, fmt.Errorf("export: %w", err)
	}
	return n == 1, nil
}

// Facts reads what stands behind a NAR: path, references and deriver. The error
// is ErrBadInput or the reader's.
func (e *ExportReader) Facts() (*flox.PathInfo, error) {
	info, err := e.facts()
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	return info, nil
}

func (e *ExportReader) facts() (*flox.PathInfo, error) {
	magic, err := e.number()
	if err != nil {
		return nil, err
	}
	if magic != exportMagic {
		return nil, fmt.Errorf("Nix archive cannot be imported; wrong format: %w", flox.ErrBadInput) //nolint:staticcheck // Nix's words
	}
	info := &flox.PathInfo{}
	if info.Path, err = e.path(); err != nil {
		return nil, err
	}
	count, err := e.number()
	if err != nil {
		return nil, err
	}
	if count > maxExportReferences {
		return nil, fmt.Errorf("%s has %d references, at most %d are read: %w", info.Path, count, maxExportReferences, flox.ErrBadInput)
	}
	for range count {
		ref, err := e.path()
		if err != nil {
			return nil, err
		}
		info.References = append(info.References, ref)
	}
	slices.Sort(info.References)
	info.References = slices.Compact(info.References)
	deriver, err := e.text()
	if err != nil {
		return nil, err
	}
	if deriver != "" {
		if info.Deriver, err = e.dir.Parse(deriver); err != nil {
			return nil, err
		}
	}
	signed, err := e.number()
	if err == nil && signed == 1 {
		_, err = e.text() // of Nix before 2.0, which nobody can check
	}
	return info, err
}

func (e *ExportReader) path() (flox.StorePath, error) {
	s, err := e.text()
	if err != nil {
		return "", err
	}
	return e.dir.Parse(s)
}

func (e *ExportReader) number() (uint64, error) {
	if _, err := io.ReadFull(e.r, e.buf[:]); err != nil {
		return 0, cutShort(err)
	}
	return binary.LittleEndian.Uint64(e.buf[:]), nil
}

// text reads a string: its length, its bytes, zeros up to a multiple of 8.
func (e *ExportReader) text() (string, error) {
	const most = 4096
	n, err := e.number()
	if err != nil {
		return "", err
	}
	if n > most {
		return "", fmt.Errorf("a text of %d bytes, want at most %d: %w", n, most, flox.ErrBadInput)
	}
	b := make([]byte, n+narPadding(n))
	if _, err := io.ReadFull(e.r, b); err != nil {
		return "", cutShort(err)
	}
	for _, c := range b[n:] {
		if c != 0 {
			return "", fmt.Errorf("padding that is not zero: %w", flox.ErrBadInput)
		}
	}
	return string(b[:n]), nil
}

// cutShort says that bytes are missing, which is the sender's mistake.
func cutShort(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF { //nolint:errorlint // io.ReadFull gives them as they are
		return fmt.Errorf("it ends too early: %w: %w", io.ErrUnexpectedEOF, flox.ErrBadInput)
	}
	return err
}
