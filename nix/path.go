package nix

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// MakeStorePath computes the store path of an object of type typ with the
// given SHA-256 (Nix 2.8 src/libstore/store-api.cc makeStorePath). The error
// is ErrBadInput: name is not allowed.
func MakeStorePath(dir flox.StoreDir, typ string, digest [32]byte, name string) (flox.StorePath, error) {
	sum := sha256.Sum256([]byte(typ + ":sha256:" + hex.EncodeToString(digest[:]) + ":" + string(dir) + ":" + name))
	return flox.ParseStorePath(EncodeBase32(CompressHash(sum[:], 20)) + "-" + name)
}

// typeWithRefs is the type of a path whose hash covers what it refers to.
func typeWithRefs(dir flox.StoreDir, typ string, refs []flox.StorePath, self bool) string {
	refs = slices.Clone(refs)
	slices.Sort(refs)
	var b strings.Builder
	b.WriteString(typ)
	for _, r := range slices.Compact(refs) {
		b.WriteByte(':')
		b.WriteString(dir.Join(r))
	}
	if self {
		b.WriteString(":self")
	}
	return b.String()
}

// TextPath is the path of a text file (builtins.toFile, .drv) with the given
// SHA-256 of its bytes and the paths it refers to.
func TextPath(dir flox.StoreDir, name string, digest [32]byte, refs []flox.StorePath) (flox.StorePath, error) {
	return MakeStorePath(dir, typeWithRefs(dir, "text", refs, false), digest, name)
}

// SourcePath is the path of a tree addressed by the SHA-256 of its NAR. With
// self the tree refers to itself, narHash is then over the NAR whose own hash
// part is replaced by zeros, and refs must not hold the path itself.
func SourcePath(dir flox.StoreDir, name string, narHash [32]byte, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	return MakeStorePath(dir, typeWithRefs(dir, "source", refs, self), narHash, name)
}

// FixedOutputPath is the path of an object known by its hash: of its NAR if
// recursive, else of the bytes of the one file it is. Only a recursive SHA-256
// may have references (Nix 2.8 makeFixedOutputPath); others are ErrBadInput.
func FixedOutputPath(dir flox.StoreDir, name string, recursive bool, h Hash, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	if len(h.Sum) != h.Algo.Size() || h.IsZero() {
		return "", fmt.Errorf("path of %q: %d bytes are no %q digest: %w", name, len(h.Sum), h.Algo, flox.ErrBadInput)
	}
	if recursive && h.Algo == SHA256 {
		return SourcePath(dir, name, [32]byte(h.Sum), refs, self)
	}
	if len(refs) > 0 || self {
		return "", fmt.Errorf("path of %q: only recursive sha256 addresses may have references, this is %s with %d: %w",
			name, h.Algo, len(refs), flox.ErrBadInput)
	}
	method := ""
	if recursive {
		method = "r:"
	}
	inner := sha256.Sum256([]byte("fixed:out:" + method + string(h.Algo) + ":" + h.Hex() + ":"))
	return MakeStorePath(dir, "output:out", inner, name)
}

// CAMethod says what of a path its content address hashes.
type CAMethod string

// The methods of Nix 2.8 src/libstore/content-address.cc; the values are what
// stands before the hash.
const (
	CAText CAMethod = "text:"    // the bytes of a text file, may have references
	CAFlat CAMethod = "fixed:"   // the bytes of the one regular file
	CANar  CAMethod = "fixed:r:" // the NAR
)

// ContentAddress is the parsed form of flox.PathInfo.CA.
type ContentAddress struct {
	Method CAMethod
	Hash   Hash
}

// ParseContentAddress parses "text:sha256:<digits>", "fixed:<algo>:<digits>"
// and "fixed:r:<algo>:<digits>", digits in base16, nix-base32 or base64. The
// error is ErrBadInput.
func ParseContentAddress(ca string) (ContentAddress, error) {
	// "fixed:" is a prefix of "fixed:r:", so it comes last.
	for _, method := range []CAMethod{CAText, CANar, CAFlat} {
		rest, ok := strings.CutPrefix(ca, string(method))
		if !ok {
			continue
		}
		// Inside a content address Nix reads no SRI.
		if !strings.Contains(rest, ":") {
			break
		}
		h, err := ParseHash(rest, "")
		if err != nil {
			return ContentAddress{}, fmt.Errorf("content address %s: %w", quote(ca), err)
		}
		if method == CAText && h.Algo != SHA256 {
			return ContentAddress{}, fmt.Errorf("content address %s: text is hashed with sha256 only: %w", quote(ca), flox.ErrBadInput)
		}
		return ContentAddress{Method: method, Hash: h}, nil
	}
	return ContentAddress{}, fmt.Errorf("content address %s: want text:sha256:…, fixed:<algo>:… or fixed:r:<algo>:…: %w", quote(ca), flox.ErrBadInput)
}

// String gives the form of narinfo, the hash in nix-base32.
func (c ContentAddress) String() string { return string(c.Method) + c.Hash.String() }

// Path computes the store path the address leads to. refs must not hold the
// path itself: self says that it refers to itself. The error is ErrBadInput.
func (c ContentAddress) Path(dir flox.StoreDir, name string, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	switch c.Method {
	case CAText:
		if self || c.Hash.Algo != SHA256 || len(c.Hash.Sum) != 32 {
			return "", fmt.Errorf("path of text %q: want a sha256 digest and no reference to itself: %w", name, flox.ErrBadInput)
		}
		return TextPath(dir, name, [32]byte(c.Hash.Sum), refs)
	case CAFlat, CANar:
		return FixedOutputPath(dir, name, c.Method == CANar, c.Hash, refs, self)
	}
	return "", fmt.Errorf("path of %q: unknown content address method %q: %w", name, c.Method, flox.ErrBadInput)
}

// ContentAddressPath parses a content address and computes the store path it
// leads to; see ContentAddress.Path.
func ContentAddressPath(dir flox.StoreDir, name, ca string, refs []flox.StorePath, self bool) (flox.StorePath, error) {
	c, err := ParseContentAddress(ca)
	if err != nil {
		return "", err
	}
	return c.Path(dir, name, refs, self)
}
