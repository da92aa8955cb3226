package nix

import (
	"context"
	"errors"
	"io"

	"github.com/floxctl/flox"
)

var errSkeleton = errors.New("nix: not written yet")

// HashAlgo names a hash algorithm as Nix does.
type HashAlgo string

// The algorithms of Nix 2.8 src/libutil/hash.cc.
const (
	MD5    HashAlgo = "md5"
	SHA1   HashAlgo = "sha1"
	SHA256 HashAlgo = "sha256"
	SHA512 HashAlgo = "sha512"
)

// Hash is a digest and the algorithm that made it; the zero Hash is none.
type Hash struct {
	Algo HashAlgo
	Sum  []byte
}

// SHA256Hash makes the Hash of a SHA-256 digest.
func SHA256Hash(sum [32]byte) Hash { return Hash{Algo: SHA256, Sum: sum[:]} }

// ParseHash parses any form Nix reads.
func ParseHash(s string, algo HashAlgo) (Hash, error) { return Hash{}, errSkeleton }

// IsZero reports whether h is no hash.
func (h Hash) IsZero() bool { return h.Algo == "" }

// String gives "sha256:<nix32>".
func (h Hash) String() string { return "" }

// SRI gives "sha256-<base64>".
func (h Hash) SRI() string { return "" }

// Hex gives the digest alone in base16.
func (h Hash) Hex() string { return "" }

// EncodeBase32 encodes in nix-base32.
func EncodeBase32(b []byte) string { return "" }

// DecodeBase32 decodes nix-base32.
func DecodeBase32(s string) ([]byte, error) { return nil, errSkeleton }

// CompressHash folds b to size bytes by XOR.
func CompressHash(b []byte, size int) []byte { return nil }

// MakeStorePath computes a store path from its type, digest and name.
func MakeStorePath(dir flox.StoreDir, typ string, digest [32]byte, name string) (flox.StorePath, error) {
	return "", errSkeleton
}

// TextPath is the path of a text file with references.
func TextPath(dir flox.StoreDir, name string, digest [32]byte, refs []flox.StorePath) (flox.StorePath, error) {
	return "", errSkeleton
}

// SourcePath is the path of a tree addressed by the SHA-256 of its NAR.
func SourcePath(dir flox.StoreDir, name string, narHash [32]byte, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	return "", errSkeleton
}

// FixedOutputPath is the path of a fixed output.
func FixedOutputPath(dir flox.StoreDir, name string, recursive bool, h Hash, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	return "", errSkeleton
}

// CAMethod says what of a path its content address hashes.
type CAMethod string

// The methods of Nix 2.8 src/libstore/content-address.cc.
const (
	CAText CAMethod = "text:"    // a text file, may have references
	CAFlat CAMethod = "fixed:"   // the bytes of one regular file
	CANar  CAMethod = "fixed:r:" // the NAR
)

// ContentAddress is the parsed form of PathInfo.CA.
type ContentAddress struct {
	Method CAMethod
	Hash   Hash
}

// ParseContentAddress parses "text:sha256:…", "fixed:…" and "fixed:r:…".
func ParseContentAddress(ca string) (ContentAddress, error) { return ContentAddress{}, errSkeleton }

// String gives the text form.
func (c ContentAddress) String() string { return "" }

// ContentAddressPath computes the path a content address leads to.
func ContentAddressPath(dir flox.StoreDir, name, ca string, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	return "", errSkeleton
}

// Limits of a NAR, those of current Nix (src/libutil/archive.cc).
const (
	MaxNarDepth  = 64   // nodes inside each other, the root included
	MaxNarName   = 255  // bytes of a name in a directory
	MaxNarTarget = 4095 // bytes of a symlink's target
)

// NarEntry is one node of a NAR.
type NarEntry struct {
	Path       string // "" for the root, "bin/git" below it
	Kind       flox.Kind
	Executable bool   // regular files only
	Size       uint64 // bytes of content of a regular file
	Target     string // of a symlink
	// Offset is the position in the NAR of the first byte behind the node's
	// header: of a regular file's first content byte.
	Offset uint64
}

// NarReader reads a NAR entry by entry.
type NarReader struct{}

// NewNarReader reads from r and never past the NAR's end.
func NewNarReader(r io.Reader) *NarReader { return &NarReader{} }

// Next moves to the next entry; io.EOF after the checked end of the NAR.
func (n *NarReader) Next() (NarEntry, error) { return NarEntry{}, errSkeleton }

// Read reads content of the current regular file.
func (n *NarReader) Read(p []byte) (int, error) { return 0, errSkeleton }

// Offset is the number of NAR bytes consumed.
func (n *NarReader) Offset() uint64 { return 0 }

// NarFramer gives the bytes of a NAR around the content of its files.
type NarFramer struct{}

// Next gives the bytes between the content of the entry before and e's own
// content; the slice is valid until the next call.
func (f *NarFramer) Next(e NarEntry) ([]byte, error) { return nil, errSkeleton }

// End gives the bytes after the last entry's content.
func (f *NarFramer) End() ([]byte, error) { return nil, errSkeleton }

// Offset is the position in the NAR behind the last entry's header, after End the NAR's size.
func (f *NarFramer) Offset() uint64 { return 0 }

// Resume makes f continue behind last (an entry with its Offset), as if it had framed everything up to it.
func (f *NarFramer) Resume(last NarEntry) error { return errSkeleton }

