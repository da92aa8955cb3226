package backup

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/floxctl/flox"
)

// Encrypted keys, integers big endian; the key of the cipher is Argon2id of the
// passphrase, and everything before the box is authenticated with it:
//
//	"flxkeys1"  passes (4)  memory in KiB (4)  threads (4)  salt (16)  nonce (24)
//	the box: XChaCha20-Poly1305
const (
	keysMagic  = "flxkeys1"
	saltSize   = 16
	headerSize = len(keysMagic) + 3*4 + saltSize + chacha20poly1305.NonceSizeX
)

// What a new passphrase costs: RFC 9106, section 4, second choice; and what one
// that is read may cost at most.
const (
	passes, memoryKiB, threads = 3, 64 << 10, 4

	maxPasses, maxMemoryKiB, maxThreads = 64, 1 << 20, 64
)

// MinPassphrase is the shortest passphrase in bytes.
const MinPassphrase = 12

// CheckPassphrase refuses one that protects nothing. ErrBadInput.
func CheckPassphrase(passphrase []byte) error {
	if len(passphrase) < MinPassphrase {
		return fmt.Errorf("the passphrase has %d bytes, want at least %d: it alone protects the storehouse's keys in the backup: %w", len(passphrase), MinPassphrase, flox.ErrBadInput)
	}
	return nil
}

// SealKeys encrypts secrets with a passphrase.
func SealKeys(secrets, passphrase []byte) ([]byte, error) {
	if err := CheckPassphrase(passphrase); err != nil {
		return nil, err
	}
	b := []byte(keysMagic)
	for _, v := range []uint32{passes, memoryKiB, threads} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	random := make([]byte, saltSize+chacha20poly1305.NonceSizeX)
	_, _ = rand.Read(random) // never fails
	b = append(b, random...)
	box, err := chacha20poly1305.NewX(argon2.IDKey(passphrase, random[:saltSize], passes, memoryKiB, threads, chacha20poly1305.KeySize))
	if err != nil {
		return nil, err
	}
	return box.Seal(b, random[saltSize:], secrets, b), nil
}

// OpenKeys decrypts what SealKeys gave. ErrDenied when the passphrase is another,
// or the box was changed: which of them cannot be told.
func OpenKeys(sealed, passphrase []byte) ([]byte, error) {
	if len(sealed) < headerSize || string(sealed[:len(keysMagic)]) != keysMagic {
		return nil, fmt.Errorf("these are no encrypted keys of a backup: %w", flox.ErrCorrupt)
	}
	u := func(i int) uint32 { return binary.BigEndian.Uint32(sealed[len(keysMagic)+4*i:]) }
	if u(0) == 0 || u(0) > maxPasses || u(1) == 0 || u(1) > maxMemoryKiB || u(2) == 0 || u(2) > maxThreads {
		return nil, fmt.Errorf("encrypted keys that take %d passes of %d KiB on %d threads: %w", u(0), u(1), u(2), flox.ErrCorrupt)
	}
	header := sealed[:headerSize]
	salt := header[headerSize-chacha20poly1305.NonceSizeX-saltSize:][:saltSize]
	box, err := chacha20poly1305.NewX(argon2.IDKey(passphrase, salt, u(0), u(1), uint8(u(2)), chacha20poly1305.KeySize)) //nolint:gosec // bounded above
	if err != nil {
		return nil, err
	}
	secrets, err := box.Open(nil, header[headerSize-chacha20poly1305.NonceSizeX:], sealed[headerSize:], header)
	if err != nil {
		return nil, fmt.Errorf("the keys of the backup do not open: the passphrase is another one than that it was made with: %w", flox.ErrDenied)
	}
	return secrets, nil
}
