package nix

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/floxctl/flox"
)

// Limits of a narinfo file. Nix has none; these are far above what any cache
// serves, and keep a hostile one from costing more than its own size.
const (
	MaxNarInfo    = 1 << 20 // bytes of the file
	MaxSignatures = 256     // of one path
)

// NarInfo is a .narinfo file: a path's facts and where its NAR lies. Of Info
// the fields Manifest, ManifestSignatures and Registered are not part of it.
type NarInfo struct {
	Info        flox.PathInfo
	URL         string // relative to the cache, or absolute
	Compression string // of the file at URL: "none", "xz", …; see Decompressor
	FileHash    Hash   // of the file at URL; zero if not given
	FileSize    uint64 // bytes of the file at URL; 0 if not given
	System      string // unused by Nix 2.8, kept
}

// ParseNarInfo parses a .narinfo file of a cache whose store directory is dir.
// It accepts what Nix 2.8 does (src/libstore/nar-info.cc) except files that
// say a thing twice or exceed the limits: fields may come in any order, unknown
// ones are skipped, a missing Compression is bzip2. References and signatures
// are sorted, the content address is brought to its usual form. The error is
// ErrBadInput and names the field.
func ParseNarInfo(dir flox.StoreDir, b []byte) (*NarInfo, error) {
	if len(b) > MaxNarInfo {
		return nil, fmt.Errorf("narinfo of %d bytes, at most %d are read: %w", len(b), MaxNarInfo, flox.ErrBadInput)
	}
	p := narInfoParser{dir: dir, info: &NarInfo{}, seen: make(map[string]bool)}
	for rest := string(b); rest != ""; {
		line, after, ended := strings.Cut(rest, "\n")
		key, value, ok := strings.Cut(line, ": ")
		if !ended || !ok {
			return nil, fmt.Errorf(`narinfo line %s: want "Key: value" and a line end: %w`, quote(line), flox.ErrBadInput)
		}
		if err := p.field(key, value); err != nil {
			return nil, fmt.Errorf("narinfo: %s %s: %w", key, quote(value), err)
		}
		rest = after
	}
	return p.finish()
}

type narInfoParser struct {
	dir  flox.StoreDir
	info *NarInfo
	seen map[string]bool // fields that may come once
}

func (p *narInfoParser) field(key, value string) (err error) {
	n := p.info
	switch key {
	case "Sig":
		if len(n.Info.Signatures) >= MaxSignatures {
			return fmt.Errorf("more than %d signatures: %w", MaxSignatures, flox.ErrBadInput)
		}
		n.Info.Signatures = append(n.Info.Signatures, value)
		return nil
	case "StorePath", "URL", "Compression", "FileHash", "FileSize", "NarHash", "NarSize", "References", "Deriver", "System", "CA":
		if p.seen[key] {
			return fmt.Errorf("it comes twice: %w", flox.ErrBadInput)
		}
		p.seen[key] = true
	}
	switch key {
	case "StorePath":
		n.Info.Path, err = p.dir.Parse(value)
	case "URL":
		n.URL = value
	case "Compression":
		n.Compression = value
	case "FileHash":
		n.FileHash, err = ParseHash(value, "")
	case "FileSize":
		n.FileSize, err = parseSize(value)
	case "NarHash":
		n.Info.NarHash, err = parseNarHash(value)
	case "NarSize":
		n.Info.NarSize, err = parseSize(value)
	case "References":
		n.Info.References, err = parseReferences(value)
	case "Deriver":
		if value != "unknown-deriver" {
			n.Info.Deriver, err = flox.ParseStorePath(value)
		}
	case "System":
		n.System = value
	case "CA":
		n.Info.CA, err = parseCA(value)
	}
	return err
}

// finish checks what must be there and puts lists in order.
func (p *narInfoParser) finish() (*NarInfo, error) {
	n := p.info
	for _, key := range []string{"StorePath", "URL", "NarHash", "NarSize"} {
		if !p.seen[key] {
			return nil, fmt.Errorf("narinfo without %s: %w", key, flox.ErrBadInput)
		}
	}
	if n.URL == "" {
		return nil, fmt.Errorf("narinfo of %s: empty URL: %w", n.Info.Path, flox.ErrBadInput)
	}
	if n.Info.NarSize == 0 {
		return nil, fmt.Errorf("narinfo of %s: NarSize 0: %w", n.Info.Path, flox.ErrBadInput)
	}
	if n.Compression == "" {
		n.Compression = "bzip2"
	}
	slices.Sort(n.Info.Signatures)
	n.Info.Signatures = slices.Compact(n.Info.Signatures)
	return n, nil
}

func parseSize(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("want a number of bytes from 0 to 2^63-1: %w", flox.ErrBadInput)
	}
	return n, nil
}

func parseNarHash(s string) ([32]byte, error) {
	h, err := ParseHash(s, "")
	if err != nil {
		return [32]byte{}, err
	}
	if h.Algo != SHA256 {
		return [32]byte{}, fmt.Errorf("a NAR is hashed with sha256: %w", flox.ErrBadInput)
	}
	return [32]byte(h.Sum), nil
}

func parseReferences(s string) ([]flox.StorePath, error) {
	var refs []flox.StorePath
	for base := range strings.FieldsSeq(s) {
		ref, err := flox.ParseStorePath(base)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	slices.Sort(refs)
	return slices.Compact(refs), nil
}

func parseCA(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	ca, err := ParseContentAddress(s)
	return ca.String(), err
}

// Marshal gives the file's bytes for a store at dir, as Nix 2.8 writes them. A
// value that would break its line is left out, so a URL with a line end makes
// a file everybody refuses.
func (n *NarInfo) Marshal(dir flox.StoreDir) []byte {
	var b strings.Builder
	line := func(key, value string) {
		if !strings.ContainsAny(value, "\n\r\x00") {
			b.WriteString(key + ": " + value + "\n")
		}
	}
	line("StorePath", dir.Join(n.Info.Path))
	line("URL", n.URL)
	line("Compression", n.Compression)
	if !n.FileHash.IsZero() {
		line("FileHash", n.FileHash.String())
		line("FileSize", strconv.FormatUint(n.FileSize, 10))
	}
	line("NarHash", SHA256Hash(n.Info.NarHash).String())
	line("NarSize", strconv.FormatUint(n.Info.NarSize, 10))
	refs := make([]string, 0, len(n.Info.References))
	for _, r := range n.Info.References {
		refs = append(refs, string(r))
	}
	line("References", strings.Join(refs, " "))
	if n.Info.Deriver != "" {
		line("Deriver", string(n.Info.Deriver))
	}
	if n.System != "" {
		line("System", n.System)
	}
	for _, sig := range slices.Compact(slices.Sorted(slices.Values(n.Info.Signatures))) {
		line("Sig", sig)
	}
	if n.Info.CA != "" {
		line("CA", n.Info.CA)
	}
	return []byte(b.String())
}
