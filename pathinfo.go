package flox

import "time"

// PathInfo is what is known of a valid store path: Nix's fields and the CID of
// the manifest. It is immutable once the path is valid.
type PathInfo struct {
	Path       StorePath
	NarHash    [32]byte    // SHA-256 of the NAR
	NarSize    uint64      // bytes of the NAR, never 0
	References []StorePath // sorted, without duplicates; may hold Path itself
	Deriver    StorePath   // "" = unknown
	CA         string      // content address in Nix's text form, "" = none
	Registered time.Time   // when it became valid, whole seconds

	// Signatures are over Nix's fingerprint, each "keyname:base64".
	Signatures []string
	// Manifest is the CID of the manifest's root block.
	Manifest CID
	// ManifestSignatures are over the manifest statement (content.Statement),
	// in the same form.
	ManifestSignatures []string
}

// Kind says what an entry of a file tree is.
type Kind uint8

// The kinds a NAR knows. Their values are part of the manifest's format.
const (
	Regular   Kind = 1
	Directory Kind = 2
	Symlink   Kind = 3
)

func (k Kind) String() string {
	switch k {
	case Regular:
		return "regular"
	case Directory:
		return "directory"
	case Symlink:
		return "symlink"
	}
	return "unknown"
}

// Entry is one file, directory or symlink of a store path. Entries are numbered
// from 0 (the store path itself) in NAR order: a directory comes before what it
// holds, names are sorted by byte.
type Entry struct {
	Name       string // last component; "" for entry 0
	Kind       Kind
	Executable bool   // regular files only
	Size       uint64 // bytes of content of a regular file
	Target     string // of a symlink

	// File names a regular file's whole content (BLAKE3). Equal content has an
	// equal File wherever it lies.
	File CID

	// Span is how many entries lie below a directory, at any depth: the next
	// sibling of entry i is entry i+1+Span. Dirs is how many of its direct
	// children are directories (st_nlink is 2+Dirs).
	Span uint32
	Dirs uint32
}

// Chunk is a run of a file's bytes, cut by content.
type Chunk struct {
	ID   CID
	Size uint32 // bytes of plain content
}
