package storehouse

import (
	"context"
	"crypto/subtle"
	"fmt"
	"sync/atomic"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// keys are the cluster's secrets in force: the same on every server.
type keys struct {
	nix      []nix.SecretKey // each signs Nix's fingerprints
	manifest []nix.SecretKey // the first signs manifest statements and trust lists
	swarm    [][]byte        // what members prove to know; the newest first
	token    string          // of publishers
}

// keyring holds the keys in force. They change while the server runs.
type keyring struct {
	now     atomic.Pointer[keys]
	changed chan struct{} // holds one while somebody has not looked yet
}

func newKeyring() *keyring { return &keyring{changed: make(chan struct{}, 1)} }

// set puts keys in force.
func (k *keyring) set(next *keys) {
	k.now.Store(next)
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// wait waits until get has keys. One goroutine may wait.
func (k *keyring) wait(ctx context.Context) error {
	for {
		if _, err := k.get(); err == nil {
			return nil
		}
		select {
		case <-k.changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// get gives the keys in force; ErrUnreachable before a server that joined has
// heard of them.
func (k *keyring) get() (*keys, error) {
	have := k.now.Load()
	if have == nil || len(have.nix) == 0 || len(have.manifest) == 0 {
		return nil, fmt.Errorf("this server does not have the storehouse's keys yet: it gets them from the others when it is one of them: %w", flox.ErrUnreachable)
	}
	return have, nil
}

// secrets gives those of the swarm, newest first.
func (k *keyring) secrets() [][]byte {
	if have := k.now.Load(); have != nil {
		return have.swarm
	}
	return nil
}

// parseKeys reads what the cluster's secrets hold.
func parseKeys(s *floxv1.ClusterSecrets) (*keys, error) {
	k := &keys{swarm: s.GetSwarmSecrets(), token: s.GetUploadToken()}
	for _, list := range []struct {
		text []string
		to   *[]nix.SecretKey
	}{{s.GetNixKeys(), &k.nix}, {s.GetManifestKeys(), &k.manifest}} {
		for i, text := range list.text {
			key, err := nix.ParseSecretKey(text)
			if err != nil {
				return nil, fmt.Errorf("key %d of the cluster's secrets: %w", i+1, flox.ErrCorrupt) // err may quote it
			}
			*list.to = append(*list.to, key)
		}
	}
	if len(k.nix) == 0 || len(k.manifest) == 0 || len(k.swarm) == 0 {
		return nil, fmt.Errorf("the cluster's secrets hold %d Nix keys, %d manifest keys and %d swarm secrets, want one of each at least: %w",
			len(k.nix), len(k.manifest), len(k.swarm), flox.ErrCorrupt)
	}
	return k, nil
}

// message is what parseKeys reads.
func (k *keys) message() *floxv1.ClusterSecrets {
	s := &floxv1.ClusterSecrets{SwarmSecrets: k.swarm, UploadToken: k.token}
	for _, key := range k.nix {
		s.NixKeys = append(s.NixKeys, key.String())
	}
	for _, key := range k.manifest {
		s.ManifestKeys = append(s.ManifestKeys, key.String())
	}
	return s
}

// sign gives a copy of info with the manifest and our signatures added.
func (k *keys) sign(dir flox.StoreDir, info *flox.PathInfo, manifest flox.CID) *flox.PathInfo {
	signed := *info
	signed.Manifest = manifest
	signed.Signatures = append([]string(nil), info.Signatures...)
	fingerprint := []byte(nix.Fingerprint(dir, &signed))
	for _, key := range k.nix {
		signed.Signatures = appendNew(signed.Signatures, key.Sign(fingerprint))
	}
	signed.ManifestSignatures = []string{k.manifest[0].Sign([]byte(content.Statement(dir, &signed)))}
	return &signed
}

// CheckToken gives the publisher a token belongs to; ErrDenied for any other.
func (s *Server) CheckToken(token string) (publisher string, err error) {
	have, err := s.id.ring.get()
	if err != nil {
		return "", err
	}
	if have.token == "" || subtle.ConstantTimeCompare([]byte(token), []byte(have.token)) != 1 {
		return "", fmt.Errorf("the upload token is wrong: the right one is in the file upload-token of the storehouse: %w", flox.ErrDenied)
	}
	return "upload-token", nil
}

// PublicKey is the key of our Nix signatures, "name:base64"; "" before they are known here.
func (s *Server) PublicKey() string {
	have, err := s.id.ring.get()
	if err != nil {
		return ""
	}
	return have.nix[0].Public().String()
}
