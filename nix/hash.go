package nix

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"

	"github.com/nix-community/go-nix/pkg/nixbase32"

	"github.com/floxctl/flox"
)

// HashAlgo names a hash algorithm as Nix does.
type HashAlgo string

// The algorithms of Nix 2.8 src/libutil/hash.cc.
const (
	MD5    HashAlgo = "md5"
	SHA1   HashAlgo = "sha1"
	SHA256 HashAlgo = "sha256"
	SHA512 HashAlgo = "sha512"
)

// Size is the length of a digest in bytes, 0 for an unknown algorithm.
func (a HashAlgo) Size() int {
	switch a {
	case MD5:
		return md5.Size
	case SHA1:
		return sha1.Size
	case SHA256:
		return sha256.Size
	case SHA512:
		return sha512.Size
	}
	return 0
}

// New starts a hash of the algorithm; nil for an unknown one.
func (a HashAlgo) New() hash.Hash {
	switch a {
	case MD5:
		return md5.New()
	case SHA1:
		return sha1.New()
	case SHA256:
		return sha256.New()
	case SHA512:
		return sha512.New()
	}
	return nil
}

// Hash is a digest and the algorithm that made it; the zero Hash is none. Sum
// has Algo.Size() bytes.
type Hash struct {
	Algo HashAlgo
	Sum  []byte
}

// SHA256Hash makes the Hash of a SHA-256 digest.
func SHA256Hash(sum [32]byte) Hash { return Hash{Algo: SHA256, Sum: sum[:]} }

// ParseHash parses any form Nix 2.8 reads: "<algo>:<digits>" with digits in
// base16, nix-base32 or base64, an SRI "<algo>-<base64>", and digits alone if
// algo says what they are. A non-empty algo must agree with the one in s. The
// error is ErrBadInput.
func ParseHash(s string, algo HashAlgo) (Hash, error) {
	bad := func(why string) (Hash, error) {
		return Hash{}, fmt.Errorf("hash %s: %s: %w", quote(s), why, flox.ErrBadInput)
	}
	stated, digits, prefixed := strings.Cut(s, ":")
	sri := false
	if !prefixed {
		// Neither base16 nor nix-base32 nor base64 has a dash.
		stated, digits, sri = strings.Cut(s, "-")
	}
	switch {
	case !prefixed && !sri:
		digits = s
		if algo == "" {
			return bad("want the algorithm before it, such as sha256:")
		}
	case algo != "" && HashAlgo(stated) != algo:
		return bad("want algorithm " + string(algo))
	default:
		algo = HashAlgo(stated)
	}
	size := algo.Size()
	if size == 0 {
		return bad("the algorithm is none of md5, sha1, sha256, sha512")
	}
	sum, err := decodeDigits(digits, size, sri)
	if err != nil {
		return bad(err.Error())
	}
	return Hash{Algo: algo, Sum: sum}, nil
}

// decodeDigits tells the bases apart by length, which is never ambiguous for
// one algorithm.
func decodeDigits(digits string, size int, sri bool) (sum []byte, err error) {
	switch {
	case !sri && len(digits) == hex.EncodedLen(size):
		return hex.DecodeString(digits)
	case !sri && len(digits) == nixbase32.EncodedLen(size):
		return nixbase32.DecodeString(digits)
	case len(digits) == base64.StdEncoding.EncodedLen(size):
		// The decoder skips line ends, which would shorten the digest.
		if strings.ContainsAny(digits, "\r\n") {
			return nil, fmt.Errorf("a line end inside base64")
		}
		sum, err = base64.StdEncoding.Strict().DecodeString(digits)
		if err == nil && len(sum) != size {
			err = fmt.Errorf("want a digest of %d bytes", size)
		}
		return sum, err
	}
	return nil, fmt.Errorf("%d characters are no digest of %d bytes in a base Nix knows", len(digits), size)
}

// IsZero reports whether h is no hash.
func (h Hash) IsZero() bool { return h.Algo == "" }

// Equal reports whether both are the same digest of the same algorithm.
func (h Hash) Equal(other Hash) bool {
	return h.Algo == other.Algo && string(h.Sum) == string(other.Sum)
}

// String gives "sha256:<nix-base32>", the form of narinfo; "" for the zero Hash.
func (h Hash) String() string {
	if h.IsZero() {
		return ""
	}
	return string(h.Algo) + ":" + EncodeBase32(h.Sum)
}

// SRI gives "sha256-<base64>".
func (h Hash) SRI() string {
	return string(h.Algo) + "-" + base64.StdEncoding.EncodeToString(h.Sum)
}

// Hex gives the digest alone in base16.
func (h Hash) Hex() string { return hex.EncodeToString(h.Sum) }

// EncodeBase32 encodes in nix-base32: no e, o, t, u, least significant digit last.
func EncodeBase32(b []byte) string { return nixbase32.EncodeToString(b) }

// DecodeBase32 decodes nix-base32. It accepts exactly what EncodeBase32 gives.
func DecodeBase32(s string) ([]byte, error) {
	if nixbase32.EncodedLen(nixbase32.DecodedLen(len(s))) != len(s) {
		return nil, fmt.Errorf("nix-base32 %s: %d characters are no whole number of bytes: %w", quote(s), len(s), flox.ErrBadInput)
	}
	b, err := nixbase32.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("nix-base32 %s: %w: %w", quote(s), err, flox.ErrBadInput)
	}
	return b, nil
}

// CompressHash folds b to size bytes by XOR, as Nix does with the digest
// inside a store path (Nix 2.8 src/libutil/hash.cc compressHash).
func CompressHash(b []byte, size int) []byte {
	out := make([]byte, size)
	for i := range b {
		out[i%size] ^= b[i]
	}
	return out
}

// quote quotes a stranger's text for a message, so that neither its length nor
// its control characters reach a log.
func quote[T string | []byte](s T) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
