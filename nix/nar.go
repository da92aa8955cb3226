package nix

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"

	"github.com/floxctl/flox"
)

// Limits of a NAR, those current Nix enforces (src/libutil/archive.cc). 2.8
// accepts more, but nothing it makes needs it.
const (
	MaxNarDepth  = 64   // nodes inside each other, the root counted
	MaxNarName   = 255  // bytes of a name in a directory
	MaxNarTarget = 4095 // bytes of a symlink's target
	// MaxNarSize is the most bytes of a NAR: sizes and offsets fit an int64, so
	// that no sum of a length, its padding and an offset can wrap around.
	MaxNarSize = math.MaxInt64
)

// NarMagicSize is the bytes before the root node.
const NarMagicSize = 24

// NarEntry is one node of a NAR. Entries come in NAR order: a directory before
// what it holds, names sorted by byte.
type NarEntry struct {
	Path       string // "" for the root, "bin/git" below it
	Kind       flox.Kind
	Executable bool   // regular files only
	Size       uint64 // bytes of content of a regular file
	Target     string // of a symlink
	// Offset is the position in the NAR behind what the node begins with: of a
	// regular file the first byte of its content (narOffset in a listing), of a
	// symlink the byte behind its target, of a directory the byte where its first
	// entry or its end follows. Readers set it, writers ignore it.
	Offset uint64
}

// Depth is how many nodes enclose the entry: 0 for the root.
func (e *NarEntry) Depth() int {
	if e.Path == "" {
		return 0
	}
	return 1 + strings.Count(e.Path, "/")
}

// The grammar of a NAR (Nix 2.8 src/libutil/archive.cc) is made of strings
// alone: a length of 8 bytes, little endian, the bytes, zeros up to a multiple
// of 8. What is constant between two variable parts is one string here.
var (
	narMagic      = narTokens("nix-archive-1")
	narNode       = narTokens("(", "type")
	narRegular    = narTokens("regular")
	narDirectory  = narTokens("directory")
	narSymlink    = narTokens("symlink", "target")
	narExecutable = narTokens("executable", "")
	narContents   = narTokens("contents")
	narEntry      = narTokens("entry")
	narEntryName  = narTokens("(", "name")
	narEntryNode  = narTokens("node")
	narClose      = narTokens(")")
	narCloseBoth  = narTokens(")", ")") // of a node and of the entry around it
)

// Lengths that follow from the grammar; nar_test.go checks them.
const (
	narCloseLen = 16
	// narLeastNode is the smallest node: an empty directory, "(" to ")".
	narLeastNode = 32 + 24 + 16
	// narLeastEntry is the smallest rest of an entry behind its "entry" tag.
	narLeastEntry = 32 + 16 + 16 + narLeastNode + 16
)

func narTokens(tokens ...string) string {
	var b []byte
	for _, t := range tokens {
		b = appendNarString(b, t)
	}
	return string(b)
}

func appendNarString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(len(s)))
	b = append(b, s...)
	return append(b, narZeros[:narPadding(uint64(len(s)))]...)
}

var narZeros [8]byte

// narPadding is how many zeros follow n bytes.
func narPadding(n uint64) uint64 { return -n & 7 }

// narStringLen is the bytes a string of n bytes takes; n is below MaxNarSize-16.
func narStringLen(n uint64) uint64 { return 8 + n + narPadding(n) }

// NarEntrySize is the bytes e adds to a NAR, its content and all padding
// included, whatever stands before or behind it. The size of a NAR is
// NarMagicSize and the sum over its entries.
func NarEntrySize(e NarEntry) uint64 {
	n := uint64(len(narNode) + narCloseLen)
	switch e.Kind {
	case flox.Regular:
		n += uint64(len(narRegular)+len(narContents)) + narStringLen(e.Size)
		if e.Executable {
			n += uint64(len(narExecutable))
		}
	case flox.Directory:
		n += uint64(len(narDirectory))
	case flox.Symlink:
		n += uint64(len(narSymlink)) + narStringLen(uint64(len(e.Target)))
	}
	if e.Path != "" {
		name := e.Path[strings.LastIndexByte(e.Path, '/')+1:]
		n += uint64(len(narEntry)+len(narEntryName)+len(narEntryNode)+narCloseLen) + narStringLen(uint64(len(name)))
	}
	return n
}

// checkNarName applies the rules for a name in a directory; why is "" if it may
// stand there.
func checkNarName[T string | []byte](name T) (why string) {
	switch {
	case len(name) == 0:
		return "an empty name"
	case len(name) > MaxNarName:
		return fmt.Sprintf("a name longer than %d bytes", MaxNarName)
	case len(name) == 1 && name[0] == '.', len(name) == 2 && name[0] == '.' && name[1] == '.':
		return "the name " + string(name)
	}
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return fmt.Sprintf("byte %q in a name", name[i])
		}
	}
	return ""
}

// checkNarTarget applies the rules for a symlink's target.
func checkNarTarget(target string) (why string) {
	switch {
	case target == "":
		return "a symlink with an empty target"
	case len(target) > MaxNarTarget:
		return fmt.Sprintf("a symlink target longer than %d bytes", MaxNarTarget)
	case strings.IndexByte(target, 0) >= 0:
		return "a NUL in a symlink target"
	}
	return ""
}

// check tells what is wrong with e apart from its place among others.
func (e *NarEntry) check() (why string) {
	if e.Kind != flox.Regular && (e.Executable || e.Size != 0) {
		return "only a regular file has a size and can be executable"
	}
	if e.Kind != flox.Symlink && e.Target != "" {
		return "only a symlink has a target"
	}
	switch e.Kind {
	case flox.Regular, flox.Directory:
		return ""
	case flox.Symlink:
		return checkNarTarget(e.Target)
	}
	return fmt.Sprintf("kind %d", e.Kind)
}
