package nix

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/floxctl/flox"
)

// MaxKeyName is the most bytes a key's name may have.
const MaxKeyName = 255

// SecretKey signs. Its text form is Nix's: "name:" and base64 of the 64 bytes
// of an Ed25519 key (seed, then public key).
type SecretKey struct {
	name string
	key  ed25519.PrivateKey
}

// PublicKey verifies. Its text form is Nix's: "name:" and base64 of the 32
// bytes of an Ed25519 public key.
type PublicKey struct {
	name string
	key  ed25519.PublicKey
}

// GenerateKey makes a new key; name is what signatures carry, by custom a host
// name and a number, "cache.example.org-1".
func GenerateKey(name string) (SecretKey, error) {
	if err := checkKeyName(name); err != nil {
		return SecretKey{}, err
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return SecretKey{}, fmt.Errorf("generate key %q: %w", name, err)
	}
	return SecretKey{name: name, key: key}, nil
}

// ParseSecretKey parses the text form of a secret key; space around it, such
// as an editor's line end, does not matter. Errors are ErrBadInput and never
// show the key.
func ParseSecretKey(s string) (SecretKey, error) {
	name, b, ok := splitNamed(strings.TrimSpace(s), ed25519.PrivateKeySize)
	if !ok {
		return SecretKey{}, fmt.Errorf("secret key: want name:base64 with %d bytes, as nix key generate-secret prints it: %w", ed25519.PrivateKeySize, flox.ErrBadInput)
	}
	// A public half that is not the seed's makes signatures nobody can verify,
	// and signing twice with different halves gives the seed away.
	key := ed25519.NewKeyFromSeed(b[:ed25519.SeedSize])
	if string(key) != string(b) {
		return SecretKey{}, fmt.Errorf("secret key %q: its public half does not belong to it: %w", name, flox.ErrBadInput)
	}
	return SecretKey{name: name, key: key}, nil
}

// ParsePublicKey parses the text form of a public key. The error is ErrBadInput.
func ParsePublicKey(s string) (PublicKey, error) {
	name, b, ok := splitNamed(strings.TrimSpace(s), ed25519.PublicKeySize)
	if !ok {
		return PublicKey{}, fmt.Errorf("public key %s: want name:base64 with %d bytes, as nix key convert-secret-to-public prints it: %w", quote(s), ed25519.PublicKeySize, flox.ErrBadInput)
	}
	return PublicKey{name: name, key: b}, nil
}

// IsZero reports whether k is no key.
func (k SecretKey) IsZero() bool { return k.key == nil }

// Name is what k's signatures carry before the colon.
func (k SecretKey) Name() string { return k.name }

// Public is the key that verifies what k signs.
func (k SecretKey) Public() PublicKey {
	return PublicKey{name: k.name, key: k.key.Public().(ed25519.PublicKey)}
}

// Sign gives the signature "name:base64" over msg.
func (k SecretKey) Sign(msg []byte) string {
	return joinNamed(k.name, ed25519.Sign(k.key, msg))
}

// String gives the text form, which is the secret itself.
func (k SecretKey) String() string { return joinNamed(k.name, k.key) }

// LogValue keeps the secret out of logs.
func (k SecretKey) LogValue() slog.Value { return slog.StringValue(k.name + ":(secret)") }

// IsZero reports whether k is no key.
func (k PublicKey) IsZero() bool { return k.key == nil }

// Name is what signatures of the key carry before the colon.
func (k PublicKey) Name() string { return k.name }

// String gives the text form.
func (k PublicKey) String() string { return joinNamed(k.name, k.key) }

// Equal reports whether both are the same key under the same name.
func (k PublicKey) Equal(other PublicKey) bool {
	return k.name == other.name && string(k.key) == string(other.key)
}

// Verify reports whether sig ("name:base64") is k's signature over msg.
func (k PublicKey) Verify(msg []byte, sig string) bool {
	name, b, ok := splitNamed(sig, ed25519.SignatureSize)
	return ok && name == k.name && len(k.key) == ed25519.PublicKeySize && ed25519.Verify(k.key, msg, b)
}

// KeyRing is a set of trusted public keys, safe for use by many goroutines.
// The zero KeyRing trusts nobody.
type KeyRing struct {
	// Two keys may share a name while one replaces the other.
	byName map[string][]PublicKey
}

// NewKeyRing trusts keys.
func NewKeyRing(keys ...PublicKey) KeyRing {
	ring := KeyRing{byName: make(map[string][]PublicKey, len(keys))}
	for _, k := range keys {
		ring.byName[k.name] = append(ring.byName[k.name], k)
	}
	return ring
}

// ParseKeyRing parses public keys, as trusted-public-keys of nix.conf has them.
func ParseKeyRing(keys []string) (KeyRing, error) {
	parsed := make([]PublicKey, 0, len(keys))
	for _, s := range keys {
		k, err := ParsePublicKey(s)
		if err != nil {
			return KeyRing{}, err
		}
		parsed = append(parsed, k)
	}
	return NewKeyRing(parsed...), nil
}

// Len is the number of trusted keys.
func (r KeyRing) Len() int {
	n := 0
	for _, keys := range r.byName {
		n += len(keys)
	}
	return n
}

// Verify finds the first signature over msg that a trusted key made, and says
// whose it is.
func (r KeyRing) Verify(msg []byte, sigs []string) (keyName string, ok bool) {
	for _, sig := range sigs {
		name, _, _ := strings.Cut(sig, ":")
		for _, k := range r.byName[name] {
			if k.Verify(msg, sig) {
				return k.name, true
			}
		}
	}
	return "", false
}

// Fingerprint is what a path's signatures are over (Nix 2.8
// src/libstore/path-info.cc): path, narHash, narSize and references, which
// must be sorted as PathInfo says.
func Fingerprint(dir flox.StoreDir, info *flox.PathInfo) string {
	var b strings.Builder
	b.WriteString("1;" + dir.Join(info.Path) + ";" + SHA256Hash(info.NarHash).String() + ";" + strconv.FormatUint(info.NarSize, 10) + ";")
	for i, ref := range info.References {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(dir.Join(ref))
	}
	return b.String()
}

// splitNamed splits "name:base64" of exactly size bytes.
func splitNamed(s string, size int) (name string, b []byte, ok bool) {
	name, text, ok := strings.Cut(s, ":")
	if !ok || checkKeyName(name) != nil || len(text) != base64.StdEncoding.EncodedLen(size) || strings.ContainsAny(text, "\r\n") {
		return "", nil, false
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	return name, b, err == nil && len(b) == size
}

func joinNamed(name string, b []byte) string {
	return name + ":" + base64.StdEncoding.EncodeToString(b)
}

// checkKeyName refuses what would not survive the files key names are written
// to: a narinfo line, a space separated list in nix.conf.
func checkKeyName(name string) error {
	bad := func(c rune) bool { return c <= ' ' || c == ':' || c == ';' || c == 0x7f }
	if name == "" || len(name) > MaxKeyName || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("key name %s: want 1 to %d characters without spaces, colons, semicolons: %w", quote(name), MaxKeyName, flox.ErrBadInput)
	}
	return nil
}
