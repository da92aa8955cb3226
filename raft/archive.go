package raft

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

// A snapshot travels as one stream, integers big endian:
//
//	"FLOXSNP1"  applied index (8)  number of files (4)
//	per file:   length of name (2)  name  size (8)  bytes  BLAKE3-256 of the bytes (32)
//	"END."
const (
	archiveMagic = "FLOXSNP1"
	archiveEnd   = "END."

	maxArchiveFiles = 1 << 20
	maxArchiveName  = 128
)

// sum is a BLAKE3-256 digest in a JSON file.
type sum [32]byte

func (s sum) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, s[:]), nil }

func (s *sum) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(s) {
		return fmt.Errorf("digest %q: %w", shorten(b), flox.ErrCorrupt)
	}
	_, err := hex.Decode(s[:], b)
	return err
}

// archiveFile is one file of a snapshot.
type archiveFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	Sum  sum    `json:"blake3"`
}

// archiveSize is the length of the stream in bytes.
func archiveSize(files []archiveFile) int64 {
	n := int64(len(archiveMagic) + 8 + 4 + len(archiveEnd))
	for _, f := range files {
		n += int64(2+len(f.Name)+8) + f.Size + 32
	}
	return n
}

// archive reads the stream of the files in dir. A file that is not what its
// sum says ends the stream with ErrCorrupt.
type archive struct {
	io.Reader
	open *os.File // the file being read
}

// newArchive streams files of dir, whose state is at the applied index.
func newArchive(dir string, appliedIndex uint64, files []archiveFile) *archive {
	a := &archive{}
	head := append([]byte(archiveMagic), make([]byte, 12)...)
	binary.BigEndian.PutUint64(head[8:], appliedIndex)
	binary.BigEndian.PutUint32(head[16:], uint32(len(files)))
	parts := make([]io.Reader, 0, 3*len(files)+2)
	parts = append(parts, bytes.NewReader(head))
	for _, f := range files {
		h := binary.BigEndian.AppendUint16(nil, uint16(len(f.Name)))
		h = binary.BigEndian.AppendUint64(append(h, f.Name...), uint64(f.Size))
		parts = append(parts, bytes.NewReader(h), &archivePart{a: a, dir: dir, file: f}, bytes.NewReader(f.Sum[:]))
	}
	a.Reader = io.MultiReader(append(parts, bytes.NewReader([]byte(archiveEnd)))...)
	return a
}

// Close releases the file that was being read.
func (a *archive) Close() error {
	if a.open == nil {
		return nil
	}
	err := a.open.Close()
	a.open = nil
	return err
}

// archivePart is one file's bytes, opened when its turn comes.
type archivePart struct {
	a    *archive
	dir  string
	file archiveFile
	hash hash.Hash
	left int64
}

func (p *archivePart) Read(b []byte) (int, error) {
	if p.hash == nil {
		f, err := os.Open(filepath.Join(p.dir, p.file.Name))
		if err != nil {
			return 0, fmt.Errorf("snapshot: %w", err)
		}
		p.a.open, p.hash, p.left = f, blake3.New(), p.file.Size
	}
	if p.left == 0 {
		if err := p.a.Close(); err != nil {
			return 0, err
		}
		if !bytes.Equal(p.hash.Sum(nil), p.file.Sum[:]) {
			return 0, fmt.Errorf("snapshot file %s has changed since it was written: %w", filepath.Join(p.dir, p.file.Name), flox.ErrCorrupt)
		}
		return 0, io.EOF
	}
	n, err := p.a.open.Read(b[:min(int64(len(b)), p.left)])
	p.hash.Write(b[:n])
	p.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("snapshot file %s is %d bytes short: %w", filepath.Join(p.dir, p.file.Name), p.left, flox.ErrCorrupt)
	}
	return n, err
}

// contents is what a stream held.
type contents struct {
	applied uint64
	files   []archiveFile
}

