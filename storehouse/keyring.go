package storehouse

import (
	"context"
	"crypto/subtle"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// keys are the cluster's secrets in force: the same on every server.
type keys struct {
	nix      []nix.SecretKey // each signs Nix's fingerprints; the first is what new readers are told
	manifest []nix.SecretKey // each signs manifest statements and trust lists; the newest first
	// all is what they were read of. It is sealed again as it is, so that a server
	// does not lose what only a newer program understands.
	all *floxv1.ClusterSecrets
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
		return have.all.GetSwarmSecrets()
	}
	return nil
}

// guestKeys are what a server that joins has: the swarm's secret, to meet the others with.
func guestKeys(swarm []byte) *keys {
	return &keys{all: &floxv1.ClusterSecrets{SwarmSecrets: [][]byte{swarm}}}
}

// parseKeys reads what the cluster's secrets hold.
func parseKeys(s *floxv1.ClusterSecrets) (*keys, error) {
	k := &keys{all: s}
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
	if len(k.nix) == 0 || len(k.manifest) == 0 || len(s.GetSwarmSecrets()) == 0 {
		return nil, fmt.Errorf("the cluster's secrets hold %d Nix keys, %d manifest keys and %d swarm secrets, want one of each at least: %w",
			len(k.nix), len(k.manifest), len(s.GetSwarmSecrets()), flox.ErrCorrupt)
	}
	return k, nil
}

// message is what parseKeys reads, for the caller to change.
func (k *keys) message() *floxv1.ClusterSecrets { return proto.CloneOf(k.all) }

// public lists public keys as a trust list does.
func public(list []nix.SecretKey) (out []string) {
	for _, key := range list {
		out = append(out, key.Public().String())
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// mark gives what is special about a key; nil = nothing.
func (k *keys) mark(use string, key nix.SecretKey) *floxv1.KeyMark {
	return markOf(k.all, use, key.Public().String())
}

func markOf(s *floxv1.ClusterSecrets, use, public string) *floxv1.KeyMark {
	for _, m := range s.GetMarks() {
		if m.GetUse() == use && m.GetPublic() == public {
			return m
		}
	}
	return nil
}

// sign gives a copy of info with the manifest and our signatures added. All
// manifest keys sign: a reader may not have heard of the newest one yet.
func (k *keys) sign(dir flox.StoreDir, info *flox.PathInfo, manifest flox.CID) *flox.PathInfo {
	signed := *info
	signed.Manifest, signed.ManifestSignatures = manifest, nil
	signed.Signatures = append([]string(nil), info.Signatures...)
	fingerprint, statement := []byte(nix.Fingerprint(dir, &signed)), []byte(content.Statement(dir, &signed))
	for _, key := range k.nix {
		signed.Signatures = appendNew(signed.Signatures, key.Sign(fingerprint))
	}
	for _, key := range k.manifest {
		signed.ManifestSignatures = append(signed.ManifestSignatures, key.Sign(statement))
	}
	return &signed
}

// signAnswer signs facts that are told together.
func (k *keys) signAnswer(dir flox.StoreDir, found []*floxv1.PathInfo) (sigs []string, err error) {
	infos := make([]*flox.PathInfo, len(found))
	for i, m := range found {
		if infos[i], err = api.ToPathInfo(m); err != nil {
			return nil, err
		}
	}
	statement := []byte(content.AnswerStatement(dir, infos))
	for _, key := range k.manifest {
		sigs = append(sigs, key.Sign(statement))
	}
	return sigs, nil
}

// signRealisation adds our signatures to a realisation.
func (k *keys) signRealisation(r *floxv1.Realisation) *floxv1.Realisation {
	fingerprint := []byte(toRealisation(r).Fingerprint())
	for _, key := range k.nix {
		r.Signatures = appendNew(r.GetSignatures(), key.Sign(fingerprint))
	}
	return r
}

// CheckToken gives the publisher a token belongs to; ErrDenied for any other.
func (s *Server) CheckToken(token string) (publisher string, err error) {
	have, err := s.id.ring.get()
	if err != nil {
		return "", err
	}
	good := have.all.GetUploadToken() != "" && subtle.ConstantTimeCompare([]byte(token), []byte(have.all.GetUploadToken())) == 1
	for _, old := range have.all.GetOldTokens() {
		is := subtle.ConstantTimeCompare([]byte(token), []byte(old.GetToken())) == 1
		good = good || is && time.Now().UnixMilli() < old.GetAtUnixMs()
	}
	if !good {
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
