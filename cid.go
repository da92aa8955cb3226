package flox

import (
	"encoding/hex"
	"fmt"

	"github.com/ipfs/go-cid"
)

// CIDSize is the size of a CID's digest in bytes.
const CIDSize = 32

// cidPrefix is what stands before the digest in a binary CIDv1: version 1,
// codec raw (0x55), multihash blake3 (0x1e) of 32 bytes.
var cidPrefix = [4]byte{0x01, 0x55, 0x1e, CIDSize}

// CID names a run of bytes by their BLAKE3-256 digest: a chunk, a block of a
// manifest, or a whole file's content. It is the digest of a CIDv1 with the
// raw codec; String gives the CID in its usual text form.
type CID [CIDSize]byte

// ParseCID parses the text form of a CIDv1 (raw codec, BLAKE3-256).
func ParseCID(s string) (CID, error) {
	c, err := cid.Decode(s)
	if err != nil {
		return CID{}, fmt.Errorf("CID %q: %w: %w", s, err, ErrBadInput)
	}
	return CIDFromBytes(c.Bytes())
}

// CIDFromBytes parses the 36 bytes of a binary CIDv1 (raw codec, BLAKE3-256).
func CIDFromBytes(b []byte) (CID, error) {
	if len(b) != len(cidPrefix)+CIDSize || [4]byte(b[:4]) != cidPrefix {
		return CID{}, fmt.Errorf("CID %s: want CIDv1, raw codec, BLAKE3 of 32 bytes: %w", hex.EncodeToString(b[:min(len(b), 40)]), ErrBadInput)
	}
	return CID(b[4:]), nil
}

// Bytes gives the 36 bytes of the binary CIDv1.
func (c CID) Bytes() []byte { return append(cidPrefix[:len(cidPrefix):len(cidPrefix)], c[:]...) }

// IsZero reports whether c names nothing.
func (c CID) IsZero() bool { return c == CID{} }

// String gives the CIDv1 in base32, "bafkr4i…"; "" for the zero CID.
func (c CID) String() string {
	if c.IsZero() {
		return ""
	}
	parsed, err := cid.Cast(c.Bytes())
	if err != nil {
		return hex.EncodeToString(c[:])
	}
	return parsed.String()
}

// MarshalText gives String.
func (c CID) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText parses what MarshalText gave.
func (c *CID) UnmarshalText(b []byte) (err error) {
	if len(b) == 0 {
		*c = CID{}
		return nil
	}
	*c, err = ParseCID(string(b))
	return err
}
