package p2p

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

// LoadOrCreateKey reads the machine's key from path (PKCS #8 in PEM), or makes
// one there with mode 0600; the directory must exist. A key file that others
// may read is refused with ErrDenied, one that is no Ed25519 key with ErrBadInput.
func LoadOrCreateKey(path string) (ed25519.PrivateKey, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, iofs.ErrNotExist) {
		return createKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("machine key: %w", err)
	}
	if st, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("machine key: %w", err)
	} else if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("machine key %s: mode %#o lets others read it, want 0600 (chmod 600 %s): %w", path, st.Mode().Perm(), path, flox.ErrDenied)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("machine key %s: not in PEM form; move it away to have a new one made: %w", path, flox.ErrBadInput)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	key, ok := parsed.(ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("machine key %s: not an Ed25519 key in PKCS #8: %w", path, flox.ErrBadInput)
	}
	return key, nil
}

// createKey writes a new key beside path and moves it there whole, so that a
// power cut leaves either no key or all of it.
func createKey(path string) (ed25519.PrivateKey, error) {
	fail := func(err error) (ed25519.PrivateKey, error) {
		return nil, fmt.Errorf("make machine key: %w", err)
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return fail(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".key-*") // CreateTemp makes mode 0600
	if err != nil {
		return fail(err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // it has its own name by then
	werr := pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return fail(err)
	}
	// Link, not rename: a process that made one at the same time keeps its key.
	if err := os.Link(f.Name(), path); errors.Is(err, iofs.ErrExist) {
		return LoadOrCreateKey(path)
	} else if err != nil {
		return fail(err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fail(err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return fail(err)
	}
	return key, nil
}

// IDFromKey gives the name of the machine that owns key.
func IDFromKey(key ed25519.PublicKey) (PeerID, error) {
	pub, err := crypto.UnmarshalEd25519PublicKey(key)
	if err != nil {
		return "", fmt.Errorf("machine key of %d bytes: %w", len(key), flox.ErrBadInput)
	}
	id, err := peer.IDFromPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("machine key: %w: %w", err, flox.ErrBadInput)
	}
	return PeerID(id.String()), nil
}

// PublicKey gives the key that a machine's name stands for.
func (p PeerID) PublicKey() (ed25519.PublicKey, error) {
	id, err := p.decode()
	if err != nil {
		return nil, err
	}
	pub, err := id.ExtractPublicKey()
	if err != nil || pub.Type() != crypto.Ed25519 {
		return nil, fmt.Errorf("peer ID %q holds no Ed25519 key: %w", string(p), flox.ErrBadInput)
	}
	return pub.Raw()
}

func (p PeerID) decode() (peer.ID, error) {
	id, err := peer.Decode(string(p))
	if err != nil {
		return "", fmt.Errorf("peer ID %q: %w: %w", string(p), err, flox.ErrBadInput)
	}
	return id, nil
}

// PathKey is the key under which holders of a store path announce themselves.
func PathKey(p flox.StorePath) flox.CID { return derivedKey("flox path 1\x00", string(p)) }

// SiteKey is the key under which the machines of a site find each other; those
// without a label share the key of "".
func SiteKey(site string) flox.CID { return derivedKey("flox site 1\x00", site) }

func derivedKey(kind, name string) flox.CID {
	return blake3.Sum256([]byte(kind + name))
}
