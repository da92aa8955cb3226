package storehouse

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha512"
	"errors"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/crypto/curve25519"
	"golang.org/x/crypto/nacl/box"
	"golang.org/x/crypto/nacl/secretbox"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	sealKeyBytes = 32
	nonceBytes   = 24
)

// sealKey is the X25519 key pair that cluster secrets are sealed to for a
// server, made of its machine key: SHA-512 of the seed as Ed25519 itself uses it
// (RFC 8032, 5.1.5), so that a server has one key to keep.
func sealKey(machine ed25519.PrivateKey) (private, public *[sealKeyBytes]byte, err error) {
	sum := sha512.Sum512(machine.Seed())
	private, public = new([sealKeyBytes]byte), new([sealKeyBytes]byte)
	copy(private[:], sum[:sealKeyBytes])
	point, err := curve25519.X25519(private[:], curve25519.Basepoint)
	if err != nil {
		return nil, nil, fmt.Errorf("seal key: %w", err)
	}
	copy(public[:], point)
	return private, public, nil
}

// sealSecrets encrypts the cluster's secrets under a new cluster key, which it
// seals to each server: to maps peers to their public seal keys.
func sealSecrets(version uint64, secrets *floxv1.ClusterSecrets, to map[p2p.PeerID][]byte) (*floxv1.SealedSecrets, error) {
	plain, err := stable.Marshal(secrets)
	if err != nil {
		return nil, err
	}
	var cluster [32]byte
	var nonce [nonceBytes]byte
	rand.Read(cluster[:])
	rand.Read(nonce[:])
	out := &floxv1.SealedSecrets{Version: version, Box: secretbox.Seal(nonce[:], plain, &nonce, &cluster)}
	for _, peer := range slices.Sorted(maps.Keys(to)) {
		if len(to[peer]) != sealKeyBytes {
			return nil, fmt.Errorf("seal key of %s has %d bytes, want %d: %w", peer, len(to[peer]), sealKeyBytes, flox.ErrBadInput)
		}
		sealed, err := box.SealAnonymous(nil, cluster[:], (*[sealKeyBytes]byte)(to[peer]), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("seal the cluster key to %s: %w", peer, err)
		}
		out.Seals = append(out.Seals, &floxv1.Seal{Peer: string(peer), Box: sealed})
	}
	return out, nil
}

// openSecrets decrypts what was sealed to this server. ErrDenied if it was not,
// ErrCorrupt if it does not open.
func openSecrets(sealed *floxv1.SealedSecrets, self p2p.PeerID, machine ed25519.PrivateKey) (*floxv1.ClusterSecrets, error) {
	private, public, err := sealKey(machine)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(sealed.GetSeals(), func(s *floxv1.Seal) bool { return s.GetPeer() == string(self) })
	if i < 0 {
		return nil, fmt.Errorf("the cluster's secrets, version %d, are not sealed to this server %s: %w", sealed.GetVersion(), self, flox.ErrDenied)
	}
	bad := func(what string) error {
		return fmt.Errorf("the cluster's secrets, version %d: %s does not open with this machine's key: %w", sealed.GetVersion(), what, flox.ErrCorrupt)
	}
	cluster, ok := box.OpenAnonymous(nil, sealed.GetSeals()[i].GetBox(), public, private)
	if !ok || len(cluster) != 32 {
		return nil, bad("the cluster key sealed to it")
	}
	raw := sealed.GetBox()
	if len(raw) < nonceBytes {
		return nil, bad("their box")
	}
	plain, ok := secretbox.Open(nil, raw[nonceBytes:], (*[nonceBytes]byte)(raw[:nonceBytes]), (*[32]byte)(cluster))
	if !ok {
		return nil, bad("their box")
	}
	secrets := &floxv1.ClusterSecrets{}
	if err := proto.Unmarshal(plain, secrets); err != nil {
		return nil, errors.Join(bad("their box"), err)
	}
	return secrets, nil
}