// NarEntrySize is the bytes e adds to a NAR, its content and padding included.
// A NAR's size is NarMagicSize and the sum over its entries.
func NarEntrySize(e NarEntry) uint64 { return 0 }

// NarMagicSize is the bytes before the root node.
const NarMagicSize = 24

// NarWriter writes a NAR entry by entry.
type NarWriter struct{}

// NewNarWriter writes to w.
func NewNarWriter(w io.Writer) *NarWriter { return &NarWriter{} }

// Entry begins the next entry.
func (n *NarWriter) Entry(e NarEntry) error { return errSkeleton }

// Write writes content of the current regular file.
func (n *NarWriter) Write(p []byte) (int, error) { return 0, errSkeleton }

// Offset is the number of NAR bytes written.
func (n *NarWriter) Offset() uint64 { return 0 }

// Close ends the NAR and flushes.
func (n *NarWriter) Close() error { return errSkeleton }

// DumpPath writes the NAR of the file tree at fsPath.
func DumpPath(ctx context.Context, w io.Writer, fsPath string) error { return errSkeleton }

// RestorePath unpacks a NAR to dest, which must not exist.
func RestorePath(ctx context.Context, r io.Reader, dest string) error { return errSkeleton }

// Listing is one node of a .ls file.
type Listing struct {
	Kind       flox.Kind
	Executable bool
	Size       uint64
	Target     string
	NarOffset  uint64 // 0 = unknown
	Entries    map[string]*Listing
}

// ParseListing parses a .ls file.
func ParseListing(b []byte) (*Listing, error) { return nil, errSkeleton }

// MarshalListing gives the bytes of a .ls file.
func MarshalListing(l *Listing) ([]byte, error) { return nil, errSkeleton }

// ListingBuilder collects a Listing from entries in NAR order.
type ListingBuilder struct{}

// Add takes the next entry.
func (b *ListingBuilder) Add(e NarEntry) error { return errSkeleton }

// Listing is the tree of what was added.
func (b *ListingBuilder) Listing() (*Listing, error) { return nil, errSkeleton }

// ListingWriter writes a .ls file from entries in NAR order with constant memory.
type ListingWriter struct{}

// NewListingWriter writes to w.
func NewListingWriter(w io.Writer) *ListingWriter { return &ListingWriter{} }

// Entry writes the next entry.
func (l *ListingWriter) Entry(e NarEntry) error { return errSkeleton }

// Close ends the file and flushes.
func (l *ListingWriter) Close() error { return errSkeleton }

// MaxNarInfo is the most bytes a narinfo file may have.
const MaxNarInfo = 1 << 20

// NarInfo is a .narinfo file: a path's facts and where its NAR lies.
type NarInfo struct {
	Info        flox.PathInfo
	URL         string
	Compression string
	FileHash    Hash // zero if none
	FileSize    uint64
	System      string
}

// ParseNarInfo parses a .narinfo file.
func ParseNarInfo(dir flox.StoreDir, b []byte) (*NarInfo, error) { return nil, errSkeleton }

// Marshal gives the file's bytes.
func (n *NarInfo) Marshal(dir flox.StoreDir) []byte { return nil }

// Fingerprint is what a path's signatures are over.
func Fingerprint(dir flox.StoreDir, info *flox.PathInfo) string { return "" }

// SecretKey signs.
type SecretKey struct{ name string }

// PublicKey verifies.
type PublicKey struct{ name string }

// GenerateKey makes a new key.
func GenerateKey(name string) (SecretKey, error) { return SecretKey{}, errSkeleton }

// ParseSecretKey parses "name:base64".
func ParseSecretKey(s string) (SecretKey, error) { return SecretKey{}, errSkeleton }

// ParsePublicKey parses "name:base64".
func ParsePublicKey(s string) (PublicKey, error) { return PublicKey{}, errSkeleton }

// Name is the key's name.
func (k SecretKey) Name() string { return k.name }

// Public is the key that verifies what k signs.
func (k SecretKey) Public() PublicKey { return PublicKey{} }

// Sign gives "name:base64".
func (k SecretKey) Sign(msg []byte) string { return "" }

// String gives the secret text form.
func (k SecretKey) String() string { return "" }

// Name is the key's name.
func (k PublicKey) Name() string { return k.name }

// String gives the text form.
func (k PublicKey) String() string { return "" }

// Verify reports whether sig ("name:base64") is k's over msg.
func (k PublicKey) Verify(msg []byte, sig string) bool { return false }

// KeyRing is a set of trusted public keys.
type KeyRing struct{}

// NewKeyRing trusts keys.
func NewKeyRing(keys ...PublicKey) KeyRing { return KeyRing{} }

// ParseKeyRing parses public keys.
func ParseKeyRing(keys []string) (KeyRing, error) { return KeyRing{}, errSkeleton }

// Verify finds the first signature of a trusted key over msg.
func (k KeyRing) Verify(msg []byte, sigs []string) (keyName string, ok bool) { return "", false }

// MaxDecoderWindow is the most memory a decoder's window may take, in bytes.
const MaxDecoderWindow = 128 << 20

// Decompressor undoes compression, stopping with an error behind maxOut bytes.
func Decompressor(compression string, r io.Reader, maxOut uint64) (io.ReadCloser, error) {
	return nil, errSkeleton
}