// unpack writes the files of a stream into dir, which it makes, and makes them
// durable. It needs all of the stream to be right, and nothing behind it.
func unpack(r io.Reader, dir string) (contents, error) {
	c := contents{}
	bad := func(format string, args ...any) (contents, error) {
		return c, fmt.Errorf("snapshot stream: %s: %w", fmt.Sprintf(format, args...), flox.ErrCorrupt)
	}
	if err := makeDir(dir); err != nil {
		return c, err
	}
	in := bufio.NewReaderSize(r, 256<<10)
	head := make([]byte, len(archiveMagic)+12)
	if _, err := io.ReadFull(in, head); err != nil {
		return bad("no header: %v", err)
	}
	if string(head[:8]) != archiveMagic {
		return bad("begins with %q, want %q", head[:8], archiveMagic)
	}
	c.applied = binary.BigEndian.Uint64(head[8:])
	count := binary.BigEndian.Uint32(head[16:])
	if count > maxArchiveFiles {
		return bad("%d files, want at most %d", count, maxArchiveFiles)
	}
	for range count {
		f, err := unpackFile(in, dir)
		if err != nil {
			return c, err
		}
		c.files = append(c.files, f)
	}
	end := make([]byte, len(archiveEnd))
	if _, err := io.ReadFull(in, end); err != nil || string(end) != archiveEnd {
		return bad("no end mark")
	}
	if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		return bad("something behind the end mark")
	}
	return c, syncDir(dir)
}

// unpackFile writes the next file of a stream.
func unpackFile(in *bufio.Reader, dir string) (archiveFile, error) {
	f := archiveFile{}
	bad := func(format string, args ...any) (archiveFile, error) {
		return f, fmt.Errorf("snapshot stream: %s: %w", fmt.Sprintf(format, args...), flox.ErrCorrupt)
	}
	var n [8]byte
	if _, err := io.ReadFull(in, n[:2]); err != nil {
		return bad("cut off: %v", err)
	}
	name := make([]byte, binary.BigEndian.Uint16(n[:2]))
	if len(name) > maxArchiveName {
		return bad("file name of %d bytes", len(name))
	}
	if _, err := io.ReadFull(in, name); err != nil {
		return bad("cut off: %v", err)
	}
	if !plainName(name) {
		return bad("file name %q", name)
	}
	f.Name = string(name)
	if _, err := io.ReadFull(in, n[:]); err != nil {
		return bad("cut off: %v", err)
	}
	size := binary.BigEndian.Uint64(n[:])
	if size > 1<<50 {
		return bad("file %s of %d bytes", f.Name, size)
	}
	f.Size = int64(size)
	out, err := os.OpenFile(filepath.Join(dir, f.Name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return bad("file %s twice", f.Name)
	}
	if err != nil {
		return f, fmt.Errorf("unpack snapshot: %w", err)
	}
	digest := blake3.New()
	got, err := io.Copy(out, io.TeeReader(io.LimitReader(in, f.Size), digest))
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return f, fmt.Errorf("unpack snapshot: %w", err)
	}
	if got != f.Size {
		return bad("file %s is cut off", f.Name)
	}
	f.Sum = sum(digest.Sum(nil))
	var want sum
	if _, err := io.ReadFull(in, want[:]); err != nil || want != f.Sum {
		return bad("file %s does not match its sum", f.Name)
	}
	return f, nil
}

// plainName reports whether name can only be a file in the directory itself.
func plainName(name []byte) bool {
	for _, c := range name {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '.', c == '-', c == '_':
		default:
			return false
		}
	}
	return len(name) > 0 && name[0] != '.'
}

// sumFile computes the entry of one file on disk.
func sumFile(dir, name string) (archiveFile, error) {
	in, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return archiveFile{}, err
	}
	defer in.Close()
	digest := blake3.New()
	n, err := io.Copy(digest, in)
	return archiveFile{Name: name, Size: n, Sum: sum(digest.Sum(nil))}, err
}
